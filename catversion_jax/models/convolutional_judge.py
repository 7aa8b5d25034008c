"""A small convolutional network as a judge: another architecture than the CLIP that scores and the
encoders that draw.

    (1)  h_{i+1} = relu(conv_i(h_i) + b_i)        3 x 3, stride 2 at the first of each pair
    (2)  features = [max over positions of h_L; mean over positions of h_L]
    (3)  image_embeds = features - their mean over the training pictures

``tools/tiny_sd/train_judge.py`` trains one on the pictures of the embedded world, folds its batch
norms into (1) and writes the folder: ``config.json`` (``model_type: catversion_judge``, ``widths``,
``image_size``, ``world``) and ``model.safetensors``.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.weights.convert import load_network
from catversion_jax.models.weights.hf_config import check_integers, read_config
from catversion_jax.models.weights.network import Network

MODEL_TYPE = "catversion_judge"


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the network.

    Attributes:
      widths: channels of each stage of two convolutions.
      image_size: pixels per side of its pictures.
    """

    widths: tuple[int, ...]
    image_size: int

    @classmethod
    def from_folder(cls, folder: str | Path) -> JudgeConfig:
        """From a folder's ``config.json``.

        Raises:
          CatVersionError: it is not a judge's, or a size is none.
        """
        raw, source = read_config(folder), str(Path(folder) / "config.json")
        if raw.get("model_type") != MODEL_TYPE:
            raise CatVersionError(
                f"{folder}: is a {shown(raw.get('model_type'))}, not a {MODEL_TYPE}. "
                "tools/tiny_sd/train_judge.py --export writes one."
            )
        check_integers(raw, {"image_size": (8, 2**12)}, source=source)
        widths: Any = raw.get("widths")
        fit = isinstance(widths, list) and all(
            type(width) is int and 1 <= width <= 4096 for width in widths
        )
        if not fit or not 1 <= len(widths) <= 16 or "image_size" not in raw:
            raise CatVersionError(
                f"{source}: widths={shown(widths)}, image_size={shown(raw.get('image_size'))}: "
                "must be a list of at most 16 channels and a number. Export the judge again."
            )
        return cls(tuple(widths), raw["image_size"])


class ConvolutionalJudge(nnx.Module):
    """Equations (1) to (3)."""

    def __init__(
        self, config: JudgeConfig, *, dtype: Any = jnp.float32, param_dtype: Any, rngs: nnx.Rngs
    ):
        before, layers = 3, []
        for width in config.widths:
            for stride in (2, 1):
                layers.append(
                    nnx.Conv(
                        before,
                        width,
                        (3, 3),
                        strides=(stride, stride),
                        padding=((1, 1), (1, 1)),
                        dtype=dtype,
                        param_dtype=param_dtype,
                        rngs=rngs,
                    )
                )
                before = width
        self.body = nnx.List(layers)
        self.feature_mean = nnx.Param(jnp.zeros((2 * before,), param_dtype))

    def image_embeds(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
        """Features of pixels in [-1, 1]."""
        hidden = pixels
        for layer in self.body:
            hidden = jax.nn.relu(layer(hidden))
        features = jnp.concatenate([hidden.max((1, 2)), hidden.mean((1, 2))], axis=-1)
        return features - self.feature_mean[...]


def load_convolutional_judge(
    folder: str | Path, *, dtype: Any = jnp.float32
) -> tuple[Network, int]:
    """Load a judge; call ``"image_embeds"`` on the network.

    Returns:
      The network and its image size in pixels.

    Raises:
      CatVersionError: the folder is not a judge's, or its weights do not fit.
    """
    config = JudgeConfig.from_folder(folder)
    network = load_network(
        functools.partial(ConvolutionalJudge, config, dtype=dtype, param_dtype=dtype),
        folder,
        dtype=dtype,
    )
    return network, config.image_size
