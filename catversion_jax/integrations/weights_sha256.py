"""The fingerprint of a text encoder's weights: that of ``models/weights/fingerprint.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

BFLOAT16 = "bfloat16:"  # the same as there
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The fingerprint of named tensors; None in a dtype that has dropped more digits."""
    digest = hashlib.sha256()
    mark = BFLOAT16 if any(t.dtype == torch.bfloat16 for t in weights.values()) else ""
    for key in sorted(weights):
        tensor = weights[key]
        if tensor.is_meta or tensor.dtype not in _DTYPES:
            return None
        digest.update(key.encode())
        digest.update(
            tensor.detach().cpu().to(torch.float16).contiguous().numpy().astype("<f2").tobytes()
        )
    return mark + digest.hexdigest()


def same_numbers(fingerprint: str | None, trained: str) -> bool:
    """Whether the numbers are the same, however they are stored."""
    return bool(fingerprint) and str(fingerprint).removeprefix(BFLOAT16) == trained.removeprefix(
        BFLOAT16
    )
