"""Tasks, data files and documents."""
