"""Where the time of a step goes on the device, from JAX's profiler."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax


def largest_kernels(step: Callable[[], object], count: int = 10) -> dict[str, float]:
    """Share of the device's time in one step, of the kernels that take most of it.

    A CPU's are hundreds of small ones: those of one kind count together.
    """
    nanoseconds: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = [*jax.profiler.ProfileData.from_file(str(path)).planes]
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                # A GPU's streams run kernels only; elsewhere XLA's operations say so.
                if line.name.startswith("Stream") or any(key == "hlo_op" for key, _ in event.stats):
                    name = event.name if devices else re.sub(r"[.\d]+$", "", event.name)
                    nanoseconds[name] += event.duration_ns
    total = nanoseconds.total()
    return {name: round(found / total, 4) for name, found in nanoseconds.most_common(count)}
