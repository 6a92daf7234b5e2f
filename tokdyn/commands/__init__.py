"""Commands of the command line other than `profile` and `report`; to import them is to add them to the application."""

from . import check, demo, diff, explain, measure, probe, recipe, scan, serve

__all__ = ["check", "demo", "diff", "explain", "measure", "probe", "recipe", "scan", "serve"]
