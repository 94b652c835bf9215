"""A step's samples as micro-batches, and their log-probabilities under a model."""
