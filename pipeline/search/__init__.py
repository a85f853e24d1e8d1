"""Search spaces: which configuration keys a search varies, over what. No Ray, no torch."""

from pipeline.search.axes import Axis, Branch, Choice, Chooser, Draw, Number, Value
from pipeline.search.params import ConfirmParams, SearchParams
from pipeline.search.space import RandomChooser, Space, flatten_start
from pipeline.search.tasks import TrialTask

__all__ = [
    "Axis",
    "Branch",
    "Choice",
    "Chooser",
    "ConfirmParams",
    "Draw",
    "Number",
    "RandomChooser",
    "SearchParams",
    "Space",
    "TrialTask",
    "Value",
    "flatten_start",
]
