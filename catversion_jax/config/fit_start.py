"""The options of ``catversion fit-start``, each with its range."""

from __future__ import annotations

import dataclasses

from catversion_jax.config.options import Options, option


@dataclasses.dataclass(frozen=True)
class FitOptions(Options):
    """How a concept encoder is fitted."""

    num_steps: int = option(1500, "updates of the concept encoder", decides_result=True, at_least=1)
    batch_size: int = option(
        16, "concepts in a step, a photo of each", decides_result=True, at_least=1
    )
    learning_rate: float = option(
        1e-3, "of AdamW, before its cosine", decides_result=True, at_least=1e-9, below=1
    )
    rank: int = option(
        128, "directions that predictions have", decides_result=True, at_least=1, at_most=4096
    )
    held_out: float = option(
        0.1,
        "share of the concepts that only judge the result",
        decides_result=True,
        at_least=0,
        below=1,
    )
    seed: int = option(0, "of start values, noise and order", decides_result=True, at_least=0)
