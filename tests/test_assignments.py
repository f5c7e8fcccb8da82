"""Large classes: groups found on a part reach the rest; nothing depends on how the work is cut up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pfungst import assignments, strategies
from pfungst.assignments import assign, draw_part, fit_assignment
from pfungst.findings import Group, find_groups, fit_discriminants, jaccard
from pfungst.settings import Settings
from pfungst.store import BLOCK, Run
from pfungst.strategies import Candidate, find_strategies, rank_candidates, rank_classes, read_strategies, set_aside
from pfungst.vectors import unit_rows


def test_a_part_is_all_or_drawn_by_lot() -> None:
    assert draw_part(5000, 3).tolist() == list(range(5000))
    part = draw_part(20_000, 3)
    assert len(set(part.tolist())) == len(part) == 5000
    assert (np.diff(part) > 0).all()
    assert np.array_equal(part, draw_part(20_000, 3))
    assert not np.array_equal(part, draw_part(20_000, 4))
    assert np.abs(np.histogram(part, 4, (0, 20_000))[0] - 1250).max() < 150


@pytest.mark.parametrize("dimensions", [8, 90, 200])
def test_discriminants_are_those_of_the_formula(dimensions: int) -> None:
    """C^-1 (a - b), where C is shrunk to a sphere; beyond 60 dimensions in the leading 60 principal directions."""
    rng = np.random.default_rng(dimensions)
    vectors = rng.normal(size=(120, dimensions)) @ np.diag(np.linspace(2, 0.5, dimensions)) + 1
    inside = np.stack([np.arange(120) < 30, np.arange(120) % 2 == 0], 1)
    outside = ~inside
    outside[100:, 0] = False
    weights, offsets = fit_discriminants(vectors, inside, outside)
    mean = vectors.mean(0)
    _, _, v = np.linalg.svd(vectors - mean, full_matrices=False)
    axes = v[:60].T
    rows = (vectors - mean) @ axes
    covariance = np.cov(rows.T, bias=True)
    sphere = np.trace(covariance) / dimensions * np.eye(len(covariance))
    for g in range(2):
        a, b = rows[inside[:, g]].mean(0), rows[outside[:, g]].mean(0)
        direction = np.linalg.solve(0.8 * covariance + 0.2 * sphere, a - b)
        slow = (rows - (a + b) / 2) @ direction / ((a - b) @ direction)
        np.testing.assert_allclose(vectors @ weights[:, g] - offsets[g], slow, rtol=0, atol=1e-7)


def _class(n: int, share: float, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Three views with one group of this share in all of them, and a second, of a tenth, in two."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    small = np.sort(order[: round(share * n)])
    tenth = order[-n // 10 :]
    views = {
        name: 3 * rng.normal(size=d) + rng.normal(size=(n, d)) for name, d in (("where", 30), ("a", 20), ("b", 12))
    }
    for matrix in views.values():
        matrix[small, :4] += 7
    for name in ("where", "a"):
        views[name][tenth, 6:9] -= 7
    return views, small


def test_the_rest_of_a_large_class_joins_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a percent of a class of which a sixteenth is analysed: held out by construction."""
    monkeypatch.setattr(assignments, "LARGE", 2500)
    views, small = _class(40_000, 0.005)
    chosen = draw_part(40_000, 0)
    part = {name: matrix[chosen] for name, matrix in views.items()}
    groups, _ = find_groups(part, null_draws=0)
    known = fit_assignment(part, groups, np.arange(len(chosen)) % 3)
    rest = np.setdiff1d(np.arange(40_000), chosen)
    members, cluster, outlier = assign(known, {name: views[name][rest] for name in known.views})
    best = max(range(len(groups)), key=lambda g: jaccard(rest[members[:, g]], small))
    assert groups[best].suspicion > 0.5
    assert jaccard(rest[members[:, best]], np.setdiff1d(small, chosen)) > 0.97
    clear = np.flatnonzero(known.clear)
    assert len(clear) >= 2
    assert members[:, clear].sum(1).max() == 1  # members of a clear group are in no later one
    # By the slow way, for some of the rest.
    near = unit_rows(part["where"])
    for i in range(0, len(rest), 3000):
        distances = np.linalg.norm(near - unit_rows(views["where"][rest[i : i + 1]]), axis=1)
        assert cluster[i] == distances.argmin() % 3
        assert outlier[i] * known.usual == pytest.approx(np.sort(distances)[:7].mean(), rel=1e-4)
    one = {name: views[name][rest[:1]] for name in known.views}
    assert np.array_equal(assign(known, one)[0], members[:1])


def test_a_group_goes_by_its_own_views() -> None:
    views, small = _class(1000, 0.05)
    known = fit_assignment(views, [Group(small, ("b",), 0.9)], np.zeros(1000, int))
    assert known.views == ["where", "b"]
    assert not known.weights["where"].any()
    members, _, _ = assign(known, views)
    assert jaccard(np.flatnonzero(members[:, 0]), small) > 0.95


# ---- the stage ------------------------------------------------------------------------------------------------------

TARGETS = np.random.default_rng(5).permutation(np.repeat([0, 1, 2, 3, 4], [420, 350, 60, 40, 10]))


