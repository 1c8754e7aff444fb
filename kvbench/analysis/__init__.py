"""Records to rows: results, comparisons, curves; no PyTorch."""
