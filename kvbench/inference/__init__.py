"""Running a compressed model: sessions, generation, sampling."""
