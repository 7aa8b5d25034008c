"""``catversion masks CONCEPTS``: object masks beside the images, for masked training and the masked
score.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from catversion_jax.cli.model_arguments import add_dtype_argument, add_source_arguments, load_model
from catversion_jax.cli.paths import path_argument
from catversion_jax.concepts import ConceptSpec, read_concepts
from catversion_jax.concepts.fields import MASK_POLARITIES, WHEN
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.config import TrainConfig
from catversion_jax.config.masks import MaskSettings
from catversion_jax.errors import CatVersionError, ConceptError, shown
from catversion_jax.runtime.columns import aligned

if TYPE_CHECKING:
    import numpy as np

    from catversion_jax.concepts.mask_files import MaskMaker, ObjectMask

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MaskSettings)}
_TRAIN_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
_COLUMNS = ("name", "base class", "images", "made", "given", "alpha", "mean area", "empty", "full")
_COMPARED = ("name", "base class", "masks", "IoU", "lowest", "whole image", "centred disk")
_DISK_RADIUS = 0.35
_IMAGES_PER_ROW = 5
_ROWS_PER_SHEET = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("concepts", metavar="CONCEPTS", help="folder or manifest of concepts")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        help="model folder, single file or hub id: masks from its attention to the base class",
    )
    source.add_argument(
        "--clipseg", metavar="FOLDER", help="CLIPSeg folder: masks from it instead (needs torch)"
    )
    add("--base_class", help="base class of concepts that do not name their own")
    add(
        "--when",
        choices=WHEN,
        default=_TRAIN_DEFAULTS["when"],
        help="prompts that concepts act on: those with the class word, or all "
        f"[{_TRAIN_DEFAULTS['when']}]",
    )
    add(
        "--mask_polarity",
        choices=MASK_POLARITIES,
        help="colour of the object in the masks that were given [white]",
    )
    add(
        "--overwrite",
        action="store_true",
        help="make all masks again, also those that were given [given masks and alpha win]",
    )
    add(
        "--compare",
        action="store_true",
        help="write nothing; print the overlap (IoU) with the masks that were given",
    )
    add(
        "--output_dir",
        type=path_argument,
        default="catversion-masks",
        help="receives contact sheets of image, mask, cut-out [catversion-masks]",
    )
    add(
        "--noise_levels",
        type=float,
        nargs="+",
        help="how noisy the image is when the UNet looks at it, from 0 to below 1, a number for "
        f"each look [{' '.join(map(str, MaskSettings.noise_levels))}]",
    )
    add(
        "--num_draws",
        type=int,
        help=f"number of noises of each level, whose maps are averaged [{_DEFAULTS['num_draws']}]",
    )
    add(
        "--min_map_side",
        type=int,
        help="least number of positions along the shorter side of an attention map; smaller maps "
        f"are left out [{_DEFAULTS['min_map_side']}]",
    )
    add(
        "--edge_window",
        type=float,
        help=f"window of the fit to edges, as a share of the image [{_DEFAULTS['edge_window']}]",
    )
    add(
        "--threshold",
        type=float,
        help="least probability at which CLIPSeg's pixels belong to the object [0.5]",
    )
    add_source_arguments(parser)
    add_dtype_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Make the masks; 3 when some concepts could not be read."""
    settings = _settings(args)
    found = read_concepts(
        args.concepts,
        base_class=args.base_class,
        default_when=args.when,
        mask_polarity=args.mask_polarity,
    )
    # held-out photos want masks too: the masked score is of both sides
    concepts = [
        dataclasses.replace(spec, images=(*spec.images, *spec.eval_images))
        for spec in found.concepts
    ]
    failures = {problem.name: problem.message for problem in found.problems}
    make, resolution = _maker(args, settings)
    if args.compare:
        _compare(concepts, make, resolution, failures)
    else:
        _write(args, concepts, make, resolution, failures)
    for name, message in failures.items():
        print(f"{name}: left out: {message}", file=sys.stderr)
    return 3 if failures else 0


