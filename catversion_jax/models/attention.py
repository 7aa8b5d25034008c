r"""Scaled dot-product attention, the one place where a kernel is chosen for a platform.

    (1)  attention(Q, K, V) = softmax(scale * Q K^T + bias) V

Logits, bias and softmax are float32 whatever the inputs are: the product of two bfloat16 numbers is
exact in float32, so this is also what diffusers calls ``upcast_attention``. Every platform uses
XLA's own fusion of (1).

The 4096 positions of a 512-pixel image make 134 million logits per image at 8 heads, and a gradient
keeps several such arrays for each layer. Long sequences therefore go through (1) some queries at a
time, and the backward pass recomputes the logits: the rows of (1) are independent, so the result is
the same. For SD 1.5's text gradient at 64x64 latents that is 5.4 GB of temporaries, not 12.4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from catversion_jax.array_types import Array, Float

MAX_LOGITS = 2**22
"""Per image and head, of one slice: 16 MB in float32. A 256-pixel image stays whole."""


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Equation (1).

    Args:
      query: ``[B T N H]``.
      key: ``[B S N H]``, not scaled.
      value: ``[B S N H]``.
      bias: added to the logits, broadcast to ``[B N T S]``; ``-inf`` hides a position.
      scale: of the logits; ``H ** -0.5`` unless given.

    Returns:
      ``[B T N H]`` in the dtype of ``value``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    slices = _slice_count(query.shape[1], key.shape[1])
    if bias is not None or slices == 1:
        return _attention(query, key, value, bias, scale)

    batch, positions, heads, head_dim = query.shape
    sliced = query.reshape(batch, slices, positions // slices, heads, head_dim).swapaxes(0, 1)
    attend = jax.checkpoint(lambda part: _attention(part, key, value, None, scale))
    out = jax.lax.map(attend, sliced).swapaxes(0, 1)
    return out.reshape(batch, positions, *out.shape[3:])


def _attention(
    query: Array, key: Array, value: Array, bias: Array | None, scale: float
) -> Float[Array, "B T N H"]:
    weights = attention_weights(query, key, bias=bias, scale=scale).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    *,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T S"]:
    """The softmax of equation (1), float32; arguments as for :func:`attention`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    return jax.nn.softmax(logits, axis=-1)


def _slice_count(queries: int, keys: int) -> int:
    """The fewest equal slices of the queries with at most ``MAX_LOGITS`` logits per head.

    1 where no number near the least one divides the queries (a prime, say).
    """
    least = -(-queries * keys // MAX_LOGITS)
    return next((n for n in range(least, 4 * least) if queries % n == 0), 1)
