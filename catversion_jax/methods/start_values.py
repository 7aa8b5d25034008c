"""Where learning starts: what a method is told, and the start values that ``init`` names."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Float
from catversion_jax.config import MethodOptions
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.random_normal import standard_normal

SPREAD = 0.1
"""How far copied start values of several positions lie apart, in units of their own root mean
square. At a tenth of it positions were still equal within 2-3 % after 150 steps (P = 4, 5e-3)."""


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """One concept's training prompt in front of the frozen text encoder.

    Attributes:
      text_encoder: the frozen encoder.
      num_layers: the number of its layers that feed the context.
      num_reaching_layers: of those whose result reaches the UNet at all; one more in the second
        encoder of Stable Diffusion XL.
      token_ids: ``[T]`` a training prompt of the concept.
      copied: ``[P]`` for each learned position, the token of the prompt that ``init`` copies.
      rng: key for the start values of this concept.
      own_states: ``[S D]`` the encoder's own output at the token that ``init`` copies for each
        state behind it; None where no such states are learned.
    """

    text_encoder: Network
    num_layers: int
    num_reaching_layers: int
    token_ids: np.ndarray
    copied: np.ndarray
    rng: Array
    own_states: Float[Array, "S D"] | None = None

    def keys_values(self, layers: tuple[int, ...]) -> tuple[Array, Array]:
        """The encoder's own keys and values ``[L P N H]`` of the copied tokens at ``layers``."""
        own = _keys_values(self.text_encoder, self.token_ids[None], layers)
        key, value = (part[:, 0, self.copied] for part in own)
        return key, value

    def embeddings(self) -> Float[Array, "P D"]:
        """The encoder's own embeddings of the copied tokens, without positions."""
        return _embeddings(self.text_encoder, self.token_ids)[self.copied]


def start_values(options: MethodOptions, own: Array, rng: Array) -> Array:
    """One array of start values, float32, in the shape of ``own``.

    Args:
      options: ``init``, ``init_std`` and ``num_positions``.
      own: the encoder's own numbers, which ``init=class_word`` and ``bos`` copy; ``predicted``
        starts as ``class_word`` does, and the concept encoder adds to it.
      rng: key of the noise.
    """
    noise = standard_normal(rng, own.shape)
    if options.init == "normal":
        return options.init_std * noise
    own = own.astype(jnp.float32)
    start = jnp.zeros_like(own) if options.init == "zero" else own
    if options.num_positions == 1:
        return start
    # Equal positions get equal gradients and would stay equal for ever.
    return start + SPREAD * jnp.sqrt(jnp.mean(own**2)) * noise


@functools.partial(jax.jit, static_argnames="layers")
def _keys_values(
    text_encoder: Network, token_ids: Array, layers: tuple[int, ...]
) -> tuple[Array, Array]:
    return text_encoder.call("keys_values", token_ids, layers=layers)


@jax.jit
def _embeddings(text_encoder: Network, token_ids: Array) -> Float[Array, "T D"]:
    return text_encoder.call("token_embeddings", token_ids)
