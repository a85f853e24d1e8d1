"""What a person sees of a run: the live view and tables."""

from pipeline.report.live import LiveView
from pipeline.report.tables import render_table

__all__ = ["LiveView", "render_table"]
