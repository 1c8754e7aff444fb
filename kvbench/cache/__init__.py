"""Caches that let go of entries, and the counting of bytes."""
