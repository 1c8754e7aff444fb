"""Rows to figures."""
