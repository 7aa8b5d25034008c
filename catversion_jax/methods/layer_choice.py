"""The option ``layers``: which text-encoder layers are adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from catversion_jax.errors import CatVersionError


def layers_by_encoder(layers: str, count: int) -> tuple[str, ...]:
    """The choice of each of ``count`` text encoders: one for all of them, or one each with ``/``
    between, such as ``last3/28,29,30``.

    Raises:
      CatVersionError: as many choices as there are encoders were not given.
    """
    choices = layers.split("/") if count > 1 else [layers]
    if len(choices) not in (1, count):
        raise CatVersionError(
            f"layers={layers!r}: has {len(choices)} choices for {count} text encoders; give one "
            "for all of them, or one for each with / between, such as last3/28,29,30."
        )
    return tuple(choices * (count // len(choices)))


def resolve_layers(
    layers: str | Sequence[int], num_layers: int, num_reaching_layers: int | None = None
) -> tuple[int, ...]:
    """Turn ``'last3'``, ``'last<k>'``, ``'all'``, ``'9,10,11'`` or a list into ascending 0-based
    indices.

    Args:
      layers: the user's choice. ``last3`` is the published one.
      num_layers: layers of the encoder that feed the UNet's cross-attention.
      num_reaching_layers: layers that can be named; None for the same number. The last layer of
        Stable Diffusion XL's second encoder, which acts on the pooled state alone, is one more.

    Raises:
      CatVersionError: not one of these forms, out of range, empty or repeated.
    """
    stop = num_layers if num_reaching_layers is None else num_reaching_layers
    rule = (
        f"must be 'all', 'last<k>' such as 'last3', or distinct layer numbers within 0..{stop - 1}"
    )
    if isinstance(layers, str):
        text = layers.strip()
        if text == "all":
            return tuple(range(num_layers))
        if re.fullmatch(r"last[0-9]{1,9}", text):
            count = int(text[4:])
            if not 1 <= count <= num_layers:
                raise CatVersionError(
                    f"layers={layers!r}: {rule}; this encoder has {num_layers} layers."
                )
            return tuple(range(num_layers - count, num_layers))
        try:
            chosen = [int(part) for part in text.split(",")]
        except ValueError:
            raise CatVersionError(f"layers={layers!r}: {rule}.") from None
    else:
        chosen = list(layers)
    if (
        not chosen
        or len(set(chosen)) != len(chosen)
        or not all(isinstance(i, int) and 0 <= i < stop for i in chosen)
    ):
        raise CatVersionError(f"layers={layers!r}: {rule}.")
    return tuple(sorted(chosen))
