"""Planning: from a request to the cells that are measured."""
