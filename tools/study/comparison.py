"""Figures of many arms: means and paired differences with 95 % intervals over concepts.

    (1)  mean of arm a            = mean_c s(a, c)
    (2)  difference of a and b    = mean_c [s(a, c) - s(b, c)]   over the concepts both have
    (3)  share of the ceiling     = mean_c [s(a, c) / s(real, c)]

Intervals are percentile bootstraps over concepts (``catversion_jax.evaluation.intervals``); the
same concepts are resampled together in (2) and (3), so a hard concept does not blur a difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from catversion_jax.evaluation.intervals import Interval, bootstrap_interval

# Figures of a concept, in the order of the tables.
METRICS = (
    "image_alignment_masked",
    "image_alignment",
    "text_alignment_edit",
    "text_alignment_prompt",
    "overall_masked",
    "overall",
    "dino_masked",
    "nearest_reference",
    "copied",
    "drift_as_used",
    "drift_forced",
    "class_kept",
    "class_kept_plain",
)
CEILING = "share_of_ceiling_masked"
ALL = (*METRICS, CEILING)

Figures = Mapping[str, float | None]


def interval(values: Sequence[float]) -> Interval | None:
    """Equation (1); a single concept has a mean and no interval, none has nothing."""
    if not values:
        return None
    if len(values) == 1:
        return Interval(values[0], float("nan"), float("nan"))
    return bootstrap_interval(values)


def means(concepts: Mapping[str, Figures], metrics: Sequence[str] = ALL) -> dict[str, Interval]:
    """Every figure's mean over the concepts that have it."""
    found = {
        metric: interval([v for f in concepts.values() if (v := f.get(metric)) is not None])
        for metric in metrics
    }
    return {metric: value for metric, value in found.items() if value is not None}


def paired(
    concepts: Mapping[str, Figures], others: Mapping[str, Figures], metrics: Sequence[str] = ALL
) -> dict[str, Interval]:
    """Equation (2) of every figure."""
    found = {}
    for metric in metrics:
        differences = [
            left - right
            for name, figures in concepts.items()
            if (left := figures.get(metric)) is not None
            and (right := others.get(name, {}).get(metric)) is not None
        ]
        found[metric] = interval(differences)
    return {metric: value for metric, value in found.items() if value is not None}


def concept_figures(record: Mapping[str, Any], images: str) -> dict[str, float | None]:
    """The figures of one concept.

    Args:
      record: of ``scores.json``.
      images: ``total`` (all seeds) or ``first_seed``.
    """
    scores, real, prior = record[images], record["real"], record.get("prior") or {}
    figures: dict[str, float | None] = {
        metric: scores[metric] for metric in METRICS if metric in scores
    }
    figures["copied"] = scores["copies"] / scores["images"]
    figures["drift_forced"] = prior.get("drift")
    figures["drift_as_used"] = 0.0 if prior.get("other_identical") else prior.get("drift")
    figures["class_kept"] = prior.get("class_kept")
    figures["class_kept_plain"] = prior.get("class_kept_plain")
    masked, ceiling = scores["image_alignment_masked"], real["image_alignment_masked"]
    figures[CEILING] = None if masked is None or not ceiling else masked / ceiling
    return figures


def compare(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What ``results.json`` says of every arm.

    Args:
      arms: the content of each arm's ``scores.json``, by arm.
    """
    methods = {arm for arm, content in arms.items() if content["question"] == "methods"}
    found: dict[str, Any] = {}
    for images in ("total", "first_seed"):
        table = {
            arm: {name: concept_figures(r, images) for name, r in content["concepts"].items()}
            for arm, content in arms.items()
        }
        for arm, concepts in table.items():
            against = {*methods, arms[arm]["base"]} & set(table) - {arm}
            found.setdefault(arm, {})[images] = {
                "concepts": len(concepts),
                "mean": plain(means(concepts)),
                "against": {
                    other: plain(paired(concepts, table[other])) for other in sorted(against)
                },
            }
    return found


def real_images(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the training images of one arm's concepts reach among themselves, with intervals."""
    rows = [record["real"] for record in content["concepts"].values()]
    found = {
        metric: interval([row[metric] for row in rows if row[metric] is not None])
        for metric in ("image_alignment_masked", "image_alignment")
    }
    return plain({metric: value for metric, value in found.items() if value is not None})


def plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    """For JSON, which has no NaN."""
    return {
        metric: {
            key: number if number == number else None
            for key, number in dataclasses.asdict(value).items()
        }
        for metric, value in intervals.items()
    }
