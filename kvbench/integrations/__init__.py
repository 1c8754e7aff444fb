"""kvbench inside other harnesses."""
