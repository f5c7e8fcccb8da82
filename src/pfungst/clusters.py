"""Why a sample lies in its cluster, and why it is an outlier: exact shares of the score, one an input feature.

k-means and kernel density estimates are turned into networks of the same output, in which relevance is shared out
(Kauffmann et al. 2019, "From clustering to cluster explanations via neural networks"; Kauffmann et al. 2020, "Towards
explaining anomalies: a deep Taylor decomposition of one-class models").  Features are pooled cells or channels.
"""

from __future__ import annotations

import numpy as np


def explain_membership(
    vectors: np.ndarray, centres: np.ndarray, cluster: int, sharpness: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How clearly each vector (n, d) belongs to ``cluster`` of the ``centres`` (k >= 2, d), and which features say so.

    The evidence is f = min over the other centres m of h_m = |x - m|² - |x - m_c|², as the soft minimum
    -1/β log Σ exp(-β h_m) with β = ``sharpness`` (default: 1 over its mean): > 0 inside the cluster.

    Returns f, (n,), and the shares (n, d), whose sum is f exactly: for each rival (x - (m_c + m) / 2) · 2 (m_c - m),
    weighted as the soft minimum weighs it.
    """
    centre, rivals = centres[cluster], np.delete(centres, cluster, axis=0)
    directions = 2 * (centre - rivals)  # (k - 1, d)
    middles = (centre + rivals) / 2
    # h_k = directions_k · (x - middle_k), as |x - m_k|² - |x - m_c|² is
    h = vectors @ directions.T - (directions * middles).sum(1)
    if sharpness is None:
        sharpness = 1 / max(float(np.abs(h.min(1)).mean()), 1e-12)
    low = h.min(1, keepdims=True)
    soft = np.exp(-sharpness * (h - low))
    total = soft.sum(1, keepdims=True)
    evidence = low[:, 0] - np.log(total[:, 0]) / sharpness
    # Each rival's part of f, in proportion to its weight; within it the features' own contributions to h_k.
    part = soft / total * evidence[:, None]
    scale = np.divide(part, h, out=np.zeros_like(h), where=h != 0)
    shares = vectors * (scale @ directions) - scale @ (directions * middles)
    lost = evidence - shares.sum(1)  # rivals with h = 0: nothing to go by, so evenly
    return evidence, shares + lost[:, None] / vectors.shape[1]


def explain_outlier(
    vectors: np.ndarray, inliers: np.ndarray, width: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How far each vector (n, d) lies from a cloud of inliers (m, d), and in which features.

    The score is o = -1/γ log mean exp(-γ |x - u|²) with γ = 1 / ``width``² (default: the median distance of inliers
    to their centre): a soft distance to the nearest inliers.  Returns o, (n,), and the shares (n, d) of the squared
    differences, weighted as the soft minimum weighs the inliers; their sum is o exactly.
    """
    if width is None:
        width = float(np.median(np.linalg.norm(inliers - inliers.mean(0), axis=1))) or 1.0
    sharpness = 1 / width**2
    scores, shares = np.empty(len(vectors)), np.empty_like(vectors, dtype=np.float64)
    for row, x in enumerate(vectors.astype(np.float64)):
        squares = (x - inliers) ** 2  # (m, d)
        distances = squares.sum(1)
        low = distances.min()
        soft = np.exp(-sharpness * (distances - low))
        scores[row] = low - np.log(soft.mean()) / sharpness
        weights = soft / soft.sum()
        # Each inlier's part of o, shared out by squared differences; a vector that is an inlier has none.
        part = weights * scores[row]
        reached = distances > 0
        scale = np.divide(part, distances, out=np.zeros_like(part), where=reached)
        shares[row] = scale @ squares + part[~reached].sum() / len(x)
    return scores, shares
