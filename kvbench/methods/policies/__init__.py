"""Methods that choose from what was computed."""
