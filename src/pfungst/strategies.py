"""Kept maps -> the strategies of each class: spectrum, clusters, candidate groups, and a picture of them.

"Strategy" is SpRAy's word for one way in which a model recognises a class.  No step holds all maps: classes are read
some at a time, each block once for all of them, and of a class of more than ``assignments.LARGE`` samples only a random
part is analysed, from which the others get their groups.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pfungst.assignments import LARGE, Assignment, assign, draw_part, fit_assignment
from pfungst.embeddings import embed
from pfungst.errors import RunError
from pfungst.findings import SAME, Group, find_groups, jaccard
from pfungst.maps import UNREADABLE, Progress, Subject
from pfungst.neighbours import measure_outliers
from pfungst.processes import end_with
from pfungst.spectra import cluster_samples
from pfungst.store import BLOCK, READ, Run
from pfungst.vectors import gate_sums, sum_maps, unit_rows

OVERALL = "overall.json"  # what was found over all classes together
SHOWN = 12  # classes without findings whose maps a report shows
_GROUPS_KEPT = 20
_HELD = 1 << 30  # bytes of maps that are held at once, and as many that are read for the classes after them
_SPREAD = 20_000  # samples from which on classes are analysed in several processes ...
_LEAST_COST = 150  # ... where each class counts for so many more: what it costs, however small it is
_PROCESSES = 8  # at most: each takes 0.6 GB
_MAPPED = 20_000  # samples up to which all classes get a map, not only those that are shown
_PENDING = 24  # large classes that are completed in one pass
_NOTHING: tuple[dict[str, np.ndarray], Iterator[None]] = ({}, iter(()))  # to read, after the last class


@dataclass(frozen=True)
class Candidate:
    """A group to be tested: ``members`` and ``others`` are rows of the data set."""

    class_index: int
    members: np.ndarray
    others: np.ndarray
    suspicion: float
    views: tuple[str, ...]
    alteration: dict[str, Any] | None = None  # what makes a picture like its members, where a property does

    @property
    def shown_in(self) -> str:
        """The view of relevance in which to look at the members."""
        return next((view for view in self.views if not view.startswith("property:")), "where")

    @property
    def by_property(self) -> bool:
        """Whether the group is told by the properties of its pictures, not by relevance."""
        return self.views[0].startswith("property:") or self.alteration is not None


# ---- who takes part -------------------------------------------------------------------------------------------------


def set_aside(run: Run, subject: Subject) -> list[str]:
    """Why a sample takes no part in the clustering, one string a sample; "" for those that do.

    Found once and kept in ``set_aside.json``, as rows by reason.
    """
    kept = run.read_json("set_aside.json")
    if kept is None:
        kept = {}
        for row, reason in enumerate(_reasons(run, subject)):
            if reason:
                kept.setdefault(reason, []).append(row)
        run.write_json("set_aside.json", kept)
    reasons = [""] * run.shape("status")[0]
    for reason, rows in kept.items():
        for row in rows:
            reasons[row] = reason
    return reasons


def _reasons(run: Run, subject: Subject) -> list[str]:
    status = run.read_array("status")
    explained, absorbed = run.read_array("explained"), run.read_array("absorbed")
    target, prediction = run.read_array("target"), run.read_array("prediction")
    reasons = [""] * len(status)
    readable = np.flatnonzero(status == READ)
    totals, sums = np.empty(len(readable), np.float32), np.empty(len(readable))
    for places, values in run.stream_arrays(["where"], readable):
        totals[places], sums[places] = sum_maps(values["where"].reshape(len(places), -1))
    gates = gate_sums(totals, sums, explained[readable], absorbed[readable])
    positive = {c: np.median(explained[rows]) > 0 for c, rows in _by_class(target, status == READ).items()}
    for row, reason in zip(readable, gates, strict=True):
        if not reason and target[row] != prediction[row]:
            reason = "not recognised as its class"
        if not reason and explained[row] <= 0 and positive[int(target[row])]:
            reason = "the model speaks against its class"
        reasons[row] = reason
    unread: dict[str, str] = {}
    for block in run.blocks_done():
        unread.update(run.read_json(f"skipped/{block:06d}.json") or {})
    for row in np.flatnonzero(status != READ):
        reasons[row] = unread.get(subject.data.ids[row], f"{UNREADABLE}unknown reason")
    return reasons


def _by_class(target: np.ndarray, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Rows (ascending) of each class, by its index, of the samples that are ``wanted``, (n,) bool."""
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(target[rows], kind="stable")]
    parts = np.split(rows, np.flatnonzero(np.diff(target[rows])) + 1) if len(rows) else []
    return {int(target[part[0]]): part for part in parts}


