"""The report page of a run: one self-contained HTML file, nothing fetched."""

from .page import render

__all__ = ["render"]
