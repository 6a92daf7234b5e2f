"""Commands of the command line other than `profile` and `report`; to import them is to add them to the application."""

from . import check, measure, probe, scan

__all__ = ["check", "measure", "probe", "scan"]
