"""What the backward pass computes again instead of keeping it from the forward pass.

The usual name is gradient checkpointing (arXiv 1604.06174). Less is kept, so that more concepts fit
a device; the numbers are the same, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

Recompute = Literal["none", "attention", "blocks"]
"""``none``; the layers of self-attention; or every residual block and every transformer, of which
only the inputs are kept.
"""

T = TypeVar("T", bound=Callable[..., Any])


def recomputed(layer: T, condition: bool) -> T:
    """``layer``, of whose intermediate results nothing is kept if the condition holds."""
    return jax.checkpoint(layer) if condition else layer  # type: ignore[return-value]
