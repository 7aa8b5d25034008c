"""What an evaluation found: the record, its means, CSV, JSON and the printed table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.evaluation.frontier import FrontierPoint
from catversion_jax.evaluation.gallery import ClassGallery, Confusion, without_gallery
from catversion_jax.evaluation.gate import GateResult
from catversion_jax.evaluation.intervals import Interval, bootstrap_interval
from catversion_jax.evaluation.prior import PriorScores
from catversion_jax.evaluation.scores import (
    METRICS,
    OPTIONAL,
    Scores,
    SubjectScores,
    plain_scores,
)
from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.columns import aligned
from catversion_jax.runtime.spreadsheet_cells import harmless_cell

TABLE_COLUMNS = {
    "image_alignment": "image",
    "image_alignment_masked": "image masked",
    "text_alignment_edit": "text (edit)",
    "text_alignment_prompt": "text (prompt)",
    "overall": "overall",
    "overall_masked": "overall masked",
    "dino": "DINO",
    "dino_max": "DINO nearest",
    "dino_masked": "DINO masked",
    "dino_masked_max": "DINO masked nearest",
    "rank1": "rank-1",
    "mean_average_precision": "mAP",
}


def label(metric: str, judge: str) -> str:
    """A column's heading."""
    return TABLE_COLUMNS[metric].replace("DINO", judge)


_KEYS = ("method", "row", "concept", "base_class", "prompt", "edit")
_SCORES = tuple(field.name for field in dataclasses.fields(Scores))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation found.

    Attributes:
      protocol: what must be equal for two tables to be comparable.
      methods: scores by method; the one under evaluation comes first.
      priors: prior preservation by concept.
      curves: scores of the first seed by concept and training step.
      left_out: why concepts are missing, by name.
      galleries: whether pictures can be told from others of their class: by method, a gallery of
        each class that has at least two concepts; {} where it was not asked.
      judge: what gives the scores named ``dino``, for people.
      frontier: scores over the scale of the concepts; empty where it was not asked.
      gate: which concepts fail; None where it was not asked.
      files: what was written: ``scores.csv``, ``scores.json`` and the page.
      num_images: images of the evaluation, where they are drawn by it.
      num_drawn: those of them that were not there already.
    """

    protocol: Mapping[str, Any]
    methods: Mapping[str, Sequence[SubjectScores]]
    priors: Mapping[str, PriorScores]
    curves: Mapping[str, Sequence[tuple[int, Scores]]]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    galleries: Mapping[str, Sequence[ClassGallery]] = dataclasses.field(default_factory=dict)
    judge: str = "DINO"
    frontier: Sequence[FrontierPoint] = ()
    gate: GateResult | None = None
    files: tuple[Path, ...] = ()
    num_images: int = 0
    num_drawn: int = 0

    def __str__(self) -> str:
        """The table that the command prints."""
        return "\n".join(table_lines(self))


def means(subjects: Sequence[SubjectScores]) -> dict[str, Interval | float | None]:
    """Each metric's mean over the concepts that have it: with its 95 % interval from two concepts
    on. Scores that no concept was asked for are left out.
    """
    result: dict[str, Interval | float | None] = {}
    for metric in METRICS:
        values = [v for s in subjects if (v := getattr(s.total, metric)) is not None]
        if metric in OPTIONAL and not values:
            continue
        if len(values) >= 2:
            result[metric] = bootstrap_interval(values)
        else:
            result[metric] = values[0] if values else None
    return result


def real_means(subjects: Sequence[SubjectScores]) -> dict[str, float]:
    """What the training images score among themselves, or against the photos that were held out,
    mean over concepts: the ceiling of the image scores.
    """
    result = {}
    for metric in ("image_alignment", "image_alignment_masked", "dino", "dino_masked"):
        values = [v for s in subjects if (v := getattr(s.real, metric)) is not None]
        if values:
            result[metric] = sum(values) / len(values)
    return result


def write_scores(folder: Path, evaluation: Evaluation) -> list[Path]:
    """Write ``scores.csv`` and ``scores.json``.

    Raises:
      CatVersionError: the folder cannot be written.
    """
    text = io.StringIO()
    subjects = [subject for listed in evaluation.methods.values() for subject in listed]
    asked = {name for subject in subjects for name in plain_scores(subject.total)}
    columns = [*_KEYS, *(name for name in _SCORES if name in asked)]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in _csv_rows(evaluation):
        writer.writerow({**row, **{key: harmless_cell(row[key]) for key in _KEYS if key in row}})
    paths = [folder / "scores.csv", folder / "scores.json"]
    write_atomically(paths[0], text.getvalue().encode())
    content = json.dumps(as_json(evaluation), indent=1, ensure_ascii=False) + "\n"
    write_atomically(paths[1], content.encode())
    return paths


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of ``scores.json``: plain values, all digits."""
    galleries = {
        name: [_gallery_json(gallery) for gallery in of_method]
        for name, of_method in evaluation.galleries.items()
    }
    frontier = [
        {
            "scale": point.scale,
            "image": point.image,
            "text": point.text,
            "concepts": {name: plain_scores(scores) for name, scores in point.scores.items()},
        }
        for point in evaluation.frontier
    ]
    return {
        "protocol": dict(evaluation.protocol),
        "methods": {
            name: {
                "concepts": [_subject_json(subject) for subject in subjects],
                "mean": {
                    metric: dataclasses.asdict(value) if isinstance(value, Interval) else value
                    for metric, value in means(subjects).items()
                },
                "training_images_mean": real_means(subjects),
            }
            for name, subjects in evaluation.methods.items()
        },
        "left_out": dict(evaluation.left_out),
        "prior_preservation": {
            name: dataclasses.asdict(scores) for name, scores in evaluation.priors.items()
        },
        "curves": {
            name: [{"step": step, **plain_scores(scores)} for step, scores in points]
            for name, points in evaluation.curves.items()
        },
        **({"galleries": galleries} if galleries else {}),
        **({"frontier": frontier} if frontier else {}),
        **({} if evaluation.gate is None else {"gate": evaluation.gate.as_json()}),
    }


