"""The report of a run: a record (`chaos/record/record.py`) as figures, and the figures as one page for people."""

from chaos.report.figures import Figures, figures
from chaos.report.promises import Checked
from chaos.report.render import page

__all__ = ["Checked", "Figures", "figures", "page"]
