"""Write a file whole or not at all: a reader, a full disk or a killed process never meets half a
file. A new folder is filled, or left as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.bucket_paths import is_in_bucket


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, flush it to disk, and rename it into
    place.

    Raises:
      CatVersionError: the folder is missing or unwritable, or the disk is full. An older file stays
        as it was.
    """
    temporary: str | None = None
    try:
        if is_in_bucket(path):
            path.write_bytes(data)  # an object appears whole
            return
        # not tempfile, whose files only their owner may read: this one is for those the umask says
        name = path.parent / f".{path.name[:60]}.{secrets.token_hex(8)}.tmp"
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        temporary = os.fspath(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too leaves nothing half written
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


@contextlib.contextmanager
def replaced_when_done(path: Path) -> Iterator[Path]:
    """A path to write a large file to, which becomes ``path`` when the block ends well.

    Raises:
      CatVersionError: the folder is missing or unwritable, or the disk is full. An older file stays
        as it was.
    """
    temporary = path.parent / f".{path.name[:60]}.{secrets.token_hex(8)}.tmp"
    try:
        make_folder(path.parent)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def emptied_if_stopped(folder: Path) -> Iterator[None]:
    """Leave ``folder``, which is missing or empty, as it was where the block that fills it does not
    end well, by Ctrl-C too: the same command can then be given again.
    """
    existed = folder.exists()
    try:
        yield
    except BaseException:
        for path in folder.iterdir() if folder.is_dir() else ():
            _remove(path)
        if not existed and folder.is_dir():
            folder.rmdir()
        raise


def _remove(path: Path) -> None:
    if is_in_bucket(path):
        cast(Any, path).rmtree()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(path: Path) -> None:
    """Create ``path`` and its parents; in a bucket there are no folders to create.

    Raises:
      CatVersionError: the folder cannot be created, or the path is a file.
    """
    if is_in_bucket(path):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def check_writable(path: Path) -> None:
    """Make sure that the folder ``path`` could be created, before work is done for it.

    Nothing is created on this machine: other processes of the same run look there too.

    Raises:
      CatVersionError: the folder could not be created.
    """
    if is_in_bucket(path):
        write_atomically(path / ".writable", b"")
        (path / ".writable").unlink(missing_ok=True)
        return
    try:
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as error:
        raise unwritable(path, error) from error
    if not nearest.is_dir():
        raise unwritable(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def unwritable(path: Path, error: OSError) -> CatVersionError:
    """The message for an output that cannot be written."""
    return CatVersionError(
        f"{path}: cannot be written ({error.strerror or error}). What was there before is intact; "
        "free some space or give a writable folder, then run the same command again."
    )
