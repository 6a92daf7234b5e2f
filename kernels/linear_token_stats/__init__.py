"""token_stats of the logits a readout would give, without the logits."""
