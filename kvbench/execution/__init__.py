"""Execution: the parent that watches, and the child that measures."""
