"""Reports of a result: its numbers as report.json, figures, and the strip picture."""

from elastic.report.figures import plot_report
from elastic.report.run_report import build_report
from elastic.report.strip import strip_frames, strip_picture

__all__ = ["build_report", "plot_report", "strip_frames", "strip_picture"]
