"""What a short probe of the model itself shows: whether both executions give what the model means, and of what kind it is."""