# ---- the analysis of classes ----------------------------------------------------------------------------------------


def find_strategies(run: Run, subject: Subject, progress: Progress) -> None:
    """Analyse every class by itself; each goes into ``classes/NUMBER.json`` as soon as it is done.

    Then those that a report shows are drawn as maps of samples, in ``embeddings/NUMBER.json``.
    """
    good = np.array([not reason for reason in set_aside(run, subject)], dtype=bool)
    rows_of = _by_class(run.read_array("target"), good)
    wanted = [subject.only] if subject.only is not None else sorted(rows_of)
    nobody: np.ndarray = np.array([], dtype=int)
    left = {i: rows_of.get(i, nobody) for i in wanted if not (run.path / _file(i)).exists()}
    done = len(wanted) - len(left)
    for index, entry in _analyse_classes(run, subject, left):
        progress("strategies", done, len(wanted))
        run.write_json(_file(index), entry)
        done += 1
    progress("strategies", done, len(wanted))
    embed_shown(run, subject, progress)


def _file(index: int) -> str:
    return f"classes/{index:04d}.json"


def _analyse_classes(
    run: Run, subject: Subject, rows_of: Mapping[int, np.ndarray]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries of these classes, rows by class index; small ones in their order, large ones when some are ready."""
    settings = subject.settings
    heads = {i: {"class": subject.classes[i], "class_index": i, "rows": r.tolist()} for i, r in rows_of.items()}
    least = 2 * settings.min_size
    for index, rows in rows_of.items():
        if len(rows) < least:
            note = f"too few samples to look for groups: {len(rows)}, at least {least} are needed"
            yield index, {**heads[index], "note": note, "groups": []}
    parts = {i: rows[draw_part(len(rows), settings.seed)] for i, rows in rows_of.items() if len(rows) >= least}
    several = len(parts) > 1 and sum(len(part) + _LEAST_COST for part in parts.values()) >= _SPREAD
    tasks = (
        (index, views, len(rows_of[index]) > LARGE, settings.min_size, settings.null_draws, settings.seed)
        for index, views in _read_classes(run, view_names(subject), parts)
    )
    pending: dict[int, tuple[dict[str, Any], Assignment]] = {}
    processes = min(settings.workers, os.cpu_count() or 1, _PROCESSES) if several else 1
    for index, entry, assignment in _spread(tasks, processes):
        if assignment is not None:
            pending[index] = entry, assignment
        else:
            groups = [{**group, "rows": rows_of[index][group["rows"]].tolist()} for group in entry["groups"]]
            yield index, {**heads[index], **entry, "groups": groups}
        if len(pending) >= _PENDING:
            yield from _complete(run, pending, rows_of, parts, heads)
            pending = {}
    yield from _complete(run, pending, rows_of, parts, heads)


def view_names(subject: Subject) -> list[str]:
    """The views in which groups are sought, that by place first."""
    return ["where", *(f"{kind}:{layer}" for kind in ("what", "strongest") for layer in subject.layers)]


def _read_classes(
    run: Run, names: Sequence[str], rows_of: Mapping[int, np.ndarray]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Each class's views, (n, d) each; as many classes at a time as may be held, so that a block is read seldom.

    The next classes are read a little at each step: those who analyse need not wait until all of them are there.
    """
    if not rows_of:
        return
    widths = {name: int(np.prod(run.shape(name)[1:])) for name in names}
    blocks = -(-run.shape(names[0])[0] // BLOCK)
    batches = _divide(rows_of, max(1, _HELD // (4 * sum(widths.values()))))
    begun = (_begin_reading(run, widths, [rows_of[index] for index in batch]) for batch in batches)
    views, rest = next(begun, _NOTHING)
    for batch in batches:
        deque(rest, maxlen=0)
        ahead, rest = next(begun, _NOTHING)
        start = 0
        for index in batch:
            end = start + len(rows_of[index])
            # Copies: who still holds the last class must not hold the whole batch.
            yield index, {name: view[start:end].copy() for name, view in views.items()}
            start = end
            deque(islice(rest, -(-blocks // len(batch))), maxlen=0)
        views = ahead


def _divide(rows_of: Mapping[int, np.ndarray], most: int) -> list[list[int]]:
    """The classes in their order, so many together that they have ``most`` samples, or one class."""
    batches: list[list[int]] = []
    held = 0
    for index, rows in rows_of.items():
        if not batches or held + len(rows) > most:
            batches.append([])
            held = 0
        batches[-1].append(index)
        held += len(rows)
    return batches


def _begin_reading(
    run: Run, widths: Mapping[str, int], rows: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], Iterator[None]]:
    """Empty views of some classes together, and what fills them, one block at each step."""
    wanted = np.concatenate(rows)
    views = {name: np.empty((len(wanted), width), np.float32) for name, width in widths.items()}

    def fill() -> Iterator[None]:
        for places, values in run.stream_arrays(list(widths), wanted):
            for name, view in views.items():
                view[places] = values[name].reshape(len(places), -1)
            yield

    return views, fill()


def _spread(tasks: Iterator[tuple[Any, ...]], processes: int) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Results of ``_analyse_class`` in the order of the tasks, which are drawn only a few ahead of them."""
    if processes <= 1:
        yield from (_analyse_class(*task) for task in tasks)
        return
    # Not multiprocessing's own: that would run a caller's script once more in every process.
    from joblib.externals.loky import ProcessPoolExecutor

    with ProcessPoolExecutor(processes, timeout=60, initializer=end_with, initargs=(os.getpid(),)) as pool:
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(pool.submit(_analyse_class, *task))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _analyse_class(
    index: int, views: Mapping[str, np.ndarray], large: bool, min_size: int, null_draws: int, seed: int
) -> tuple[int, dict[str, Any], Assignment | None]:
    """The class's entry, its groups' rows within it; of a ``large`` one, of whose part these views are, what assigns
    the rest.  On one thread, so that nothing depends on how many there are."""
    with threadpool_limits(1):
        wide = {name: view.astype(np.float64) for name, view in views.items()}
        groups, spectrum = find_groups(wide, min_size=min_size, null_draws=null_draws, seed=seed)
        groups = groups[:_GROUPS_KEPT]
        cluster = cluster_samples(spectrum, min(spectrum.clusters, 8), seed)
        outlier = measure_outliers(unit_rows(wide["where"]))
        assignment = fit_assignment(wide, groups, cluster, seed) if large else None
    entry = {
        "eigenvalues": [round(float(v), 6) for v in spectrum.eigenvalues],
        "clusters": spectrum.clusters,
        "gap": spectrum.gap,
        "p": None if np.isnan(spectrum.p) else spectrum.p,
        "separability": round(spectrum.separability, 4),
        "separability_p": None if np.isnan(spectrum.separability_p) else spectrum.separability_p,
        "cluster": cluster.tolist(),
        "outlier": [round(float(v), 4) for v in outlier],
        "groups": [_record(group) for group in groups],
    }
    return index, entry, assignment


def _record(group: Group) -> dict[str, Any]:
    return {"rows": group.members, "views": list(group.views), "suspicion": round(group.suspicion, 4)}


def _complete(
    run: Run,
    pending: Mapping[int, tuple[dict[str, Any], Assignment]],
    rows_of: Mapping[int, np.ndarray],
    parts: Mapping[int, np.ndarray],
    heads: Mapping[int, dict[str, Any]],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Entries of large classes, with all their samples assigned in one pass over the maps."""
    if not pending:
        return
    rows = np.concatenate([rows_of[index] for index in pending])
    owner = np.repeat(list(pending), [len(rows_of[index]) for index in pending])
    cluster, outlier = np.empty(len(rows), int), np.empty(len(rows))
    members = np.zeros((len(rows), _GROUPS_KEPT), dtype=bool)
    names = list(dict.fromkeys(name for _, known in pending.values() for name in known.views))
    with threadpool_limits(1):
        for places, values in run.stream_arrays(names, rows):
            for index in np.unique(owner[places]):
                known = pending[int(index)][1]
                own = owner[places] == index
                views = {name: values[name][own].reshape(own.sum(), -1) for name in known.views}
                found, cluster[places[own]], outlier[places[own]] = assign(known, views)
                members[places[own], : found.shape[1]] = found
    start = 0
    for index, (entry, _) in pending.items():
        whole = rows_of[index]
        end = start + len(whole)
        drawn = start + np.searchsorted(whole, parts[index])  # as they were found
        cluster[drawn], outlier[drawn] = entry["cluster"], entry["outlier"]
        groups = []
        for column, group in enumerate(entry["groups"]):
            members[drawn, column] = np.isin(np.arange(len(drawn)), group["rows"])
            groups.append({**group, "rows": whole[members[start:end, column]].tolist()})
        everyone = {
            "cluster": cluster[start:end].tolist(),
            "outlier": [round(float(v), 4) for v in outlier[start:end]],
            "groups": groups,
        }
        yield index, {**heads[index], **entry, "analysed": len(drawn), **everyone}
        start = end


# ---- maps of samples ------------------------------------------------------------------------------------------------


def embed_shown(run: Run, subject: Subject, progress: Progress) -> None:
    """Maps of the classes that a report shows: with a group to be tested, and ranked first; of all in small runs."""
    sizes = {entry["class_index"]: len(entry["rows"]) for entry in read_strategies(run) if "cluster" in entry}
    chosen = list(sizes)
    if sum(min(size, LARGE) for size in sizes.values()) > _MAPPED:
        ranked = {candidate.class_index for candidate in rank_candidates(run, subject)[0]}
        first = [head["class_index"] for head in rank_classes(map(_head_of, read_strategies(run)))]
        chosen = sorted(ranked | {index for index in first[:SHOWN] if index in sizes})
    for done, index in enumerate(chosen):
        progress("maps", done, len(chosen))
        embed_class(run, subject, index)
    progress("maps", len(chosen), len(chosen))


def _head_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What ``rank_classes`` goes by, without the rows, of which there may be a million."""
    groups = [{"suspicion": group["suspicion"]} for group in entry["groups"]]
    return {"class_index": entry["class_index"], "separability": entry.get("separability", 0.0), "groups": groups}


def embed_class(run: Run, subject: Subject, index: int) -> None:
    """The t-SNE map of one analysed class, into ``embeddings/NUMBER.json`` if it is not there; of a large one, of the
    part that was analysed."""
    name = f"embeddings/{index:04d}.json"
    if (run.path / name).exists():
        return
    rows = np.array(run.read_json(_file(index))["rows"])
    rows = rows[draw_part(len(rows), subject.settings.seed)]
    with threadpool_limits(1):
        coordinates = embed(unit_rows(run.read_view("where", rows)), subject.settings.seed)
    x, y = ([round(float(v), 4) for v in column] for column in coordinates.T)
    run.write_json(name, {"rows": rows.tolist(), "x": x, "y": y})


def read_strategies(run: Run) -> Iterator[dict[str, Any]]:
    """The entries of all analysed classes, by class index; with ``x`` and ``y`` (None for who is not on it) where
    there is a map."""
    for path in sorted((run.path / "classes").glob("*.json"), key=lambda path: int(path.stem)):
        entry = run.read_json(f"classes/{path.name}")
        drawn = run.read_json(f"embeddings/{path.name}")
        if drawn is not None:
            for key in ("x", "y"):
                place = dict(zip(drawn["rows"], drawn[key], strict=True))
                entry[key] = [place.get(row) for row in entry["rows"]]
        yield entry


def find_entry(run: Run, class_name: str | None, key: str, what: str) -> dict[str, Any]:
    """The entry of the class of this name, which has ``key``.  Raises RunError where none is, named by ``what``."""
    run.describe()  # an error of its own for what is no run folder
    known = {entry["class"]: entry for entry in read_strategies(run) if key in entry}
    if class_name not in known:
        raise RunError(f"{run.path} has no {what} of the class {class_name!r}", f"give one of {', '.join(known)}")
    return known[class_name]


def rank_classes(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes worth a look first: their most suspicious group first, then how separable their clusters are."""
    return sorted(
        entries,
        key=lambda entry: (
            -max((group["suspicion"] for group in entry["groups"]), default=0.0),
            -entry.get("separability", 0.0),
            entry["class_index"],
        ),
    )


# ---- what is to be tested -------------------------------------------------------------------------------------------


def _groups_by_property(run: Run, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What ``probes.py`` found in a class; nothing where it was not asked."""
    found = run.read_json(f"properties/{entry['class_index']:04d}.json")
    groups: list[dict[str, Any]] = found["groups"] if found else []
    return groups


def _shared_groups(run: Run) -> dict[int, list[dict[str, Any]]]:
    """What groups over all classes hold of each class (``overall.py``); nothing where they were not asked for."""
    parts: dict[int, list[dict[str, Any]]] = {}
    for part in (run.read_json(OVERALL) or {"parts": []})["parts"]:
        parts.setdefault(part["class_index"], []).append(part)
    return parts


def rank_candidates(run: Run, subject: Subject) -> tuple[list[Candidate], int]:
    """The groups to be tested, most suspicious first, and how many more were suspicious enough."""
    shared = _shared_groups(run)  # read once, not once a class
    found: list[Candidate] = []
    for entry in read_strategies(run):
        index, whole = entry["class_index"], np.array(entry["rows"], dtype=int)
        own: list[Candidate] = []
        for group in [*entry["groups"], *_groups_by_property(run, entry), *shared.get(index, [])]:
            if group["suspicion"] >= subject.settings.suspicion:
                members = np.array(group["rows"], dtype=int)
                more = tuple(group["views"]), group.get("alteration")
                own.append(Candidate(index, members, np.setdiff1d(whole, members), group["suspicion"], *more))
        found += _merge(own)
    found.sort(key=lambda one: (-one.suspicion, one.class_index, int(one.members[0])))
    most = subject.settings.max_findings
    return found[:most], max(0, len(found) - most)


def _merge(candidates: list[Candidate]) -> list[Candidate]:
    """Each group of a class once: of those much the same, found in several ways, the most suspicious.

    It keeps the alteration, if another one has it, and the views of all, those of relevance first.
    """
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: -one.suspicion):
        same = next((i for i, other in enumerate(kept) if jaccard(one.members, other.members) >= SAME), None)
        if same is None:
            kept.append(one)
        else:
            first = kept[same]
            views = sorted(dict.fromkeys((*first.views, *one.views)), key=lambda view: view.startswith("property:"))
            kept[same] = replace(first, views=tuple(views), alteration=first.alteration or one.alteration)
    return kept
