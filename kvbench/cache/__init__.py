"""KV caches that evict entries or store them in other forms, and count their bytes."""