def _write(folder: Path, small: np.ndarray, target: np.ndarray = TARGETS) -> Run:
    """A run of made-up maps; ``small`` has a corner of its own."""
    rng = np.random.default_rng(1)
    n = len(target)
    run = Run(folder)
    run.begin({})
    where = rng.normal(size=(n, 6, 6)) + 3 * np.random.default_rng(0).normal(size=(5, 6, 6))[target]
    what = rng.normal(size=(n, 8)) + 3
    where[small, :2, :2] += 7
    what[small, :3] += 7
    arrays: dict[str, np.ndarray] = {"where": where, "what:l": what, "strongest:l": what**2}
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    explained = arrays["where"].sum((1, 2), dtype=np.float64)
    arrays |= {"explained": np.abs(explained), "absorbed": np.abs(explained) - explained}
    arrays |= {"target": target.astype(np.int32), "prediction": target.astype(np.int32)}
    arrays |= {"status": np.ones(n, np.uint8)}
    arrays["prediction"][7] = (target[7] + 1) % 5
    arrays["where"][8] = 0
    run.create_arrays(n, {name: (a.shape[1:], str(a.dtype)) for name, a in arrays.items()})
    for block in range(-(-n // BLOCK)):
        run.write_block(block, {name: a[block * BLOCK : (block + 1) * BLOCK] for name, a in arrays.items()})
    return run


def _subject(count: int, **settings: Any) -> Any:
    ids = [str(i) for i in range(count)]
    chosen = Settings(null_draws=3, **settings)
    data = SimpleNamespace(ids=ids)
    return SimpleNamespace(settings=chosen, classes=tuple("abcde"), layers=("l",), only=None, data=data)


def _results(run: Run) -> dict[str, bytes]:
    return {str(f.relative_to(run.path)): f.read_bytes() for f in run.path.glob("*s/*.json")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The planted rows; and a picture that takes no time."""
    monkeypatch.setattr(strategies, "embed", lambda vectors, seed: vectors[:, :2])
    return np.flatnonzero(TARGETS == 0)[::10]


def _tell(stage: str, done: int, total: int) -> None:
    pass


def test_nothing_depends_on_how_the_work_is_cut_up(
    small: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (assignments, strategies):
        monkeypatch.setattr(module, "LARGE", 300)
    found = []
    two_by_two = {"_HELD": 4 * 620 * 52}  # room for 600 samples and some of the others, not for all
    for case, limits in enumerate([{}, {"_HELD": 1, "_PENDING": 1}, two_by_two, {"_SPREAD": 1}]):
        with monkeypatch.context() as patched:
            for name, value in limits.items():
                patched.setattr(strategies, name, value)
            run = _write(tmp_path / str(case), small)
            find_strategies(run, _subject(len(TARGETS)), _tell)
            found.append(_results(run))
    assert len(found[0]) == 5 + 4  # the fifth class is too small to have a map
    assert found[0] == found[1] == found[2] == found[3]
    entries = {entry["class_index"]: entry for entry in read_strategies(run)}
    assert entries[0]["analysed"] == entries[1]["analysed"] == 300
    assert "analysed" not in entries[2]
    good = np.flatnonzero(~np.isin(np.arange(len(TARGETS)), [7, 8]))
    for index in range(4):
        entry = entries[index]
        rows = good[TARGETS[good] == index]
        assert entry["rows"] == rows.tolist()
        assert len(entry["cluster"]) == len(entry["outlier"]) == len(entry["x"]) == len(rows)
        assert sum(x is not None for x in entry["x"]) == min(len(rows), 300)
        assert all(0.2 < value < 10 for value in entry["outlier"])
    first = rank_candidates(run, _subject(len(TARGETS)))[0][0]
    assert isinstance(first, Candidate)
    assert jaccard(first.members, np.intersect1d(small, good)) > 0.95
    assert np.array_equal(np.sort(np.concatenate([first.members, first.others])), entries[0]["rows"])


def test_set_aside_is_found_once(small: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _write(tmp_path / "run", small)
    reasons = set_aside(run, _subject(len(TARGETS)))
    assert {row: why for row, why in enumerate(reasons) if why} == {
        7: "not recognised as its class", 8: "relevance is zero everywhere"}  # fmt: skip
    monkeypatch.setattr(strategies, "_reasons", lambda *_: pytest.fail("done again"))
    assert set_aside(run, _subject(len(TARGETS))) == reasons


def test_only_what_is_shown_is_drawn(small: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large run: the classes that are ranked first, and those with groups that are tested."""
    monkeypatch.setattr(strategies, "_MAPPED", 100)
    monkeypatch.setattr(strategies, "SHOWN", 2)
    target = np.where(TARGETS == 0, 3, np.where(TARGETS == 3, 0, TARGETS))
    run = _write(tmp_path / "run", small, target)
    find_strategies(run, _subject(len(target), suspicion=0.5), _tell)
    mapped = {entry["class_index"] for entry in read_strategies(run) if "x" in entry}
    assert mapped == {entry["class_index"] for entry in rank_classes(read_strategies(run))[:2]}
    assert 3 in mapped
    assert {int(f.stem) for f in (run.path / "embeddings").glob("*")} == mapped
