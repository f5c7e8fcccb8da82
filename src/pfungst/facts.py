"""What a person is told of a finding, in words, pictures and charts: the same in the report and in the viewer.

Both read the entry of ``findings.json``; what is not there as it is to be shown is worked out here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pfungst.charts import draw_effects, draw_spectrum
from pfungst.confirmations import folder_of, read_confirmations, tell
from pfungst.evidence import DECIDE
from pfungst.store import Run

# What the pictures of an experiment show, by the name of their file: of a region, or of a property of whole pictures.
EXPERIMENT_TITLES = {
    "region": {
        "member": "a member",
        "cut": "region cut out",
        "cut_control": "control cut out",
        "foreign": "another class",
        "paste": "region pasted",
        "paste_control": "control pasted",
    },
    "whole": {
        "member": "a member",
        "cut": "it undone",
        "cut_control": "control",
        "foreign": "another class",
        "paste": "it applied",
        "paste_control": "control: the other way",
    },
}
_VIEWS, _ALIKE = 3, 8  # so many layers, and near-duplicates, are named


def list_experiment(run: Run, folder: str, kind: str) -> list[dict[str, Any]]:
    """The pictures of an experiment in the order of their story: name of the file, title, score, decision, caption.

    ``folder``: where they are in the run folder; ``kind``: of the region, fixed, moving or whole.
    """
    notes = run.read_json(f"{folder}/experiment.json") or {}
    titles = EXPERIMENT_TITLES["whole" if kind == "whole" else "region"]
    return [
        {
            "name": name,
            "title": title,
            **notes[name],
            "caption": f"{title}: score {notes[name]['score']:+.2f}, taken for {notes[name]['decision']}",
        }
        for name, title in titles.items()
        if name in notes
    ]


def tell_finding(run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of a finding besides its entry in ``findings.json``, ``record``.

    head, rule  see ``tell_head``
    chart       of its evidence, see ``charts.draw_effects``
    drawn       its pictures that are no sample's: name of the file, title
    experiment  see ``list_experiment``
    again       see ``list_again``
    facts       the rest: name, lines
    """
    kind = record["where"]["kind"]
    return {
        **tell_head(record),
        "chart": draw_effects(record["evidence"], DECIDE),
        "drawn": _list_drawn(kind),
        "experiment": list_experiment(run, folder_of(record), kind),
        "again": list_again(run, record),
        "facts": tell_facts(record),
    }


def list_again(run: Run, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a finding was when it was tested again: seed, verdict, lines."""
    return [
        {"seed": one["seed"], "verdict": one["verdict"], "lines": tell(one)[1:]}
        for one in read_confirmations(run, folder_of(record))
    ]


def tell_head(record: Mapping[str, Any]) -> dict[str, str]:
    """``head``: size, share of the class, suspicion and views; ``rule``: what decided, "" if the summary says it."""
    share = f"{record['size']} pictures, {record['prevalence']:.0%} of those recognised as {record['class']}"
    return {
        "head": f"{share}; suspicion {record['suspicion']:.2f}; told apart by {tell_views(record['views'])}",
        "rule": "" if record["reason"] in record["summary"] else record["reason"],
    }


def tell_views(views: Sequence[str]) -> str:
    """The views in which a group is apart, in words: "place, the channels of features.4 and features.7, blockiness"."""
    layers = list(dict.fromkeys(name.partition(":")[2] for name in views if name.startswith(("what:", "strongest:"))))
    more = [f"{len(layers) - _VIEWS} more layers"] if len(layers) > _VIEWS else []
    channels = " and ".join([*layers[:_VIEWS], *more])
    told = ["place"] if "where" in views else []
    told += [f"the channels of {channels}"] if layers else []
    return ", ".join([*told, *(name.partition(":")[2] for name in views if name.startswith("property:"))])


def _list_drawn(kind: str) -> list[dict[str, str]]:
    region = {"fixed": "the region", "moving": "the region, mean over members"}
    drawn = {
        "mean": "mean relevance of members (red for, blue against)",
        **({"mask": region[kind]} if kind in region else {}),
        "why": "cells that make the members a cluster (red for, blue against)",
    }
    return [{"name": name, "title": title} for name, title in drawn.items()]


def tell_facts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What sets the members apart and where they stand: name of the fact, its lines."""
    accuracy, probability = record["accuracy"], record["probability"]
    facts = {
        "Sets it apart from its class": [one["text"] for one in record["traits"]]
        or ["no measured property and no metadata (false discovery rate 1 %)"],
        "Channels that make it a cluster": [
            ", ".join(f"{one['layer']} {one['channel']} ({one['share']:.0%})" for one in record["channels"])
        ],
        "Score": [f"members score {record['distance']:.1f} higher than pictures of other classes"],
        "Mean probability of the class": [
            f"{probability['members']:.0%} in members, {probability['others']:.0%} in the rest"
        ],
        # Where pictures are explained for their label, those not recognised take no part: all others are right.
        "Recognised rightly": [_tell_accuracy(accuracy)] if set(accuracy.values()) - {1.0, None} else [],
        "Without near-duplicates": [
            f"{record['distinct']} of {record['size']} members",
            *(f"alike: {_name_samples(alike, _ALIKE)}" for alike in record["duplicates"]),
        ],
        "Seen in": [", ".join(record["views"])],
        "Clearest members": [_name_samples(record["central"])],
        "Members at the rim": [_name_samples(record["rim"])],
        "Nearest of the rest": [_name_samples(record["nearest"])],
    }  # fmt: skip
    return [{"name": name, "lines": lines} for name, lines in facts.items() if any(lines)]


def _tell_accuracy(accuracy: Mapping[str, float | None]) -> str:
    who = {"members": "of the members", "others": "of the rest"}
    return ", ".join(f"{accuracy[one]:.0%} {text}" for one, text in who.items() if accuracy[one] is not None)


def _name_samples(names: list[str], most: int | None = None) -> str:
    return ", ".join(names[:most]) + ", ..." * (most is not None and len(names) > most)


def tell_spectrum(entry: Mapping[str, Any]) -> dict[str, str]:
    """A class's spectrum, from its entry of ``strategies.read_strategies``: ``chart``, and ``text`` that goes below.

    The chart is "" where the class was not analysed (empty, or too small).
    """
    if not entry.get("eigenvalues"):
        return {"chart": "", "text": "too small to be analysed"}
    told = [f"{entry['clusters']} cluster{'s' * (entry['clusters'] != 1)}"]
    if entry.get("p") is not None:
        told.append(f"so clear a gap in a class without groups: p = {entry['p']:.2g}")
    separability = f"separability {entry['separability']:.2f}" if entry.get("separability") is not None else ""
    if separability and entry.get("separability_p") is not None:
        separability += f" (p = {entry['separability_p']:.2g})"
    text = "; ".join([*told, separability] if separability else told)
    return {"chart": draw_spectrum(entry["eigenvalues"], entry["clusters"]), "text": text}
