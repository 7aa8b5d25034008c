"""What no input may cost: time, memory, and files elsewhere."""

import contextlib
import hashlib
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS = 30  # of this process's own time: a machine may be busy with other work
PATIENCE = 10  # times as long on the clock, for what waits and does nothing
MEGABYTES = 1500


class TooLong(BaseException):
    """No ``except Exception`` may swallow it."""


@contextlib.contextmanager
def within_bounds(seconds: float = SECONDS, megabytes: float = MEGABYTES) -> Iterator[None]:
    """Raise when the body takes longer, or when this process grows by more than so much.

    The limit of address space is a safety net far above: it ends what asks for all at once.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        kind = "at work" if signum == signal.SIGPROF else "waiting"
        limit = seconds if signum == signal.SIGPROF else seconds * PATIENCE
        raise TooLong(f"still {kind} after {limit} s")

    before, started = _peak_megabytes(), time.process_time()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (4 << 30), limits[1]))
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    took, grown = time.process_time() - started, _peak_megabytes() - before
    assert took < seconds, f"took {took:.0f} s"
    assert grown < megabytes, f"took {grown:.0f} MB"


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def contents(folder: Path, leave_out: Path) -> dict[str, str]:
    """Every file below a folder but for one folder's, and what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_relative_to(leave_out)
    }
