"""Paths on the command line: folders of this machine and of a bucket alike."""

from __future__ import annotations

import argparse
from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.bucket_paths import as_path


def path_argument(text: str) -> Path:
    """The ``type`` of every argument that is a path: ``gs://`` is a bucket, not a folder's name.

    Raises:
      argparse.ArgumentTypeError: the bucket cannot be used; the message says why.
    """
    try:
        return as_path(text)
    except CatVersionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
