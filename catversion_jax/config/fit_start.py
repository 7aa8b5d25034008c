"""The options of ``catversion fit-start``, each with its range."""

from __future__ import annotations

import dataclasses

from catversion_jax.config.options import Options, option


@dataclasses.dataclass(frozen=True)
class FitOptions(Options):
    """How a concept encoder is fitted."""

    num_steps: int = option(
        1500, "Number of updates of the concept encoder.", decides_result=True, at_least=1
    )
    batch_size: int = option(
        16,
        "Number of concepts in one update, with a photo of each.",
        decides_result=True,
        at_least=1,
    )
    learning_rate: float = option(
        1e-3,
        "Largest learning rate of AdamW, which falls to 0 along a cosine after a warm-up.",
        decides_result=True,
        at_least=1e-9,
        below=1,
    )
    rank: int = option(
        128,
        "Number of directions in which predictions differ; more make the file larger.",
        decides_result=True,
        at_least=1,
        at_most=4096,
    )
    held_out: float = option(
        0.1,
        "Share of the concepts that are kept from the fit, to judge it.",
        decides_result=True,
        at_least=0,
        below=1,
    )
    seed: int = option(
        0, "Seed of start values, noise and the order of concepts.", decides_result=True, at_least=0
    )
