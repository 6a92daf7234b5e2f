"""The softmax Jacobian applied to columns."""
