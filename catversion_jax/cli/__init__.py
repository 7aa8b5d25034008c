"""The ``catversion`` command. Each command is one module with ``add_arguments(parser)`` and
``run(args) -> int``.

Exit codes: 0 all succeeded, 2 wrong usage or input, 3 some concepts were quarantined, 75 training
was asked to stop and has saved everything, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Sequence

from catversion_jax import __version__
from catversion_jax.cli.paths import check_values
from catversion_jax.cli.terminal import (
    INTERRUPTED,
    SAVED,
    prompt_interrupts,
    safe_terminal,
    say_interrupted,
)
from catversion_jax.errors import CatVersionError, did_you_mean, shown
from catversion_jax.runtime.libtpu import leave_out_libtpu

WRONG = 2
"""Exit code after wrong usage or input."""
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "train many concepts at once"),
    "teach": ("teach", "teach one concept from photos and its class word"),
    "fit-start": (
        "fit_start",
        "fit a concept encoder to many concepts, for train with init=predicted",
    ),
    "plan": ("plan", "what a run will need on a TPU or GPU: memory, hours, cost"),
    "status": ("status", "how far a run is: queued, running, done, quarantined and why"),
    "merge": ("merge", "one index of all shards of a run, also while they are at work"),
    "pack": ("pack", "all concepts of a run in one Arrow file"),
    "check": (
        "check",
        "show what a folder or manifest of concepts holds, before any accelerator is needed",
    ),
    "masks": ("masks", "make object masks beside the images of concepts"),
    "generate": ("generate", "draw images with trained concepts"),
    "serve": ("serve", "teach and draw for many users over HTTP, with OpenAI's and A1111's forms"),
    "evaluate": ("evaluate", "score a run's concepts, or any method's images, and write a report"),
    "export": ("export", "concept files, prompt embeddings, or a complete diffusers pipeline"),
    "push": ("push", "send concepts and a model card to the Hugging Face hub"),
    "import": ("import_official", "convert the authors' released adapters"),
    "inspect": ("inspect", "say what a concept file is"),
}
_ASKED_TO_STOP = {"train": SAVED, "teach": SAVED, "serve": 0}
"""Exit codes after SIGTERM of the commands that listen to it."""


_NO_BACKEND = "Unable to initialize backend"
"""How jax begins to say that there is no such device, or that another process has it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with safe_terminal() as output:
        if (encoding := sys.getfilesystemencoding().lower()) != "utf-8":
            print(
                f"note: this shell's locale has Python read names of files as {encoding}. Set "
                "PYTHONUTF8=1 where they are in UTF-8.",
                file=sys.stderr,
            )
        try:
            given = list(sys.argv[1:] if argv is None else argv)
            with prompt_interrupts(_ASKED_TO_STOP.get(given[0]) if given else None):
                code = _run(given)
        except CatVersionError as error:
            print(f"error: {error}", file=sys.stderr)
            code = WRONG
        except OSError as error:  # a path that is too long, a disk that is gone
            place = f"{shown(error.filename)}: " if error.filename else ""
            remedy = "Give another path, or free what is lacking, and run the same command again."
            if isinstance(error, FileNotFoundError) and _is_nowhere():
                place, remedy = "the working directory: ", "Change to one that is there (cd)."
            print(f"error: {place}{error.strerror or shown(error)}. {remedy}", file=sys.stderr)
            code = WRONG
        except MemoryError as error:
            print(
                f"error: out of memory ({shown(error)}). Ask for less at once: a smaller "
                "resolution or batch_size, fewer images.",
                file=sys.stderr,
            )
            code = WRONG
        except RuntimeError as error:
            if not str(error).startswith(_NO_BACKEND):
                raise
            print(
                f"error: JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {shown(error)}. "
                "Name a platform that this machine has and no other process holds, or unset the "
                "variable.",
                file=sys.stderr,
            )
            code = WRONG
        except KeyboardInterrupt:
            say_interrupted()
            code = INTERRUPTED
        output.flush()
        if output.failure is not None:
            reason = output.failure.strerror or output.failure
            print(f"error: standard output: cannot be written ({reason})", file=sys.stderr)
        return code or (WRONG if output.failure else 0)


def _is_nowhere() -> bool:
    """Whether the working directory was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else WRONG
    if argv[0] == "--version":
        print(_versions())
        return 0
    name = argv[0]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"error: {name!r}: no such command.{hint}\n\n{_usage()}", file=sys.stderr)
        return WRONG
    leave_out_libtpu()
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(f"catversion_jax.cli.{module_name}")
    parser = argparse.ArgumentParser(
        prog=f"catversion {name}",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(argv[1:])
    check_values(vars(args))
    # transformers is here for its tokenizer; that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("catversion_jax").setLevel(logging.INFO)
    # orbax also logs, with tracebacks of its threads, what it raises and we report
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return module.run(args)


def _versions() -> str:
    """This package's version, and those of what its results depend on."""
    return (
        f"catversion_jax {__version__}\n"
        f"jax {importlib.metadata.version('jax')}\n"
        f"python {platform.python_version()}"
    )


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return (
        "usage: catversion COMMAND ...\n\n"
        + "\n".join(lines)
        + "\n\n`catversion COMMAND --help` says more."
    )
