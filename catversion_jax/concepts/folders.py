"""One folder of images: which files are images, which are masks, which are neither.

Masks follow the habits of the field, and a file recognised as a mask is never a training image:

| habit                                          | example                               |
|------------------------------------------------|---------------------------------------|
| ``<image stem>-masklabel.<ext>`` (OneTrainer)  | ``dog-masklabel.png`` for ``dog.jpg``  |
| ``<image stem>.mask.<ext>`` (cloneofsimo/lora) | ``1.mask.png`` for ``1.png``, ``1.src.jpg`` |
| a parallel folder, same stem (kohya)           | ``masks/dog.png``, ``../<folder>_masks/dog.png``|
| the image's own alpha channel                  | decided when the image is decoded     |
| ``<image stem>_mask.<ext>``, only when that image exists | ``dog_mask.png`` for ``dog.jpg`` |

``<image stem>.txt`` and ``.caption`` hold its captions.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from catversion_jax.config.data import DataOptions
from catversion_jax.errors import ConceptError, encodable
from catversion_jax.runtime.alike_names import folded

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
MaskPolarity = Literal["white", "black"]
CAPTION_SUFFIXES = (".txt", ".caption")
MASK_FOLDERS = ("masks", "mask")
EVAL_FOLDER = "eval_images"
_MASK_STEM = re.compile(r"^(?P<image>.+)(-masklabel|\.mask)$", re.IGNORECASE)
_PAIRED_MASK_STEM = re.compile(r"^(?P<image>.+)[_-]mask$", re.IGNORECASE)
_SYSTEM_NAMES = frozenset({"__macosx", "@eadir", "__pycache__", "thumbs.db", "desktop.ini"})


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """One training image: a file, or the encoded bytes of a dataset row.

    Attributes:
      label: short name for messages and metadata.
      path: the file, or None when only ``data`` is known.
      data: the encoded (not decoded) file contents, or None when ``path`` is to be read.
      mask: file that says where the object is, or None.
      mask_polarity: what the object is in the mask file and that it is meant so; None for white,
        with masks that look wrong refused where they decide the loss.
      max_megapixels: most pixels, in millions, that are decoded.
      caption: what the row of a list says of it; one line each.
      caption_file: a text file that does, read where there is no ``caption``.
    """

    label: str
    path: Path | None = None
    data: bytes | None = dataclasses.field(default=None, repr=False)
    mask: Path | None = None
    mask_polarity: MaskPolarity | None = DataOptions.mask_polarity
    max_megapixels: float = DataOptions.max_megapixels
    caption: str | None = None
    caption_file: Path | None = None


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """What :func:`list_images` found. ``nested`` are sub-folders that hold images of their own;
    ``held_out`` are photos that are kept from training.
    """

    images: tuple[ImageSource, ...]
    nested: tuple[Path, ...] = ()
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    held_out: tuple[ImageSource, ...] = ()


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts ``2.png`` before ``10.png`` and is the same on every file system."""
    parts = re.split(r"([0-9]+)", name)
    return [part.casefold() if i % 2 == 0 else int(part) for i, part in enumerate(parts)], name


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system, not to the user (``.DS_Store``, ``Thumbs.db``
    ...).
    """
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def is_image_name(path: Path) -> bool:
    """Whether the name is that of an image file; whether it decodes is known only when it is
    read.
    """
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name)


def is_mask_name(path: Path) -> bool:
    """Whether a file of that name is a mask, whatever lies beside it."""
    return _MASK_STEM.match(path.stem) is not None


def children(folder: Path) -> list[Path]:
    """Entries of ``folder`` in natural order.

    Raises:
      ConceptError: the folder cannot be listed.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise ConceptError(
            f"{folder}: cannot be listed ({error.strerror or error}). Check that it is a folder "
            "you may read."
        ) from error


def holds_images(folder: Path) -> bool:
    """Whether a training image (not only masks) lies directly in ``folder``."""
    return any(
        path.is_file() and is_image_name(path) and not is_mask_name(path)
        for path in children(folder)
    )


def mask_folder_of(folder: Path) -> Path | None:
    """The parallel mask folder of ``folder`` by naming habit, inside it or beside it, or None."""
    beside = [f"{folder.name}{joint}{word}" for joint in "_-" for word in MASK_FOLDERS]
    candidates = [folder / name for name in MASK_FOLDERS] + [
        folder.parent / name for name in beside
    ]
    return next((path for path in candidates if path.is_dir()), None)


def eval_folder_of(folder: Path) -> Path | None:
    """The sub-folder of held-out photos by naming habit, ``eval_images``, or None."""
    path = folder / EVAL_FOLDER
    return path if path.is_dir() and holds_images(path) else None


