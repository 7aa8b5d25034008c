"""What a training step sees and how its loss is weighed."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from catversion_jax.config.options import Options, option


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions(Options):
    """Batch and loss."""

    train_batch_size: int = option(
        2,
        "Number of images of each concept in one step (official).",
        decides_result=True,
        at_least=1,
    )
    snr_gamma: float | None = option(
        None,
        "Gamma of the min-SNR weight of the loss (diffusers; 5 is usual); null weighs all "
        "timesteps alike.",
        decides_result=True,
        at_least=0.0,
    )
    preserve_weight: float = option(
        0.0,
        "Weight of the distance to the plain model's own prediction outside the object mask, which "
        "keeps backgrounds and prompts as they were; what the photo shows there then counts only "
        "as far as masked_training says. It needs masks, and one more forward pass of the UNet. 0 "
        "leaves it out, 1 weighs both sides of the mask alike.",
        decides_result=True,
        at_least=0.0,
    )
    masked_training: bool = option(
        False, "Whether the object masks weigh the loss (OneTrainer).", decides_result=True
    )
    make_masks: bool = option(
        False,
        "Whether a photo without a mask gets one from the model's attention to the base class, as "
        "`catversion masks` makes it, where masks are part of the loss; otherwise its concept is "
        "refused.",
        decides_result=False,
    )
    unmasked_weight: float = option(
        0.1,
        "Weight of the loss outside the object mask where masked_training is on (OneTrainer).",
        decides_result=True,
        at_least=0.0,
        at_most=1.0,
    )
    timestep_sampling: Literal["uniform", "stratified", "proportional"] = option(
        "uniform",
        "How the timesteps of a batch are drawn: uniform (official); stratified, which draws one "
        "from each n-th of the schedule for a batch of n and shifts them evenly from step to step; "
        "or proportional, which does so with a probability in proportion to the timestep, so that "
        "noisier pictures come more often.",
        decides_result=True,
    )
    caption_dropout: float = option(
        0.0,
        "Probability that the empty prompt replaces a training prompt; what is learned stays "
        "attached.",
        decides_result=True,
        at_least=0.0,
        at_most=1.0,
    )

    @property
    def preserves(self) -> bool:
        """Whether the plain model's own prediction is part of the loss."""
        return self.preserve_weight > 0

    @property
    def needs_masks(self) -> str:
        """The option that makes object masks part of the loss, for messages; ``""`` for none."""
        if self.masked_training:
            return "masked_training=true"
        return f"preserve_weight={self.preserve_weight:g}" if self.preserves else ""

    @property
    def loss_weights(self) -> dict[str, Any]:
        """The arguments of ``diffusion_losses`` that say how a loss is weighed."""
        return {
            "snr_gamma": self.snr_gamma,
            "unmasked_weight": self.photo_weight_outside,
            "preserve_weight": self.preserve_weight,
        }

    @property
    def photo_weight_outside(self) -> float:
        """What a photo weighs outside its object mask, where masks are part of the loss."""
        return self.unmasked_weight if self.masked_training else 0.0
