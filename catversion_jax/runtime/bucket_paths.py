"""Folders on this machine and folders in a bucket (``gs://``), used alike.

A path in a bucket is an ``etils.epath.Path``: it has the methods of ``pathlib.Path`` that are used
on it, and needs the bucket's library: ``pip install 'catversion-jax[gcs]'``.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any, cast

from etils import epath

from catversion_jax.assets import embedded_folder
from catversion_jax.errors import CatVersionError, encodable, shown


def path_text(path: object) -> str:
    """What the file system is asked for.

    Raises:
      CatVersionError: it is neither text nor a path, or no file can have such a name.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in (text := os.fspath(path)):
        raise CatVersionError(f"{shown(path)}: is no path. Give text without NUL, or a Path.")
    data = text.encode(errors="surrogatepass")
    if "://" not in text and (len(data) >= 4096 or max(map(len, data.split(b"/"))) > 255):
        raise CatVersionError(
            f"{shown(path)}: is too long for a path, of which each part has at most 255 bytes and "
            "all together 4,095. Shorten it."
        )
    return text


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path to work with; one in a bucket only looks like a ``pathlib.Path``.

    Raises:
      CatVersionError: the bucket's library is missing, it is no bucket this package knows, or it
        is no path.
    """
    text = path_text(path)
    if "://" not in text:
        return Path(text)
    if not text.startswith("gs://"):
        raise CatVersionError(f"{encodable(text[:200])}: must be a folder or begin with gs://.")
    if not re.match(r"gs://[a-z0-9][a-z0-9._-]{0,221}(/|$)", text):
        raise CatVersionError(f"{encodable(text[:200])}: must be like gs://BUCKET/folder.")
    try:
        import fsspec.config
        import gcsfs  # noqa: F401
    except ImportError:
        raise CatVersionError(
            f"{text}: a bucket needs pip install 'catversion-jax[gcs]'; or mount it as a folder."
        ) from None
    # Other processes write there too: what a listing said a while ago is not to be relied on.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return cast(Path, epath.Path(text))


def home_expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the home folder in place of ``~`` or ``~user``.

    Raises:
      CatVersionError: there is no such user, or no home folder, or it is no path.
    """
    try:
        return Path(path_text(path)).expanduser()
    except RuntimeError as error:
        raise CatVersionError(
            f"{shown(os.fspath(path))}: its ~ stands for no folder ({error}). Write the whole path."
        ) from None


def embedded_or_given(path: str | os.PathLike[str]) -> Path:
    """What ships under a name such as ``tiny-sd``, or else the path itself, home expanded.

    Raises:
      CatVersionError: its ``~`` stands for no folder, or it is no path.
    """
    return embedded_folder(os.fspath(path)) or home_expanded(path)


def absolute(path: Path) -> Path:
    """``path`` with the working directory in front, unless it is complete already."""
    return path if is_in_bucket(path) else path.absolute()


def file_size(path: Path) -> int:
    """Bytes of a file here or in a bucket.

    Raises:
      OSError: there is none, or it is no regular file, such as a pipe, which would keep its reader
        waiting.
    """
    found: Any = path.stat()
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return found.length if is_in_bucket(path) else found.st_size


def is_in_bucket(path: Path) -> bool:
    """Whether ``path`` names objects of a bucket."""
    return "://" in os.fspath(path)