def _gallery_json(gallery: ClassGallery) -> dict[str, Any]:
    return {
        **dataclasses.asdict(gallery),
        "rank1": gallery.mean("rank1"),
        "mean_average_precision": gallery.mean("mean_average_precision"),
        "confusions": [dataclasses.asdict(pair) for pair in gallery.confusions],
    }


def table_lines(evaluation: Evaluation) -> list[str]:
    """The table for a terminal: concepts, their mean, the training images; and the protocol."""
    lines: list[str] = []
    for method, subjects in evaluation.methods.items():
        shown = [
            metric
            for metric in TABLE_COLUMNS
            if any(getattr(subject.total, metric) is not None for subject in subjects)
        ]
        labels = [label(metric, evaluation.judge) for metric in shown]
        header = [method, *labels, "copies", "empty masks"]
        rows = [header] + [_table_row(subject, shown) for subject in subjects]
        rows += [_mean_row(subjects, shown)] if len(subjects) > 1 else []
        real = real_means(subjects)
        rows.append(["training images", *(number(real.get(m)) for m in shown), "", ""])
        lines += [*aligned(rows, left=(0,)), ""]
    lines += _gallery_lines(evaluation)
    for point in evaluation.frontier:
        lines.append(
            f"scale {point.scale:g}: image {number(point.image)}, text {number(point.text)}"
        )
    lines += [*evaluation.gate.lines(), ""] if evaluation.gate else []
    lines += _unscored(evaluation)
    for name, prior in evaluation.priors.items():
        lines.append(f"{name}: {describe_prior(prior)}")
    lines += ["", "protocol"]
    lines += [f"  {key}: {value}" for key, value in evaluation.protocol.items()]
    return lines


def _gallery_lines(evaluation: Evaluation) -> list[str]:
    """What the galleries found, a line for each class and confusable pair."""
    lines = []
    for method, galleries in evaluation.galleries.items():
        for gallery in galleries:
            lines.append(f"gallery, {method}, {describe_gallery(gallery)}")
            lines += [f"  {describe_confusion(pair)}" for pair in gallery.confusions[:5]]
    if evaluation.galleries:
        first = next(iter(evaluation.methods.values()))
        if alone := without_gallery(first):
            lines.append(f"no gallery, one concept only: {', '.join(alone)}")
        lines.append("")
    return lines


