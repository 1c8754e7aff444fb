"""Tables made from rows of results: terminal, Markdown, CSV, LaTeX."""
