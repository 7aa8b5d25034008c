r"""Scaled dot-product attention, the one place where a kernel is chosen for a platform.

    (1)  attention(Q, K, V) = softmax(scale * Q K^T + bias) V

Logits, bias and softmax are float32 whatever the inputs are, as with ``upcast_attention`` in
diffusers; only the scaled query is rounded to the inputs' width (heads of 64 lose nothing).

The 4096 positions of a 512-pixel image make 134 million logits per image at 8 heads. Where
there are many queries, they are therefore never held all at once, and the backward pass computes
them again:

- TPU: the Pallas kernel of ``attention_pallas.py``;
- NVIDIA, half precision, heads of at most 128, many keys: cuDNN's flash attention;
- otherwise XLA, some queries at a time: the rows of (1) are independent, so the result is the same.

Few queries, and those with a bias, are left to XLA's own fusion of (1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from catversion_jax.array_types import Array, Float
from catversion_jax.models.layers.attention_pallas import is_supported, transposed_attention
from catversion_jax.models.layers.recompute import KEPT, in_slices

MIN_FUSED_QUERIES = 1024
"""Below, XLA is as good: the logits of 256 positions stay in a TPU's fast memory."""
MAX_LOGITS = 2**22
"""Per image and head, of one slice: 16 MB in float32. A 256-pixel image stays whole."""
MAX_CUDNN_HEAD_DIM = 128


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
    if bias is not None:
        return whole_attention(query, key, value, bias=bias, scale=scale)
    sliced = functools.partial(sliced_attention, scale=scale)
    _, queries, _, head_dim = query.shape
    if queries < MIN_FUSED_QUERIES:
        return sliced(query, key, value)
    kernels: dict[str, Callable[..., Any]] = {}
    if is_supported(queries, key.shape[1], head_dim):
        kernels["tpu"] = functools.partial(lane_attention, scale=scale)
    if jax.default_backend() == "gpu" and _suits_cudnn(query, key):
        kernels["cuda"] = functools.partial(
            jax.nn.dot_product_attention, scale=scale, implementation="cudnn"
        )
    # Decided where the program is compiled, which need not be where it is traced.
    return jax.lax.platform_dependent(query, key, value, default=sliced, **kernels)


def whole_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Equation (1), all logits at once.

    The query is scaled instead of the logits, and the product with V is divided by the softmax's
    sum instead of the weights: the exponentials are then the only array as large as the logits.
    """
    logits = _logits(query, key, bias, scale)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1).swapaxes(1, 2)[..., None]  # [B T N 1]
    out = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(value.dtype), value)
    # Without KEPT the backward pass of a slice would multiply by V once more.
    return (checkpoint_name(out, KEPT) / total).astype(value.dtype)


def attention_weights(
    query: Float[Array, "B T N H"], key: Float[Array, "B S N H"]
) -> Float[Array, "B N T S"]:
    """The softmax of equation (1), float32; arguments as for :func:`attention`."""
    return jax.nn.softmax(_logits(query, key, None, query.shape[-1] ** -0.5), axis=-1)


def _logits(query: Array, key: Array, bias: Array | None, scale: float) -> Float[Array, "B N T S"]:
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    logits = jnp.einsum("BTNH,BSNH->BNTS", scaled, key, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias


# ---- XLA, some queries at a time -----------------------------------------------------------------


def sliced_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """At most ``MAX_LOGITS`` logits of a head at once, where the number of queries divides."""
    slices = _slice_count(query.shape[1], key.shape[1])
    if slices == 1:
        return whole_attention(query, key, value, scale=scale)
    return in_slices(lambda part: whole_attention(part, key, value, scale=scale), query, slices)


def _slice_count(queries: int, keys: int) -> int:
    """The fewest equal slices of the queries with at most ``MAX_LOGITS`` logits per head.

    1 where no number near the least one divides the queries (a prime, say).
    """
    least = -(-queries * keys // MAX_LOGITS)
    return next((n for n in range(least, 4 * least) if queries % n == 0), 1)


# ---- TPU -----------------------------------------------------------------------------------------


def lane_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """:func:`~.attention_pallas.transposed_attention` for arrays as everywhere else."""
    batch, positions, heads, head_dim = query.shape

    def by_head(array: Array) -> Array:
        return array.transpose(0, 2, 3, 1).reshape(batch * heads, head_dim, array.shape[1])

    out = transposed_attention(*map(by_head, (query, key, value)), scale, interpret)
    return out.reshape(batch, heads, head_dim, positions).transpose(0, 3, 1, 2)


# ---- NVIDIA --------------------------------------------------------------------------------------


def _suits_cudnn(query: Array, key: Array) -> bool:
    head_dim, keys = query.shape[-1], key.shape[1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    long = keys >= MIN_FUSED_QUERIES and keys % 2 == query.shape[1] % 2 == 0
    return half and long and head_dim % 8 == 0 and head_dim <= MAX_CUDNN_HEAD_DIM
