"""Reporting: from records on disk to tables, figures and an HTML page; needs no model."""
