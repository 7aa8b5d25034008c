"""Whose turn the device is: drawing and teaching each get a share of its time.

    (1)  next = the one that is busy and has the smallest (seconds used / share)

A kind of work that had nothing to do gets nothing for it: its account is brought up to the other's
when it comes back, also after a rest of both (start-time fair queueing, Goyal, Vin, Cheng 1996).
"""

from __future__ import annotations

import threading
from typing import Literal

Work = Literal["draw", "teach"]


class Shares:
    """The accounts; any thread may call.

    Args:
      drawing: share of drawing while both are busy, between 0 and 1.
    """

    def __init__(self, drawing: float):
        self._lock = threading.Lock()
        self._share = {"draw": drawing, "teach": 1 - drawing}
        self._used = {"draw": 0.0, "teach": 0.0}
        self._busy = {"draw": False, "teach": False}

    def turn(self, *, draws: bool, teaches: bool) -> Work | None:
        """What to do next, of what there is to do (1)."""
        wants = {"draw": draws, "teach": teaches}
        order: tuple[Work, ...] = ("draw", "teach")
        with self._lock:
            for work in order:
                if wants[work] and not self._busy[work]:
                    self._used[work] = max(self._used.values())
            self._busy = wants
            return min(
                (work for work in order if wants[work]), key=lambda w: self._used[w], default=None
            )

    def spent(self, work: Work, seconds: float) -> None:
        """Note what a turn took."""
        with self._lock:
            self._used[work] += seconds / self._share[work]
