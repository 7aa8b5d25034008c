"""One concept that cannot be read never stops the others, whatever reading it raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from catversion_jax.errors import CatVersionError, ConceptError, shown


@contextlib.contextmanager
def concept_errors(failed: str, remedy: str = ". Correct or remove it.") -> Iterator[None]:
    """Turn what reading one concept raises into :class:`ConceptError`.

    What strangers' files raise is not a list that anyone can write down: decoders and parsers let
    errors of every class through, MemoryError and RecursionError included.

    Args:
      failed: what could not be done with which file; begins the message.
      remedy: ends the message.

    Raises:
      ConceptError: for every :class:`Exception`; the mistakes that have a message keep it.
    """
    try:
        yield
    except ConceptError:
        raise
    except CatVersionError as error:
        raise ConceptError(str(error)) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise ConceptError(f"{failed} ({reason}){remedy}") from error


def grouped(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """Labelled remarks, one line for all images of which the same is said."""
    labels: dict[str, list[str]] = {}
    for label, remark in remarks:
        labels.setdefault(remark, []).append(label)
    return [f"{', '.join(names)}: {remark}" for remark, names in labels.items()]
