"""A short probe of a model: which kind it is, and whether streamed and masked execution give its likelihoods."""
