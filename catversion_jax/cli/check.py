"""``catversion check CONCEPTS``: what a folder, manifest or dataset of concepts holds, and what may
go wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from catversion_jax.cli.model_arguments import add_prediction_type_argument
from catversion_jax.concepts import ConceptList, ConceptSpec, read_concepts
from catversion_jax.concepts.fields import MASK_POLARITIES, WHEN
from catversion_jax.concepts.long_lists import LongList, open_long_list
from catversion_jax.concepts.report import ConceptReport, report_concept
from catversion_jax.config import TrainConfig
from catversion_jax.config.data import DataOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.models.weights.model_files import open_model
from catversion_jax.runtime.columns import aligned

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
_SD_RESOLUTION = 512
_MIN_RESOLUTION = 8  # as for training: one latent position
_HEADER = ("name", "base class", "other forms", "images", "masks", "smallest side", "prompts")
_LEFT_COLUMNS = (0, 1, 2, 6)
_BLOCK = 1000
"""Concepts of a long list that are reported together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; names and defaults are those of training."""
    parser.add_argument(
        "concepts", metavar="CONCEPTS", help="folder, manifest, or dataset (hf:owner/name)"
    )
    parser.add_argument("--base_class", help="base class of concepts that do not name their own")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="model folder, file or hub id: also check words and prompts with its tokenizer",
    )
    add_prediction_type_argument(parser)
    parser.add_argument(
        "--resolution",
        type=int,
        help=f"training size in pixels [the model's, else {_SD_RESOLUTION}]",
    )
    parser.add_argument(
        "--alpha",
        choices=("white", "mask"),
        default=_DEFAULTS["alpha"],
        help="what transparency means: put the image on white, or also take it as the object mask "
        f"[{_DEFAULTS['alpha']}]",
    )
    parser.add_argument(
        "--mask_polarity",
        choices=MASK_POLARITIES,
        help="what the object is in mask files [white, and masks that look wrong are named]",
    )
    parser.add_argument(
        "--max_megapixels",
        type=float,
        default=_DEFAULTS["max_megapixels"],
        help="largest image that is decoded, in millions of pixels "
        f"[{_DEFAULTS['max_megapixels']:g}]",
    )
    parser.add_argument(
        "--holdout",
        type=int,
        default=_DEFAULTS["holdout"],
        help="number of each concept's last photos that are kept from training "
        f"[{_DEFAULTS['holdout']}]",
    )
    parser.add_argument(
        "--instance_prompt",
        default=_DEFAULTS["instance_prompt"],
        help="template of the training prompts, or 'object' or 'style' for a list of templates "
        f"[{_DEFAULTS['instance_prompt']}]",
    )
    parser.add_argument(
        "--when",
        choices=WHEN,
        default=_DEFAULTS["when"],
        help=f"prompts that concepts act on: those with the class word, or all "
        f"[{_DEFAULTS['when']}]",
    )
    parser.add_argument(
        "--dataset_split",
        default=_DEFAULTS["dataset_split"],
        help=f"split that is read of a dataset [{_DEFAULTS['dataset_split']}]",
    )
    parser.add_argument(
        "--image_column",
        default=_DEFAULTS["image_column"],
        help=f"dataset column that holds the images [{_DEFAULTS['image_column']}]",
    )
    parser.add_argument("--concept_column", help="dataset column that names the concept of a row")
    parser.add_argument("--base_class_column", help="dataset column that holds the base class")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when every concept can be trained, 3 when some have problems."""
    if args.resolution is not None and args.resolution < _MIN_RESOLUTION:
        raise CatVersionError(
            f"--resolution {args.resolution}: must be at least {_MIN_RESOLUTION} pixels. Leave it "
            "out for the model's own."
        )
    DataOptions(max_megapixels=args.max_megapixels, holdout=args.holdout)  # the options' ranges
    tokenizer = None
    resolution = _SD_RESOLUTION if args.resolution is None else args.resolution
    if args.model is not None:
        files = open_model(args.model, prediction_type=args.prediction_type, weights=False)
        tokenizer = files.tokenizer()
        if args.resolution is None:
            # imports jax, which the rest of this command does without
            from catversion_jax.models.stable_diffusion import model_resolution

            resolution = model_resolution(files)
    shared: dict[str, Any] = {
        "base_class": args.base_class,
        "default_when": args.when,
        "mask_polarity": args.mask_polarity,
        "max_megapixels": args.max_megapixels,
        "holdout": args.holdout,
    }
    report = functools.partial(
        report_concept,
        resolution=resolution,
        alpha=args.alpha,
        templates=args.instance_prompt,
        default_when=args.when,
        tokenizer=tokenizer,
    )
    if (long_list := open_long_list(args.concepts, **shared)) is not None:
        return _check_long(long_list, report, as_json=args.json)
    found = read_concepts(
        args.concepts,
        dataset_split=args.dataset_split,
        image_column=args.image_column,
        concept_column=args.concept_column,
        base_class_column=args.base_class_column,
        **shared,
    )
    reports = [report(spec) for spec in found.concepts]
    if args.json:
        _print_json(reports, found)
    else:
        _print_table(reports, found)
        print(_total(*_counts(reports, found)))
    return 3 if found.problems or any(report.problems for report in reports) else 0


