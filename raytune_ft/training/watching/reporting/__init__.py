"""What a run folder tells afterwards: its figures, `report.html`, `loss.png`, and comparisons."""

from raytune_ft.training.watching.reporting.page import clock, left_with_report, write_report
from raytune_ft.training.watching.reporting.summary import Summary, moments, summarize

__all__ = ["Summary", "clock", "left_with_report", "moments", "summarize", "write_report"]
