"""What a request asks for: models, methods, cells."""
