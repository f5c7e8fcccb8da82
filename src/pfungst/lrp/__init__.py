"""Relevance of any PyTorch model: layer-wise relevance propagation.  Knows nothing of pictures or clusters."""

from pfungst.lrp.engine import LRP, Relevance, Trace
from pfungst.lrp.plan import Plan
from pfungst.lrp.presets import PRESETS, Preset, Row, preset

__all__ = ["LRP", "PRESETS", "Plan", "Preset", "Relevance", "Row", "Trace", "preset"]
