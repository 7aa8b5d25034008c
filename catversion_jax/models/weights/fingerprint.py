r"""One hash that says which text encoder a concept was trained on, the same in JAX and in PyTorch.

A concept is only meaningful with the encoder it was trained on. The hash covers every tensor of the
text encoder except ``token_embedding`` (textual inversion adds rows to it) and ``position_ids`` (a
buffer some versions write):

    (1)  sha256( for key in sorted(keys):
                     key as UTF-8,  tensor as little-endian float16 bytes in C order )

with keys freed of the ``text_model.`` prefix, which depends on the transformers version. Rounding
to float16 makes the float32 and fp16 folders of one model agree.

A bfloat16 copy has another hash, since it lacks digits that float16 keeps, and its fingerprint
says so: ``bfloat16:`` and the hash. It agrees with the encoder it was rounded from, whose numbers
rounded likewise have its hash:

    (2)  the same as (1), of tensors rounded to bfloat16 first

A copy that was rounded twice, to float16 and to bfloat16, differs in a few numbers from one that
was rounded once, so that whether a bfloat16 copy is one of another encoder cannot always be known.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from catversion_jax.models.weights.variants import TEXT_ENCODERS

PREFIX = "text_model."
BFLOAT16 = "bfloat16:"
LEFT_OUT = ("token_embedding", "position_ids")


def fingerprints_by_name(hashes: Sequence[str]) -> dict[str, str]:
    """The hashes of a model's text encoders under the names that they have in files:
    ``text_encoder_sha256`` and, in Stable Diffusion XL, ``text_encoder_2_sha256``.
    """
    return {f"{name}_sha256": sha256 for name, sha256 in zip(TEXT_ENCODERS, hashes, strict=False)}


@dataclasses.dataclass(frozen=True)
class EncoderHashes:
    """What tells a text encoder.

    Attributes:
      sha256: the hash of equation (1), after ``bfloat16:`` where all numbers are bfloat16 ones;
        what files state.
      bfloat16_sha256: the hash of equation (2).
    """

    sha256: str
    bfloat16_sha256: str

    def agrees_with(self, trained: str) -> bool | None:
        """Whether this is the encoder whose hash a file states, or one is a copy of the other in
        fewer digits; None where that cannot be known, since one of them is a bfloat16 copy and was
        not made from the other one as it is stored here.
        """
        bare = trained.removeprefix(BFLOAT16)
        if bare in (self.sha256.removeprefix(BFLOAT16), self.bfloat16_sha256):
            return True
        return None if BFLOAT16 in (trained + self.sha256) else False


NO_HASHES = EncoderHashes("", "")
"""Of an encoder without weights."""


def encoder_hashes(tensors: Mapping[str, Any]) -> EncoderHashes:
    """The hashes of equations (1) and (2), of 64 hexadecimal digits each.

    Args:
      tensors: the text encoder's state dict; values are whatever ``numpy.asarray`` reads, one at a
        time.
    """
    names = {
        name.removeprefix(PREFIX): name
        for name in tensors
        if not any(part in name for part in LEFT_OUT)
    }
    digest, rounded = hashlib.sha256(), hashlib.sha256()
    with np.errstate(over="ignore"):
        # a weight beyond float16's range hashes as infinity on both sides
        for key in sorted(names):
            tensor = np.ascontiguousarray(np.asarray(tensors[names[key]]))
            for one, numbers in ((digest, tensor), (rounded, tensor.astype(ml_dtypes.bfloat16))):
                one.update(key.encode())
                one.update(numbers.astype("<f2").tobytes())
    sha256, bfloat16_sha256 = digest.hexdigest(), rounded.hexdigest()
    mark = BFLOAT16 if sha256 == bfloat16_sha256 else ""
    return EncoderHashes(mark + sha256, bfloat16_sha256)


def text_encoder_sha256(tensors: Mapping[str, Any]) -> str:
    """The fingerprint; see :func:`encoder_hashes`."""
    return encoder_hashes(tensors).sha256
