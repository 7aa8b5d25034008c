"""States of a concept behind its text encoder's output, in a pipeline: further keys and values of
the prompt for the UNet.

    (1)  prompt_embeds = [c_1 .. c_T; c_T + s (x_1 - c_T) .. c_T + s (x_S - c_T); c_T .. c_T]

``x`` are the states of the concepts that act on the prompt, ``s`` is the scale of each, and copies
of ``c_T``, the prompt's own last state, fill shorter rows of a batch up, the negative prompts'
among them. A forward pre-hook on the UNet hides the filling by the UNet's own
``encoder_attention_mask``, so that it has no influence; what reads the embeddings besides (a
ControlNet) sees it as more padding.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from catversion_jax.integrations.concept_attention import CALLED_HERE, Called
from catversion_jax.integrations.encoder_wrapping import innermost
from catversion_jax.integrations.pipeline_encoders import encoders_of, states_on


@contextlib.contextmanager
def collected() -> Iterator[list[Called]]:
    """A block whose calls of text encoders say which prompts called which concepts."""
    calls: list[Called] = []
    token: contextvars.Token[Any] = CALLED_HERE.set(calls)
    try:
        yield calls
    finally:
        CALLED_HERE.reset(token)


def has_states(pipe: Any) -> bool:
    """Whether a loaded concept has states of its own."""
    return any(one.states is not None for state in states_on(pipe) for one in state.loaded.values())


def num_tokens(pipe: Any) -> int:
    """Length of the text encoders' own output."""
    return encoders_of(pipe)[0].tokenizer.model_max_length


def split_long(pipe: Any, given: Any) -> tuple[Any, Any]:
    """Embeddings ``[B T D]`` that a caller gave, in those of the tokens, for which a negative
    prompt can be encoded, and what stands behind them (None where nothing does).
    """
    if not isinstance(given, torch.Tensor) or not has_states(pipe):
        return given, None
    tokens = num_tokens(pipe)
    return (given, None) if given.shape[1] <= tokens else (given[:, :tokens], given[:, tokens:])


def with_states(
    pipe: Any, encoded: Any, calls: Sequence[Called], images_per_prompt: int, behind: Any = None
) -> Any:
    """What ``encode_prompt`` returns, ``(prompt, negative, ...)``, by equation (1).

    Args:
      pipe: the pipeline.
      encoded: the same of the text encoders alone.
      calls: of the calls that made the prompts.
      images_per_prompt: rows of each prompt, which follow one another.
      behind: ``[B S D]`` what :func:`split_long` took off the prompts, or None.
    """
    # in Stable Diffusion XL the first text encoder, which is called first, decides
    acting = [one for call in calls if call.state is calls[0].state for one in call.acting]
    if behind is None and all(concept.states is None for concept, *_ in acting):
        return encoded
    prompted, negative, *rest = encoded
    added = []
    for row, own in enumerate(prompted):
        prompt = row // images_per_prompt
        states = [
            concept.states_at(scale, own[-1])
            for concept, scale, prompts in acting
            if prompt in prompts and concept.states is not None
        ]
        added.append(states if behind is None else [behind[prompt].to(own), *states])
    both = [[torch.cat([own, *more]) for own, more in zip(prompted, added, strict=True)]]
    if negative is not None:
        both.append(list(negative))
    length = max(len(row) for rows in both for row in rows)
    if length == prompted.shape[1] and (negative is None or length == negative.shape[1]):
        return encoded
    tokens = num_tokens(pipe)
    filled = [torch.stack([_filled_up(row, tokens, length) for row in rows]) for rows in both]
    return filled[0], (filled[1] if negative is not None else None), *rest


def _filled_up(row: torch.Tensor, tokens: int, length: int) -> torch.Tensor:
    return torch.cat([row, row[tokens - 1].expand(length - len(row), -1)])


def hide_filling(unet: Any, tokens: int) -> None:
    """Let a UNet hide the filling of equation (1) behind prompts of ``tokens``."""
    unet = innermost(unet)
    if unet is not None and not hasattr(unet, "_catversion_filling"):
        unet.catversion_tokens = tokens
        unet._catversion_filling = unet.register_forward_pre_hook(_before_drawing, with_kwargs=True)


def show_filling(unet: Any) -> None:
    """Undo :func:`hide_filling`."""
    unet = innermost(unet)
    if hasattr(unet, "_catversion_filling"):
        unet._catversion_filling.remove()
        del unet._catversion_filling, unet.catversion_tokens


def _before_drawing(
    unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the UNet: add the mask to the arguments of the call."""
    states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
    tokens: int = unet.catversion_tokens
    if not isinstance(states, torch.Tensor) or states.shape[1] <= tokens:
        return None
    if kwargs.get("encoder_attention_mask") is not None:
        return None
    same = (states[:, tokens:] == states[:, tokens - 1 : tokens]).all(dim=-1).int()
    filling = same.flip(1).cumprod(1).flip(1)  # the copies at the end of a row
    if not torch.compiler.is_compiling() and not filling.any():
        return None
    visible = torch.cat(
        [torch.ones_like(states[:, :tokens, 0], dtype=filling.dtype), 1 - filling], 1
    )
    return args, {**kwargs, "encoder_attention_mask": visible}
