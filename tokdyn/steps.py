"""The records of a monitored training, under the name that users know: `tokdyn.steps.read(folder)`; see training/steps.py."""

from .training.steps import Step, metrics, read, table

__all__ = ["Step", "metrics", "read", "table"]
