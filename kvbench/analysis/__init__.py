"""Analysis: computes rows of results from records; needs no PyTorch."""
