r"""One hash that says which text encoder a concept was trained on, the same in JAX and in PyTorch.

A concept is only meaningful with the encoder it was trained on. The hash covers every tensor of the
text encoder except ``token_embedding`` (textual inversion adds rows to it) and ``position_ids`` (a
buffer some versions write):

    (1)  sha256( for key in sorted(keys):
                     key as UTF-8,  tensor as little-endian float16 bytes in C order )

with keys freed of the ``text_model.`` prefix, which depends on the transformers version. Rounding
to float16 makes the float32 and fp16 folders of one model agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from catversion_jax.models.weights.variants import TEXT_ENCODERS

PREFIX = "text_model."
LEFT_OUT = ("token_embedding", "position_ids")


def fingerprints_by_name(hashes: Sequence[str]) -> dict[str, str]:
    """The hashes of a model's text encoders under the names that they have in files:
    ``text_encoder_sha256`` and, in Stable Diffusion XL, ``text_encoder_2_sha256``.
    """
    return {f"{name}_sha256": sha256 for name, sha256 in zip(TEXT_ENCODERS, hashes, strict=False)}


def text_encoder_sha256(tensors: Mapping[str, Any]) -> str:
    """The hash of equation (1), as 64 hexadecimal digits.

    Args:
      tensors: the text encoder's state dict; values are whatever ``numpy.asarray`` reads, one at a
        time.
    """
    names = {
        name.removeprefix(PREFIX): name
        for name in tensors
        if not any(part in name for part in LEFT_OUT)
    }
    digest = hashlib.sha256()
    with np.errstate(over="ignore"):
        # a weight beyond float16's range hashes as infinity on both sides
        for key in sorted(names):
            digest.update(key.encode())
            digest.update(
                np.ascontiguousarray(np.asarray(tensors[names[key]]).astype("<f2")).tobytes()
            )
    return digest.hexdigest()
