"""What a concept file states, checked before it is used: the tensors, and values that are strings
in its metadata.

A file can be damaged or made by hand. Every function here raises ValueError, or KeyError where the
value is missing, with a message that names the tensor or the key;
:func:`~catversion_jax.methods.concept_file.load_concept` adds the file's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

_WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
_SHOWN = 80  # characters of a value in a message


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Check that every tensor is float32 and finite, as the format says."""
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype != np.float32:
            raise ValueError(f"tensor {name:.{_SHOWN}} is {tensor.dtype}, must be float32")
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name:.{_SHOWN}} holds NaN or infinite numbers")


def check_names(tensors: Mapping[str, Any], expected: Collection[str]) -> None:
    """Check that a file holds the tensors that its metadata speak of and no other."""
    if missing := set(expected).difference(tensors):
        raise KeyError(f"{min(missing):.{_SHOWN}}")
    if unknown := set(tensors).difference(expected):
        raise ValueError(f"tensor {min(unknown):.{_SHOWN}} is none that the header speaks of")


def check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Check that a tensor has the stated shape, of which no axis is empty."""
    if tensor.shape != shape or 0 in shape:
        raise ValueError(
            f"tensor {name:.{_SHOWN}} is of shape {tensor.shape}, the header says {shape}"
        )


def nonblank_text(facts: Mapping[str, str], key: str) -> str:
    """A text that is not blank."""
    if not facts[key].strip():
        raise ValueError(f"{key} is empty")
    return facts[key]


def choice(facts: Mapping[str, str], key: str, choices: Collection[str], default: str = "") -> str:
    """One of ``choices``; where the key is missing ``default``, if there is one."""
    value = facts.get(key, default) if default else facts[key]
    if value not in choices:
        raise ValueError(f"{key}={value!r:.{_SHOWN}}, must be one of {', '.join(choices)}")
    return value


def whole_number(facts: Mapping[str, str], key: str) -> int:
    """A number without a sign."""
    if not _WHOLE_NUMBER.fullmatch(facts[key]):
        raise ValueError(f"{key}={facts[key]!r:.{_SHOWN}}, must be a whole number")
    return int(facts[key])


def finite_number(facts: Mapping[str, str], key: str) -> float:
    """A number that is neither NaN nor infinite."""
    try:
        number = float(facts[key])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key}={facts[key]!r:.{_SHOWN}}, must be a finite number")
    return number


def json_object(facts: Mapping[str, str], key: str, default: str = "") -> dict[str, Any]:
    """An object in JSON; where the key is missing ``default``, if there is one."""
    return _json(facts.get(key, default) if default else facts[key], key, dict)


def json_texts(facts: Mapping[str, str], key: str, default: str = "") -> tuple[str, ...]:
    """A list of texts in JSON; where the key is missing ``default``, if there is one."""
    value = _json(facts.get(key, default) if default else facts[key], key, list)
    if not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key}={value!r:.{_SHOWN}}, must be a list of texts")
    return tuple(value)


def layer_numbers(facts: Mapping[str, str], key: str) -> tuple[int, ...]:
    """Numbers of layers in JSON, ascending, each once."""
    value = _json(facts[key], key, list)
    numbers = all(type(i) is int and i >= 0 for i in value)
    if not numbers or not value or sorted(set(value)) != value:
        raise ValueError(f"{key}={facts[key]:.{_SHOWN}}, must be ascending numbers, each once")
    return tuple(value)


def _json(stored: str, key: str, kind: type) -> Any:
    try:
        value = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}={stored!r:.{_SHOWN}}, must be JSON") from error
    if not isinstance(value, kind):
        raise ValueError(f"{key}={stored!r:.{_SHOWN}}, must be a JSON {kind.__name__}")
    return value
