"""Methods that read a whole context in a way of their own, for text that follows it."""
