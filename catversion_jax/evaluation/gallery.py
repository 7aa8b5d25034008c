"""Gallery rank: is a drawn picture nearer to its own concept's photos than to those of other
concepts of the same class?

The gallery of a class holds the photos r_i of all its concepts. For a drawn picture g

    (1)  s_i = cos(g, r_i)
    (2)  rank-1: the photo with the largest s_i is of g's own concept
    (3)  average precision = mean over own photos r_j of j' / rank_j,  where rank_j is the place of
         r_j in the order of s, and j' its place among the own photos

as in re-identification (Zheng et al., ICCV 2015); means over pictures. Ties count against the
concept. Photos are ranked in the same way for comparison: each without itself, or, where photos
were held out, the training images against the held-out ones.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from catversion_jax.array_types import Float
from catversion_jax.evaluation.prompts import class_key
from catversion_jax.evaluation.scores import SubjectScores
from catversion_jax.evaluation.vectors import View

_MOST_PAIRS = 10


@dataclasses.dataclass(frozen=True)
class Ranks:
    """How a concept's pictures rank.

    Attributes:
      queries: number of pictures.
      rank1: equation (2), the share of them.
      mean_average_precision: equation (3).
      chance: ``rank1`` of a picture that says nothing: the share of the gallery that is its own.
      taken_for: pictures nearest to a photo of another concept, by the other's name.
    """

    queries: int
    rank1: float
    mean_average_precision: float
    chance: float
    taken_for: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """``count`` of ``queries`` pictures of concept ``name`` are nearest to a photo of ``other``."""

    name: str
    other: str
    count: int
    queries: int


@dataclasses.dataclass(frozen=True)
class ClassGallery:
    """The gallery of one class.

    Attributes:
      base_class: the class.
      judge: whose vectors are compared.
      view: ``"object alone"`` or, where a concept has no masked picture or photo, ``"whole
        pictures"``.
      photos: number of photos in it.
      concepts: ranks of drawn pictures, by concept.
      real: ranks of real photos, by concept; of those that have one to rank.
    """

    base_class: str
    judge: str
    view: str
    photos: int
    concepts: Mapping[str, Ranks]
    real: Mapping[str, Ranks]

    def mean(self, metric: str) -> float:
        """A number of :class:`Ranks`, mean over concepts."""
        return float(np.mean([getattr(ranks, metric) for ranks in self.concepts.values()]))

    @property
    def real_rank1(self) -> float | None:
        """Rank-1 of real photos, mean over concepts."""
        values = [ranks.rank1 for ranks in self.real.values()]
        return float(np.mean(values)) if values else None

    @property
    def confusions(self) -> list[Confusion]:
        """The most confusable pairs, by share of pictures."""
        pairs = [
            Confusion(name, other, count, ranks.queries)
            for name, ranks in self.concepts.items()
            for other, count in ranks.taken_for.items()
        ]
        pairs.sort(key=lambda pair: (-pair.count / pair.queries, pair.name, pair.other))
        return pairs[:_MOST_PAIRS]


def rank_galleries(
    subjects: Sequence[SubjectScores],
) -> tuple[list[SubjectScores], list[ClassGallery]]:
    """Rank the pictures of every concept whose class has at least two.

    Returns:
      The scores with ``rank1`` and ``mean_average_precision``, and the galleries by class.
    """
    by_class: dict[str, list[SubjectScores]] = collections.defaultdict(list)
    for subject in subjects:
        if subject.judged is not None:
            by_class[class_key(subject.base_class)].append(subject)
    galleries = [
        _gallery(members[0].base_class, members)
        for _, members in sorted(by_class.items())
        if len(members) > 1
    ]
    found = {name: ranks for gallery in galleries for name, ranks in gallery.concepts.items()}
    return [_with_ranks(subject, found.get(subject.name)) for subject in subjects], galleries


def without_gallery(subjects: Sequence[SubjectScores]) -> list[str]:
    """The classes of which there is one concept only, sorted."""
    counts = collections.Counter(class_key(subject.base_class) for subject in subjects)
    return sorted(
        subject.base_class for subject in subjects if counts[class_key(subject.base_class)] == 1
    )


def _with_ranks(subject: SubjectScores, ranks: Ranks | None) -> SubjectScores:
    if ranks is None:
        return subject
    total = dataclasses.replace(
        subject.total,
        rank1=ranks.rank1,
        mean_average_precision=ranks.mean_average_precision,
    )
    return dataclasses.replace(subject, total=total)


def _gallery(base_class: str, members: Sequence[SubjectScores]) -> ClassGallery:
    judged = [subject.judged for subject in members if subject.judged is not None]
    masked = all(len(one.masked.drawn) and len(one.masked.photos) for one in judged)
    views: list[View] = [one.masked if masked else one.whole for one in judged]
    names = [subject.name for subject in members]
    gallery = np.concatenate([view.photos for view in views])
    owners = np.repeat(np.arange(len(views)), [len(view.photos) for view in views])
    concepts, real = {}, {}
    for number, (name, view) in enumerate(zip(names, views, strict=True)):
        concepts[name] = rank(view.drawn, gallery, owners, number, names)
        if judged[number].held_out:
            real_queries = rank(view.trained, gallery, owners, number, names)
        else:
            own = np.flatnonzero(owners == number)
            real_queries = rank(view.photos, gallery, owners, number, names, itself=own)
        if real_queries.queries:
            real[name] = real_queries
    return ClassGallery(
        base_class,
        judged[0].judge,
        "object alone" if masked else "whole pictures",
        len(gallery),
        concepts,
        real,
    )


def rank(
    queries: Float[np.ndarray, "n E"],
    gallery: Float[np.ndarray, "r E"],
    owners: np.ndarray,
    own: int,
    names: Sequence[str],
    *,
    itself: np.ndarray | None = None,
) -> Ranks:
    """Equations (1) to (3) for the pictures of one concept.

    Args:
      queries: unit vectors of its pictures.
      gallery: unit vectors of all photos.
      owners: ``[r]``, the number of each photo's concept.
      own: the number of this concept.
      names: of the concepts, by number.
      itself: ``[n]``, the photo that each query is and is not compared with; None for drawn ones.
    """
    is_own = owners == own
    others = np.flatnonzero(~is_own)
    precisions: list[float] = []
    taken_for: collections.Counter[str] = collections.Counter()
    for row, query in enumerate(queries):
        similar = gallery.astype(np.float64) @ query.astype(np.float64)
        kept = is_own.copy()
        if itself is not None:
            kept[itself[row]] = False
        mine = np.sort(similar[kept])[::-1]
        if not len(mine) or not len(others):
            continue
        theirs = np.sort(similar[others])
        above = len(theirs) - np.searchsorted(theirs, mine, side="left")  # ties count against
        place = np.arange(1, len(mine) + 1)
        precisions.append(float((place / (place + above)).mean()))
        if theirs[-1] >= mine[0]:
            taken_for[names[owners[others[similar[others].argmax()]]]] += 1
    count = len(precisions)
    left = int(is_own.sum()) - (itself is not None)
    return Ranks(
        count,
        (count - sum(taken_for.values())) / count if count else 0.0,
        float(np.mean(precisions)) if count else 0.0,
        left / max(left + len(others), 1),
        dict(taken_for.most_common()),
    )
