"""From what the compiler says of one step to hours and money.

    (1)  memory(S) = weights + state S + a + b S     temporaries: a line through two compilations
    (2)  seconds of a step of S concepts = max(FLOPs(S) / (u peak),  least bytes / bandwidth)
    (3)  hours = ceil(N / (S devices / data parallel)) steps seconds / 3600

A device is a chip, or one of a chip's TensorCores with its share of all figures (``chips.py``).
``u`` is the share of the peak that the step reaches. Nothing here has measured it: the
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
    state_per_row: float
    temporary_once: float
    temporary_per_row: float

    @classmethod
    def of(cls, small: CompiledStep, large: CompiledStep) -> MemoryModel:
        """The line through two compilations with different numbers of rows."""
        more = large.rows - small.rows
        slope = max(0.0, (large.temporary_bytes - small.temporary_bytes) / more)
        return cls(
            weights=small.weights_bytes,
            state_per_row=small.state_bytes / small.rows,
            temporary_once=max(0.0, small.temporary_bytes - slope * small.rows),
            temporary_per_row=slope,
        )

    def bytes_of(self, rows: int) -> float:
        """Everything a device with so many rows holds."""
        per_row = self.state_per_row + self.temporary_per_row
        return self.weights + self.temporary_once + per_row * rows

    def largest(self, memory_bytes: float) -> int:
        """Number of rows that fit; 0 when not even one does."""
        free = memory_bytes - self.weights - self.temporary_once
        return max(0, math.floor(free / (self.state_per_row + self.temporary_per_row)))


@dataclasses.dataclass(frozen=True)
class Job:
    """Equation (3) for one number of chips.

    Attributes:
      chips: number of chips.
      concepts_at_once: rows of all of them.
      seconds_per_step: of a step of all rows.
      hours: until all concepts are done.
      cost: of those hours on all chips; None without a price.
    """

    chips: int
    concepts_at_once: int
    seconds_per_step: float
    hours: float
    cost: float | None


def step_seconds(
    flops: float, least_bytes: float, chip: Chip, utilization: float = UTILIZATION
) -> float:
    """Equation (2) for one device: ``flops`` of its rows, ``least_bytes`` that it must read."""
    seconds = max(flops / (utilization * chip.flops_per_s), least_bytes / chip.bytes_per_s)
    return chip.devices * seconds


def job(
    concepts: int,
    steps: int,
    chips: int,
    concepts_at_once: int,
    seconds_per_step: float,
    price_per_chip_hour: float | None,
) -> Job:
    """Hours and cost of so many concepts on so many chips; chips never wait for each other."""
    rounds = math.ceil(concepts / concepts_at_once)
    hours = rounds * steps * seconds_per_step / 3600
    cost = None if price_per_chip_hour is None else hours * chips * price_per_chip_hour
    return Job(chips, concepts_at_once, seconds_per_step, hours, cost)
