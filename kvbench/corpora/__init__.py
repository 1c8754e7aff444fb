"""Tasks and documents."""