def describe_gallery(gallery: ClassGallery) -> str:
    """The ranks of one class in one line."""
    real = gallery.real_rank1
    photos = "" if real is None else f", real photos {real:.2f}"
    return (
        f"{gallery.base_class} ({len(gallery.concepts)} concepts, {gallery.photos} photos; "
        f"{gallery.judge}, {gallery.view}): rank-1 {gallery.mean('rank1'):.2f} "
        f"(chance {gallery.mean('chance'):.2f}{photos}), "
        f"mAP {gallery.mean('mean_average_precision'):.2f}"
    )


def describe_confusion(pair: Confusion) -> str:
    """One confusable pair in a sentence."""
    return f"{pair.name} taken for {pair.other}: {pair.count} of {pair.queries} pictures"


def _unscored(evaluation: Evaluation) -> list[str]:
    """A line for each concept that has images of no prompt of the set."""
    return [
        f"{method}, {subject.name}: {len(subject.ignored)} images not scored, as they show no "
        f"prompt of the set: {', '.join(subject.ignored[:8])}"
        f"{' ...' if len(subject.ignored) > 8 else ''}"
        for method, subjects in evaluation.methods.items()
        for subject in subjects
        if subject.ignored
    ]


def describe_prior(prior: PriorScores) -> str:
    """Prior preservation in one sentence."""
    yes_no = {True: "bit-identical", False: "DIFFERENT", None: "not checked"}
    parts = [
        f"switched off {yes_no[prior.off_identical]}",
        f"other classes as used {yes_no[prior.other_identical]}",
    ]
    if prior.drift is not None:
        parts.append(
            f"forced on other classes: drift {prior.drift:.4f}, class kept "
            f"{prior.class_kept:.0%} (plain model {prior.class_kept_plain:.0%}) of {prior.images}"
        )
    return "; ".join(parts)


def number(value: float | None) -> str:
    """A score as people read it."""
    return "-" if value is None else f"{value:.4f}"


def _subject_json(subject: SubjectScores) -> dict[str, Any]:
    return {
        "name": subject.name,
        "base_class": subject.base_class,
        **plain_scores(subject.total),
        **({"held_out_images": list(subject.held_out)} if subject.held_out else {}),
        "training_images": {
            key: value
            for key, value in dataclasses.asdict(subject.real).items()
            if value is not None or key != "dino_masked"
        },
        "ignored_files": list(subject.ignored),
        "prompts": [
            {"prompt": p.prompt, "edit": p.edit, **plain_scores(p.scores)} for p in subject.prompts
        ],
    }


def _csv_rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for method, subjects in evaluation.methods.items():
        for subject in subjects:
            keys = {"method": method, "concept": subject.name, "base_class": subject.base_class}
            for prompt in subject.prompts:
                text = {"prompt": prompt.prompt, "edit": prompt.edit}
                yield {**keys, "row": "prompt", **text, **_cells(prompt.scores)}
            yield {**keys, "row": "concept", **_cells(subject.total)}
        for part in ("mean", "low", "high"):
            values = {
                metric: getattr(value, part) if isinstance(value, Interval) else value
                for metric, value in means(subjects).items()
                if isinstance(value, Interval) or part == "mean"
            }
            if values:
                yield {"method": method, "row": part} | {
                    metric: "" if value is None else f"{value:.6f}"
                    for metric, value in values.items()
                }


def _cells(scores: Scores) -> dict[str, Any]:
    return {
        name: f"{value:.6f}" if isinstance(value, float) else "" if value is None else value
        for name, value in plain_scores(scores).items()
    }


def _table_row(subject: SubjectScores, shown: Sequence[str]) -> list[str]:
    total = subject.total
    empty = f"{total.empty_masks} of {total.masks}" if total.masks else "no masks"
    scores = [number(getattr(total, metric)) for metric in shown]
    return [subject.name, *scores, f"{total.copies} of {total.images}", empty]


def _mean_row(subjects: Sequence[SubjectScores], shown: Sequence[str]) -> list[str]:
    values = means(subjects)
    cells = []
    for metric in shown:
        value = values[metric]
        cells.append(
            f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"
            if isinstance(value, Interval)
            else number(value)
        )
    return ["mean [95 %]", *cells, "", ""]
