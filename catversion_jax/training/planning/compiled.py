"""Compile the training step, also for a TPU that is not here, and read what the compiler knows.

libtpu holds the compiler and runs on any x86 Linux machine.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from catversion_jax.diffusion import noise_schedule
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.sharding import CONCEPT_AXIS, make_mesh
from catversion_jax.training.planning.abstract import PlannedStep, abstract_arguments
from catversion_jax.training.planning.chips import Slice
from catversion_jax.training.planning.flops import count_flops
from catversion_jax.training.state import make_optimizer
from catversion_jax.training.step import make_train_step

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)
FAST_COMPILATION: dict[str, float] = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {}
)
"""Leaves out the search for the fastest schedule: minutes instead of a quarter of an hour for
Stable Diffusion 1.5, with the same FLOPs and nearly the same memory. jax 0.11 has taken the option
away. What it offers instead, ``optimization_level``, makes another program below O2 (five times the
temporary memory for tiny-sd on a v5e), which says nothing of the one that training runs."""
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""How XLA begins the message of an error that fewer rows would have spared."""


class DoesNotFitError(CatVersionError):
    """The step needs more memory than the device has."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of one step of all rows of one device.

    Attributes:
      rows: concepts it trains at once.
      weights_bytes: of the frozen networks, on each device.
      state_bytes: what the rows' concepts hold: learned numbers, moments, latents, text states.
      temporary_bytes: largest sum of intermediate results.
      flops: of one step of all rows of a device, by :func:`~.flops.count_flops`.
      bytes_accessed: by its operations; counts what stays in the chip's fast memory as well.
      collectives: operations that talk to other chips, by kind.
      seconds: that compiling took.
    """

    rows: int
    weights_bytes: float
    state_bytes: float
    temporary_bytes: float
    flops: float
    bytes_accessed: float
    collectives: dict[str, int]
    seconds: float

    @property
    def total_bytes(self) -> float:
        """Everything a device holds at once."""
        return self.weights_bytes + self.state_bytes + self.temporary_bytes


def tpu_mesh(target: Slice, data_parallel: int = 1) -> Mesh:
    """A mesh of the slice's devices, none of which is here.

    Raises:
      CatVersionError: libtpu is missing, or knows no such slice.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # only silences a warning
    single = math.prod(map(int, target.topology.split("x"))) == 1
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=target.name, **options
        )
    except Exception as error:  # whatever the plugin raises
        reason = str(error).splitlines()[0]
        raise CatVersionError(
            f"--tpu {target.name}: cannot be compiled for ({reason}). The compiler is in libtpu: "
            "pip install 'catversion-jax[plan]', on x86-64 Linux; or give another topology."
        ) from error
    return make_mesh(data_parallel, described.devices)


def compile_step(
    planned: PlannedStep,
    mesh: Mesh,
    rows: int,
    max_images: int,
    max_prompts: int = 1,
    *,
    fast: bool = True,
) -> CompiledStep:
    """Compile the program that training runs, and ask the compiler about it.

    Raises:
      DoesNotFitError: it needs more memory than a device has.
      CatVersionError: it does not compile for another reason.
    """
    started = time.perf_counter()
    num_devices = mesh.shape[CONCEPT_AXIS]
    arguments = abstract_arguments(planned, mesh, rows * num_devices, max_images, max_prompts)
    traced, compiled = compile_program(planned, mesh, arguments, fast=fast)
    return CompiledStep(
        rows=rows,
        weights_bytes=_bytes(arguments[2:4]),
        state_bytes=_bytes(arguments[:2]) / num_devices,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        flops=count_flops(traced.jaxpr),
        bytes_accessed=compiled.cost_analysis()["bytes accessed"],
        collectives=count_collectives(compiled.as_text()),
        seconds=time.perf_counter() - started,
    )


def compile_program(
    planned: PlannedStep, mesh: Mesh, arguments: Any, *, fast: bool = True
) -> tuple[Any, Any]:
    """The training step for ``arguments`` of :func:`~.abstract.abstract_arguments`, as
    ``jax.stages.Traced`` and ``jax.stages.Compiled``.

    Raises:
      DoesNotFitError: it needs more memory than a device has.
      CatVersionError: it does not compile for another reason.
    """
    step: Any = _train_step(planned, mesh)
    try:
        platform = mesh.devices.flat[0].platform
        traced = step.trace(*arguments)
        lowered = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),))
        return traced, lowered.compile(compiler_options=FAST_COMPILATION if fast else None)
    except jax.errors.JaxRuntimeError as error:
        rows = arguments[0].step.shape[0] // mesh.shape[CONCEPT_AXIS]
        reason = str(error).splitlines()[0][:300]
        if reason.startswith(OUT_OF_MEMORY):
            raise DoesNotFitError(
                f"{rows} rows on a device: do not fit its memory ({reason}). Try fewer "
                "(concepts_per_device)."
            ) from error
        raise CatVersionError(
            f"the training step does not compile on jax {jax.__version__}, whatever its size "
            f"({reason}). tests/constraints.txt of the repository names versions that do; please "
            "report this message."
        ) from error


def count_collectives(hlo: str) -> dict[str, int]:
    """Operations of an optimized program that talk to other chips."""
    found = {kind: len(re.findall(rf"= [^=\n]*? {kind}(?:-start)?\(", hlo)) for kind in COLLECTIVES}
    return {kind: number for kind, number in found.items() if number}


def counted_flops(planned: PlannedStep, max_images: int) -> float:
    """FLOPs of one step of one concept; needs no libtpu."""
    mesh = make_mesh(1, jax.devices()[:1])
    arguments = abstract_arguments(planned, mesh, 1, max_images)
    step: Any = _train_step(planned, mesh)
    return count_flops(step.trace(*arguments).jaxpr)


def _train_step(planned: PlannedStep, mesh: Mesh) -> Any:
    schedule = noise_schedule(planned.backbone.noise_schedule)
    optimizer = planned.optimizer
    tx = make_optimizer(optimizer, planned.method)
    return make_train_step(
        schedule, tx, mesh, planned.objective, planned.devices, ema_decay=optimizer.ema_decay
    )


def _bytes(tree: Any) -> float:
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        total += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return float(total)
