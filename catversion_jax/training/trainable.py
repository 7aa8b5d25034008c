"""Which models a concept can be learned on: those whose own training had our objective. Others can
draw a concept that was learned on such a relative.
"""

from __future__ import annotations

from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone


def check_trainable(backbone: Backbone) -> None:
    """Refuse a model whose own training had another objective than ours.

    Raises:
      CatVersionError: a latent consistency model, or one with noise levels of EDM.
    """
    relative = "the text-to-image model of the same family"
    if backbone.takes_guidance:
        what, relative = "a latent consistency model", "the model that it was distilled from"
    elif backbone.noise_schedule.edm is not None:
        what, relative = "a model with noise levels of EDM", "Stable Diffusion XL base"
    else:
        return
    raise CatVersionError(
        f"{backbone.name}: is {what}, which draws concepts but cannot be trained on. Train on "
        f"{relative}; the concept acts here too if both have the same text encoders."
    )
