"""From records on disk to tables and figures; needs no model."""
