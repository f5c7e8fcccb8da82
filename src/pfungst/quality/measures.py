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

    ``passes``: forward passes of the model, or maps of the method, for one picture.  ``text``: what it is, and whose.
    """

    name: str
    score: Callable[..., Scores]
    figures: dict[str, Figure]
    text: str
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
            "How much later the probability falls with the least important regions first than with the most "
            "important first: difference of the areas under both curves, the whole picture replaced by its mean "
            "colour in 28 steps. A random order gets 0. Blücher et al. 2024 (symmetric relevance gain).",
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
            "Mean fall of the probability while the 100 most relevant of the regions (9 x 9 pixels of 227) are "
            "replaced by uniform noise, over 10 draws (AOPC); ABPC is that less the same for the least relevant "
            "first. Samek et al. 2017.",
            passes="3,000 forward",
        ),
        Measure(
            "pixel-flipping",
            score_pixel_flipping,
            {"flipping": Figure("flipping area", "low")},
            "Area under the curve of the probability while single pixels are replaced, most relevant first. Bach "
            "et al. 2015.",
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
            "Share of positive relevance on the object (mass; Kohlbrenner et al. 2020), and the same over the "
            "object's share of the picture; share of the object's pixels among as many greatest values (rank; "
            "Arras et al. 2022); whether the greatest value lies on the object (pointing; Zhang et al. 2018); use "
            "of context (outside / inside; Lapuschkin et al. 2016); area under the ROC curve over pixels.",
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
            "Greatest and mean change of the map under noise of 2 % of the input's range, over its length (Yeh et "
            "al. 2019); correlation with the map of the picture moved by a few pixels, moved back.",
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
            "Entropy of |relevance| in nats (Bhatt et al. 2020), size of the compressed map in bits a pixel "
            "(after Samek et al. 2017), Gini coefficient (Chalasani et al. 2020). Simple is not right: look at "
            "the controls.",
        ),
        Measure(
            "class-sensitivity",
            score_class_sensitivity,
            {"top_two": Figure("top two alike", "low"), "any_two": Figure("any two alike", "low", False)},
            "Cosine of the map and that of the strongest other class, and of a random one. 1: the map does not "
            "say why this class (Sixt et al. 2020).",
            needs=(METHOD,),
            passes="2 maps",
        ),
        Measure(
            "randomisation",
            score_randomisation,
            {"alike_head": Figure("random head", "", False), "alike_whole": Figure("random model")},
            "Rank correlation of |relevance| with the map of the model with shuffled weights, in its last layer "
            "or everywhere. Near 1: the map does not depend on what was learned. A smoke test: nothing can be "
            "ranked by it (Binder et al. 2023).",
            needs=(METHOD,),
            passes="2 maps",
        ),
        Measure(
            "conservation",
            score_conservation,
            {"leak": Figure("leak"), "blow_up": Figure("blow-up", "", False)},
            "|output - Σ relevance| / |output|: what biases, stabilisers and norms absorbed; Σ |relevance| / "
            "|output|. For methods that promise a sum.",
        ),
    )
}
DEFAULT = ("srg", "class-sensitivity", "complexity", "randomisation", "conservation")


def choose_measures(names: Iterable[str]) -> list[Measure]:
    """The measures of these names, each once.  Raises SettingError for one that there is not."""
    chosen = list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown or not chosen:
        cause = f"there is no measure {unknown[0]!r}" if unknown else "no measures"
        raise SettingError(cause, f"the measures are {', '.join(MEASURES)}")
    return [MEASURES[name] for name in chosen]
