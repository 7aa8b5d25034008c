"""Arguments ``--name`` of a command for a group of options of ``config/``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from catversion_jax.config import ALIASES
from catversion_jax.config.options import Options, accepted_types, choices_of, statement_of
from catversion_jax.config.reading import OPTION_NAMES
from catversion_jax.errors import CatVersionError, shown


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
        number = next((kind for kind in (int, float) if kind in kinds), None)
        keywords: dict[str, Any] = {
            "type": number,
            "choices": None if number else choices_of(kinds) or None,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        parser.add_argument(f"--{field.name}", **keywords | dict(special.get(field.name, {})))


def given_options(args: argparse.Namespace, group: type[Options]) -> dict[str, Any]:
    """The options of ``group`` that the command was given, as its attributes take them."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(group) if f.name in args}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def option_of(text: str) -> str:
    """The option that ``key=value`` names, by whichever of its names."""
    key = text.partition("=")[0]
    return ALIASES.get(key, key)


def refuse_own_options(overrides: Sequence[str], own: Mapping[str, str | None]) -> None:
    """Make sure that no ``key=value`` says again what a command has an argument for: one of both
    would have no effect.

    Args:
      overrides: the texts.
      own: by option the argument that stands for it; None where the command decides it.

    Raises:
      CatVersionError: one does.
    """
    for text in overrides:
        option = option_of(text)
        if option in own:
            remedy = f"Say it with {own[option]}." if own[option] else "Leave it out."
            raise CatVersionError(f"{shown(text)}: this command gives {option} itself. {remedy}")


def refuse_unused_options(overrides: Sequence[str], used: Collection[str], command: str) -> None:
    """Make sure that every ``key=value`` is of an option that a command looks at.

    Args:
      overrides: the texts.
      used: the options.
      command: name of the command, for the message.

    Raises:
      CatVersionError: one is not.
    """
    for text in overrides:
        option = option_of(text)
        if option in OPTION_NAMES and option not in used:
            raise CatVersionError(
                f"{shown(text)}: catversion {command} does not look at {option}. Leave it out."
            )
