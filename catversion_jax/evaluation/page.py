"""``report.html`` of an evaluation: one file, no network, every text of the user escaped."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from catversion_jax.evaluation.charts import Chart, frontier_chart, line_chart
from catversion_jax.evaluation.gallery import ClassGallery, without_gallery
from catversion_jax.evaluation.gate import CHECKS, GateResult
from catversion_jax.evaluation.image_folders import read_mask, read_pixels
from catversion_jax.evaluation.intervals import Interval
from catversion_jax.evaluation.masked_crops import masked_crop
from catversion_jax.evaluation.prior import PriorScores
from catversion_jax.evaluation.scores import PromptScores, SubjectScores
from catversion_jax.evaluation.subjects import References
from catversion_jax.evaluation.tables import (
    TABLE_COLUMNS,
    Evaluation,
    describe_confusion,
    label,
    means,
    number,
    real_means,
)
from catversion_jax.runtime.atomic_files import write_atomically

_THUMBNAIL = 160
_LOSSLESS_UP_TO = 96  # pixels: small pictures stay PNG, larger ones become JPEG
_CURVES = ("image_alignment", "image_alignment_masked", "text_alignment_edit", "overall_masked")


@dataclasses.dataclass(frozen=True)
class PageMaterial:
    """What the page shows besides the scores.

    Attributes:
      references: training images by concept.
      fill: colour of removed backgrounds, within 0..1.
      losses: evaluation losses over the training step, by concept and curve.
    """

    references: Mapping[str, References]
    fill: np.ndarray
    losses: Mapping[str, Mapping[str, Sequence[tuple[float, float | None]]]]


def write_evaluation_page(path: Path, evaluation: Evaluation, material: PageMaterial) -> Path:
    """Write the page.

    Raises:
      CatVersionError: an image cannot be read, or the file not written.
    """
    environment = Environment(
        loader=PackageLoader("catversion_jax.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    columns = _shown_columns(evaluation)
    first = next(iter(evaluation.methods))
    others = {name: subjects for name, subjects in evaluation.methods.items() if name != first}
    text = template.render(
        held_out=any(subject.held_out for subject in evaluation.methods[first]),
        columns=[(label(metric, evaluation.judge), metric) for metric in columns],
        judge=evaluation.judge,
        method=first,
        methods=[_method(name, s, columns) for name, s in evaluation.methods.items()],
        concepts=[
            _concept(subject, evaluation, material, others) for subject in evaluation.methods[first]
        ],
        galleries=[
            _gallery(name, gallery)
            for name, galleries in evaluation.galleries.items()
            for gallery in galleries
        ],
        frontier=frontier_chart(
            [(point.text, point.image, f"{point.scale:g}") for point in evaluation.frontier]
        ),
        gate=None if evaluation.gate is None else _gate(evaluation.gate),
        alone=without_gallery(evaluation.methods[first]) if evaluation.galleries else [],
        priors=[(name, _prior(scores)) for name, scores in evaluation.priors.items()],
        protocol=[(key, str(value)) for key, value in evaluation.protocol.items()],
    )
    write_atomically(path, _own_script_only(text).encode())
    return path


def _own_script_only(text: str) -> str:
    """The page with a policy by which browsers run the script at its end and no other."""
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return text.replace("script-src 'none'", f"script-src 'sha256-{digest}'", 1)


def _shown_columns(evaluation: Evaluation) -> list[str]:
    subjects = [s for listed in evaluation.methods.values() for s in listed]
    return [m for m in TABLE_COLUMNS if any(getattr(s.total, m) is not None for s in subjects)]


def _method(name: str, subjects: Sequence[SubjectScores], columns: Sequence[str]) -> dict[str, Any]:
    """Rows of the table; cells are (sort key, text)."""
    rows = []
    for subject in subjects:
        values = [getattr(subject.total, metric) for metric in columns]
        empty = f"{subject.total.empty_masks} / {subject.total.masks}"
        rows.append(
            {
                "concept": subject.name,
                "base_class": subject.base_class,
                "cells": [("" if v is None else v, number(v)) for v in values],
                "copies": subject.total.copies,
                "images": subject.total.images,
                "empty": (subject.total.empty_masks, empty if subject.total.masks else "no masks"),
            }
        )
    mean = []
    for metric in columns:
        value = means(subjects)[metric]
        if isinstance(value, Interval):
            mean.append((number(value.mean), f"{number(value.low)} to {number(value.high)}"))
        else:
            mean.append((number(value), ""))
    real = real_means(subjects)
    ceiling = [number(real.get(metric)) for metric in columns]
    return {"name": name, "rows": rows, "mean": mean, "real": ceiling}


def _gate(gate: GateResult) -> dict[str, Any]:
    return {
        "failed": [(name, "; ".join(reasons)) for name, reasons in gate.failed.items()],
        "total": len(gate.failed) + len(gate.passed),
        "settings": gate.settings,
        "unchecked": [(CHECKS[key], names) for key, names in gate.not_checked.items()],
    }


def _gallery(method: str, gallery: ClassGallery) -> dict[str, Any]:
    real = gallery.real_rank1
    return {
        "method": method,
        "base_class": gallery.base_class,
        "judge": f"{gallery.judge}, {gallery.view}",
        "concepts": len(gallery.concepts),
        "photos": gallery.photos,
        "rank1": f"{gallery.mean('rank1'):.2f}",
        "chance": f"{gallery.mean('chance'):.2f}",
        "real": "-" if real is None else f"{real:.2f}",
        "map": f"{gallery.mean('mean_average_precision'):.2f}",
        "confusions": [describe_confusion(pair) for pair in gallery.confusions],
    }


def _concept(
    subject: SubjectScores,
    evaluation: Evaluation,
    material: PageMaterial,
    others: Mapping[str, Sequence[SubjectScores]],
) -> dict[str, Any]:
    references = material.references[subject.name]
    crops = [
        None if mask is None else masked_crop(picture, mask, material.fill)
        for picture, mask in zip(references.pictures, references.masks, strict=True)
    ]
    peers = {
        name: {p.prompt: p for s in listed if s.name == subject.name for p in s.prompts}
        for name, listed in others.items()
    }
    return {
        "name": subject.name,
        "base_class": subject.base_class,
        "references": [_data_uri(picture) for picture in references.pictures],
        "held_out": [_data_uri(picture) for picture in references.judged_by.pictures]
        if references.held_out
        else [],
        "crops": [_data_uri(crop) for crop in crops if crop is not None],
        "real": subject.real,
        "total": subject.total,
        "ignored": subject.ignored,
        "prompts": [_prompt(prompt, material, peers) for prompt in subject.prompts],
        "charts": _charts(subject.name, evaluation, material),
    }


def _prompt(
    prompt: PromptScores, material: PageMaterial, peers: Mapping[str, Mapping[str, PromptScores]]
) -> dict[str, Any]:
    pixels, mask = read_pixels(prompt.shown), read_mask(prompt.shown)
    crop = None if mask is None else masked_crop(pixels, mask, material.fill)
    return {
        "prompt": prompt.prompt,
        "edit": prompt.edit,
        "scores": prompt.scores,
        "image": _data_uri(pixels),
        "crop": None if crop is None else _data_uri(crop),
        "empty": mask is not None and crop is None,
        "peers": [
            (name, _data_uri(read_pixels(by_prompt[prompt.prompt].shown)))
            for name, by_prompt in peers.items()
            if prompt.prompt in by_prompt
        ],
    }


def _charts(name: str, evaluation: Evaluation, material: PageMaterial) -> list[Chart]:
    points = evaluation.curves.get(name, ())
    charts = [
        line_chart(TABLE_COLUMNS[metric], {"": [(step, getattr(s, metric)) for step, s in points]})
        for metric in _CURVES
    ]
    charts.append(line_chart("evaluation loss", material.losses.get(name, {})))
    return [chart for chart in charts if chart is not None]


def _prior(scores: PriorScores) -> dict[str, Any]:
    said = {True: "identical", False: "DIFFERENT", None: "not checked"}
    kept, plain = scores.class_kept, scores.class_kept_plain
    return {
        "off": said[scores.off_identical],
        "other": said[scores.other_identical],
        "broken": scores.off_identical is False,
        "drift": number(scores.drift),
        "kept": "-" if kept is None else f"{kept:.0%}",
        "plain": "-" if plain is None else f"{plain:.0%}",
        "images": scores.images,
    }


def _data_uri(pixels: np.ndarray) -> str:
    """The picture inlined, at most ``_THUMBNAIL`` pixels high and wide."""
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= _LOSSLESS_UP_TO else "jpeg"
    image.save(buffer, format=kind, **({} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
