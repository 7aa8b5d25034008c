"""An option is one statement: default, meaning, range, other names, whether it decides the result.

    max_train_steps: int = option(
        1000,
        "Number of optimizer updates of each concept (official).",
        decides_result=True,
        at_least=1,
    )

A group of options is a frozen dataclass that inherits from :class:`Options`. Types, choices and
ranges are checked when a group is made; rules between options are the group's
:meth:`Options.contradictions`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from typing import Any, Literal

from catversion_jax.errors import CatVersionError, did_you_mean, encodable, shown

DecidesResult = bool | Literal["with early_stop"]
"""Whether an option changes the learned numbers; some do so only where ``early_stop`` is on."""

LARGEST = 2**31 - 1
"""Largest whole number of an option whose definition gives no bound: what 32 bits hold."""

_TYPE_NAMES = {str: "text", bool: "true or false", types.NoneType: "null"}


@dataclasses.dataclass(frozen=True)
class Statement:
    """What an option's definition says about it, apart from name, type and default."""

    help: str
    decides_result: DecidesResult
    at_least: float | None
    at_most: float | None
    below: float | None
    aliases: tuple[str, ...]

    @property
    def range(self) -> str:
        """The allowed numbers in words; empty where all finite ones are."""
        if self.at_least is not None and self.at_most is not None:
            return f"within {self.at_least:g}..{self.at_most:g}"
        limits = {"at least": self.at_least, "at most": self.at_most, "below": self.below}
        return " and ".join(
            f"{word} {limit}" for word, limit in limits.items() if limit is not None
        )

    def problem(self, name: str, value: object) -> str | None:
        """What is wrong with a number; None for a good one and for anything but a number."""
        if not isinstance(value, int | float):
            return None
        is_finite = abs(value) < math.inf
        bound = LARGEST if self.below is None and self.at_most is None else math.inf
        allowed = (
            is_finite
            and not (isinstance(value, int) and value > bound)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if allowed:
            return None
        rules = [self.range] if self.range else []
        if not is_finite and self.at_most is None:
            rules.append("finite")
        elif isinstance(value, int) and value > bound:
            rules.append(f"at most {LARGEST}")
        return f"{name}={shown(value)}: must be {' and '.join(rules)}."


def option(
    default: Any,
    help: str,
    *,
    decides_result: DecidesResult,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Define an option of a group.

    Args:
      default: its value where nobody gives one.
      help: one or two sentences for a stranger, with the origin of the default: "official" is the
        authors' released code (RoyZhao926/CatVersion), "diffusers" its example scripts.
      decides_result: whether it changes what is learned. Such an option is written into every
        concept file and must stay the same when a run is continued; the others may change.
      at_least: smallest allowed number.
      at_most: largest allowed number.
      below: number that must not be reached.
      aliases: names under which users of other trainers know it.
    """
    statement = Statement(help, decides_result, at_least, at_most, below, aliases)
    return dataclasses.field(default=default, metadata={"statement": statement})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base class of the groups of options.

    Raises:
      TypeError: when a group is defined with an attribute that is not an :func:`option`.
      CatVersionError: when a group is made with values of a wrong type, outside their range, or
        that contradict each other; the message lists all of them.
    """

    def __init_subclass__(cls) -> None:
        for name in inspect.get_annotations(cls):
            field = cls.__dict__.get(name)
            if not isinstance(field, dataclasses.Field) or "statement" not in field.metadata:
                raise TypeError(
                    f"{cls.__name__}.{name}: is not defined by option(...), so nothing says what "
                    "it means and whether it decides the result."
                )

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        problems = [p for name in names if (p := self._type_problem(name))]
        if not problems:
            values = [(name, getattr(self, name)) for name in names]
            problems = [p for n, v in values if (p := statement_of(type(self), n).problem(n, v))]
            problems += [p for name in names if (p := self._text_problem(name))]
        problems = problems or self.contradictions()
        if problems:
            raise CatVersionError("\n".join(problems))

    def contradictions(self) -> list[str]:
        """What is wrong between options, each of which is right by itself: one message each."""
        return []

    def _type_problem(self, name: str) -> str | None:
        value, accepted = getattr(self, name), accepted_types(type(self), name)
        choices = choices_of(accepted)
        if value in choices:
            return None
        kinds = [kind for kind in accepted if typing.get_origin(kind) is not Literal]
        for kind in kinds:
            if typing.get_origin(kind) is tuple:
                if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                    return None
            elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
                return None
        words = type_in_words(type(self), name)
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"{name}={shown(value)}: must be {words}.{hint}"

    def _text_problem(self, name: str) -> str | None:
        value = getattr(self, name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or encodable(text) != text):
                return (
                    f"{name}={shown(text)}: must be text without NUL that UTF-8 can hold; rename "
                    "what it names."
                )
        return None


def statement_of(group: type[Options], name: str) -> Statement:
    """What the definition of option ``name`` says."""
    statement = group.__dataclass_fields__[name].metadata["statement"]
    assert isinstance(statement, Statement)
    return statement


def accepted_types(group: type[Options], name: str) -> tuple[Any, ...]:
    """The types that option ``name`` may have: of ``int | Literal["auto"]`` both."""
    key: Any = group  # mypy looks for the hash of an instance
    hint = _type_hints(key)[name]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


@functools.cache
def _type_hints(group: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(group)


def choices_of(accepted: tuple[Any, ...]) -> tuple[str, ...]:
    """The texts that ``Literal`` types among :func:`accepted_types` allow."""
    return tuple(c for a in accepted if typing.get_origin(a) is Literal for c in typing.get_args(a))


def type_in_words(group: type[Options], name: str) -> str:
    """The type of option ``name``, such as ``int or auto``, or ``one of center, squash``."""
    accepted = accepted_types(group, name)
    kinds = [kind for kind in accepted if typing.get_origin(kind) is not Literal]
    if not kinds:
        return f"one of {', '.join(choices_of(accepted))}"
    names = [
        "list of text" if typing.get_origin(kind) is tuple else _TYPE_NAMES.get(kind, kind.__name__)
        for kind in kinds
    ]
    return " or ".join([*names, *choices_of(accepted)])
