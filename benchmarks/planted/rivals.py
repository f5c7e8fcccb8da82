"""What else is used to find such cues, each re-stated in a few lines from its documentation, none of its code.

A rival gets what the audit gets, and more where it cannot do without: those that give clusterings without saying which
to look at are told the class that has the cue, and an oracle, which knows the planted pictures, chooses the best
cluster of all (``ranked=False``); those that give an order of pictures are told how many there are to be found.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from networks import ConvNet, ViT, ask, to_inputs
from PIL import Image, ImageFilter
from scipy import ndimage
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import eigsh
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import DBSCAN, HDBSCAN, AgglomerativeClustering, KMeans, SpectralClustering
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import cross_val_score
from sklearn.naive_bayes import GaussianNB

from pfungst.lrp import LRP


@dataclass(frozen=True)
class Question:
    """A trained network and its pictures (n, 64, 64, 3) with labels and predictions.

    suspect   index of the class with the cue, for rivals that look at one class at a time
    count     how many pictures have the cue, for rivals that only order pictures
    """

    model: ConvNet | ViT
    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    classes: tuple[str, ...]
    suspect: int
    count: int
    device: str
    _maps: dict[int, np.ndarray] = field(default_factory=dict)

    def rows(self, label: int) -> np.ndarray:
        return np.flatnonzero(self.labels == label)

    def maps(self, label: int) -> np.ndarray:
        """Relevance maps of a class by pfungst's own engine, summed over channels, (m, 64, 64)."""
        if label not in self._maps:
            lrp, rows = LRP(self.model), self.rows(label)
            parts = []
            for start in range(0, len(rows), 128):
                x = to_inputs(self.images[rows[start : start + 128]], self.device)
                scores = lrp(x, target=torch.full((len(x),), label, device=self.device)).scores
                parts.append(scores.sum(1).detach().cpu().numpy())
            self._maps[label] = np.concatenate(parts).astype(np.float64)
        return self._maps[label]


@dataclass(frozen=True)
class Answer:
    """Groups of rows, in the method's order if ``ranked``.

    ordered   the members of a group come in the method's order, not in that of the data
    accused   of each group, whether the method says that it is a cheat; None: it never says so
    """

    groups: list[np.ndarray]
    ranked: bool = False
    ordered: bool = False
    accused: list[bool] | None = None


