"""Models, adapters, and where they are."""
