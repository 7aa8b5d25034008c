"""From what the compiler says of one step to hours and money.

    (1)  memory(S) = weights + state S + a + b S     temporaries: a line through two compilations
    (2)  seconds of a step of S concepts = max(FLOPs(S) / (u peak),  least bytes / bandwidth)
    (3)  hours = ceil(N / (S chips)) steps seconds / 3600

``u`` is the share of the chip's peak that the step reaches. Nothing here has measured it: the
default is what published trainings of this UNet reach (docs/how_to/many_concepts.md).
"""

from __future__ import annotations

import dataclasses
import math

from catversion_jax.training.planning.chips import Chip
from catversion_jax.training.planning.compiled import CompiledStep

USABLE_MEMORY = 0.9
"""Share of a device's memory for the training step; evaluation, sample grids and the encoding of
newcomers want some as well.
"""

UTILIZATION = 0.3


@dataclasses.dataclass(frozen=True)
class MemoryModel:
    """Equation (1), bytes."""

    weights: float
    state_per_slot: float
    temporary_once: float
    temporary_per_slot: float

    @classmethod
    def of(cls, small: CompiledStep, large: CompiledStep) -> MemoryModel:
        """The line through two compilations with different numbers of slots."""
        more = large.slots_per_chip - small.slots_per_chip
        slope = max(0.0, (large.temporary_bytes - small.temporary_bytes) / more)
        return cls(
            weights=small.weights_bytes,
            state_per_slot=small.state_bytes / small.slots_per_chip,
            temporary_once=max(0.0, small.temporary_bytes - slope * small.slots_per_chip),
            temporary_per_slot=slope,
        )

    def bytes_of(self, slots: int) -> float:
        """Everything a chip with so many slots holds."""
        per_slot = self.state_per_slot + self.temporary_per_slot
        return self.weights + self.temporary_once + per_slot * slots

    def largest(self, memory_bytes: float) -> int:
        """Slots that fit; 0 when not even one does."""
        free = memory_bytes - self.weights - self.temporary_once
        return max(0, math.floor(free / (self.state_per_slot + self.temporary_per_slot)))


@dataclasses.dataclass(frozen=True)
class Job:
    """Equation (3) for one number of chips."""

    chips: int
    slots_per_chip: int
    seconds_per_step: float
    hours: float
    cost: float | None


def step_seconds(
    flops: float, least_bytes: float, chip: Chip, utilization: float = UTILIZATION
) -> float:
    """Equation (2)."""
    return max(flops / (utilization * chip.flops_per_s), least_bytes / chip.bytes_per_s)


def job(
    concepts: int,
    steps: int,
    chips: int,
    slots_per_chip: int,
    seconds_per_step: float,
    price_per_chip_hour: float | None,
) -> Job:
    """Hours and cost of so many concepts on so many chips; chips never wait for each other."""
    rounds = math.ceil(concepts / (chips * slots_per_chip))
    hours = rounds * steps * seconds_per_step / 3600
    cost = None if price_per_chip_hour is None else hours * chips * price_per_chip_hour
    return Job(chips, slots_per_chip, seconds_per_step, hours, cost)
