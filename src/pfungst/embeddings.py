"""Vectors -> two coordinates for the eye (t-SNE).  Distances in the picture prove nothing; verdicts do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MOST = 3000  # samples; more are thinned out, the rest is placed by its neighbours
_EVERY = 25  # steps after which progress is told
_STEPS = 250 + 500  # those that openTSNE takes, the early ones first


def embed(vectors: np.ndarray, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """t-SNE of (n, d) vectors, (n, 2): deterministic, started from the principal components.

    Of more than ``MOST`` samples a random part is embedded and the others are placed beside it.  ``progress`` is called
    with the steps that are done and how many there are; what it raises ends the work.
    """
    from openTSNE import TSNE

    n = len(vectors)
    if n < 8:
        return np.column_stack([np.arange(n), np.zeros(n)]).astype(float)
    data = np.ascontiguousarray(vectors, dtype=np.float64)
    if data.shape[1] < 2:
        data = np.column_stack([data, np.zeros(n)])
    if not np.ptp(data, axis=0).any():
        return np.zeros((n, 2))
    done = 0

    def tell(iteration: int, error: float, embedding: np.ndarray) -> None:
        nonlocal done  # iterations count anew after the early ones
        done += _EVERY
        if progress is not None:
            progress(min(done, _STEPS), _STEPS)

    tsne = TSNE(
        perplexity=min(30, (n - 1) / 3),
        initialization="pca",
        random_state=seed,
        n_jobs=1,
        negative_gradient_method="bh",
        callbacks=None if progress is None else tell,
        callbacks_every_iters=_EVERY,
    )
    if n <= MOST:
        return np.asarray(tsne.fit(data))
    chosen = np.random.default_rng(seed).permutation(n)[:MOST]
    rest = np.setdiff1d(np.arange(n), chosen)
    embedding = tsne.fit(data[chosen])
    result = np.empty((n, 2))
    result[chosen] = embedding
    result[rest] = embedding.transform(data[rest])
    return result
