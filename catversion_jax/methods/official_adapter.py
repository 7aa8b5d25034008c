r"""Concepts trained with the authors' own code (github.com/RoyZhao926/CatVersion), read without
torch.

Their ``pytorch_adapter.bin`` is a zip with a pickle that names one flat float32 vector several
times: once per adapted layer (the layer number is in the key) and once in the pool. The vector is

    (1)  control_trans.view(P, 2 L, N, H)      position slowest;
                                               index 2 l is the key, 2 l + 1 the value of layer l

so ``key[l, p, n, h] = flat[p, 2 l, n, h]``. Their additive causal mask is padded with ones:
``logit_bias`` is 1.

A pickle is a program. This reader runs none of it (``plain_pickle.py``), and reads no more numbers
than an adapter may have.
"""

from __future__ import annotations

import errno
import math
import re
import zipfile
from pathlib import Path

import numpy as np

from catversion_jax.config.documents import parse_json, read_text
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.plain_pickle import (
    MAX_PICKLE_BYTES,
    StoredTensor,
    read_named_tensors,
)
from catversion_jax.methods.residual import KVResidual
from catversion_jax.runtime.bucket_paths import path_text

ADAPTER_FILE_NAME = "pytorch_adapter.bin"
_LAYER_KEY = re.compile(r"(?:^|\.)layers\.([0-9]{1,4})\.(?:.*\.)?control_trans$")
_HEAD_DIM = 64  # of every published CLIP text encoder; used only where nothing else tells the width
# of all vectors together: a guard against decompression bombs, far above any real adapter
_MAX_BYTES = 64 * 2**20
_MAX_TENSORS = 1024
_MAX_CONFIG_BYTES = 1024 * 1024
_MAX_SIZE = 2**20  # of heads, positions and widths


