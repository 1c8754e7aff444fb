"""Profiling: what compression gains in time and bytes, with entries really removed."""
