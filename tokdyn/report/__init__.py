"""The report page of a run: one self-contained HTML file, nothing fetched."""

from tokdyn.report.page import render

__all__ = ["render"]
