"""Relevance of any PyTorch model: layer-wise relevance propagation.  Knows nothing of pictures or clusters."""

from pfungst.lrp.adapters import quantus_explain
from pfungst.lrp.concepts import Reference, relevance_maximisation
from pfungst.lrp.engine import LRP
from pfungst.lrp.places import Channels
from pfungst.lrp.plan import Plan
from pfungst.lrp.preset_files import preset, read_preset, write_preset
from pfungst.lrp.presets import PRESETS, Preset, Row
from pfungst.lrp.results import Relevance
from pfungst.lrp.targets import Contrast, Logit, LogOdds, Margin, Region, Several, Similarity, Unit, Weights
from pfungst.lrp.tokens import OutlierTokens, outlier_tokens
from pfungst.lrp.traces import Trace

__all__ = [
    "LRP",
    "PRESETS",
    "Channels",
    "Contrast",
    "LogOdds",
    "Logit",
    "Margin",
    "OutlierTokens",
    "Plan",
    "Preset",
    "Reference",
    "Region",
    "Relevance",
    "Row",
    "Several",
    "Similarity",
    "Trace",
    "Unit",
    "Weights",
    "outlier_tokens",
    "preset",
    "quantus_explain",
    "read_preset",
    "relevance_maximisation",
    "write_preset",
]
