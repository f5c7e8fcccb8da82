"""pfungst shows what a trained vision model really looks at, and proves it.

    pfungst.LRP(model)(x)                        relevance of any PyTorch model, unmodified
    pfungst.audit(model, "images/", out="run")   systematic cheats of a model on a data set, each tested by experiment
    pfungst.evaluate(model, "images/")           which way to explain the model is right, measured beside controls
    pfungst.tune(model, "images/")               the rules that explain the model best, group of layers by group

The story of an audit is told in ``pipeline.py``.  Importing this does no work: the first name used loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfungst import plot as plot
    from pfungst import widget as widget
    from pfungst.errors import PfungstError as PfungstError
    from pfungst.evaluations import Evaluation as Evaluation
    from pfungst.evaluations import evaluate as evaluate
    from pfungst.lrp import LRP as LRP
    from pfungst.lrp import Channels as Channels
    from pfungst.lrp import Contrast as Contrast
    from pfungst.lrp import Logit as Logit
    from pfungst.lrp import LogOdds as LogOdds
    from pfungst.lrp import Margin as Margin
    from pfungst.lrp import OutlierTokens as OutlierTokens
    from pfungst.lrp import Preset as Preset
    from pfungst.lrp import Reference as Reference
    from pfungst.lrp import Region as Region
    from pfungst.lrp import Relevance as Relevance
    from pfungst.lrp import Row as Row
    from pfungst.lrp import Several as Several
    from pfungst.lrp import Similarity as Similarity
    from pfungst.lrp import Unit as Unit
    from pfungst.lrp import Weights as Weights
    from pfungst.lrp import outlier_tokens as outlier_tokens
    from pfungst.lrp import preset as preset
    from pfungst.lrp import quantus_explain as quantus_explain
    from pfungst.lrp import read_preset as read_preset
    from pfungst.lrp import relevance_maximisation as relevance_maximisation
    from pfungst.lrp import write_preset as write_preset
    from pfungst.methods import make_method as make_method
    from pfungst.pipeline import Audit as Audit
    from pfungst.pipeline import Finding as Finding
    from pfungst.pipeline import audit as audit
    from pfungst.runs import reopen as reopen
    from pfungst.tuning import Tuning as Tuning
    from pfungst.tuning import tune as tune

_LRP = (
    *(
        "LRP",
        "Relevance",
        "Preset",
        "preset",
        "read_preset",
        "write_preset",
        "Row",
        "OutlierTokens",
        "outlier_tokens",
        "Channels",
        "Reference",
        "relevance_maximisation",
        "quantus_explain",
    ),
    *("Logit", "LogOdds", "Margin", "Contrast", "Weights", "Similarity", "Unit", "Region", "Several"),
)
_HOMES = {
    **dict.fromkeys(_LRP, "pfungst.lrp"),
    "PfungstError": "pfungst.errors",
    "evaluate": "pfungst.evaluations",
    "Evaluation": "pfungst.evaluations",
    "make_method": "pfungst.methods",
    "audit": "pfungst.pipeline",
    "Audit": "pfungst.pipeline",
    "Finding": "pfungst.pipeline",
    "reopen": "pfungst.runs",
    "tune": "pfungst.tuning",
    "Tuning": "pfungst.tuning",
}
_MODULES = ("plot", "widget")
__all__ = sorted((*_HOMES, *_MODULES))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pfungst' has no attribute {name!r}")
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"pfungst.{name}")
    return getattr(import_module(_HOMES[name]), name)
