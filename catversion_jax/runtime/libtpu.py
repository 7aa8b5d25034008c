"""libtpu on a machine without a TPU, where only ``catversion plan`` needs it: for its compiler.

JAX starts every backend that it finds. libtpu then looks for a TPU, prints a screenful of warnings
from C++ because it has found none, and JAX goes on with the CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path


def has_tpu_chips(devices: Path = Path("/dev")) -> bool:
    """Whether this machine has a TPU: ``accel0`` up to v4, ``accel0`` or ``vfio/0`` since v5.

    Args:
      devices: folder of the machine's devices.
    """
    return any((*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")))


def leave_out_libtpu() -> None:
    """Let JAX start on the CPU where libtpu would only look for a TPU in vain; to be called before
    JAX is imported.

    Nothing changes where the user has set ``JAX_PLATFORMS``, where there is a TPU, and where JAX
    has a plugin for another accelerator.
    """
    if (
        "JAX_PLATFORMS" in os.environ
        or importlib.util.find_spec("libtpu") is None
        or has_tpu_chips()
        or importlib.metadata.entry_points(group="jax_plugins")
        or importlib.util.find_spec("jax_plugins") is not None
    ):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
