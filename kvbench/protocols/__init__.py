"""Measurement protocols: how documents are cut into pieces, and how pieces are scored."""
