"""What a kind of file is that the product reads: a good example of it, what may become of it, and
the command that reads it. All kinds stand in the ``*_inputs.py`` beside this file.
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path

import mutations
import numpy as np
from PIL import Image

from catversion_jax.cli import main
from catversion_jax.errors import CatVersionError

SUCCEEDED, REFUSED = "result", "refused"
EXIT_CODES = {0: SUCCEEDED, 2: REFUSED, 3: REFUSED}
MODEL = "one_block_sd_folder"  # a fixture of tests/conftest.py


@dataclasses.dataclass(frozen=True)
class Input:
    """One kind of file.

    ``write`` makes a good world in an empty folder, or names fixtures: the first one's folder is
    copied there, the others are linked. ``file`` is what is changed in it, relative to that folder.
    ``read`` does what a user does with it and says how it ended. What lies in ``output`` may
    change, nothing else.
    """

    name: str
    file: str
    write: Callable[[Path], object] | tuple[str, ...]
    mutate: mutations.Mutation
    read: Callable[[Path], str]
    output: str = "out"


def command(*args: object) -> str:
    """Run a command here; whatever it prints is not looked at, but printing must not fail."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
            code = main(list(map(str, args)))
    except SystemExit as error:  # of argparse
        code = error.code
    assert code in EXIT_CODES, f"exit code {code}"
    return EXIT_CODES[code]


def library(read: Callable[[Path], object]) -> Callable[[Path], str]:
    """The reading function of a command that would need a model to go on."""

    @functools.wraps(read)
    def outcome(folder: Path) -> str:
        try:
            read(folder)
        except CatVersionError:
            return REFUSED
        return SUCCEEDED

    return outcome


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, channels), np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode)
