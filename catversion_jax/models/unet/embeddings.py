r"""Everything but noise and prompt that a UNet is told, as one vector that its residual blocks add.

    (1)  e(t) = [cos(t w), sin(t w)] or sin first,  w_k = 10000^{-k / (E/2 - freq_shift)},  k < E/2
    (2)  temb = W_2 act(W_1 e(t))
    (3)  temb' = temb + V_2 silu(V_1 [pooled, e(a_1), ..., e(a_6)])       (Stable Diffusion XL only)
    (4)  temb = W_2 act(W_1 (e(t) + G e'(1000 (w - 1))))        (latent consistency models, for (2))

(3) adds the pooled state of the prompt and six numbers ``a`` about the picture, each by (1) at the
width ``addition_time_embed_dim``. (4) has the guidance scale w as an input (arXiv 2310.04378), e'
is (1) with sin first and freq_shift 1. Source: diffusers ``models/embeddings.py``,
``get_guidance_scale_embedding`` of its LCM pipeline and, for (3), ``addition_embed_type =
"text_time"`` of ``models/unets/unet_2d_condition.py``. The activation of (3) is silu whatever
``act_fn`` says.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.models.layers.resnet import ACTIVATIONS, LayerFactory

NUM_TIME_IDS = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AddedConditions:
    """What Stable Diffusion XL's UNet is told beside the prompt's states.

    Attributes:
      pooled: ``[B P]``, one vector for a prompt; see
        :class:`~catversion_jax.models.clip.text_projection.CLIPTextModelWithProjection`.
      time_ids: ``[B 6]`` pixels: height and width of the picture before it was resized, top and
        left of the crop, height and width asked for.
    """

    pooled: Float[Array, "B P"]
    time_ids: Float[Array, "B 6"]


def timestep_embedding(
    timesteps: Float[Array, " B"], width: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "B E"]:
    """Equation (1), in float32: timesteps reach 999, beyond what half precision tells apart.

    An odd ``width`` is padded with one zero.
    """
    half = width // 2
    # On the host, rounded where torch rounds: at t = 999 the last bit of w moves the angle by 6e-5.
    exponent = (
        np.float32(-math.log(10000.0))
        * np.arange(half, dtype=np.float32)
        / np.float32(half - freq_shift)
    )
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = jnp.asarray(timesteps, jnp.float32)[:, None] * frequencies
    parts = (
        [jnp.cos(angles), jnp.sin(angles)]
        if flip_sin_to_cos
        else [jnp.sin(angles), jnp.cos(angles)]
    )
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


class TimestepEmbedding(nnx.Module):
    """Equation (2) or (4), and the second term of (3).

    Args:
      in_channels: of the embedding.
      width: of the result.
      act_fn: a key of ``ACTIVATIONS``.
      guidance_width: of the wave of the guidance scale; None where there is none.
      layers: makes the elementary layers.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        act_fn: str,
        guidance_width: int | None = None,
        layers: LayerFactory,
    ):
        self.cond_proj = (
            None
            if guidance_width is None
            else layers.linear(guidance_width, in_channels, use_bias=False)
        )
        self.act = ACTIVATIONS[act_fn]
        self.linear_1 = layers.linear(in_channels, width)
        self.linear_2 = layers.linear(width, width)

    def __call__(
        self, embedding: Float[Array, "B E"], guidance: Float[Array, "B G"] | None = None
    ) -> Float[Array, "B F"]:
        """Two dense layers; ``guidance`` is the wave of (4)."""
        if guidance is not None and self.cond_proj is not None:
            embedding = embedding + self.cond_proj(guidance)
        return self.linear_2(self.act(self.linear_1(embedding)))
