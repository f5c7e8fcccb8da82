"""pfungst shows what a trained vision model really looks at, and proves it.

    pfungst.LRP(model)(x)                        relevance of any PyTorch model, unmodified
    pfungst.audit(model, "images/", out="run")   systematic cheats of a model on a data set, each tested by experiment

The story of an audit is told in ``pipeline.py``.  Importing this does no work: the first name used loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfungst.errors import PfungstError as PfungstError
    from pfungst.lrp import LRP as LRP
    from pfungst.lrp import Relevance as Relevance
    from pfungst.lrp import quantus_explain as quantus_explain
    from pfungst.pipeline import Audit as Audit
    from pfungst.pipeline import Finding as Finding
    from pfungst.pipeline import audit as audit

_HOMES = {
    "LRP": "pfungst.lrp",
    "Relevance": "pfungst.lrp",
    "quantus_explain": "pfungst.lrp",
    "PfungstError": "pfungst.errors",
    "audit": "pfungst.pipeline",
    "Audit": "pfungst.pipeline",
    "Finding": "pfungst.pipeline",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pfungst' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
