"""Prediction files of NVIDIA's kvpress, made into a run folder."""
