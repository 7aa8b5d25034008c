r"""Where the UNet looks: its cross-attention, written down during one forward pass.

With A the softmax weights of a layer with N heads over the T tokens of the text, for every image
position s, and w the weight of each token (1 / count for the tokens of a word, 0 elsewhere):

    (1)  map_s = 1/N sum_n sum_t  A_nst w_t                      (DAAM, arXiv 2210.04885)

Only this average leaves a layer, never the heads or the other tokens: 16 kB an image at 64x64
positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from catversion_jax.array_types import Array, Float


@dataclasses.dataclass(frozen=True)
class AttentionRecorder:
    """Handed down the blocks of one forward pass; its list fills while that pass is traced.

    Attributes:
      token_weights: ``[B T]``, w of equation (1).
      maps: ``[B h w]`` float32 of every cross-attention layer so far, in the order they run.
    """

    token_weights: Float[Array, "B T"]
    maps: list[Float[Array, "B h w"]] = dataclasses.field(default_factory=list)

    def at(self, height: int, width: int) -> Callable[[Float[Array, "B N S T"]], None]:
        """What layers over ``height * width`` positions call with their softmax weights."""

        def record(weights: Float[Array, "B N S T"]) -> None:
            shares = jnp.einsum("BNST,BT->BS", weights, self.token_weights) / weights.shape[1]
            self.maps.append(shares.reshape(-1, height, width))

        return record
