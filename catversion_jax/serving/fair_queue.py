"""A bounded queue that serves the keys in turn.

    (1)  ahead of item k of a key = k + the sum over the others of min(their items, k or k + 1)

Each key's items keep their order; the keys take turns, one item each, and a key that has been
served goes to the end of the round. So for each of its items nobody waits for more than one of each
other key, however many those have. (1) is how many come first: ``k + 1`` of a key whose turn is
earlier in the round, else ``k``.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from catversion_jax.serving.errors import ApiError

T = TypeVar("T")


class FairQueue(Generic[T]):
    """The queue. It is not safe for threads: whoever shares it holds a lock.

    Args:
      most: items that may wait.
      most_of_one: items of one key that may wait.
      what: what messages call them.
      seconds: estimates how long an item takes, for ``Retry-After``.
    """

    def __init__(self, most: int, most_of_one: int, what: str, seconds: Callable[[], float]):
        self._most, self._most_of_one, self._what = most, most_of_one, what
        self._seconds = seconds
        self._turns: collections.OrderedDict[str, collections.deque[T]] = collections.OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._turns.values()))

    def __iter__(self) -> Iterator[T]:
        for items in self._turns.values():
            yield from items

    def admit(self, owner: str, count: int) -> None:
        """Make sure that ``count`` more items of a key may wait.

        Raises:
          ApiError: 429, with the time after which there should be room.
        """
        own = len(self._turns.get(owner, ()))
        for waiting, most, whose in (
            (own, self._most_of_one, "of this key"),
            (len(self), self._most, "of all keys"),
        ):
            if waiting + count > most:
                raise ApiError(
                    429,
                    "queue_full",
                    f"{waiting} {self._what} {whose} wait and {count} more would be above the "
                    f"limit of {most}. Ask again later, or for fewer.",
                    retry_after=min(max((waiting + count - most) * self._seconds(), 1.0), 120.0),
                )

    def put(self, owner: str, item: T) -> None:
        """Add an item behind the key's others."""
        self._turns.setdefault(owner, collections.deque()).append(item)

    def take(self, most: int, together: Callable[[T, T], bool]) -> list[T]:
        """Up to ``most`` items that may be served together: the first of the key whose turn it is,
        and with it what goes ``together`` with that, the keys in turn.
        """
        taken: list[T] = []
        while len(taken) < most:
            found = False
            for owner in [*self._turns]:
                items = self._turns[owner]
                index = next(
                    (i for i, item in enumerate(items) if not taken or together(taken[0], item)),
                    None,
                )
                if index is None:
                    continue
                taken.append(items[index])
                del items[index]
                self._turns.move_to_end(owner)
                if not items:
                    del self._turns[owner]
                found = True
                if len(taken) == most:
                    break
            if not found:
                break
        return taken

    def would_take(self, most: int, together: Callable[[T, T], bool]) -> int:
        """How many items :meth:`take` would give."""
        first = next(iter(self), None)
        if first is None:
            return 0
        return min(most, sum(together(first, item) for item in self))

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out the items that are ``unwanted``; returns them."""
        removed: list[T] = []
        for owner in [*self._turns]:
            items = self._turns[owner]
            removed += [item for item in items if unwanted(item)]
            kept = collections.deque(item for item in items if not unwanted(item))
            if kept:
                self._turns[owner] = kept
            else:
                del self._turns[owner]
        return removed

    def ahead(self, owner: str, wanted: Callable[[T], bool]) -> int | None:
        """How many items come before the first of a key that is ``wanted`` (1); None where there
        is none.
        """
        own = self._turns.get(owner, ())
        k = next((i for i, item in enumerate(own) if wanted(item)), None)
        if k is None:
            return None
        ahead, earlier = k, 1
        for other, items in self._turns.items():
            if other == owner:
                earlier = 0
            else:
                ahead += min(len(items), k + earlier)
        return ahead
