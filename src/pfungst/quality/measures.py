"""The measures by name, and what each of their figures means: commands, tables and docs are made from this table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pfungst.errors import SettingError
from pfungst.quality.class_sensitivity import score_class_sensitivity
from pfungst.quality.complexity import score_complexity
from pfungst.quality.conservation import score_conservation
from pfungst.quality.localisation import score_localisation
from pfungst.quality.pixel_flipping import score_pixel_flipping, score_region_perturbation, score_srg
from pfungst.quality.questions import MASKS, METHOD, Question, Scores
from pfungst.quality.randomisation import score_randomisation
from pfungst.quality.robustness import score_robustness


@dataclass(frozen=True)
class Figure:
    """One number a picture.  ``better``: high, low, or "" where neither is.  ``main``: it stands in short tables."""

    title: str
    better: str = ""
    main: bool = True


@dataclass(frozen=True)
class Measure:
    """A measure: what scores a batch, its figures, what it needs (masks, method), and what it costs a picture.

    ``passes``: forward passes of the model, or maps of the method, for one picture.
    """

    name: str
    score: Callable[..., Scores]
    figures: dict[str, Figure]
    needs: tuple[str, ...] = ()
    passes: str = "0"

    def __call__(self, question: Question, **options: Any) -> Scores:
        return self.score(question, **options)


MEASURES: dict[str, Measure] = {
    one.name: one
    for one in (
        Measure(
            "srg",
            score_srg,
            {
                "srg": Figure("SRG", "high"),
                "mif": Figure("most first", "low", False),
                "lif": Figure("least first", "high", False),
            },
            passes="57 forward",
        ),
        Measure(
            "region-perturbation",
            score_region_perturbation,
            {
                "aopc": Figure("AOPC", "high"),
                "abpc": Figure("ABPC", "high"),
                "aopc_random": Figure("AOPC, random order", "", False),
                "aopc_logit": Figure("AOPC, logit", "high", False),
                "abpc_logit": Figure("ABPC, logit", "high", False),
            },
            passes="3,000 forward",
        ),
        Measure(
            "pixel-flipping",
            score_pixel_flipping,
            {"flipping": Figure("flipping area", "low")},
            passes="100 forward",
        ),
        Measure(
            "localisation",
            score_localisation,
            {
                "mass": Figure("mass", "high"),
                "mass_w": Figure("mass / area", "high", False),
                "rank": Figure("rank", "high"),
                "pointing": Figure("pointing", "high"),
                "outside": Figure("outside / inside", "low", False),
                "outside_signed": Figure("outside / inside, signed", "", False),
                "auc": Figure("pixel AUC", "high"),
            },
            needs=(MASKS,),
        ),
        Measure(
            "robustness",
            score_robustness,
            {
                "max_sensitivity": Figure("max sensitivity", "low"),
                "mean_sensitivity": Figure("mean sensitivity", "low", False),
                "shift": Figure("moves along", "high"),
            },
            needs=(METHOD,),
            passes="12 maps",
        ),
        Measure(
            "complexity",
            score_complexity,
            {
                "entropy": Figure("entropy", "low"),
                "bits": Figure("bits a pixel", "low", False),
                "sparseness": Figure("sparseness", "high", False),
            },
        ),
        Measure(
            "class-sensitivity",
            score_class_sensitivity,
            {"top_two": Figure("top two alike", "low"), "any_two": Figure("any two alike", "low", False)},
            needs=(METHOD,),
            passes="2 maps",
        ),
        Measure(
            "randomisation",
            score_randomisation,
            {"alike_head": Figure("random head", "", False), "alike_whole": Figure("random model")},
            needs=(METHOD,),
            passes="2 maps",
        ),
        Measure(
            "conservation",
            score_conservation,
            {"leak": Figure("leak"), "blow_up": Figure("blow-up", "", False)},
        ),
    )
}
DEFAULT = ("srg", "class-sensitivity", "complexity", "randomisation", "conservation")


def choose_measures(names: Iterable[str]) -> list[Measure]:
    """The measures of these names, each once.  Raises SettingError for one that there is not."""
    chosen = list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown or not chosen:
        raise SettingError(f"measures {unknown or 'none'}", f"the measures are {', '.join(MEASURES)}")
    return [MEASURES[name] for name in chosen]