def _settings(args: argparse.Namespace) -> MaskSettings:
    given = {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}
    of_model = [
        *given,
        *(k for k in ("revision", "variant", "prediction_type", "dtype") if getattr(args, k)),
    ]
    if args.clipseg is not None and of_model:
        raise CatVersionError(
            f"--{of_model[0]}: is an option of --model and means nothing to --clipseg. Leave it "
            "out."
        )
    if args.clipseg is None and args.threshold is not None:
        raise CatVersionError(
            "--threshold: is an option of --clipseg; attention maps are thresholded by Otsu's "
            "method. Leave it out."
        )
    if "noise_levels" in given:
        given["noise_levels"] = tuple(given["noise_levels"])
    return MaskSettings(**given)


def _maker(args: argparse.Namespace, settings: MaskSettings) -> tuple[MaskMaker, int]:
    """What makes masks, and the side of the images it wants."""
    if args.clipseg is not None:
        try:
            from catversion_jax.integrations.clipseg import THRESHOLD, load_clipseg
        except ImportError as error:
            raise CatVersionError(
                f"--clipseg: needs PyTorch ({error}). pip install 'catversion-jax[torch]', or use "
                "--model."
            ) from None
        threshold = THRESHOLD if args.threshold is None else args.threshold
        clipseg = load_clipseg(args.clipseg, threshold=threshold)
        return clipseg, clipseg.side

    from catversion_jax.sampling.class_word_masks import class_word_masks

    backbone = load_model(args, args.model, dtype=args.dtype)
    return (
        lambda pixels, words: class_word_masks(backbone, pixels, words, settings),
        backbone.default_resolution,
    )


def _write(
    args: argparse.Namespace,
    concepts: Sequence[ConceptSpec],
    make: MaskMaker,
    resolution: int,
    failures: dict[str, str],
) -> None:
    """Masks beside the images, a line per concept, contact sheets."""
    from catversion_jax.concepts.mask_files import mask_paths, object_masks, write_mask
    from catversion_jax.runtime.atomic_files import check_writable

    _check_outside(args.output_dir, args.concepts, concepts)
    check_writable(args.output_dir)
    rows, sheet_rows = [], []
    made: dict[Path, tuple[str, str]] = {}
    for spec in concepts:
        try:
            with concept_errors(f"{spec.name}: its masks cannot be made"):
                paths = mask_paths(spec, replace=args.overwrite)
                masks = object_masks(spec, make, resolution=resolution, replace=args.overwrite)
                for path, mask in zip(paths, masks, strict=True):
                    if mask.origin != "given":
                        _check_one_class(made, path, spec)
                        write_mask(path, mask.mask, mask.source.mask_polarity)
        except ConceptError as error:
            failures[spec.name] = str(error)
            continue
        rows.append(_row(spec, masks))
        sheet_rows += _sheet_rows(spec, masks)
    print("\n".join(aligned([_COLUMNS, *rows], left=(0, 1))))
    for path in _write_sheets(args.output_dir, sheet_rows):
        print(path)


def _check_outside(output: Path, source: str, concepts: Sequence[ConceptSpec]) -> None:
    """Make sure that the next reader of the photos takes no contact sheet for one of them.

    Raises:
      CatVersionError: they would lie beside photos.
    """
    from catversion_jax.training.run.directory import check_outside

    check_outside(output, source)
    images = [image.path for spec in concepts for image in spec.images if image.path is not None]
    if output.resolve() in {path.parent.resolve() for path in images}:
        raise CatVersionError(
            f"--output_dir {output}: holds the photos, and the contact sheets would be taken for "
            "photos. Give another folder."
        )


def _check_one_class(made: dict[Path, tuple[str, str]], path: Path, spec: ConceptSpec) -> None:
    """Make sure that no mask is made twice, of different things in one photo.

    Args:
      made: what was made so far: the first concept's name and base class by file.
      path: the file to write.
      spec: the concept.

    Raises:
      ConceptError: the file is another thing's mask already.
    """
    first, base_class = made.setdefault(path.resolve(), (spec.name, spec.base_class))
    if base_class != spec.base_class:
        raise ConceptError(
            f"{path}: is the mask of {shown(base_class)} in that photo, for concept {first}. Give "
            f"concept {spec.name} a copy of the photo, or list its `masks`."
        )