def list_images(
    folder: Path,
    *,
    mask_folder: Path | None = None,
    eval_folder: Path | None = None,
    ignore: Iterable[str] = (),
) -> FolderImages:
    """Sort the contents of one folder into training images, masks, nested folders and the rest.

    Args:
      folder: the folder; sub-folders are not entered.
      mask_folder: parallel folder of masks; found by naming habit when None.
      eval_folder: folder of photos that are held out; found by naming habit when None.
      ignore: file names that are configuration, not to be reported as skipped.

    Raises:
      ConceptError: the folder cannot be listed.
    """
    mask_folder = mask_folder or mask_folder_of(folder)
    eval_folder = eval_folder or eval_folder_of(folder)
    apart = [path for path in (mask_folder, eval_folder) if path is not None]
    candidates: list[Path] = []
    texts: list[Path] = []
    nested: list[Path] = []
    skipped: list[str] = []
    broken: list[str] = []
    for path in children(folder):
        if path.is_dir():
            if any(os.path.samefile(path, other) for other in apart):
                continue
            if not is_hidden(path.name) and holds_images(path):
                nested.append(path)
            else:
                skipped.append(f"{path.name}/")
        elif path.is_file() and is_image_name(path):
            candidates.append(path)
        elif path.is_file() and path.suffix.lower() in CAPTION_SUFFIXES:
            texts.append(path)
        elif path.name not in ignore:
            skipped.append(path.name if path.exists() else f"{path.name} (broken link)")
        if is_image_name(path) and not path.exists():
            broken.append(path.name)
    images, masks = _separate_masks(candidates)
    if mask_folder is not None:
        named = [path for path in children(mask_folder) if is_image_name(path)]
        found = [path for path in named if path.is_file()]
        broken += [f"{mask_folder.name}/{path.name}" for path in named if not path.exists()]
        masks += [(_mask_target(path) or path.stem, path) for path in found]
    sources, warnings = _pair(images, masks)
    if broken:
        warnings += (f"not used, since the files they link to are missing: {', '.join(broken)}",)
    captions = {path.stem: path for path in reversed(texts)}
    alike = {folded(path.stem): path for path in reversed(texts)}
    sources = tuple(_with_caption(source, captions, alike) for source in sources)
    used = {source.caption_file for source in sources}
    skipped += [path.name for path in texts if path not in used and path.name not in ignore]
    skipped.sort(key=natural_key)
    shown_names = tuple(map(encodable, skipped))
    return FolderImages(sources, tuple(nested), shown_names, tuple(map(encodable, warnings)))


def _with_caption(
    source: ImageSource, captions: Mapping[str, Path], alike: Mapping[str, Path]
) -> ImageSource:
    """``source`` with the text file of its name, else of a name that is like it;
    ``1.png.txt`` counts too.
    """
    names = [source.path.stem, source.path.name] if source.path is not None else []
    files = [captions.get(name) for name in names] + [alike.get(folded(name)) for name in names]
    found = next((file for file in files if file is not None), None)
    return dataclasses.replace(source, caption_file=found)


def _mask_target(path: Path) -> str | None:
    match = _MASK_STEM.match(path.stem)
    return match["image"] if match else None


def _separate_masks(candidates: list[Path]) -> tuple[list[Path], list[tuple[str, Path]]]:
    """Split image files into training images and ``(image stem, mask file)``."""
    stems = {folded(path.stem) for path in candidates}
    images: list[Path] = []
    masks: list[tuple[str, Path]] = []
    for path in candidates:
        target = _mask_target(path)
        paired = _PAIRED_MASK_STEM.match(path.stem)
        if target is None and paired and folded(paired["image"]) in stems:
            target = paired["image"]
        if target is None:
            images.append(path)
        else:
            masks.append((target, path))
    return images, masks


def _called(image: Path) -> tuple[str, ...]:
    """What a mask may call its image."""
    # cloneofsimo/lora writes the prepared image as N.src.jpg beside N.mask.png
    return image.name, image.stem, image.stem.removesuffix(".src")


def _pair(
    images: list[Path], masks: list[tuple[str, Path]]
) -> tuple[tuple[ImageSource, ...], tuple[str, ...]]:
    """Give every image its mask, and say which masks found no image or came second."""
    warnings: list[str] = []
    mask_of: dict[str, Path] = {}
    known = [name for path in images for name in _called(path)]
    alike = {folded(name): name for name in reversed(known)}
    exact = set(known)
    found = [(t if t in exact else alike.get(folded(t), t), t, path) for t, path in masks]
    # a mask of the very name comes before one whose name is only like it
    for target, _, path in sorted(found, key=lambda one: one[0] != one[1]):
        if target in mask_of:
            warnings.append(
                f"mask {path.name} not used: {mask_of[target].name} is already the mask of {target}"
            )
        else:
            mask_of[target] = path
    sources = []
    used = set()
    for path in images:
        targets = [target for target in _called(path) if target in mask_of]
        used.update(targets[:1])
        sources.append(
            ImageSource(encodable(path.name), path, mask=mask_of[targets[0]] if targets else None)
        )
    users: dict[Path, list[str]] = {}
    for source in sources:
        if source.mask is not None:
            users.setdefault(source.mask, []).append(source.label)
    warnings += [
        f"{' and '.join(labels)} have one mask: {path.name}"
        for path, labels in users.items()
        if len(labels) > 1
    ]
    warnings += [
        f"mask {path.name} has no image" for target, path in mask_of.items() if target not in used
    ]
    return tuple(sources), tuple(warnings)
