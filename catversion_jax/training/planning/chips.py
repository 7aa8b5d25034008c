"""Accelerators a run can be planned for: published figures of one chip, and what slices there are.

Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, nvidia.com data sheets (dense bf16).
"""

from __future__ import annotations

import dataclasses
import math
import re

from catversion_jax.errors import CatVersionError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as users write it.
      flops_per_s: peak, bfloat16.
      bytes_per_s: of its memory.
      memory_bytes: of it.
      slices: topologies worth comparing, smallest first; none for GPUs.
      devices: that it is compiled for as. The two TensorCores of a TPU7x are devices of their own,
        each with half of everything. So are those of a v4 to the compiler, while a real v4 shows
        JAX one device, which holds what both do.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    slices: tuple[str, ...] = ()
    devices: int = 1

    @property
    def device_memory_bytes(self) -> float:
        """Memory of one device."""
        return self.memory_bytes / self.devices


TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1228e9, 32e9, ("2x2x1", "2x2x2", "2x2x4", "4x4x4"), devices=2),
        Chip("v5e", 197e12, 819e9, 16e9, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8")),
        Chip("v5p", 459e12, 2765e9, 95e9, ("2x2x1", "2x2x2", "2x4x4", "4x4x4")),
        Chip("v6e", 918e12, 1640e9, 32e9, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8")),
        Chip("tpu7x", 2307e12, 7380e9, 192e9, ("2x2x1", "2x2x2", "2x2x4", "4x4x4"), devices=2),
    )
}
GPUS = {
    chip.name: chip
    for chip in (
        Chip("a100", 312e12, 2039e9, 80e9),
        Chip("h100", 989e12, 3350e9, 80e9),
        Chip("h200", 989e12, 4800e9, 141e9),
        Chip("l4", 121e12, 300e9, 24e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A number of connected chips.

    Attributes:
      chip: which.
      topology: for instance ``4x4``.
    """

    chip: Chip
    topology: str

    @property
    def num_chips(self) -> int:
        """The product of the topology."""
        return math.prod(int(side) for side in self.topology.split("x"))

    @property
    def num_devices(self) -> int:
        """Number of devices of all chips."""
        return self.num_chips * self.chip.devices

    @property
    def name(self) -> str:
        """As the compiler writes it."""
        return f"{self.chip.name}:{self.topology}"

    def others(self) -> list[Slice]:
        """The usual slices of this chip, this one among them."""
        names = dict.fromkeys((*self.chip.slices, self.topology))
        return sorted((Slice(self.chip, name) for name in names), key=lambda one: one.num_chips)


_TOPOLOGY = r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2})*"


def parse_slice(text: str) -> Slice:
    """Read ``v5e:4x4``.

    Raises:
      CatVersionError: an unknown chip, or not a topology.
    """
    name, _, topology = text.partition(":")
    if name not in TPUS:
        raise CatVersionError(f"--tpu {text}: must be one of {', '.join(TPUS)} and a topology.")
    chip = TPUS[name]
    dimensions = len(chip.slices[0].split("x"))
    topology = topology or chip.slices[0]
    if not re.fullmatch(_TOPOLOGY, topology) or topology.count("x") + 1 != dimensions:
        example = ", ".join(f"{name}:{one}" for one in chip.slices)
        raise CatVersionError(f"--tpu {text}: must be like {example}.")
    return Slice(chip, topology)
