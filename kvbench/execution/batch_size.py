"""How many texts are scored in one batch; needs neither PyTorch nor transformers."""

MAX_ROWS, MAX_SCORES = 8, 1 << 27
"""Upper bounds on a batch: rows, and scores (rows x targets x vocabulary)."""


def rows_at_once(targets: int, vocabulary: int) -> int:
    """Number of texts that are scored in one batch: matrix products of few rows are slow, and scores take memory."""
    return max(1, min(MAX_ROWS, MAX_SCORES // max(1, targets * vocabulary)))


def scores_at_once(targets: int, vocabulary: int) -> int:
    """Largest number of scores in a batch of texts with at most so many targets: shorter ones fill it better."""
    return min(MAX_ROWS * targets * vocabulary, max(MAX_SCORES, targets * vocabulary))
