"""Models that judge text: a language model for fluency, an encoder for meaning."""
