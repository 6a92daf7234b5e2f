"""The log-softmax Jacobian applied to columns."""
