"""The run folder and the record types."""
