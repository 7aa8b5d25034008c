"""Safetensors files whose bytes depend on their content alone.

The safetensors library writes its metadata in the order of a randomly seeded hash map, so the
header (8-byte little-endian length, JSON, then the data) is written here; ``tests/test_export.py``
reads it back with the library.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np


def serialize_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Safetensors bytes that are the same in every process; tensors keep the given order.

    float16 stays float16, everything else becomes float32.

    Adds ``modelspec.hash_sha256`` of the data to the metadata.
    """
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        kind, dtype = ("F16", "<f2") if tensor.dtype == np.float16 else ("F32", "<f4")
        raw = np.ascontiguousarray(tensor, dtype=dtype).tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    signed = dict(metadata) | {"modelspec.hash_sha256": "0x" + hashlib.sha256(data).hexdigest()}
    header = {"__metadata__": {k: _utf8(signed[k]) for k in sorted(signed)}} | header
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the format asks
    return struct.pack("<Q", len(text)) + text + data


def _utf8(text: str) -> str:
    """File names may hold bytes that are not UTF-8 (surrogates here), which JSON readers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")
