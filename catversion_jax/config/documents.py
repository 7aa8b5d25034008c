"""Text, JSON and YAML from strangers: what it says, or one line that says why it cannot be read.

Whatever the bytes, reading ends soon and in little memory: there are bounds on size and depth, no
YAML aliases (300 bytes can stand for gigabytes), no merge keys, and no key twice, of which parsers
silently keep the last.
"""

from __future__ import annotations

import codecs
import collections
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from catversion_jax.errors import CatVersionError, encodable, shown

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 100

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_DECIMAL = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_.]+)+)")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark, as Excel writes it.

    Raises:
      CatVersionError: unreadable, too large, or in another encoding.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise CatVersionError(f"{path}: cannot be read ({reason}).") from error
    if len(data) > max_bytes:
        raise CatVersionError(
            f"{path}: is larger than {max_bytes / 2**20:g} MB, the most that is read of such a "
            "file."
        )
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CatVersionError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        raise CatVersionError(f"{path}: is not UTF-8 text (zero bytes); save it as UTF-8.")
    return text


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
      CatVersionError: not JSON, a key twice in one object, NaN or infinity, numbers of thousands of
        digits, or nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=without_repetition, parse_constant=_no_constant)
        return _without_halves(value)
    except RecursionError:
        raise CatVersionError(f"{where}: is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise CatVersionError(f"{where}: is not valid JSON: {shown(error)}") from None


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; JSON is YAML.

    Raises:
      CatVersionError: not YAML, more than one document, an alias, a merge key, a key twice in one
        mapping, values that cannot be made, or nested deeper than :data:`MAX_DEPTH`.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1}: aliases (*) are not read")
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        return _without_halves(yaml.load(text, Loader=_StrictLoader))  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        place = "" if mark is None else f"line {mark.line + 1}: "
        raise CatVersionError(f"{where}: is not valid YAML: {place}{problem}") from None
    # PyYAML lets IndexError, KeyError, AttributeError through for tags such as !!timestamp.
    except Exception as error:
        raise CatVersionError(f"{where}: is not valid YAML: {shown(error)}") from None


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``json.loads(object_pairs_hook=...)``.

    Raises:
      ValueError: a key appears twice, of which parsers silently keep the last.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        (twice, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} appears twice in one object")
    return unique


def _without_halves(value: Any) -> Any:
    """``value``, in whose texts no escape has left half of a character (a lone surrogate).

    Raises:
      ValueError: one has; nothing could print, store or tokenize it.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str) and encodable(one) != one:
            raise ValueError(f"{shown(one)} holds half of a character, which is no text")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class _StrictLoader(_Loader):  # type: ignore[misc]  # PyYAML has no types
    """``yaml.SafeLoader`` without merge keys, repeated keys, and numbers to the base 8 or 60."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and _NOT_DECIMAL.fullmatch(str(node.value)):
            raise ValueError(
                f"line {node.start_mark.line + 1}: {shown(node.value)} is a number to the base 8 "
                "or 60 in YAML. Write it without leading zeros or colons, or quote it if it is text"
            )
        return super().construct_object(node, deep=deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ValueError(f"line {line}: merge keys (<<) are not read")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ValueError(f"line {line}: {shown(key)} cannot be a key")
            if key in seen:
                raise ValueError(f"line {line}: the key {shown(key)} appears twice in one mapping")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
