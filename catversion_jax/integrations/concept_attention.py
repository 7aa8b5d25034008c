"""Concatenated attention inside transformers' CLIP text encoder, for the rows of a batch that ask
for it.

Equations (1) and (2) are in ``diffusers.py``. The attention function is registered in transformers'
public interface. What it needs to know of a call is an argument of that call, :class:`Marks`, so
threads do not meet, a checkpointed layer that is computed again finds it, and ``torch.compile``
traces it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from catversion_jax.integrations.loaded_concept import LoadedConcept
from catversion_jax.integrations.shared_softmax import overwritten

ATTENTION_PREFIX = "catversion_"  # our implementations are catversion_sdpa and catversion_eager
# The layers of transformers 5 take any argument; those of 4.57 hand on output_attentions alone.
MARKS_ARGUMENTS = ("catversion", "output_attentions")


@dataclasses.dataclass(frozen=True)
class Called:
    """What one call of a text encoder has found out.

    Attributes:
      state: what is loaded into that encoder.
      acting: each concept that acts, its scale, and the prompts of the call that it acts on.
    """

    state: Any
    acting: Sequence[tuple[LoadedConcept, float, frozenset[int]]]


# Where calls of text encoders leave what they have found out; None: nobody asks.
CALLED_HERE: contextvars.ContextVar[list[Called] | None]
CALLED_HERE = contextvars.ContextVar("catversion_called", default=None)


@dataclasses.dataclass(eq=False)
class Marks:
    """What one call of the text encoder tells its attention layers.

    Attributes:
      concepts: the C concepts that act.
      bias: ``[C B T]`` float32, ``b + log s`` of equation (2) where a token of a row sees the
        concept, -inf where it does not.
      output_attentions: what the caller said of attention weights, where the marks travel in its
        place; they are true where it is.
    """

    concepts: Sequence[LoadedConcept]
    bias: torch.Tensor
    output_attentions: Any = None

    def __bool__(self) -> bool:
        return bool(self.output_attentions)

    def overwrite(
        self,
        layer: int,
        heads: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """See :func:`overwritten`."""
        return overwritten(self.concepts, self.bias, layer, heads, mask, scaling, output)


def register_attention(original: str) -> str:
    """Register our attention on top of ``original``, and ``original``'s masks under the same
    name, which is returned.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = ATTENTION_PREFIX + original
    AttentionInterface.register(name, _make_attention(original, AttentionInterface()))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[original])
    return name


def _make_attention(
    original: str, registered: Any
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def catversion_attention(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if original == "eager":  # not in the registry: every model file brings its own
            plain = sys.modules[type(module).__module__].eager_attention_forward
        else:
            plain = registered[original]
        marks = kwargs.pop(MARKS_ARGUMENTS[0], None)
        if hasattr(kwargs.get(MARKS_ARGUMENTS[1]), "overwrite"):
            marks = kwargs.pop(MARKS_ARGUMENTS[1])
            kwargs[MARKS_ARGUMENTS[1]] = marks.output_attentions
        output, weights = plain(module, query, key, value, attention_mask, **kwargs)
        if marks is None:
            return output, weights
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        heads = (query, key, value)
        # The plain weights would be wrong for the marked rows and have another number of columns.
        return marks.overwrite(
            module.catversion_layer, heads, attention_mask, scaling, output
        ), None

    return catversion_attention
