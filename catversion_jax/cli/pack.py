"""``catversion pack RUN --out concepts.arrow``: all concepts of a run in one file."""

from __future__ import annotations

import argparse
import sys

from catversion_jax.cli.paths import path_argument
from catversion_jax.cli.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="output_dir of a training run"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="FILE.arrow",
        help="the file to write; FILE.arrow#NAME then names a concept for every other command",
    )


def run(args: argparse.Namespace) -> int:
    """Write the pack; 0 when it holds every finished concept, 3 when some cannot be read."""
    from catversion_jax.training.run.packing import write_pack

    with progress("packing", "concept") as advance:
        count, left_out = write_pack(args.run, args.out, advance)
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    print(f"{count} concepts in {args.out}")
    return 3 if left_out else 0
