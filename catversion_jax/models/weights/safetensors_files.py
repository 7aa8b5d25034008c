"""Finding and reading safetensors files, one tensor at a time.

The format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header
``{name: {dtype, shape, data_offsets}}``, then the raw little-endian tensors. Tensors are read by
offset instead of through a memory map, because mapped pages count as the process's memory and would
double the peak while loading.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from catversion_jax.config.documents import without_repetition
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.weights.hf_config import read_config

STEMS = ("diffusion_pytorch_model", "model")
"""File names without ending: diffusers writes the first, transformers the second."""

PICKLED = (".bin", ".ckpt", ".pt", ".pth")

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

HEADER_LIMIT = 32 * 1024 * 1024
"""Bytes of a header; the format allows 100 MB, known models have less than 1 MB."""

MOST_LISTED = 40
"""Names of tensors of one kind in a message."""

SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
"""Plain names: what an index names lies beside it."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file; ``numpy.asarray`` reads it."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            array = np.fromfile(file, dtype=self.dtype, count=int(np.prod(self.shape))).reshape(
                self.shape
            )
        return array if dtype is None else array.astype(dtype)


def open_checkpoint(folder: str | Path, *, variant: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name; nothing but headers is read.

    Args:
      folder: a folder with ``<stem>[.<variant>].safetensors``, or its shards and their index.
      variant: for instance ``"fp16"``.

    Raises:
      CatVersionError: no such weights; the message lists what exists.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CatVersionError(
            f"{folder}: the folder does not exist; weights were expected in it. Check the path."
        )
    names = sorted(path.name for path in folder.iterdir())
    for stem in STEMS:
        for name in weight_files(stem, variant):
            if name in names:
                return (
                    _open_shards(folder / name)
                    if name.endswith(".json")
                    else read_header(folder / name)
                )
    raise CatVersionError(missing_weights(str(folder), names, variant))


def weight_files(stem: str, variant: str | None) -> tuple[str, ...]:
    """File names that hold the weights of a variant, or the index of their shards; the first one
    counts.
    """
    infix = f".{variant}" if variant else ""
    single = f"{stem}{infix}.safetensors"
    # Both places for the variant's name in an index are in use.
    return single, f"{stem}.safetensors.index{infix}.json", f"{single}.index.json"


def shard_patterns(stem: str, variant: str | None) -> tuple[str, ...]:
    """Glob patterns of a variant's shards."""
    infix = f".{variant}" if variant else ""
    return f"{stem}{infix}-?????-of-?????.safetensors", f"{stem}-?????-of-?????{infix}.safetensors"


def missing_weights(where: str, names: Sequence[str], variant: str | None) -> str:
    """The message for a place whose files ``names`` hold no weights of ``variant``."""
    variants = _variants(names)
    if variants:
        remedy = "Pass " + " or ".join(f"variant={name!r}" for name in variants) + "."
    elif any(name.endswith(PICKLED) for name in names):
        remedy = (
            "Pickled weights can run arbitrary code and are not read. Convert them once in "
            "PyTorch: load the model with diffusers or transformers and call "
            "save_pretrained(folder, safe_serialization=True)."
        )
    else:
        remedy = (
            f"Expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}; download the model "
            "again."
        )
    wanted = f"safetensors weights{f' of variant {variant!r}' if variant else ''}"
    return f"{where}: no {wanted}; found {list(names)}. {remedy}"


def _variants(names: Sequence[str]) -> list[str | None]:
    """Variants whose safetensors are among ``names``; None is the plain one."""
    pattern = re.compile(
        rf"(?:{'|'.join(STEMS)})(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
    )
    matches = [match for match in map(pattern.fullmatch, names) if match]
    return sorted({match[1] or match[2] for match in matches}, key=lambda name: name or "")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensor names, shapes and places of one safetensors file.

    Raises:
      CatVersionError: not a whole safetensors file, or a dtype that needs dequantization.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """As :func:`read_header`, and the texts that the writer left in ``__metadata__``.

    Raises:
      CatVersionError: see :func:`read_header`.
    """
    if not path.is_file():
        raise CatVersionError(
            f"{path}: is not a regular file, or a link to one that is missing. Download it again."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start.startswith(b"version "):
            raise CatVersionError(
                f"{path}: is a git-lfs pointer, not the weights. Run 'git lfs pull' there."
            )
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise CatVersionError(
                f"{path}: not a safetensors file ({size} bytes, header length {length}); it is "
                "probably cut off or of another kind. Download it again."
            )
        try:
            header = parse_header(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CatVersionError(
                f"{path}: damaged safetensors header ({shown(error)}). Download it again."
            ) from error
    if not isinstance(header, dict):
        raise CatVersionError(
            f"{path}: damaged safetensors header ({shown(header, 80)} is no object). Download it "
            "again."
        )
    notes = header.pop("__metadata__", None)
    metadata = (
        {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}
    )
    tensors = {
        name: _stored_tensor(path, name, entry, 8 + length, size) for name, entry in header.items()
    }
    return tensors, metadata


def parse_header(data: bytes) -> Any:
    """The JSON of a header, in which no name may appear twice.

    Raises:
      ValueError, RecursionError: it is not such JSON.
    """
    return json.loads(data, object_pairs_hook=without_repetition)


def _stored_tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    """One entry of a header, checked against a file of ``size`` bytes whose data begin at
    ``start``.
    """
    shape: Any
    offsets: Any
    shape, offsets = (
        entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "data_offsets")
    )
    whole = all(
        isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        for numbers in (shape, offsets)
    )
    if not whole or len(offsets) != 2 or not isinstance(entry.get("dtype"), str):
        raise CatVersionError(
            f"{path}: tensor {name:.200} has the header {shown(entry)}; must be dtype, shape and "
            "two data_offsets. The file is damaged: download it again."
        )
    if entry["dtype"] not in DTYPES:
        raise CatVersionError(
            f"{path}: tensor {name:.200} has dtype {entry['dtype']:.40}; supported are "
            f"{', '.join(DTYPES)}. Use the model's unquantized weights."
        )
    dtype = np.dtype(DTYPES[entry["dtype"]])
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise CatVersionError(
            f"{path}: tensor {name:.200} lies outside the file ({size} bytes); the file is cut off "
            "or damaged. Download it again."
        )
    return StoredTensor(path, start + begin, tuple(shape), dtype)


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_config(index.parent, index.name).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise CatVersionError(
            f"{index}: not an index of shards; weight_map = {shown(weight_map)} must give each "
            "tensor the name of a .safetensors file beside it. Download it again."
        )
    shards = sorted(set(names))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CatVersionError(
            f"{index}: these shards are missing beside it: {missing}. Download them."
        )
    tensors: dict[str, StoredTensor] = {}
    for name in shards:
        tensors.update(read_header(index.parent / name))
    return tensors
