"""Statistics of every row of logits at its target, in one read."""