def _row(spec: ConceptSpec, masks: Sequence[ObjectMask]) -> tuple[str, ...]:
    from catversion_jax.concepts.mask_files import FULL_SHARE
    from catversion_jax.concepts.mask_values import EMPTY_SHARE

    areas = [mask.area for mask in masks]
    origins = [mask.origin for mask in masks]
    return (
        spec.name,
        spec.base_class,
        str(len(masks)),
        *(str(origins.count(origin)) for origin in ("made", "given", "alpha")),
        f"{100 * sum(areas) / len(areas):.1f} %",
        str(sum(area < EMPTY_SHARE for area in areas)),
        str(sum(area > FULL_SHARE for area in areas)),
    )


def _sheet_rows(
    spec: ConceptSpec, masks: Sequence[ObjectMask]
) -> list[tuple[str, list[np.ndarray | None]]]:
    """Labelled rows of a contact sheet, padded to one length."""
    from catversion_jax.concepts.mask_files import thumbnails

    rows = []
    for start in range(0, len(masks), _IMAGES_PER_ROW):
        shown: list[np.ndarray | None] = [
            cell for mask in masks[start : start + _IMAGES_PER_ROW] for cell in thumbnails(mask)
        ]
        shown += [None] * (3 * _IMAGES_PER_ROW - len(shown))
        rows.append((f"{spec.name} ({spec.base_class})", shown))
    return rows


def _write_sheets(folder: Path, rows: Sequence[tuple[str, list[np.ndarray | None]]]) -> list[Path]:
    from catversion_jax.runtime.atomic_files import make_folder
    from catversion_jax.sampling.grids import image_grid
    from catversion_jax.sampling.png import save_png

    paths = []
    make_folder(folder)
    for start in range(0, len(rows), _ROWS_PER_SHEET):
        labels, cells = zip(*rows[start : start + _ROWS_PER_SHEET], strict=True)
        path = folder / f"sheet_{start // _ROWS_PER_SHEET + 1}.png"
        columns = ("image", "mask", "cut-out") * _IMAGES_PER_ROW
        sheet = image_grid(cells, row_labels=labels, column_labels=columns)
        save_png(path, sheet, synthetic=False)
        paths.append(path)
    return paths


def _compare(
    concepts: Sequence[ConceptSpec],
    make: MaskMaker,
    resolution: int,
    failures: dict[str, str],
) -> None:
    """Print the overlap of made masks with given ones, beside what no model is needed for."""
    import numpy as np

    from catversion_jax.concepts.mask_files import object_masks
    from catversion_jax.concepts.object_masks import centred_disk, intersection_over_union

    rows, scores = [], []
    for spec in concepts:
        judged = dataclasses.replace(
            spec, images=tuple(source for source in spec.images if source.mask is not None)
        )
        if not judged.images:
            failures[spec.name] = "no mask was given to compare with."
            continue
        try:
            with concept_errors(f"{spec.name}: its masks cannot be made"):
                given = object_masks(judged, make, resolution=resolution)
                made = object_masks(judged, make, resolution=resolution, replace=True)
        except ConceptError as error:
            failures[spec.name] = str(error)
            continue
        of_images = []
        for one, other in zip(made, given, strict=True):
            true = np.asarray(other.mask)
            guesses = (
                np.asarray(one.mask),
                np.full_like(true, 255),
                centred_disk(true.shape, _DISK_RADIUS),
            )
            of_images.append([intersection_over_union(guess, true) for guess in guesses])
        scores += of_images
        rows.append(_compared_row(spec.name, spec.base_class, of_images))
    if scores:
        rows.append(_compared_row("mean of images", "", scores))
    print("\n".join(aligned([_COMPARED, *rows], left=(0, 1))))


def _compared_row(name: str, base_class: str, scores: Sequence[Sequence[float]]) -> tuple[str, ...]:
    made, whole, disk = (sum(column) / len(column) for column in zip(*scores, strict=True))
    lowest = min(score[0] for score in scores)
    return (
        name,
        base_class,
        str(len(scores)),
        *(f"{value:.3f}" for value in (made, lowest, whole, disk)),
    )
