"""The records of a monitored training, under the name that users know: `tokdyn.steps.read(folder)`; see training/steps.py."""

from .training.columns import metrics, table
from .training.step_folder import read
from .training.steps import Step

__all__ = ["Step", "metrics", "read", "table"]
