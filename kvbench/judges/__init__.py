"""Models that judge generated text: a language model for fluency, encoders for meaning and MAUVE."""
