"""What the commands print on, and Ctrl-C: nothing that is printed can end a command.

Names, reasons and prompts come from strangers' files. Control characters in them, which could move
the cursor, change the window's title or reverse the reading direction, are shown as escapes; so is
what the terminal's encoding lacks. The escapes are those of JSON, so that ``--json`` stays JSON.
Who reads our output may go away at any time (``catversion train ... | head -1``).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO, cast

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
SAVED = 75
"""Exit code (EX_TEMPFAIL) of training that was asked to stop: try again, and nothing is lost."""

_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_CURSOR = re.compile("\r?[^\x00-\x1f]*|\n+|(\x1b\\[A)+")
"""What progress bars write: a line over the last one, or a move up or down."""
_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN)


def printable(text: str, encoding: str = "utf-8") -> str:
    """``text`` with escapes in place of what a terminal would obey or could not show."""
    text = _UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = "".join(map(_escaped, text.encode(encoding, "replace").decode(encoding), text))
    return text


def _escaped(shown: str, character: str) -> str:
    """``character``, or its escape where the encoding shows something else."""
    if shown == character:
        return character
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


class SafeStream:
    """A text stream that shows what is written as :func:`printable` says, and never raises.

    Args:
      stream: the stream; None, as Python has it for one that was closed before it began, takes
        everything and shows nothing.

    Attributes:
      failure: why something could not be written that somebody waits for, such as a full disk.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``, whole lines at once; returns its length."""
        shown = text
        if not _CURSOR.fullmatch(text) or not text.isascii():
            start = "\r" if text.startswith("\r") else ""
            shown = start + printable(text[len(start) :], self.encoding)
        with self._guarded() as stream:
            stream.write(shown)
            if "\n" in text:
                stream.flush()
        return len(text)

    def flush(self) -> None:
        """Write what the stream holds back."""
        with self._guarded() as stream:
            stream.flush()

    def close(self) -> None:
        """Leave the stream to whom it belongs: loggers close at exit what they once took."""
        self.flush()

    def isatty(self) -> bool:
        """Whether a person looks on."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[Any]:
        if self._stream is None:
            yield _Nowhere()
            return
        try:
            yield self._stream
        except ValueError:
            self._stream = None  # it was closed
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                self.failure = error
            self._give_up()

    def _give_up(self) -> None:
        """Let Python's own flush at its end go nowhere, which would raise once more."""
        stream = self._stream
        if stream is not None and any(stream is one for one in (sys.__stdout__, sys.__stderr__)):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
        self._stream = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)


class _Nowhere:
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


@contextlib.contextmanager
def safe_terminal() -> Iterator[SafeStream]:
    """Standard output and error as :class:`SafeStream` within the block; gives the first one."""
    before = sys.stdout, sys.stderr
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def prompt_interrupts(asked_to_stop: int | None = None) -> Iterator[None]:
    """Ctrl-C while modules are imported ends the process at once, within the block.

    Python's own way is to raise KeyboardInterrupt, which one of the hundreds of modules of JAX may
    catch, or which its C++ code cannot pass on; the command would go on for hours. While modules
    are imported there is nothing to save.

    Args:
      asked_to_stop: exit code of a command that SIGTERM asks to save and end. Until the command
        listens itself, nothing is under way, and SIGTERM ends the process at once with this code.
    """
    handlers: dict[int, tuple[Any, Any]] = {}  # what is there, and what takes its place
    if threading.current_thread() is threading.main_thread():
        handlers[signal.SIGINT] = (signal.default_int_handler, _interrupt)
        if asked_to_stop is not None:
            ends = functools.partial(_end, asked_to_stop)
            handlers[signal.SIGTERM] = (signal.SIG_DFL, ends)
    handlers = {one: pair for one, pair in handlers.items() if signal.getsignal(one) is pair[0]}
    for number, (_, ours) in handlers.items():
        signal.signal(number, ours)
    try:
        yield
    finally:
        for number, (usual, _) in handlers.items():
            signal.signal(number, usual)


def _interrupt(number: int, frame: FrameType | None) -> None:
    above = frame
    while above is not None:
        if above.f_code.co_filename.startswith("<frozen importlib"):
            _end(INTERRUPTED)
        above = above.f_back
    signal.default_int_handler(number, frame)


def _end(code: int, *_: object) -> None:
    say_interrupted()
    sys.stdout.flush()
    os._exit(code)


def say_interrupted() -> None:
    """Tell the user that nothing is lost."""
    print("interrupted; finished files are kept. Run the same command again.", file=sys.stderr)
