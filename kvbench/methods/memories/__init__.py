"""Memories: layouts whose special tokens are fed rows that a writer computes from the text of a chunk."""
