"""Ranks among the photos of a class, against rankings written out by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.evaluation.gallery import rank_galleries, without_gallery
from catversion_jax.evaluation.scores import PromptScores, RealImages, Scores, SubjectScores
from catversion_jax.evaluation.tables import Evaluation, means, write_scores
from catversion_jax.evaluation.vectors import Judged, View

SCORES = Scores(4, 0.5, None, 0.2, 0.1, 0.3, None, None, 0.9, 0, 1, 0)
REAL = RealImages(0.95, 0.97, None, 0.99, 2, 2, 0)
NONE = np.zeros((0, 1), np.float32)


def unit(rng: np.random.Generator, count: int, size: int = 5) -> np.ndarray:
    vectors = rng.normal(size=(count, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def subject(
    name: str,
    base_class: str,
    drawn: np.ndarray,
    photos: np.ndarray,
    *,
    trained: np.ndarray | None = None,
    masked: View = View(NONE, NONE, NONE),  # noqa: B008
) -> SubjectScores:
    prompts = (PromptScores("a dog", "", SCORES, Path("x.png")),)
    whole = View(drawn, photos, photos if trained is None else trained)
    judged = Judged("CLIP", whole, masked, trained is not None)
    return SubjectScores(name, base_class, SCORES, SCORES, prompts, REAL, (0,), (), judged=judged)


def ranked_by_hand(queries, own: str, gallery: list[tuple[str, np.ndarray]]) -> tuple[float, float]:
    """Rank-1 and mAP from sorted lists, ties in the worst order."""
    first, precisions = [], []
    for query in queries:
        scored = [(float(np.dot(query, photo)), name != own, name) for name, photo in gallery]
        order = [name for _, _, name in sorted(scored, key=lambda one: (-one[0], not one[1]))]
        first.append(order[0] == own)
        hits = [place for place, name in enumerate(order, start=1) if name == own]
        precisions.append(np.mean([n / place for n, place in enumerate(hits, start=1)]))
    return float(np.mean(first)), float(np.mean(precisions))


def test_ranks_equal_sorted_lists() -> None:
    rng = np.random.default_rng(0)
    counts = {"rex": (7, 3), "fido": (5, 4), "wolf": (6, 2)}
    drawn = {name: unit(rng, n) for name, (n, _) in counts.items()}
    photos = {name: unit(rng, n) for name, (_, n) in counts.items()}
    subjects = [subject(name, "dog", drawn[name], photos[name]) for name in counts]
    tom = subject("tom", "cat", unit(rng, 2), unit(rng, 2))
    ranked, (dogs,) = rank_galleries([*subjects, tom])
    gallery = [(name, photo) for name in counts for photo in photos[name]]
    for one, name in zip(ranked, counts, strict=False):
        rank1, precision = ranked_by_hand(drawn[name], name, gallery)
        assert one.total.rank1 == pytest.approx(rank1)
        assert one.total.mean_average_precision == pytest.approx(precision)
        assert dogs.concepts[name].chance == pytest.approx(counts[name][1] / 9)
        # a photo among the others
        left = []
        for number, photo in enumerate(photos[name]):
            others = [(n, p) for n, p in gallery if p is not photos[name][number]]
            others = [(n, p) for n, p in others if not np.array_equal(p, photo)]
            left.append(ranked_by_hand([photo], name, others))
        expected = np.mean(left, axis=0)
        assert dogs.real[name].rank1 == pytest.approx(expected[0])
        assert dogs.real[name].mean_average_precision == pytest.approx(expected[1])
    assert ranked[-1].total == tom.total  # no gallery, no rank
    assert without_gallery([*subjects, tom]) == ["cat"]
    assert means(ranked)["rank1"].mean == pytest.approx(dogs.mean("rank1"))


def test_mean_average_precision_in_closed_form() -> None:
    """Own photos on places 2 and 3 of four: (1/2 + 2/3) / 2."""
    axis = np.eye(4, dtype=np.float32)
    query = np.array([[0.6, 0.5, 0.4, 0.3]], np.float32)
    rex = subject("rex", "dog", query, axis[[1, 2]])
    fido = subject("fido", "dog", axis[[0]], axis[[0, 3]])
    _, (dogs,) = rank_galleries([rex, fido])
    assert dogs.concepts["rex"].mean_average_precision == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert dogs.concepts["rex"].rank1 == 0
    assert dogs.concepts["rex"].taken_for == {"fido": 1}
    (pair,) = dogs.confusions
    assert (pair.name, pair.other, pair.count, pair.queries) == ("rex", "fido", 1, 1)
    assert dogs.concepts["fido"].rank1 == 1


def test_ties_count_against_the_concept() -> None:
    same = np.ones((2, 1), np.float32)
    ranked, (dogs,) = rank_galleries(
        [subject("rex", "dog", same, same), subject("fido", "dog", same, same)]
    )
    assert [one.total.rank1 for one in ranked] == [0, 0]
    assert dogs.real_rank1 == 0


def test_held_out_photos_are_the_gallery_and_training_photos_the_comparison() -> None:
    rng = np.random.default_rng(3)
    drawn, held, trained = ([unit(rng, n) for _ in range(2)] for n in (4, 1, 3))
    names = ("rex", "fido")
    subjects = [
        subject(n, "dog", d, h, trained=t)
        for n, d, h, t in zip(names, drawn, held, trained, strict=True)
    ]
    _, (dogs,) = rank_galleries(subjects)
    gallery = [("rex", held[0][0]), ("fido", held[1][0])]
    assert dogs.photos == 2
    for number, name in enumerate(names):
        assert dogs.concepts[name].rank1 == pytest.approx(
            ranked_by_hand(drawn[number], name, gallery)[0]
        )
        assert dogs.real[name].rank1 == pytest.approx(
            ranked_by_hand(trained[number], name, gallery)[0]
        )


def test_objects_alone_where_every_concept_has_some() -> None:
    rng = np.random.default_rng(4)
    masked = View(unit(rng, 3), unit(rng, 2), unit(rng, 2))
    both = [
        subject(name, "dog", unit(rng, 4), unit(rng, 2), masked=masked) for name in ("rex", "fido")
    ]
    _, (dogs,) = rank_galleries(both)
    assert (dogs.view, dogs.concepts["rex"].queries) == ("object alone", 3)
    _, (dogs,) = rank_galleries([both[0], subject("tom", "dog", unit(rng, 4), unit(rng, 2))])
    assert (dogs.view, dogs.concepts["rex"].queries) == ("whole pictures", 4)


def test_the_tables_say_it_only_when_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    subjects = [subject(name, "dog", unit(rng, 9), unit(rng, 3)) for name in ("rex", "fido")]
    subjects.append(subject("tom", "cat", unit(rng, 2), unit(rng, 2)))
    plain = Evaluation({}, {"ours": subjects}, {}, {})
    assert "rank" not in str(plain)
    csv, content = write_scores(tmp_path, plain)
    assert "rank1" not in csv.read_text()
    assert "rank1" not in content.read_text()
    ranked, galleries = rank_galleries(subjects)
    asked = dataclasses.replace(plain, methods={"ours": ranked}, galleries={"ours": galleries})
    shown = str(asked)
    assert "gallery, ours, dog (2 concepts, 6 photos; CLIP, whole pictures): rank-1" in shown
    assert "no gallery, one concept only: cat" in shown
    two = dataclasses.replace(subjects[0], base_class="Dog")
    assert without_gallery([two, *subjects[1:]]) == ["cat"]  # one class to the gallery, too
    write_scores(tmp_path, asked)
    found = json.loads(content.read_text())["galleries"]["ours"][0]
    assert found["concepts"]["rex"]["rank1"] == pytest.approx(ranked[0].total.rank1)
    assert csv.read_text().splitlines()[0].endswith("empty_masks,rank1,mean_average_precision")
