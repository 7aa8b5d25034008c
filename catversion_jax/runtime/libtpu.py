"""libtpu on a machine without a TPU, where only ``catversion plan`` wants it: for its compiler.

JAX starts every backend that it finds. libtpu then looks for a TPU, prints a screenful of warnings
from C++ that it has found none, and JAX goes on with the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_GOOGLE = "0x1ae0"
"""Google's number as a vendor of PCI devices; JAX looks for its chips in the same way."""


def has_tpu_chips(root: Path = Path("/")) -> bool:
    """Whether this machine has a TPU, by its device files and its PCI devices.

    Args:
      root: of the file system.
    """
    files = (*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*"))
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    return bool(files) or any(path.read_text().strip() == _GOOGLE for path in vendors)


def leave_out_libtpu() -> None:
    """Have JAX start on the CPU if it would only try libtpu in vain; before JAX is imported.

    Nothing is changed where the user has said ``JAX_PLATFORMS``, where there is a TPU or a variable
    ``TPU_...`` tells of one, and where JAX has a plugin for another accelerator.
    """
    if (
        "JAX_PLATFORMS" in os.environ
        or importlib.util.find_spec("libtpu") is None
        or any(name.startswith("TPU_") for name in os.environ)
        or has_tpu_chips()
        or importlib.metadata.entry_points(group="jax_plugins")
        or importlib.util.find_spec("jax_plugins") is not None
    ):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"


@contextlib.contextmanager
def messages_caught() -> Iterator[None]:
    """Keep what C++ prints to the standard error within the block from the user's screen; if the
    block raises, it is printed after all.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        except BaseException:
            caught.seek(0)
            os.write(screen, caught.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
