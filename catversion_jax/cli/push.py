"""``catversion push SOURCE --repo_id USER/NAME``: concepts and a model card to the Hugging Face
hub.
"""

from __future__ import annotations

import argparse
import sys

from catversion_jax.cli.paths import path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        type=path_argument,
        help="run directory, concept file or its folder",
    )
    add(
        "--repo_id",
        required=True,
        metavar="USER/NAME",
        help="repository on the hub; it is made if there is none",
    )
    add("--private", action="store_true", help="if the repository is made, make it private")
    add(
        "--license",
        metavar="ID",
        help="licence of the concepts, by the hub's name of it [that of the published base model]",
    )
    add("--dry_run", action="store_true", help="print what would be sent, and send nothing")


def run(args: argparse.Namespace) -> int:
    """Push; 3 where damaged concepts were left out."""
    from catversion_jax.training.run.hub_push import plan_push

    push = plan_push(args.source, args.repo_id, args.license)
    for name, reason in push.damaged.items():
        print(f"{name}: left out: {reason}", file=sys.stderr)
    if args.dry_run:
        for path, content in push.files.items():
            print(f"{len(content):>9,}  {path}")
        print(push.files["README.md"].decode())
        where = f"{len(push.files)} files would go to {push.repo_id}"
        print(f"{where}, private if it is new" if args.private else f"{where}, for all to see")
    else:
        print(push.send(private=args.private))
    return 3 if push.damaged else 0
