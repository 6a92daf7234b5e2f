"""One folder per operator: reference.py is its specification, and the fast forms beside it have the same signature."""
