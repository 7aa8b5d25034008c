"""How long and how fast a concept learns."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

from catversion_jax.config.options import Options, option

# What the early-stop rules use where the options say nothing: (eps, window).
EARLY_STOP_RULES: Mapping[str, tuple[float, int]] = types.MappingProxyType(
    {"dvar": (0.3, 120), "plateau": (0.02, 80)}
)


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(Options):
    """Optimization."""

    max_train_steps: int = option(
        1000,
        "Number of optimizer updates of each concept (official); with init=predicted it can be 0.",
        decides_result=True,
        at_least=0,
    )
    learning_rate: float = option(
        1e-2,
        "Learning rate, which neither the batch size nor the number of devices scales (official: "
        "5e-3 times the batch size 2).",
        decides_result=True,
        at_least=0.0,
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "constant",
        "How the learning rate continues after the warm-up (official: constant).",
        decides_result=True,
    )
    lr_warmup_steps: int = option(
        0,
        "Number of updates in which the learning rate rises linearly from 0 (official: 0).",
        decides_result=True,
        at_least=0,
    )
    adam_beta1: float = option(
        0.9,
        "Decay of AdamW's mean of gradients (official: torch's default).",
        decides_result=True,
        at_least=0,
        below=1,
    )
    adam_beta2: float = option(
        0.999,
        "Decay of AdamW's mean of squared gradients (official: torch's default).",
        decides_result=True,
        at_least=0,
        below=1,
    )
    adam_weight_decay: float = option(
        1e-2,
        "Weight decay of AdamW (official: torch's default).",
        decides_result=True,
        at_least=0.0,
    )
    adam_epsilon: float = option(
        1e-8,
        "Number that AdamW adds to the denominator of an update (official: torch's default).",
        decides_result=True,
        at_least=0.0,
    )
    max_grad_norm: float | None = option(
        None,
        "Largest norm of a gradient; each concept's gradient is clipped on its own. null clips "
        "nothing (official).",
        decides_result=True,
        at_least=0.0,
    )
    ema_decay: float | None = option(
        None,
        "Decay of a moving average of what is learned, which is then evaluated and exported in "
        "its place (diffusers); null keeps no average (official).",
        decides_result=True,
        at_least=0.0,
        at_most=1.0,
    )
    early_stop: Literal["none", "dvar", "plateau"] = option(
        "none",
        "Rule that ends a concept when its evaluation loss has settled: dvar goes by the variance "
        "of that loss (DVAR, arXiv 2302.04841), plateau by its minimum.",
        decides_result=True,
    )
    early_stop_eps: float | None = option(
        None,
        "Threshold of the early-stop rule; null takes 0.3 for dvar (share of the whole variance) "
        "and 0.02 for plateau (relative gain that counts).",
        decides_result=True,
        at_least=0.0,
    )
    early_stop_window: int | None = option(
        None,
        "Number of steps that the early-stop rule looks back; null takes 120 for dvar and 80 for "
        "plateau (measured, see docs/how_to/many_concepts.md).",
        decides_result=True,
        at_least=1,
    )
    early_stop_min_steps: int | None = option(
        None,
        "Number of steps before the early-stop rule is first asked; null takes early_stop_window.",
        decides_result=True,
        at_least=0,
    )
    seed: int = option(
        42,
        "Seed of all random numbers of a concept, for concepts that do not name their own (Custom "
        "Diffusion).",
        decides_result=True,
        at_least=0,
        below=2**32,
    )

    @property
    def early_stop_rule(self) -> tuple[float, int]:
        """``early_stop_eps`` and ``early_stop_window`` where ``early_stop`` is on."""
        eps, window = EARLY_STOP_RULES[self.early_stop]
        return (
            eps if self.early_stop_eps is None else self.early_stop_eps,
            self.early_stop_window or window,
        )
