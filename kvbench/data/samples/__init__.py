"""Samples of long-context tasks that are made by rule: a context, questions about it, and what counts as right."""
