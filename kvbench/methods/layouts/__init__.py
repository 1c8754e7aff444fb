"""Methods whose mask is known before a text is read."""
