"""Profiling: time and memory of compressed models, with entries really removed."""
