"""How much of each token's attention goes to a concept's residual: lambda of ``residual.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.models.clip.adaptation import Adaptation
from catversion_jax.models.weights.network import Network


@jax.jit
def residual_attention_mass(
    text_encoder: Network,
    token_ids: Int[Array, "B T"],
    residual: Adaptation,
    word_places: Int[Array, "B T"] | None = None,
) -> Float[Array, "L B N T"]:
    """Lambda of equation (2), summed over the P positions.

    Args:
      text_encoder: frozen CLIP text encoder.
      token_ids: ``[B T]``.
      residual: one concept, leaves ``[L P N H]``; it acts on every prompt.
      word_places: ``[B T]`` where its class word stands; needed unless ``scope="all"``.

    Returns:
      ``[L B N T]`` float32 in 0..1: for each adapted layer, prompt, head and query token.
    """
    mass = text_encoder.call("extra_keys_mass", token_ids, residual, word_places)
    return mass.astype(jnp.float32)
