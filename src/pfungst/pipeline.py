"""READ THIS FIRST: the whole story of an audit, from a model and a folder of images to proven findings.

model + images -> relevance maps -> pooled vectors -> neighbour graph -> spectra -> findings -> verdicts -> report

Every stage reads and writes the run folder, is recorded there when it is done, and is not done again; so an audit that
was stopped goes on where it was.  No mathematics lives here.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pfungst.cards import show_audit, show_finding
from pfungst.confirmations import Confirmation, confirm
from pfungst.domains.image import ImageData
from pfungst.engines import map_blocks_on_ray
from pfungst.errors import PfungstWarning, SettingError
from pfungst.evidence import DECIDE
from pfungst.exports import export
from pfungst.judgements import Judgement, add_judgements, find_any, write_judgement
from pfungst.maps import Progress, Subject, map_blocks, map_relevance, open_subject
from pfungst.models import LoadedModel
from pfungst.overall import find_shared
from pfungst.own_findings import confirm_own
from pfungst.own_groups import as_finding
from pfungst.placements import Placement, place_samples
from pfungst.portraits import read_columns
from pfungst.probes import probe_properties
from pfungst.properties import NAMES
from pfungst.recognition import Recognition, read_recognition, write_recognition
from pfungst.reports import place_in_report, write_report
from pfungst.settings import Settings
from pfungst.store import READ, Run
from pfungst.strategies import embed_shown, find_strategies, read_strategies, set_aside
from pfungst.verdicts import prove_findings


def audit(
    model: str | nn.Module | LoadedModel,
    images: str | Path | ImageData,
    *,
    out: str | Path,
    progress: Progress | None = None,
    **settings: Any,
) -> Audit:
    """Find out what a model really looks at on these images, and prove it.

    model     "torchvision:resnet50", "timm:NAME", "hf:NAME", "file.py:function", "package.module:function", "FILE.pt2",
              or a module in eval mode
    images    a folder (one subfolder a class, or flat) or a .csv/.parquet manifest
    out       the run folder; an unfinished run of the same audit goes on where it stopped
    settings  see ``Settings``; the same names as the command line's flags
    progress  called with (stage, done, total)

    Returns the ``Audit``; everything is in the run folder too.  Raises ``PfungstError`` with cause and remedy.
    """
    chosen = make_settings(settings)
    tell = progress or (lambda stage, done, total: None)
    if isinstance(images, str | Path) and Path(images).resolve() in Path(out).resolve().parents:
        raise SettingError(f"the run folder {out} lies in the folder of pictures {images}", "give --out another folder")
    run = Run(out)
    with run.locked():
        subject = open_subject(model, images, chosen)
        run.begin(identity(subject, tell), folder=str(Path.cwd()))  # from where relative names count
        if damaged := run.find_damage():
            told = f"{len(damaged)} damaged blocks of {out} are computed anew: is the disk sound?"
            warnings.warn(told, PfungstWarning, stacklevel=2)
            run.forget_blocks(damaged)
        for stage, work in STAGES:
            if run.stage(stage) is None:
                work(run, subject, tell)
                run.finish(stage)
        write_report(run)
    return Audit(run, subject)


def make_settings(given: dict[str, Any]) -> Settings:
    """Settings from keyword arguments; an unknown name is an error that lists the known ones."""
    known = Settings.__dataclass_fields__
    for name in given:
        if name not in known:
            raise SettingError(f"there is no setting {name!r}", f"the settings are {', '.join(known)}")
    for name in ("mean", "std"):
        if isinstance(given.get(name), int | float):
            given = {**given, name: (float(given[name]),)}
    return Settings(**given)


def identity(subject: Subject, progress: Progress) -> dict[str, Any]:
    """What makes two audits the same: model, data and settings, by content."""
    data, given = subject.data, subject.given
    preset = subject.lrp.preset.describe()  # the one that ``auto`` chose, too
    made: dict[str, Any] = {}
    if given is not None:
        preset = f"none: relevance made elsewhere, {given.path.name}"
        made["relevance"] = {"digest": digest_given(subject, progress)}
    return {
        "settings": subject.settings.record(),
        "preset": preset,
        **made,
        "model": {
            "name": subject.model.name,
            "digest": subject.model.digest,
            "preprocess": subject.preprocess.describe(),
            "layers": list(subject.layers),
        },
        "data": {
            "root": str(data.root),
            "samples": len(data),
            "classes": list(subject.classes),
            "target": subject.mode,
            "notes": list(data.notes),
            "digest": data.digest(lambda done, total: progress("reading", done, total)),
        },
        "versions": {name: _version(name) for name in ("pfungst", "torch", "numpy", "scikit-learn")}
        | {"python": platform.python_version()},
    }


def digest_given(subject: Subject, progress: Progress) -> str:
    """Digest of the relevance that was made elsewhere, all of which is read and checked for that."""
    assert subject.given is not None
    return subject.given.digest(subject.data.ids, lambda done, total: progress("reading relevance", done, total))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def write_samples(run: Run, subject: Subject, progress: Progress) -> None:
    """``samples.parquet``: one row a sample, with everything that pandas or DuckDB users ask for."""
    import pyarrow as pa

    data, names = subject.data, subject.classes
    embed_shown(run, subject, progress)  # since the strategies, groups by property may have come
    findings: dict[str, list[str]] = {}
    for finding in sorted(run.read_findings()["findings"], key=place_in_report):
        for sample in finding["samples"]:
            findings.setdefault(sample, []).append(finding["id"])
    own = [findings.get(name, []) for name in data.ids]
    place: dict[str, list[Any]] = {key: [None] * len(data) for key in ("cluster", "x", "y", "outlier")}
    for entry in read_strategies(run):
        for key, column in place.items():
            for row, value in zip(entry["rows"], entry.get(key, ()), strict=False):
                column[row] = value
    unread = run.read_array("status") != READ

    def told(name: str) -> pa.Array:
        """An array as a column; of pictures that could not be read, nothing is known."""
        return pa.array(run.read_array(name), mask=unread)

    def named(name: str) -> pa.Array:
        return pa.array([names[index] for index in run.read_array(name)], pa.string(), mask=unread)

    columns: dict[str, Any] = {
        "id": list(data.ids),
        "path": [str(path) for path in data.paths],
        "label": pa.array([names[label] if label >= 0 else None for label in data.labels], pa.string()),
        "prediction": named("prediction"),
        "probability": told("probability"),
        "class": named("target"),
        "score": told("explained"),
        "absorbed": told("absorbed"),
        **place,
        "finding": [next(iter(names), None) for names in own],  # of several, the first of the report
        "findings": pa.array(own, pa.list_(pa.string())),
        "set_aside": set_aside(run, subject),
    }
    for name, numbers in read_columns(run, subject).numbers.items():
        if name in NAMES:
            columns[name] = pa.array(numbers, mask=unread | np.isnan(numbers))
    if data.metadata is not None:
        for name in data.metadata.column_names:
            columns[name if name not in columns else f"metadata:{name}"] = data.metadata.column(name)
    run.write_table("samples.parquet", columns)


def compute_relevance(run: Run, subject: Subject, progress: Progress) -> None:
    """Relevance of every picture, by this process or by those of a Ray cluster."""
    map_relevance(run, subject, progress, map_blocks_on_ray if subject.settings.engine == "ray" else map_blocks)


def compare_labels(run: Run, subject: Subject, progress: Progress) -> None:
    """``recognition.json``: how many pictures are recognised as their label; a warning where hardly any are."""
    own_names = subject.model.classes is not None
    found = write_recognition(run, subject.data.labels, subject.classes, own_names)
    if found is not None and found.warning:
        warnings.warn(found.warning, PfungstWarning, stacklevel=3)


STAGES: tuple[tuple[str, Callable[[Run, Subject, Progress], None]], ...] = (
    ("relevance", compute_relevance),
    ("recognition", compare_labels),
    ("strategies", find_strategies),
    ("overall", find_shared),
    ("properties", probe_properties),
    ("interventions", prove_findings),
    ("samples", write_samples),
)


def judge(run: Run, finding: str, answer: str, *, note: str = "", by: str | None = None) -> Judgement:
    """Write down what a person says of a finding (``judgements.write_judgement``), and renew the report."""
    judgement = write_judgement(run, finding, answer, note=note, by=by)
    if run.stage("samples") is not None:  # else the audit that is still at work writes it
        write_report(run)
    return judgement


@dataclass(frozen=True)
class Finding:
    """One entry of ``findings.json`` with its ``judgements`` (``record``), and the ways to test and to judge it."""

    record: dict[str, Any]
    _audit: Audit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.record:
            raise AttributeError(name)
        return self.record[name]

    def __repr__(self) -> str:
        return f"Finding({self.record['id']}, {self.record['verdict']}: {self.record['summary']})"

    def _repr_html_(self) -> str | None:
        return None if self.record.get("own") else show_finding(self.record, self._audit.run.path, DECIDE)

    def judge(self, answer: str, note: str = "", by: str | None = None) -> Judgement:
        """Say what it is: "cheat", "legitimate" or "unsure"; kept in the run folder, ``by`` the user if not given."""
        return judge(self._audit.run, self.record["id"], answer, note=note, by=by)

    def confirm(
        self,
        seed: int | None = None,
        samples: int | None = None,
        *,
        presets: Sequence[str] = (),
        models: Sequence[LoadedModel] = (),
        folders: Sequence[str | Path] = (),
    ) -> Confirmation:
        """Repeat the interventions with other random draws, and ask for counter-evidence: ``confirmations.confirm``.

        A finding of one's own that was never tested is tested before it is tested again.
        """
        run, subject, record = self._audit.run, self._audit.subject, self.record
        if record.get("own") and "evidence" not in record:
            record = as_finding(confirm_own(run, subject, record["id"]))
        confirmation = confirm(
            run, subject, record, seed=seed, samples=samples, presets=presets, models=models, folders=folders
        )
        write_report(run)
        return confirmation


@dataclass(frozen=True)
class Audit:
    """The result of an audit: its run folder, and its findings, most suspicious first."""

    run: Run
    subject: Subject

    @property
    def findings(self) -> list[Finding]:
        records = add_judgements(self.run, self.run.read_findings()["findings"])
        return [Finding(record, self) for record in records]

    @property
    def recognition(self) -> Recognition | None:
        """How many pictures are recognised as their label, and what may be wrong; None where nothing is labelled."""
        return read_recognition(self.run)

    def find(self, name: str) -> Finding:
        """The finding of this id, or a person's own of this name.  RunError if there is none."""
        (record,) = add_judgements(self.run, [find_any(self.run, name)])
        return Finding(record, self)

    @property
    def report(self) -> Path:
        """The self-contained HTML report."""
        return self.run.path / "report.html"

    def place(self, images: str | Path, progress: Progress | None = None, target: str = "auto") -> list[Placement]:
        """New pictures on this analysis: the findings they share, their nearest samples; see ``placements.py``."""
        return place_samples(self.run, self.subject, images, progress, target)

    def export(
        self, to: str, out: str | Path, *, findings: Sequence[str] = (), images: str | Path | None = None
    ) -> None:
        """Write it for another tool: "csv", "parquet", "coco", "fiftyone", ...; see ``exports.export``."""
        export(self.run, to, out, findings=findings, images=images)

    def __repr__(self) -> str:
        verdicts = [finding.verdict for finding in self.findings]
        counts = {name: verdicts.count(name) for name in ("confirmed", "refuted", "open")}
        return f"Audit({self.run.path}, {', '.join(f'{n} {name}' for name, n in counts.items())})"

    def _repr_html_(self) -> str:
        return show_audit(self.run.describe(), [finding.record for finding in self.findings], self.run.path)
