"""Starting the commands of the package as their user does."""

import os
import subprocess
import sys
from pathlib import Path

FROM_LIBTPU = ("libtpu", "InitGoogle", "TPU worker")
# What jax is about to take away is an error where we use it.
PROGRAM = """
import sys, warnings
warnings.filterwarnings("error", category=DeprecationWarning, module="catversion_jax")
from catversion_jax.cli import main
sys.exit(main())
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """A command in ``folder``, with JAX free to choose a device."""
    variables = {name: text for name, text in os.environ.items() if name != "JAX_PLATFORMS"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def printed(process: subprocess.Popen, code: int = 0) -> str:
    """What the command printed, when it has ended with ``code``; libtpu has said nothing."""
    try:
        text, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, text
    assert not [word for word in FROM_LIBTPU if word in text], text
    return text
