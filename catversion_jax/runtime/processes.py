"""Several processes, one list of concepts: JAX's own runtime joins them.

Each process trains its own part of the list on its own devices, with a program of its own: nothing
is exchanged while training, so no host ever waits for another host's refills, and the results do
not depend on the number of processes. ``jax.distributed`` joins the processes: it tells each one
which part is its own, ends all of them when one dies, and lets them wait for each other at the
start and at the end.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Sequence
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.libtpu import has_tpu_chips

T = TypeVar("T")
HEARTBEAT_SECONDS = 30
"""After this silence a process counts as dead, and the other processes end."""


def join_processes(
    address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of the run, if there are any; before anything touches a device.

    A process that has joined them already stays as it is.

    Args:
      address: ``host:port`` of process 0. On the hosts of a Cloud TPU slice JAX finds all three by
        itself; elsewhere None means that this process is the only one.
      num_processes: number of processes that train one list together.
      process_id: number of this process among them, counted from 0.

    Raises:
      CatVersionError: the other processes cannot be reached.
    """
    if jax.distributed.is_initialized() or (address is None and not _on_tpu_slice()):
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,  # after an error in one process
        )
    except Exception as error:
        raise CatVersionError(
            f"the processes of this run cannot find each other ({str(error).splitlines()[0]}). "
            "Start the same command on every host; elsewhere than on Cloud TPU with "
            "coordinator_address=HOST:PORT num_processes=N process_id=0..N-1."
        ) from error
    # JAX listens to SIGTERM itself from now on; a caller that listened already still does.
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def own_part(items: Sequence[T]) -> Sequence[T]:
    """The items that this process works on: every ``num_processes``-th, from its own number on."""
    return items[jax.process_index() :: jax.process_count()]


def wait_for_others(what: str) -> None:
    """Block until every process has called this with the same ``what``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _on_tpu_slice() -> bool:
    """Whether this machine is a host of a Cloud TPU."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return has_tpu_chips() and importlib.util.find_spec("libtpu") is not None
