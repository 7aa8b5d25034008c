"""``catversion train --config FILE [key=value ...]``, the same as ``python train_tpu.py``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from catversion_jax.config import TrainConfig, load_config, option_table
from catversion_jax.runtime.atomic_files import check_writable, unwritable
from catversion_jax.runtime.bucket_paths import as_path

if TYPE_CHECKING:
    from catversion_jax.concepts import ConceptList
    from catversion_jax.training.loop import TrainResult


INTERRUPTED = 75
"""Exit code (EX_TEMPFAIL): try again, and nothing is lost."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; the options themselves are listed from the config's own table."""
    parser.usage = "catversion train --config FILE [key=value ...]"
    parser.epilog = "Every option can stand in the YAML file, or as key=value, or as --key value."
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that win over the file"
    )
    for option in option_table():
        shown = f"{option.help} [{option.default}]" if option.default else option.help
        parser.add_argument(
            f"--{option.name}", metavar="", default=argparse.SUPPRESS, help=shown.replace("%", "%%")
        )


def run(args: argparse.Namespace) -> int:
    """Train; 0 when every concept succeeded, 3 when some were quarantined, 75 when SIGTERM (or
    Ctrl-C) came first: everything under way is saved, and the same command goes on.
    """
    given = [f"{o.name}={vars(args)[o.name]}" for o in option_table() if o.name in vars(args)]
    config = load_config(args.config, [*args.overrides, *given])
    # Before jax is imported: the paths can be wrong, and that should show at once.
    from catversion_jax.concepts import read_configured_concepts

    concepts = read_configured_concepts(config)
    _announce(config, concepts)
    check_writable(as_path(config.output_dir))

    import jax

    from catversion_jax.models.stable_diffusion import default_dtype, load_backbone
    from catversion_jax.runtime.compilation import use_compilation_cache
    from catversion_jax.runtime.processes import join_processes
    from catversion_jax.runtime.sharding import make_mesh, replicated
    from catversion_jax.training.loop import train
    from catversion_jax.training.planning.fitting import fitted

    use_compilation_cache(config.compilation_cache_dir)
    join_processes(config.coordinator_address, config.num_processes, config.process_id)
    mesh = make_mesh(config.data_parallel, jax.local_devices())
    dtype = {"auto": default_dtype(), "bf16": "bfloat16", "no": "float32"}[config.mixed_precision]
    if jax.process_count() > 1:
        print(f"process {jax.process_index()} of {jax.process_count()}")
    devices = jax.local_devices()
    print(f"{len(devices)} device(s) of kind {devices[0].device_kind}, {dtype}")
    print(f"loading {config.pretrained_model_name_or_path}")
    backbone = load_backbone(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        dtype=dtype,
        sharding=replicated(mesh),
    )
    # What "auto" and "the model's own" mean here is part of what is learned: recorded as such.
    config = dataclasses.replace(
        config,
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        resolution=config.resolution or backbone.default_resolution,
    )
    config = fitted(config, backbone, mesh, concepts.concepts)
    try:
        with _stop_signals() as stop:
            result = train(config, backbone, concepts, mesh, stop)
    except OSError as error:
        raise unwritable(as_path(error.filename or config.output_dir), error) from error
    return _report(config, result)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first Ctrl-C set; the second one ends the process as usual."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"{signal.Signals(number).name}: saving what is under way", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may listen
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(config: TrainConfig, concepts: ConceptList) -> None:
    num_images = sum(len(spec.images) for spec in concepts.concepts)
    plural = "" if len(concepts.concepts) == 1 else "s"
    print(f"{len(concepts.concepts)} concept{plural}, {num_images} images from {config.concepts}")
    for line in concepts.skipped:
        print(f"  skipped {line}")
    for spec in concepts.concepts:
        for line in (*spec.warnings, *spec.notes):
            print(f"  {spec.name}: {line}")
    for problem in concepts.problems:
        print(f"  {problem.name}: left out: {problem.message.splitlines()[0]}", file=sys.stderr)


def _report(config: TrainConfig, result: TrainResult) -> int:
    print(f"{len(result.finished)} concepts in {as_path(config.output_dir) / 'concepts'}")
    if result.interrupted:
        print("interrupted; what is under way is saved. The same command goes on.")
        return INTERRUPTED
    if not result.failures:
        return 0
    print(f"{len(result.failures)} quarantined (their FAILED.txt says why):", file=sys.stderr)
    for name, reason in result.failures.items():
        print(f"  {name}: {reason.splitlines()[0]}", file=sys.stderr)
    return 3
