"""Values on the command line; paths are folders of this machine and of a bucket alike."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path

from catversion_jax.errors import CatVersionError, encodable, shown
from catversion_jax.runtime.bucket_paths import as_path


def check_values(values: Mapping[str, object]) -> None:
    """Make sure that every argument of a command is something that can be worked with.

    Args:
      values: by the name of the argument, as argparse has parsed them.

    Raises:
      CatVersionError: a number is not finite or larger than 32 bits hold, or a text holds NUL or
        bytes that are not UTF-8.
    """
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            rule = None
            if isinstance(one, float) and not math.isfinite(one):
                rule = "must be a finite number"
            elif isinstance(one, int) and abs(one) >= 2**32:
                rule = f"must be at most {2**32 - 1}"
            elif isinstance(one, str | os.PathLike):
                text = os.fspath(one)
                if "\0" in text or encodable(text) != text:
                    rule = "must be text without NUL that UTF-8 can hold; rename what it names"
            if rule:
                raise CatVersionError(f"--{name} {shown(one)}: {rule}.")


def path_argument(text: str) -> Path:
    """The ``type`` of every argument that is a path: ``gs://`` is a bucket, not a folder's name.

    Raises:
      argparse.ArgumentTypeError: the bucket cannot be used; the message says why.
    """
    try:
        return as_path(text)
    except CatVersionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
