"""The most likely tokens of every row and their log-probabilities."""
