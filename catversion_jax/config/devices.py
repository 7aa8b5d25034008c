"""On which devices a run computes, and how it is spread over them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from catversion_jax.config.options import Options, option


@dataclasses.dataclass(frozen=True)
class DeviceOptions(Options):
    """Devices."""

    mixed_precision: Literal["auto", "bf16", "no"] = option(
        "auto",
        "Number type of the frozen UNet and text encoder: bf16, no (float32), or auto, which is "
        "bf16 on accelerators and float32 on CPU.",
        decides_result=True,
    )
    concepts_per_device: int | Literal["auto"] = option(
        4,
        "Number of concepts that each device trains at once; auto takes as many as its memory "
        "holds (CPU: 4).",
        decides_result=False,
        at_least=1,
    )
    gradient_checkpointing: Literal["auto", "none", "attention", "blocks"] = option(
        "auto",
        "What the backward pass computes again instead of keeping it in memory; auto computes as "
        "little again as concepts_per_device allows (CPU: nothing).",
        decides_result=False,
    )
    data_parallel: int = option(
        1,
        "Number of devices that share the batch of each concept; further devices train other "
        "concepts.",
        decides_result=False,
        at_least=1,
    )
    coordinator_address: str | None = option(
        None,
        "Address HOST:PORT of process 0 where several processes train one list together; on Cloud "
        "TPU it is found without this option.",
        decides_result=False,
    )
    num_processes: int | None = option(
        None, "Number of processes that train one list together.", decides_result=False
    )
    process_id: int | None = option(
        None,
        "Number of this process among those that train one list together, counted from 0.",
        decides_result=False,
    )
    steps_per_dispatch: int | None = option(
        None,
        "Largest number of steps in one call of the compiled program; null takes 10, but 1 on "
        "CPU, where a loop would halve the speed. A stop (SIGTERM, Ctrl-C) waits for the call "
        "under way and the one that is queued behind it.",
        decides_result=False,
        at_least=1,
    )
    compilation_cache_dir: str | None = option(
        "~/.cache/catversion/xla",
        "Folder of XLA's persistent compilation cache, and of the executables of training. What is "
        "in it runs, so keep it as safe as this package. null leaves it to JAX's own settings, "
        "which keep nothing unless they are changed.",
        decides_result=False,
    )

    def contradictions(self) -> list[str]:
        """What does not suit several processes."""
        address, count, number = self.coordinator_address, self.num_processes, self.process_id
        problems = super().contradictions()
        if address is None and count is None and number is None:
            return problems
        if address is None or count is None or number is None:
            problems.append(
                "coordinator_address, num_processes and process_id belong together: give all "
                "three, or none on Cloud TPU."
            )
        elif not 0 <= number < count:
            problems.append(
                f"process_id={number}: must lie within 0..num_processes - 1 = {count - 1}."
            )
        return problems
