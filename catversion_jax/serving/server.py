"""A server put together, begun and ended; HTTP comes on top of it (``app.py``)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
import time
from pathlib import Path

from catversion_jax.config import TrainConfig, learning_options
from catversion_jax.config.model import ModelOptions
from catversion_jax.config.serving import ServeOptions
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import check_writable, make_folder
from catversion_jax.serving.core import Core
from catversion_jax.serving.device import DeviceThread
from catversion_jax.serving.keys import Keys
from catversion_jax.serving.meters import Meters
from catversion_jax.serving.ordering import Orders
from catversion_jax.serving.store import Store
from catversion_jax.serving.teaching import ConceptFolders
from catversion_jax.serving.worker import Worker

logger = logging.getLogger(__name__)

DATABASE = "server.sqlite"


class Server:
    """Everything but HTTP.

    Args:
      options: the server's options.
      config: how concepts are taught; ``output_dir`` is not read.
      backbone: networks that are loaded already; None loads them in the device's thread.

    Raises:
      CatVersionError: a file of keys, or a folder, that cannot be used.
    """

    def __init__(
        self, options: ServeOptions, config: TrainConfig, backbone: Backbone | None = None
    ):
        root = Path(options.output_dir)
        self.options = options
        self.keys = Keys.read(None if options.keys is None else Path(options.keys))
        check_writable(root)
        make_folder(root)
        run = run_folder(root, config)
        config = dataclasses.replace(config, output_dir=str(run))
        folders = ConceptFolders(root, run, config.data_options, config.method_options)
        self.core = Core(options, Store(root / DATABASE), folders, Meters())
        self.worker = Worker(self.core, config, backbone)
        self.device = DeviceThread(self.worker.prepare, self.worker.work, self.worker.finish)
        self.core.device = self.device
        self._closing = threading.Lock()
        self._deadline: float | None = None

    @property
    def orders(self) -> Orders:
        """What takes requests for pictures.

        Raises:
          ApiError: 503, while nothing is taken.
        """
        self.core.admit()
        return self.worker.orders

    def start(self) -> None:
        """Begin to load and compile."""
        self.device.start()

    def drain(self) -> None:
        """Take nothing new from now on; what waits to be drawn has ``shutdown_timeout``."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.options.shutdown_timeout
        self.core.draining = True

    def hurry(self) -> None:
        """Wait for nothing more than the piece of work under way."""
        self._deadline = time.monotonic()

    def end_work(self) -> None:
        """Finish the pictures that wait, as many as there is time for, save the training, and end
        the device's thread. Requests are still answered; what is left is done after the next start.
        """
        with self._closing:
            self.drain()
            assert self._deadline is not None
            while time.monotonic() < self._deadline and self.device.is_alive and self.core.left:
                time.sleep(0.05)
            if not self.device.stop(timeout=max(30.0, self.options.shutdown_timeout)):
                logger.error("the device does not answer; what it worked on is done again")
        self.core.watchers.tell_all()

    def close(self) -> None:
        """End the work and close the database; nothing may be asked afterwards."""
        self.end_work()
        self.core.store.close()


def run_folder(root: Path, config: TrainConfig) -> Path:
    """Where the training of these options has its state. With other options, except those of the
    model, it is another folder: what was under way begins anew. Another model is refused there
    (:meth:`~catversion_jax.serving.teaching.ConceptFolders.check_model`).
    """
    of_model = {field.name for field in dataclasses.fields(ModelOptions)}
    options = {k: v for k, v in learning_options(config).items() if k not in of_model}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    return root / f"run-{digest.hexdigest()[:12]}"
