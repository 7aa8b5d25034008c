"""Compiled programs on disk: a process that starts again traces and compiles nothing.

JAX's own compilation cache begins after a program was traced and lowered, which for the training
step takes longer than reading it, and only process 0 writes there. Here the executable itself is
kept, under a name that is the SHA-256 of all that decides it: the source of this package, the
versions of JAX and of the compiler, JAX's settings, the processor's instructions, the devices, what
the maker says (``decided_by``), and the structure and shapes of the arguments. What cannot be read
is compiled again.

An executable is code, and so is the pickle around it: files that another user of this machine owns
or may write are left alone. A bucket is as safe as its permissions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import pickle
import platform
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental import serialize_executable

import catversion_jax
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import as_path, is_in_bucket
from catversion_jax.runtime.compilation import FOUND, PROGRAM, watch_compilation
from catversion_jax.runtime.sharding import mesh_of

logger = logging.getLogger(__name__)

FOLDER = "executables"
"""In the folder of the compilation cache."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu")
_DIGEST_SIZE = hashlib.sha256().digest_size
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def source_of(kind: type) -> str | None:
    """The digest of the file that defines a class, which decides programs as this package does.

    None where there is no such file, as for the cells of a notebook.
    """
    try:
        file = inspect.getsourcefile(kind)
        return file and hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


class StoredProgram:
    """A jitted function whose executables are kept in the folder of the compilation cache.

    Args:
      function: a jitted function of positional arguments.
      name: of its files, for people.
      decided_by: all that decides the program beside the arguments, as text.
      varying: number of first arguments whose structure or shapes may change from call to call.
      donated: the arguments that the function donates.
    """

    def __init__(
        self,
        function: Any,
        name: str,
        decided_by: str,
        *,
        varying: int,
        donated: tuple[int, ...] = (),
    ):
        self._function, self._name, self._decided_by = function, name, decided_by
        self._varying, self._donated = varying, donated
        self._loaded: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        leaves, structure = jax.tree.flatten(args[: self._varying])
        key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        program = self._loaded.get(key)
        if program is None:
            program = self._loaded[key] = self._program(args)
        return program(*args)

    def _program(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        folder = _folder()
        if folder is None:
            return self._function
        digest = _digest(self._decided_by, args)
        path = folder / f"{self._name}-{digest}"
        found = _read(path, args)
        if found is not None:
            return found
        with watch_compilation() as jax_cache:
            compiled = self._named().lower(*args).compile()
        # XLA for CPUs cannot store again what it has read from JAX's cache.
        if not jax_cache.hits or jax.default_backend() != "cpu":
            _write(path, compiled)
        return compiled

    def _named(self) -> Any:
        """The function under the name of this version, which is another one to JAX's cache: so that
        what an earlier version left there keeps nothing from being stored here.
        """
        function = self._function.__wrapped__

        def program(*args: Any) -> Any:
            return function(*args)

        program.__name__ = f"{self._name}_{re.sub('[^0-9a-z]', '_', catversion_jax.__version__)}"
        return jax.jit(program, donate_argnums=self._donated)


def _folder() -> Path | None:
    """Where executables lie; None where there is no compilation cache."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    if folder is None:
        return None
    try:
        return as_path(folder) / FOLDER
    except CatVersionError:  # a URL that JAX can write to and this package cannot
        return None


def _read(path: Path, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    started = time.perf_counter()
    try:
        data = _own_bytes(path)
        digest, rest = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
        if hashlib.sha256(rest).digest() != digest:
            raise ValueError("its contents do not match their SHA-256")
        payload, out_tree = pickle.loads(rest)
        in_tree = jax.tree.structure((args, {}))
        program = serialize_executable.deserialize_and_load(
            payload, in_tree, out_tree, execution_devices=_devices(args)
        )
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file makes of its readers
        logger.warning("%s: is not read (%s); compiling again", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    jax.monitoring.record_event(FOUND)
    jax.monitoring.record_event_duration_secs(PROGRAM, time.perf_counter() - started)
    return program


def _own_bytes(path: Path) -> bytes:
    """Contents of a file that only this user can have written, as far as this machine can tell.

    Raises:
      PermissionError: somebody else can have written it.
    """
    if is_in_bucket(path) or not hasattr(os, "geteuid"):  # Windows has no such owners
        return path.read_bytes()
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
            raise PermissionError("another user owns it or may write it")
        return file.read()


def _write(path: Path, compiled: Any) -> None:
    try:
        payload, _, out_tree = serialize_executable.serialize(compiled)
        data = pickle.dumps((payload, out_tree))
        make_folder(path.parent)
        write_atomically(path, hashlib.sha256(data).digest() + data)
    except Exception as error:  # what a compiler cannot store is compiled at every start
        logger.warning("%s: is not kept (%s)", path, error)


def _digest(decided_by: str, args: tuple[Any, ...]) -> str:
    digest = hashlib.sha256()
    for text in (*_surroundings(_devices(args)), decided_by, *_described(args)):
        digest.update(_ADDRESS.sub("", text).encode() + b"\0")
    return digest.hexdigest()


def _devices(args: tuple[Any, ...]) -> list[jax.Device]:
    return [*mesh_of(args).devices.flat]


def _described(args: tuple[Any, ...]) -> Iterator[str]:
    leaves, structure = jax.tree.flatten(args)
    yield repr(structure)
    for leaf in leaves:
        yield f"{leaf.dtype} {leaf.shape} {leaf.sharding!r} {getattr(leaf, 'weak_type', False)}"


def _surroundings(devices: Iterable[jax.Device]) -> Iterator[str]:
    """What decides every program of this process on these devices."""
    for name in _PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    for device in devices:
        client = device.client.platform_version
        yield f"{device.id} {device.platform} {device.device_kind} {client}"
    yield str(jax.process_count())
    yield str({k: v for k, v in sorted(jax.config.values.items()) if "cache" not in k})
    yield str({k: os.environ.get(k) for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")})
    yield f"{getattr(os, 'geteuid', int)()} {platform.machine()} {_instructions()}"
    yield _source()


@functools.cache
def _instructions() -> str:
    """What the processor can do, where the system says it: programs for a CPU are made for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    kinds = ("flags", "model name", "Features")
    return str(sorted({line for line in lines if line.startswith(kinds)}))


@functools.cache
def _source() -> str:
    """The digest of this package's source."""
    digest = hashlib.sha256()
    root = Path(catversion_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
