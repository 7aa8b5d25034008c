"""What a training step sees and how its loss is weighed."""

from __future__ import annotations

import dataclasses
from typing import Literal

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
    masked_training: bool = option(
        False, "Whether the object masks weigh the loss (OneTrainer).", decides_result=True
    )
    unmasked_weight: float = option(
        0.1,
        "Weight of the loss outside the object mask where masked_training is on (OneTrainer).",
        decides_result=True,
        at_least=0.0,
        at_most=1.0,
    )
    timestep_sampling: Literal["uniform", "stratified"] = option(
        "uniform",
        "How the timesteps of a batch are drawn: uniform (official), or stratified, which draws "
        "one from each n-th of the schedule for a batch of n and shifts them evenly from step to "
        "step.",
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
