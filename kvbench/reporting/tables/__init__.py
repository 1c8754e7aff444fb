"""Rows to tables: terminal, Markdown, CSV, LaTeX."""