def _partitions(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """k-means and agglomerative clustering for every k from 2 to 30: labels of the rows, (n,)."""
    for clusters in range(2, min(31, len(vectors))):
        yield KMeans(clusters, random_state=0).fit_predict(vectors)
        yield AgglomerativeClustering(clusters).fit_predict(vectors)


def _groups(rows: np.ndarray, partitions: Iterator[np.ndarray]) -> list[np.ndarray]:
    groups: dict[bytes, np.ndarray] = {}
    for labels in partitions:
        for label in np.unique(labels[labels >= 0]):
            members = rows[labels == label]
            groups[members.tobytes()] = members
    return list(groups.values())


def corelay(question: Question) -> Answer:
    """The pipeline that CoRelAy ships for SpRAy (variant ``spectral``), its best clustering chosen by the oracle.

    Maps of one class at full size, divided by their sums; Euclidean distances; 32 neighbours, one-way edges at half
    weight; 32 eigenvectors of D^-1/2 A D^-1/2 of the greatest magnitude, rows to unit norm; k-means and agglomerative
    clustering with k = 2..30, DBSCAN with eps = 0.2..3.0, HDBSCAN with at least 5 members.
    """
    rows, maps = question.rows(question.suspect), question.maps(question.suspect)
    totals = maps.sum((1, 2), keepdims=True)
    flat = (maps / np.where(totals == 0, 1, totals)).reshape(len(maps), -1)
    distances = squareform(pdist(flat))
    n, k = len(flat), min(32, len(flat) - 1)
    nearest = distances.argsort(1)[:, 1 : k + 1]
    edges = csr_matrix((np.ones(n * k), (np.repeat(np.arange(n), k), nearest.ravel())), shape=(n, n))
    affinity = (edges + edges.T) / 2
    scale = diags(np.asarray(affinity.sum(1)).ravel() ** -0.5)
    _, vectors = eigsh(scale @ affinity @ scale, k=min(32, n - 2), which="LM", v0=np.ones(n))
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def partitions() -> Iterator[np.ndarray]:
        yield from _partitions(vectors)
        for step in range(2, 31):
            yield DBSCAN(eps=step / 10).fit_predict(vectors)
        yield HDBSCAN(min_cluster_size=5, copy=True).fit_predict(vectors)

    return Answer(_groups(rows, partitions()))


def shortkit(question: Question) -> Answer:
    """ShortKit-ML's SpRAy detector, with our maps, in every class: it accuses by fixed thresholds.

    Maps to 32 x 32, each from 0 to 1; cosine similarities; the greatest eigengap for up to 10 clusters; spectral
    clustering.  Accused: clusters of less than 5 % of the class (of one label all are pure), or, if the most focused
    cluster has a focus of 0.6 or more, that cluster.
    """
    groups: list[np.ndarray] = []
    accused: list[bool] = []
    for label in range(len(question.classes)):
        rows, maps = question.rows(label), question.maps(label)
        small = np.stack([ndimage.zoom(one, (32 / one.shape[0], 32 / one.shape[1]), order=1) for one in maps])
        flat = small.reshape(len(small), -1)
        flat = flat - flat.min(1, keepdims=True)
        flat = flat / (flat.max(1, keepdims=True) + 1e-8)
        affinity = cosine_similarity(flat).clip(0)
        root = 1 / np.sqrt(np.maximum(affinity.sum(1), 1e-8))
        values = np.linalg.eigvalsh(np.eye(len(flat)) - root[:, None] * affinity * root)[:12]
        clusters = int(np.diff(values)[1:].argmax()) + 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the graph is full, so that nothing can be said of its connections
            found = SpectralClustering(clusters, affinity="precomputed", random_state=42).fit_predict(affinity)
        shares = flat / (flat.sum(1, keepdims=True) + 1e-8)
        focus = 1 + (shares * np.log(shares + 1e-8)).sum(1) / np.log(flat.shape[1])
        sets = [np.flatnonzero(found == cluster) for cluster in np.unique(found)]
        means = [focus[members].mean() for members in sets]
        for members, mean in zip(sets, means, strict=True):
            groups.append(rows[members])
            accused.append(bool(len(members) < 0.05 * len(rows) or (mean == max(means) and mean >= 0.6)))
    order = sorted(range(len(groups)), key=lambda i: (not accused[i], len(groups[i])))
    return Answer([groups[i] for i in order], ranked=True, accused=[accused[i] for i in order])


def image_embeddings(question: Question) -> Answer:
    """No explanations: clusters of the features of another network (ResNet-20 of CIFAR-10), oracle's choice."""
    rows = question.rows(question.suspect)
    return Answer(_groups(rows, _partitions(_foreign_features(question.images[rows]))))


def own_features(question: Question) -> Answer:
    """No explanations: clusters of the audited network's features before its last layer, oracle's choice."""
    rows = question.rows(question.suspect)
    vectors = ask(question.model, question.images[rows], question.device, embed=True).double().numpy()
    return Answer(_groups(rows, _partitions(vectors)))


def spectral_signatures(question: Question) -> Answer:
    """Tran et al. 2018: the class's features, centred, along their first singular vector; the farthest pictures."""
    if not question.count:
        return Answer([])
    rows = question.rows(question.suspect)
    vectors = ask(question.model, question.images[rows], question.device, embed=True).double().numpy()
    centred = vectors - vectors.mean(0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    return Answer([rows[np.argsort(-(along**2), kind="stable")[: question.count]]], ordered=True)


def cleanlab(question: Question) -> Answer:
    """cleanlab's spurious-correlation score: how well one property of a picture tells its label.

    For each property, s = (1 - accuracy of naive Bayes, 5 folds) / (1 - baseline); accused where s < 0.3.  The baseline
    is as it ships, with the index of the greatest class in place of its size.  It names a property, not pictures; taken
    are those with the least of it, as CleanVision scores it, in the class that has the cue.
    """
    rows = question.rows(question.suspect)
    baseline = np.bincount(question.labels).argmax() / len(question.labels)
    found = []
    for values in _properties(question.images).values():
        if np.ptp(values) == 0:  # the same in all pictures tells nothing
            continue
        accuracy = cross_val_score(GaussianNB(), values[:, None], question.labels, cv=5).mean()
        grade = float(np.clip((1 - accuracy) / (1 - baseline + 1e-8), 0, 1))
        found.append((grade, rows[np.argsort(values[rows], kind="stable")[: max(question.count, 1)]]))
    found.sort(key=lambda pair: pair[0])
    return Answer([g for _, g in found], ranked=True, ordered=True, accused=[grade < 0.3 for grade, _ in found])


def _properties(images: np.ndarray) -> dict[str, np.ndarray]:
    """CleanVision's properties that differ among pictures of one size: each low where the picture is odd."""
    values: dict[str, list[float]] = {"dark": [], "light": [], "information": [], "colour": [], "sharpness": []}
    for picture in images:
        image = Image.fromarray(picture)
        grey = np.asarray(image.convert("L"))
        bright = np.sqrt(picture.astype(np.float64) ** 2 @ (0.241, 0.691, 0.068)) / 255
        values["dark"].append(float(np.percentile(bright, 99)))
        values["light"].append(1 - float(np.percentile(bright, 5)))
        values["information"].append(float(image.convert("L").entropy()) / 10)
        values["colour"].append(float(np.ptp(picture.astype(int), axis=2).any()))
        edges = np.asarray(Image.fromarray(grey).filter(ImageFilter.FIND_EDGES), dtype=np.float64)
        values["sharpness"].append(1 - float(np.exp(-edges.std() / 100)))
    return {name: np.array(numbers) for name, numbers in values.items()}


def _foreign_features(images: np.ndarray) -> np.ndarray:
    """Features (n, 64) of a ResNet-20 that was trained on CIFAR-10 and not by us."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from cifar_planted import PREPROCESS  # the scripts in the folder above
    from trained import load_resnet

    network = load_resnet(20)
    network.linear = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        small = torch.stack([PREPROCESS(Image.fromarray(one).resize((32, 32))) for one in images])
        return np.concatenate([network(part).double().numpy() for part in small.split(256)])


RIVALS: dict[str, Callable[[Question], Answer]] = {
    "corelay, oracle": corelay,
    "shortkit": shortkit,
    "image embeddings, oracle": image_embeddings,
    "own features, oracle": own_features,
    "spectral signatures": spectral_signatures,
    "cleanlab": cleanlab,
}
