"""What the backward pass computes again instead of keeping it from the forward pass.

The usual name is gradient checkpointing (arXiv 1604.06174). Less is kept, so that more concepts fit
a device; the numbers are the same, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

from catversion_jax.array_types import Array, Float

Recompute = Literal["none", "attention", "blocks"]
"""``none``; the layers of self-attention; or every residual block and every transformer, of which
only the inputs are kept.
"""

KEPT = "kept"
"""Name of what is worth keeping even where the rest of a slice is computed again."""

T = TypeVar("T", bound=Callable[..., Any])


def recomputed(layer: T, condition: bool) -> T:
    """``layer``; if the condition holds, it keeps nothing but its input for the backward pass."""
    return jax.checkpoint(layer) if condition else layer  # type: ignore[return-value]


def in_slices(
    function: Callable[[Array], Array], x: Float[Array, "B T *rest"], slices: int
) -> Float[Array, "B T *out"]:
    """Apply ``function`` to some positions at a time.

    For the backward pass only the input of a slice and what is named :data:`KEPT` is kept.

    Args:
      function: maps ``[B T/slices ...]`` to as many positions, each by itself.
      x: ``[B T ...]``.
      slices: must divide T.
    """
    batch, positions, *rest = x.shape
    parts = x.reshape(batch, slices, positions // slices, *rest).swapaxes(0, 1)
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    out = jax.lax.map(jax.checkpoint(function, policy=policy), parts).swapaxes(0, 1)
    return out.reshape(batch, positions, *out.shape[3:])
