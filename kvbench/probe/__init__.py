"""What a short probe of a model shows: of what kind it is, and whether both executions give what it means."""
