r"""Scaled dot-product attention, the one place where a kernel is chosen for a platform.

    (1)  attention(Q, K, V) = softmax(scale * Q K^T + bias) V

Logits, bias and softmax are float32 whatever the inputs are: the product of two bfloat16 numbers is exact in
float32, so this is also what diffusers calls ``upcast_attention``. Every platform uses XLA's own fusion of (1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from catversion_jax.array_types import Array, Float


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
    logits = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)
