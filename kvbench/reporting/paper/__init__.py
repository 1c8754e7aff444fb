"""What a paper needs of a run: figures at column width, LaTeX tables, references, and the set-up in words."""
