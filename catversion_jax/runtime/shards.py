"""Shards: parts of a list of concepts that are trained by processes which know nothing of each
other.

    (1)  shard(name) = SHA-256(name) mod n

The name alone decides, so concepts that are added to the list move no other one. Engines that start
many jobs tell each of them its number through the environment (:data:`ENGINES`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Mapping

from catversion_jax.errors import CatVersionError, shown

MOST_SHARDS = 99_999

ENGINES: tuple[tuple[str, str | None], ...] = (
    ("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", None),
)
"""Environment variables of SkyPilot's pools, Slurm's job arrays and Kubernetes' Indexed Jobs: the
number of a job, from 0, and how many there are, which Kubernetes does not say."""

_SHARD = re.compile(r"(auto|[0-9]{1,9})/([0-9]{1,9})")
_FOLDER = re.compile(r"([0-9]{5})-of-([0-9]{5})")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of ``count`` parts of a list.

    Attributes:
      index: its number, counted from 0.
      count: how many there are.
    """

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder(self) -> str:
        """The name of its folder, such as ``00003-of-00064``."""
        return f"{self.index:05d}-of-{self.count:05d}"

    @classmethod
    def of_folder(cls, name: str) -> Shard | None:
        """The inverse of :attr:`folder`; None for every other name."""
        match = _FOLDER.fullmatch(name)
        if match is None or not int(match[1]) < int(match[2]):
            return None
        return cls(int(match[1]), int(match[2]))

    def holds(self, name: str) -> bool:
        """Whether the concept ``name`` belongs to it, equation (1); a name is the same however its
        accents are stored.
        """
        digest = hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "replace"))
        return int.from_bytes(digest.digest(), "big") % self.count == self.index


WHOLE = Shard()
"""The whole list."""


def parse_shard(text: str) -> tuple[int | None, int]:
    """Number and count of ``i/n``; the number is None in ``auto/n``.

    Raises:
      CatVersionError: it is neither.
    """
    match = _SHARD.fullmatch(text)
    count = int(match[2]) if match else 0
    index = None if match is None or match[1] == "auto" else int(match[1])
    if not 1 <= count <= MOST_SHARDS or (index is not None and index >= count):
        raise CatVersionError(
            f"shard={shown(text)}: must be i/n with 0 <= i < n <= {MOST_SHARDS}, such as 3/64, or "
            "auto/64, which takes i from the environment."
        )
    return index, count


def find_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The shard that the option ``shard`` means.

    Args:
      text: ``i/n``, ``auto/n``, or None, which takes both numbers from the environment where an
        engine gives both, and else is the whole list.
      environment: variables of the process.

    Raises:
      CatVersionError: the numbers are missing or contradict each other.
    """
    if text is None:
        return _of_engine(environment)
    index, count = parse_shard(text)
    if index is not None:
        return Shard(index, count)
    for variable, _ in ENGINES:
        if variable in environment:
            number = _whole_number(variable, environment)
            if number >= count:
                raise CatVersionError(
                    f"shard={text}: {variable}={number}: must be below {count}. Start the jobs 0 "
                    f"to {count - 1}, or give shard=i/{count}."
                )
            return Shard(number, count)
    known = ", ".join(variable for variable, _ in ENGINES)
    raise CatVersionError(
        f"shard={text}: the environment does not number this job ({known} are not set). Give "
        f"shard=i/{count}."
    )


def _of_engine(environment: Mapping[str, str]) -> Shard:
    for variable, total in ENGINES:
        if total is None or not {variable, total} <= environment.keys():
            continue
        index, count = (_whole_number(name, environment) for name in (variable, total))
        last = environment.get("SLURM_ARRAY_TASK_MAX") if variable.startswith("SLURM") else None
        if not index < count <= MOST_SHARDS or last not in (None, str(count - 1)):
            raise CatVersionError(
                f"{variable}={index}, {total}={count}: jobs must be numbered from 0 to their "
                "number - 1 where each is to train a part of the list. Number them so, give "
                "shard=auto/n to start single ones again, or shard=0/1 to train the whole list."
            )
        return Shard(index, count)
    return WHOLE


def _whole_number(name: str, environment: Mapping[str, str]) -> int:
    text = environment[name]
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise CatVersionError(
            f"{name}={shown(text)}: must be a whole number. Give shard=i/n, or shard=0/1 for the "
            "whole list."
        )
    return int(text)
