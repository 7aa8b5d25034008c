r"""Where the UNet looks: its attention, written down during one forward pass.

With A the softmax weights of a layer with N heads, T tokens and S image positions, and w the weight
of each token (1 / count for the tokens of a word, 0 elsewhere):

    (1)  cross_s = 1/N sum_n sum_t  A_nst w_t                    (DAAM, arXiv 2210.04885)
    (2)  own_sr  = 1/N sum_n  A_nsr                              rows sum to 1

Only these averages leave the layer, never the heads or the other tokens. Self-attention (2) is
quadratic in the positions and kept where there are few: 4 MB an image for 32x32 positions.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from catversion_jax.array_types import Array, Float


class AttentionLayer(Protocol):
    """What a layer tells a recorder."""

    def weights(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"] | None
    ) -> Float[Array, "B N T S"]:
        """Its softmax weights, float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """What one forward pass looked at; layers in the order they run, float32.

    Attributes:
      cross: ``[B h w]`` of every cross-attention layer, equation (1).
      own: ``[B h*w h*w]`` of the self-attention layers with few positions, equation (2).
    """

    cross: tuple[Float[Array, "B h w"], ...]
    own: tuple[Float[Array, "B S S"], ...]


@dataclasses.dataclass(frozen=True)
class AttentionRecorder:
    """Handed down the blocks of one forward pass; its lists fill while that pass is traced.

    Attributes:
      token_weights: ``[B T]``, w of equation (1).
      max_positions: self-attention over more positions is not recorded.
      size: height and width of the layer at hand.
      cross: as in :class:`AttentionMaps`.
      own: as in :class:`AttentionMaps`.
    """

    token_weights: Float[Array, "B T"]
    max_positions: int
    size: tuple[int, int] = (1, 1)
    cross: list[Array] = dataclasses.field(default_factory=list)
    own: list[Array] = dataclasses.field(default_factory=list)

    def at(self, height: int, width: int) -> AttentionRecorder:
        """The same lists, for layers of ``height * width`` positions."""
        return dataclasses.replace(self, size=(height, width))

    def record(
        self,
        layer: AttentionLayer,
        x: Float[Array, "B S D"],
        context: Float[Array, "B T E"] | None = None,
    ) -> None:
        """Write down what ``layer`` looks at; without a context it is self-attention."""
        if context is not None:
            weights = layer.weights(x, context).mean(axis=1)
            shares = jnp.einsum("BST,BT->BS", weights, self.token_weights)
            self.cross.append(shares.reshape(-1, *self.size))
        elif x.shape[1] <= self.max_positions:
            self.own.append(layer.weights(x, None).mean(axis=1))

    def maps(self) -> AttentionMaps:
        """Everything recorded so far."""
        return AttentionMaps(tuple(self.cross), tuple(self.own))
