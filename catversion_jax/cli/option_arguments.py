"""Arguments ``--name`` of a command for a group of options of ``config/``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from catversion_jax.config.options import Options, accepted_types, statement_of


def add_option_arguments(
    parser: argparse.ArgumentParser,
    group: type[Options],
    special: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Add an argument for each option of ``group``, which says its default, range and meaning.

    Args:
      parser: of the command.
      group: the options.
      special: by option what else ``add_argument`` is given.
    """
    special = special or {}
    for field in dataclasses.fields(group):
        said = statement_of(group, field.name).help
        text = said if field.default in (None, ()) else f"{said} [{field.default}]"
        kinds = accepted_types(group, field.name)
        keywords: dict[str, Any] = {
            "type": next((kind for kind in (int, float) if kind in kinds), None),
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        parser.add_argument(f"--{field.name}", **keywords | dict(special.get(field.name, {})))


def given_options(args: argparse.Namespace, group: type[Options]) -> dict[str, Any]:
    """The options of ``group`` that the command was given, as its attributes take them."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(group) if f.name in args}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
