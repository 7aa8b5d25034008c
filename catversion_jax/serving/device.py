"""The one thread that owns the device.

Everything compiled is called from here, except that concepts are encoded ahead by the feeder's
thread, as in every training. Between two pieces of work, a batch of pictures or one dispatch of
training, it looks at what has come in and takes the next by :mod:`~catversion_jax.serving.share`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from catversion_jax.errors import CatVersionError

logger = logging.getLogger(__name__)


class DeviceThread:
    """Runs ``work`` over and over.

    Args:
      prepare: is called once, in the thread, before anything else: it loads and compiles.
      work: does one piece of work; returns for how many seconds there is nothing to do, 0 where
        there was something.
      finish: is called once at the end, in the thread.

    Attributes:
      compiled: set once ``prepare`` has returned.
      failure: what ended the thread before it was asked to stop.
      on_failure: is called when the thread has ended by a failure.
    """

    def __init__(
        self,
        prepare: Callable[[], None],
        work: Callable[[], float],
        finish: Callable[[], None],
    ):
        self._prepare, self._work, self._finish = prepare, work, finish
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._progress, self._idle = time.monotonic(), False
        self.compiled = threading.Event()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that there may be something to do."""
        self._wake.set()

    def progressed(self) -> None:
        """Note that the work moves; a long piece of work says so in between."""
        self._progress = time.monotonic()

    @property
    def seconds_without_progress(self) -> float:
        """How long nothing has moved although there was something to do; 0 while idle."""
        return 0.0 if self._idle else time.monotonic() - self._progress

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self, timeout: float | None = None) -> bool:
        """Ask the thread to end after the piece of work under way; whether it has."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._prepare()
            self.compiled.set()
            while not self._stop.is_set():
                self._wake.clear()
                self._idle = False
                self.progressed()
                seconds = self._work()
                self._idle = seconds > 0
                if seconds > 0:
                    self._wake.wait(seconds)
        except CatVersionError as error:  # what the user reads says everything
            self.failure = error
            logger.error("%s", error)
        except BaseException as error:
            self.failure = error
            logger.exception("the device's thread has ended")
        finally:
            try:
                self._finish()
            except BaseException as error:
                self.failure = self.failure or error
                logger.exception("not everything under way could be saved")
            if self.failure is not None:
                self.on_failure()
