"""An evaluation to look at: one HTML file, the same as Markdown and as JSON."""

from kd_recipes.evaluation.report.page import stylesheet
from kd_recipes.evaluation.report.write import to_json, write_report

__all__ = ["stylesheet", "to_json", "write_report"]
