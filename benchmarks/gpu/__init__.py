"""Everything worth knowing of a GPU that is there for a few minutes: ``make gpu``, or python3 -m benchmarks.gpu."""
