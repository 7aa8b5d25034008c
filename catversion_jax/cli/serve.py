"""``catversion serve --model tiny-sd``: teach and draw for many users, over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from catversion_jax.cli.option_arguments import add_option_arguments, given_options
from catversion_jax.cli.paths import path_argument
from catversion_jax.cli.teach import own_start, start_options, usual_updates
from catversion_jax.config import TrainConfig, as_override, load_config
from catversion_jax.config.serving import ServeOptions
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.runtime.bucket_paths import as_path, is_in_bucket

_PATHS = ("output_dir", "keys")
_SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"type": path_argument} for name in _PATHS},
    "sizes": {"nargs": "+", "metavar": "SIZE"},
}
ROWS = {"cpu": 1}
"""Concepts that train at once on a device of a kind, where nobody says."""
USUAL_ROWS = 8
FAILED = 1
"""Exit code after the device has failed: what supervises the server starts it again."""
WRONG_INPUT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command: the options of the server."""
    parser.epilog = (
        "The server answers OpenAI's Images API (/v1/images), its own API (/v1/concepts,\n"
        "/v1/jobs) and that of AUTOMATIC1111's web UI (/sdapi/v1); /openapi.json describes all of\n"
        "them. It needs pip install 'catversion-jax[serve]'."
    )
    add_option_arguments(parser, ServeOptions, _SPECIAL)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; 0 then, 2 where the model, the folder or the port cannot be
    used, 1 after the device has failed.
    """
    given = given_options(args, ServeOptions)
    given |= {name: str(given[name]) for name in _PATHS if name in given}
    options = ServeOptions(**given)
    if is_in_bucket(as_path(options.output_dir)):
        raise CatVersionError(
            f"output_dir={options.output_dir}: a database needs a folder of this machine. Give one."
        )
    from catversion_jax.serving.app import check_installed

    check_installed()
    config = teaching_config(options)

    from catversion_jax.serving.keys import Keys

    Keys.read(None if options.keys is None else args.keys)  # before anything is loaded
    with listening_socket(options.host, options.port) as listener:
        return _serve(options, config, listener)


def _serve(options: ServeOptions, config: TrainConfig, listener: socket.socket) -> int:
    import uvicorn

    from catversion_jax.serving.app import make_app
    from catversion_jax.serving.server import Server

    server = Server(options, config)

    class Web(uvicorn.Server):
        """Takes nothing new as soon as it is asked to end, and answers until the work is done; the
        exit code is 0 then. Asked again, it waits for no more pictures.
        """

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            asked = (signal.SIGINT, signal.SIGTERM)
            before = {one: signal.signal(one, self.handle_exit) for one in asked}
            try:
                yield
            finally:
                for one, handler in before.items():
                    signal.signal(one, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if server.core.draining:
                server.hurry()
                return
            server.drain()
            threading.Thread(target=self.end, name="end", daemon=True).start()

        def end(self) -> None:
            server.end_work()
            self.should_exit = True

    web = Web(
        uvicorn.Config(
            make_app(server),
            log_level="warning",
            log_config=None,  # its messages go where ours do
            timeout_graceful_shutdown=int(options.shutdown_timeout) + 1,
            server_header=False,
        )
    )

    def broken() -> None:
        server.core.watchers.tell_all()
        web.should_exit = True

    server.device.on_failure = broken
    address = listening_at(options.host, listener.getsockname()[1])
    logging.getLogger("catversion_jax").info("serving %s at %s", options.model, address)
    web.run(sockets=[listener])
    failure = server.device.failure
    if isinstance(failure, CatVersionError):
        return WRONG_INPUT
    if failure is not None:
        print(f"error: the device has failed: {failure}", file=sys.stderr)
        return FAILED
    return 0


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
      CatVersionError: another process has the port, or the address is none of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise CatVersionError(
            f"--host {shown(host)} --port {port}: nothing can listen there ({error.strerror}). "
            "Give a port that no other process has (0 takes a free one), and an address of this "
            "machine."
        ) from error


def listening_at(host: str, port: int) -> str:
    """The address to open; one of IPv6 stands in brackets (RFC 3986, 3.2.2)."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def teaching_config(options: ServeOptions) -> TrainConfig:
    """How concepts are taught: as ``catversion teach`` does, with rows and shapes of the server."""
    import jax

    start = own_start(options.model) if options.preset == "fast" else None
    updates = options.updates or usual_updates(start, options.preset)
    rows = options.rows or ROWS.get(jax.default_backend(), USUAL_ROWS)
    root = options.output_dir
    return load_config(
        None,
        [
            f"preset={options.preset}",
            as_override("pretrained_model_name_or_path", options.model),
            as_override("concepts", f"{root}/photos"),
            as_override("output_dir", f"{root}/run"),
            f"max_train_steps={updates}",
            f"eval_steps={max(1, updates // 5)}",
            f"checkpointing_steps={max(1, min(25, updates // 2))}",
            "validation_steps=null",
            "report_to=none",
            f"concepts_per_device={rows}",
            f"max_megapixels={options.max_megapixels}",
            *(start_options(start) if start else []),
        ],
    )
