"""Files of prompts: plain text, JSON Lines or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.config.documents import parse_json, parse_yaml, read_text
from catversion_jax.errors import CatVersionError, did_you_mean, shown
from catversion_jax.sampling.prompts import Prompt

_KEYS = {"prompt": str, "concepts": list, "seed": int, "negative_prompt": str}


def read_prompts(path: Path) -> list[Prompt]:
    """Read ``.txt`` (one prompt a line), ``.jsonl``, ``.json`` or ``.yaml`` (rows with the keys of
    a Prompt).

    Raises:
      CatVersionError: unreadable, empty, or a row that is no prompt; the message names its number.
    """
    try:
        text = read_text(path)
    except CatVersionError as error:
        raise CatVersionError(f"--prompts {error} Give a text file.") from None
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = [_row(path, n, _json(path, n, line)) for n, line in _lines(text)]
    elif suffix in (".yaml", ".yml", ".json"):
        rows = [_row(path, n, value) for n, value in enumerate(_yaml_list(path, text), start=1)]
    else:
        rows = [Prompt(line) for _, line in _lines(text)]
    if not rows:
        raise CatVersionError(f"--prompts {path}: holds no prompt. Write one per line.")
    return rows


def _lines(text: str) -> list[tuple[int, str]]:
    return [(n, line.strip()) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line, f"--prompts {path}, line {number}")
    except CatVersionError as error:
        raise CatVersionError(f'{error} Write {{"prompt": "a dog"}} on each line.') from None


def _yaml_list(path: Path, text: str) -> list[Any]:
    value = parse_yaml(text, f"--prompts {path}")  # JSON is YAML
    if not isinstance(value, list):
        raise CatVersionError(
            f"--prompts {path}: holds {type(value).__name__}, must be a list of prompts or of rows "
            f"with the keys {', '.join(_KEYS)}."
        )
    return value


def _row(path: Path, number: int, value: Any) -> Prompt:
    where = f"--prompts {path}, row {number}"
    if isinstance(value, str):
        return Prompt(value)
    if not isinstance(value, Mapping) or "prompt" not in value:
        raise CatVersionError(
            f"{where}: {shown(value)} has no 'prompt'. The keys are {', '.join(_KEYS)}."
        )
    for key, item in value.items():
        if key not in _KEYS:
            raise CatVersionError(
                f"{where}: unknown key {shown(key)}, the keys are {', '.join(_KEYS)}."
                f"{did_you_mean(str(key), _KEYS)}"
            )
        if isinstance(item, bool) or not isinstance(item, _KEYS[key]):
            raise CatVersionError(
                f"{where}: {key}={shown(item)}, must be of type {_KEYS[key].__name__}."
            )
    concepts = value.get("concepts")
    if concepts is not None and not all(isinstance(item, str) for item in concepts):
        raise CatVersionError(
            f"{where}: concepts={shown(concepts)}, must be a list of names or paths."
        )
    return Prompt(
        value["prompt"],
        None if concepts is None else tuple(concepts),
        value.get("seed"),
        value.get("negative_prompt"),
    )
