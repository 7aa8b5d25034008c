"""Training with a model that lies on the disk asks nobody anything."""

import os
import subprocess
import sys
from pathlib import Path

from running import ROOT, arguments, final_files

# The interpreter reports every address that Python code looks up or connects to.
WATCHED = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("NETWORK", event, args, flush=True)
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(refuse)
from catversion_jax.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_training_opens_no_connection(
    one_block_sd_folder: Path, toys: Path, tmp_path: Path
) -> None:
    args = arguments(one_block_sd_folder, toys, tmp_path / "out")  # compiled already
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *args],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HOME": str(tmp_path),
        },
    )
    assert "NETWORK" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    assert len(final_files(tmp_path / "out")) == 3


def test_the_watch_sees_a_connection() -> None:
    """Without this the test above would pass by seeing nothing."""
    program = WATCHED.split("from catversion_jax")[0] + (
        "import socket; socket.create_connection(('127.0.0.1', 9))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "NETWORK socket." in done.stdout
    assert done.returncode == 1
