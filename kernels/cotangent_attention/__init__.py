"""Backward derivative of softmax attention for many cotangents at once."""
