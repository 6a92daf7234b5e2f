"""Product of two Gram matrices, elementwise, with optional segment sums."""
