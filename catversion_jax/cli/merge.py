"""``catversion merge RUN``: one index of all shards of a run, also while they are at work."""

from __future__ import annotations

import argparse

from catversion_jax.cli.paths import path_argument
from catversion_jax.cli.status import print_counts
from catversion_jax.cli.terminal import SAVED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "run",
        type=path_argument,
        metavar="RUN",
        help="output_dir that the shards of a run have in common; receives index.csv and run.json",
    )


def run(args: argparse.Namespace) -> int:
    """Merge; 0 when every concept of every shard is done, 3 when some were given up, 75 when shards
    are missing or have work to do: run it again later.
    """
    from catversion_jax.training.run.merging import merge_shards
    from catversion_jax.training.run.names import INDEX_FILE

    found = merge_shards(args.run)
    print_counts(args.run, found)
    print(args.run / INDEX_FILE)
    if found["shards"]["ended"] < found["shards"]["expected"]:
        return SAVED
    return 3 if found["counts"].get("quarantined") else 0
