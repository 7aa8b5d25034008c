"""Digests of what a model consists of, so that a run knows it by its content and not by its name.

A component's digest covers its configuration and every weight, as they were read:

    (1)  xxh3_128( configuration as sorted JSON,
                   for name in sorted(names):  name, dtype, xxh3_128(little-endian bytes) )

with today's PyTorch names (``convert.py``), so that neither shards, nor the order in a file, nor
the version that wrote it matter. The weights are hashed on their way to the device: 4 GB take a
third of a second. XXH3 notices every accident; it does not resist somebody who builds a collision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

_BOOKKEEPING = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})


class ContentDigest:
    """The digest of one component; :meth:`add` is called for each of its weights."""

    def __init__(self) -> None:
        self._weights: dict[str, str] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Take in one weight as its file stores it."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._weights[name] = f"{array.dtype} {xxhash.xxh3_128_hexdigest(data.data)}"

    def hexdigest(self, config: Mapping[str, Any]) -> str:
        """The digest of equation (1), 32 hexadecimal digits.

        Args:
          config: the component's configuration; keys that say who wrote it are left out.
        """
        own = {
            key: value
            for key, value in config.items()
            if not key.startswith("_") and key not in _BOOKKEEPING
        }
        text = json.dumps([own, sorted(self._weights.items())], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())
