"""Which points of a map lie in a polygon or a box: exact, and quick for a million points and hundreds of corners."""

from __future__ import annotations

import numpy as np

_AT_ONCE = 1 << 14  # points that are tried together: few enough to stay in the processor's cache


class Plane:
    """The points of one map, in the order of y, so that an edge of a polygon touches only those beside it.

    rows  (m,) uint32: the samples that are on the map, ascending
    x, y  (m,) float32: where they are
    """

    def __init__(self, rows: np.ndarray, points: np.ndarray) -> None:
        """``points``: (m, 2), of the samples ``rows``, ascending; those that are not finite are not on the map."""
        known = np.isfinite(points).all(1)
        rows, points = np.asarray(rows)[known], np.asarray(points, np.float32)[known]
        self.rows, self.x, self.y = rows.astype(np.uint32), points[:, 0].copy(), points[:, 1].copy()
        self._order = np.argsort(self.y, kind="stable").astype(np.uint32)
        self._x, self._y = self.x[self._order], self.y[self._order]

    def __len__(self) -> int:
        return len(self.rows)

    def interleave(self, count: int) -> np.ndarray:
        """(count, 2) little-endian float32: x, y of every sample, nan for those that are not on the map."""
        whole: np.ndarray = np.full((count, 2), np.nan, "<f4")
        whole[self.rows, 0], whole[self.rows, 1] = self.x, self.y
        return whole

    def in_polygon(self, corners: np.ndarray) -> np.ndarray:
        """Rows, ascending, of the points inside a closed polygon (k, 2), by the even-odd rule.

        Of points on an edge, those with the inside to their right or above them count, so that of polygons side by
        side each point belongs to one.  Corners are rounded to float32, as the points are; then the side of an edge is
        computed without rounding for coordinates of like size.
        """
        low, high = _upward(np.asarray(corners, np.float32).astype(np.float64))
        if len(low) == 0:
            return self.rows[:0]
        first, last = (np.searchsorted(self._y, np.float32(end)) for end in (low[:, 1].min(), high[:, 1].max()))
        starts: np.ndarray = np.searchsorted(self._y, low[:, 1].astype(np.float32))
        ends: np.ndarray = np.searchsorted(self._y, high[:, 1].astype(np.float32))
        inside = np.zeros(len(self._y), dtype=bool)
        for begin in range(first, last, _AT_ONCE):
            end = min(begin + _AT_ONCE, last)
            x, y = self._x[begin:end].astype(np.float64), self._y[begin:end].astype(np.float64)
            for edge in np.flatnonzero(np.logical_and(starts < end, ends > begin)):
                part = slice(max(starts[edge] - begin, 0), min(ends[edge], end) - begin)
                (x0, y0), (x1, y1) = low[edge], high[edge]
                left: np.ndarray = (x[part] - x0) * (y1 - y0) < (y[part] - y0) * (x1 - x0)
                inside[begin:end][part] ^= left
        return self._ascending(inside)

    def in_box(self, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        """Rows, ascending, of the points in a box, its border included; corners in any order."""
        left, right = np.sort(np.array([x0, x1], np.float32))
        bottom, top = np.sort(np.array([y0, y1], np.float32))
        begin, end = np.searchsorted(self._y, bottom, "left"), np.searchsorted(self._y, top, "right")
        inside = np.zeros(len(self._y), dtype=bool)
        between: np.ndarray = self._x[begin:end]
        inside[begin:end] = np.logical_and(between >= left, between <= right)
        return self._ascending(inside)

    def _ascending(self, inside: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.rows[np.sort(self._order[inside])]
        return found


def _upward(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of the polygon's edges, those that are level left out: no ray to the right crosses them."""
    start, end = corners, np.roll(corners, -1, axis=0)
    kept = start[:, 1] != end[:, 1]
    start, end = start[kept], end[kept]
    turned = (start[:, 1] > end[:, 1])[:, None]
    return np.where(turned, end, start), np.where(turned, start, end)