def import_official_concept(
    path: str | Path, num_heads: int = 12, *, prefix_length: int | None = None
) -> KVResidual:
    """Read a concept trained with the authors' code.

    Args:
      path: a folder with ``pytorch_adapter.bin`` (and ``adapter_config.json``), or the ``.bin``
        itself; the configuration is looked for beside it.
      num_heads: attention heads of the text encoder, which the file does not state (12 for SD 1.x,
        16 for SD 2.x).
      prefix_length: concatenated positions P. Default: what ``adapter_config.json`` says; without
        that file, what the vector's length gives for heads of 64 numbers, else 1.

    Returns:
      numpy leaves ``[L P N H]`` float32, layers as in the key names, ``logit_bias`` 1.0.

    Raises:
      CatVersionError: not such an adapter, damaged, or its lengths do not fit; nothing in it is
        executed.
    """
    for name, size in (("num_heads", num_heads), ("prefix_length", prefix_length)):
        if size is not None and not _is_size(size):
            raise CatVersionError(
                f"{name}={size!r}: must be a whole number >= 1. Give that of the model it was "
                "trained with (12 heads for SD 1.x, 16 for SD 2.x)."
            )
    path = Path(path_text(path))
    file = path / ADAPTER_FILE_NAME if path.is_dir() else path
    vectors = _read_vectors(file)
    layers, flat = _layers_and_vector(file, vectors)
    positions, width = _positions_and_width(file, flat.size, len(layers), num_heads, prefix_length)
    # (1)
    grid = flat.reshape(positions, len(layers), 2, num_heads, width // num_heads)  # [P L 2 N H]
    # [L P N H]
    key, value = (np.ascontiguousarray(grid[:, :, part].swapaxes(0, 1)) for part in (0, 1))
    return KVResidual(key, value, layers, logit_bias=1.0)  # type: ignore[arg-type]  # numpy leaves


def _layers_and_vector(
    file: Path, vectors: dict[str, np.ndarray]
) -> tuple[tuple[int, ...], np.ndarray]:
    """Adapted layers, ascending, and the one vector that all entries repeat."""
    unknown = [key for key in vectors if not key.endswith("control_trans")]
    matches = {key: match for key in vectors if (match := _LAYER_KEY.search(key))}
    layers = [int(match.group(1)) for match in matches.values()]
    if unknown or not layers or len(set(layers)) != len(layers):
        listed = ", ".join(unknown or list(vectors) or ["nothing"])[:300]
        raise CatVersionError(
            f"{file}: holds {listed}; must hold one flat `...layers.<i>...control_trans` vector "
            "per adapted layer and nothing else (one adapter, `flat=True`, no gates), as the "
            "authors' training script writes it."
        )
    flat = vectors[next(iter(matches))].reshape(-1)
    distinct = {id(vector): key for key, vector in vectors.items()}
    for key in distinct.values():
        if not np.array_equal(vectors[key].reshape(-1), flat, equal_nan=True):
            raise CatVersionError(
                f"{file}: the vector of {key} differs from that of {next(iter(matches))}; the "
                "authors' code writes the same pool vector under every key. The file was altered: "
                "get the original."
            )
    if not np.isfinite(flat).all():
        raise CatVersionError(
            f"{file}: holds NaN or infinite numbers; get another checkpoint of that training."
        )
    return tuple(sorted(layers)), flat


def _positions_and_width(
    file: Path, size: int, num_layers: int, num_heads: int, prefix_length: int | None
) -> tuple[int, int]:
    """P and the encoder's width D from the configuration, or from ``size = P * 2 L * D``."""
    width, positions = _stated_sizes(file.with_name("adapter_config.json"))
    positions = prefix_length or positions
    if positions is None:
        known_width = width or num_heads * _HEAD_DIM
        positions = max(1, size // (2 * num_layers * known_width))
        if size != positions * 2 * num_layers * known_width:
            positions = 1
    found, rest = divmod(size, positions * 2 * num_layers)
    if rest or found % num_heads or (width is not None and found != width) or found == 0:
        raise CatVersionError(
            f"{file}: a vector of {size} numbers for {num_layers} layers, "
            f"prefix_length={positions}, hidden_size={width or 'unknown'}, num_heads={num_heads}; "
            "must be prefix_length * 2 * layers * hidden_size, with hidden_size a multiple of "
            "num_heads. Give the right num_heads and keep adapter_config.json beside the file."
        )
    return positions, found


def _stated_sizes(config_file: Path) -> tuple[int | None, int | None]:
    """``hidden_size`` and ``prefix_length`` of ``adapter_config.json``, as far as it says them."""
    if not config_file.is_file():
        return None, None
    try:
        text = read_text(config_file, max_bytes=_MAX_CONFIG_BYTES)
        config = parse_json(text, str(config_file))
    except CatVersionError as error:
        reason = str(error).rstrip(".")
        raise CatVersionError(f"{reason}. Restore the file.") from error
    inner = config.get("config", config) if isinstance(config, dict) else None
    if not isinstance(inner, dict):
        raise CatVersionError(
            f"{config_file}: must be a JSON object, and so must its `config`. Restore the file."
        )
    sizes = {
        "hidden_size": config.get("hidden_size"),
        "prefix_length": inner.get("prefix_length"),
    }
    for key, value in sizes.items():
        if value is not None and not _is_size(value):
            raise CatVersionError(
                f"{config_file}: {key}={value!r:.80}, must be a whole number >= 1. Restore the "
                "file."
            )
    return sizes["hidden_size"], sizes["prefix_length"]


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIZE


def _read_vectors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a torch zip file by its key, float32; the same array where keys name the
    same numbers.
    """
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        with file.open("rb") as opened:
            head = opened.read(4)
    except OSError as error:
        raise CatVersionError(
            f"{file}: cannot be read ({error.strerror}). Give the folder with {ADAPTER_FILE_NAME} "
            "in it, or that file."
        ) from error
    if head[:1] == b"\x80" and head != b"PK\x03\x04":
        raise CatVersionError(
            f"{file}: saved by PyTorch before 1.6, which is one bare pickle. Save it again with a "
            "newer PyTorch: torch.save(torch.load(file, weights_only=True, map_location='cpu'), "
            "file)."
        )
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_archive(file, archive)
    except CatVersionError:
        raise
    except Exception as error:  # zipfile raises many kinds on a damaged archive
        raise CatVersionError(
            f"{file}: not a complete PyTorch zip file ({error!s:.200}). Download or copy it again."
        ) from error


def _read_archive(file: Path, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    pickles = [
        name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")
    ]
    if len(pickles) != 1:
        raise CatVersionError(
            f"{file}: a zip file without PyTorch's data.pkl. Give a {ADAPTER_FILE_NAME}."
        )
    root = pickles[0].removesuffix("data.pkl")
    if (
        f"{root}byteorder" in archive.namelist()
        and _member(file, archive, f"{root}byteorder", 16) != b"little"
    ):
        raise CatVersionError(
            f"{file}: big-endian numbers. Save it again on a little-endian machine."
        )
    data = _member(file, archive, pickles[0], MAX_PICKLE_BYTES)
    content = read_named_tensors(data, str(file))
    views = set(content.values())
    total = 4 * sum(math.prod(tensor.shape) for tensor in views)
    if len(content) > _MAX_TENSORS or total > _MAX_BYTES:
        raise CatVersionError(
            f"{file}: {len(content)} tensors of {total:.3g} bytes, an adapter has at most "
            f"{_MAX_TENSORS} of {_MAX_BYTES} bytes together. Not an adapter file."
        )
    storages: dict[str, np.ndarray] = {}
    room = _MAX_BYTES
    for name in {tensor.storage for tensor in views}:
        numbers = _member(file, archive, f"{root}data/{name}", room)
        storages[name] = np.frombuffer(numbers, dtype="<f4")
        room -= len(numbers)
    arrays = {tensor: _view(file, storages[tensor.storage], tensor) for tensor in views}
    return {key: arrays[tensor] for key, tensor in content.items()}


def _view(file: Path, stored: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    count = math.prod(tensor.shape)
    dense = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    if tensor.stride != dense or not 0 <= tensor.offset <= stored.size - count:
        raise CatVersionError(
            f"{file}: a tensor of shape {tensor.shape}, stride {tensor.stride} at {tensor.offset} "
            f"of {stored.size} stored numbers; must be contiguous and inside. The file was "
            "altered: get the original."
        )
    return stored[tensor.offset : tensor.offset + count].reshape(tensor.shape)


def _member(file: Path, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise CatVersionError(
            f"{file}: {name:.200} is missing in the archive. Download it again."
        ) from None
    if info.file_size > limit:
        raise CatVersionError(
            f"{file}: {name:.200} is {info.file_size} bytes, in an adapter at most {limit}. Not an "
            "adapter file."
        )
    return archive.read(info)