def _check_long(
    long_list: LongList, report: Callable[[ConceptSpec], ConceptReport], *, as_json: bool
) -> int:
    """Report a long list in blocks, a table or a line of JSON each, as they are read."""
    bad = total = 0
    for found in long_list.blocks(_BLOCK):
        reports = [report(spec) for spec in found.concepts]
        if as_json:
            print(json.dumps(_as_json(reports, found), ensure_ascii=False))
        else:
            _print_table(reports, found)
        of_block, size = _counts(reports, found)
        bad, total = bad + of_block, total + size
    if not as_json:
        for note in long_list.notes:
            print(f"note: {note}")
        print(_total(bad, total))
    return 3 if bad else 0


def _print_json(reports: Sequence[ConceptReport], found: ConceptList) -> None:
    print(json.dumps(_as_json(reports, found), indent=1, ensure_ascii=False))


def _as_json(reports: Sequence[ConceptReport], found: ConceptList) -> dict[str, Any]:
    return {
        "concepts": [dataclasses.asdict(report) for report in reports],
        "problems": [dataclasses.asdict(problem) for problem in found.problems],
        "skipped": list(found.skipped),
        "notes": list(found.notes),
    }


def _print_table(reports: Sequence[ConceptReport], found: ConceptList) -> None:
    lines = aligned([_HEADER, *map(_row, reports)], left=_LEFT_COLUMNS)
    for line, report in zip(lines, [None, *reports], strict=True):
        print(line)
        if report is None:
            continue
        for kind, messages in (
            ("problem", report.problems),
            ("warning", report.warnings),
            ("note", report.notes),
        ):
            for message in messages:
                print(f"    {kind}: {message}")
        if report.skipped:
            print(f"    skipped: {', '.join(report.skipped)}")
    for problem in found.problems:
        print(f"{problem.name}\n    problem: {problem.message}")
    if found.skipped:
        print(f"skipped: {', '.join(found.skipped)}")
    for note in found.notes:
        print(f"note: {note}")


def _counts(reports: Sequence[ConceptReport], found: ConceptList) -> tuple[int, int]:
    """How many concepts cannot be trained, and how many there are."""
    bad = len(found.problems) + sum(bool(report.problems) for report in reports)
    return bad, len(reports) + len(found.problems)


def _total(bad: int, total: int) -> str:
    return f"{total} concept{'s' if total != 1 else ''}, {total - bad} ready to train"


def _row(report: ConceptReport) -> tuple[str, ...]:
    return (
        report.name,
        report.base_class,
        _shortened(report.class_forms),
        str(report.num_images),
        str(report.num_masks) if report.num_masks else "-",
        "-" if report.smallest_side is None else str(report.smallest_side),
        _shortened(report.prompts, first=1),
    )


def _shortened(texts: Sequence[str], first: int = 3) -> str:
    """The first ones, and how many there are more."""
    more = f" (+{len(texts) - first} more)" if len(texts) > first else ""
    return (", ".join(texts[:first]) or "-") + more
