"""Options from YAML files and ``key=value`` texts, and back; the table of all options."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from catversion_jax.assets import SHIPPED_CONFIGS
from catversion_jax.config.documents import parse_yaml, read_text
from catversion_jax.config.options import (
    DecidesResult,
    accepted_types,
    choices_of,
    statement_of,
    type_in_words,
)
from catversion_jax.config.presets import PRESETS
from catversion_jax.config.training import GROUPS, TrainConfig, plain_values
from catversion_jax.errors import CatVersionError, did_you_mean, shown
from catversion_jax.runtime.bucket_paths import path_text

OPTION_NAMES = tuple(field.name for field in dataclasses.fields(TrainConfig))

# Names under which users of other trainers know an option.
ALIASES: Mapping[str, str] = types.MappingProxyType(
    {alias: name for name in OPTION_NAMES for alias in statement_of(TrainConfig, name).aliases}
)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and ``key=value`` overrides into a :class:`TrainConfig`.

    Relative ``concepts``, ``output_dir`` and model paths are taken from the working directory, as
    typed.

    Args:
      path: a YAML file, or the name of a shipped one, such as ``quickstart``; None for none.
      overrides: texts ``key=value`` that win over the file.

    Raises:
      CatVersionError: unreadable file, unknown key (with the nearest known one), wrong type or
        range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _by_name(_read_yaml(_config_path(path)))
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise CatVersionError(
            f"overrides={shown(overrides)}: must be a list of texts key=value, for example "
            "['learning_rate=5e-3']."
        )
    for item in overrides:
        key, sep, text = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not sep:
            raise CatVersionError(
                f"{shown(item)}: an override is key=value, for example learning_rate=5e-3."
            )
        name = ALIASES.get(key, key)
        values[name] = _parse_value(name, text)
    return make_config(values)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Build a config from plain values; the preset named in them fills what they leave open.

    Raises:
      CatVersionError: unknown key (with the nearest known one), wrong type or range.
    """
    values = _by_name(values)
    if values.get("concepts", "") is None:
        del values["concepts"]
    unknown = [
        f"{shown(key)}: no such option.{did_you_mean(str(key), OPTION_NAMES, cutoff=0.5)} "
        "`catversion train --help` lists all."
        for key in values
        if key not in OPTION_NAMES
    ]
    if unknown:
        raise CatVersionError("\n".join(unknown))
    # A method's usual settings come with it unless another preset, or none, is asked for.
    method = values.get("method", "none")
    usual = method if isinstance(method, str) and method in PRESETS else "none"
    preset = values.get("preset", usual)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise CatVersionError(f"preset={shown(preset)}: must be one of {', '.join(PRESETS)}.")
    merged = {**PRESETS[preset], **values, "preset": preset}
    return TrainConfig(**{key: _coerce(key, value) for key, value in merged.items()})


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the options' own names in place of those of other trainers.

    Raises:
      CatVersionError: one option under two names.
    """
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name in named:
            raise CatVersionError(
                f"{key}: is given under another name too, and both mean {name}. Give it once."
            )
        named[name] = value
    return named


def as_override(name: str, text: str) -> str:
    """``name=text`` of which :func:`load_config` reads this very text, be it "null" or "[1] a"."""
    return f"{name}={json.dumps(text, ensure_ascii=False)}"


def dump_config(config: TrainConfig) -> str:
    """YAML text that :func:`load_config` turns back into the same config."""
    return yaml.safe_dump(plain_values(config), sort_keys=False, allow_unicode=True)


@dataclasses.dataclass(frozen=True)
class OptionRow:
    """What the definition of an option says, in words.

    Attributes:
      name: as in YAML files and on the command line.
      group: heading under which it belongs.
      type: such as ``int or null``.
      default: empty where it is null or nothing.
      help: what it does.
      range: such as ``at least 1``; empty where all finite values are allowed.
      aliases: names that other trainers give it.
      decides_result: whether it changes what is learned, so that a run keeps it when continued.
    """

    name: str
    group: str
    type: str
    default: str
    help: str
    range: str
    aliases: tuple[str, ...]
    decides_result: DecidesResult


def option_table() -> list[OptionRow]:
    """All options, group by group."""
    return [
        _row(name, heading=(group.__doc__ or "").split("\n")[0].rstrip("."))
        for group in GROUPS
        for name in inspect.get_annotations(group)
    ]


def _row(name: str, heading: str) -> OptionRow:
    statement = statement_of(TrainConfig, name)
    default = TrainConfig.__dataclass_fields__[name].default
    if isinstance(default, tuple):
        default = ", ".join(default)
    return OptionRow(
        name=name,
        group=heading,
        type=type_in_words(TrainConfig, name),
        default="" if default is None else str(default),
        help=statement.help,
        range=statement.range,
        aliases=statement.aliases,
        decides_result=statement.decides_result,
    )


def _config_path(path: str | Path) -> Path:
    """The file that ``path`` means: itself, or the shipped one of that name."""
    file = Path(path_text(path))
    if file.exists() or file.suffix or len(file.parts) > 1:
        return file
    shipped = {found.stem: found for found in sorted(SHIPPED_CONFIGS.glob("*.yaml"))}
    if file.name in shipped:
        return shipped[file.name]
    raise CatVersionError(
        f"--config {path}: is neither a file nor a configuration that ships with this package "
        f"({', '.join(shipped)}).{did_you_mean(file.name, shipped)}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except CatVersionError as error:
        raise CatVersionError(
            f"--config {error} Give the path of a YAML file; see configs/."
        ) from None
    values = parse_yaml(text, f"--config {path}")
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CatVersionError(
            f"--config {path}: must hold `key: value` lines; see configs/ for examples."
        )
    return values


def _parse_value(name: str, text: str) -> Any:
    """The value of ``name=text``; ``name`` may be unknown."""
    accepted = accepted_types(TrainConfig, name) if name in OPTION_NAMES else ()
    is_list = tuple[str, ...] in accepted
    if (str in accepted or is_list) and text not in ("", "null"):
        if text[0] not in "['\"":
            return text  # prompts and paths such as "a {x}: y" need no quoting
        if not is_list:
            with contextlib.suppress(CatVersionError):  # of "[1] cats" and "'90s" no YAML either
                return parse_yaml(text, name)
            return text
    return parse_yaml(text, f"{name}={shown(text)}") if text else None


def _coerce(name: str, value: Any) -> Any:
    """YAML's looser spellings: 1e-2 reads as text, 5 for a float, one string for a list."""
    accepted = accepted_types(TrainConfig, name)
    if accepted == (tuple[str, ...],):
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value
    if float in accepted and not isinstance(value, bool) and isinstance(value, int | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    if str in accepted and isinstance(value, int | float) and not isinstance(value, bool):
        return shown(value)
    if name == "layers" and isinstance(value, list):
        return ",".join(str(item) for item in value)
    # YAML 1.1 reads a bare `no` as false: mixed_precision=no is what diffusers users type.
    if value is False and "no" in choices_of(accepted):
        return "no"
    return value
