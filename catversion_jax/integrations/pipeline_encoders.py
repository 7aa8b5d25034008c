"""The text encoders of a pipeline: one, or the two of Stable Diffusion XL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from catversion_jax.integrations.encoder_state import (
    EncoderState,
    content,
    state_on,
)
from catversion_jax.integrations.encoder_wrapping import innermost
from catversion_jax.integrations.loaded_concept import (
    PAIR,
    CatVersionLoadError,
    LoadedConcept,
)

_TOKENIZERS = dict(zip(PAIR, ("tokenizer", "tokenizer_2"), strict=True))


@dataclasses.dataclass(frozen=True)
class PipelineEncoder:
    """One text encoder of a pipeline.

    Attributes:
      model: the transformers model, freed of what was put around it.
      tokenizer: makes its token ids.
    """

    model: Any
    tokenizer: Any

    @property
    def state(self) -> EncoderState | None:
        """What is loaded into it; None where nothing is."""
        return state_on(self.model)

    def word_ids(self, text: str) -> tuple[int, ...]:
        """The token ids of some words, as many as the model reads.

        A fast tokenizer keeps how it pads and cuts off, and each of its calls sets that first. So
        its backend is asked, which sets nothing: a call would meet the prompts that other threads
        encode at the same time ("Already borrowed", tokenizers 0.22).
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        ids = self.tokenizer(text).input_ids if backend is None else backend.encode(text).ids
        found = content(ids, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return found[: self.tokenizer.model_max_length - 2]  # begin-of-text and end-of-text


def encoders_of(pipe: Any) -> tuple[PipelineEncoder, ...]:
    """The text encoders that a pipeline has; the refiner of Stable Diffusion XL has the second."""
    return tuple(
        PipelineEncoder(innermost(model), getattr(pipe, tokenizer, None))
        for component, tokenizer in _TOKENIZERS.items()
        if (model := getattr(pipe, component, None)) is not None
    )


def encoders_for(
    pipe: Any, parts: Sequence[LoadedConcept], source: str
) -> tuple[PipelineEncoder, ...]:
    """The text encoders that the parts of a concept act on.

    Raises:
      CatVersionLoadError: it was made for another number of them, or one is not there.
    """
    kind = type(pipe).__name__
    expected = [name for name in (*PAIR, "text_encoder_3") if hasattr(pipe, name)]
    if expected and len(expected) != len(parts):
        model = parts[0].base_model or "not stated in the file"
        known = "Stable Diffusion XL" if len(parts) > 1 else "Stable Diffusion 1.x or 2.x"
        raise CatVersionLoadError(
            f"{source}: was trained for the {len(parts)} text encoder(s) of {known}, and {kind} "
            f"has {len(expected)}: {', '.join(expected)}. A part of every prompt would stay plain "
            f"or be misread. Load it into the model it was trained on: {model}."
        )
    found = encoders_of(pipe)
    if len(found) != len(parts) or any(one.tokenizer is None for one in found):
        needed = [part.component or PAIR[0] for part in parts]
        needed += [_TOKENIZERS[name] for name in needed]
        raise CatVersionLoadError(
            f"{kind}: a concept needs {' and '.join(needed)}. Load the pipeline with all of them."
        )
    return found


def states_on(pipe: Any) -> tuple[EncoderState, ...]:
    """What is loaded into a pipeline's text encoders; nothing unless each of them has something."""
    states = [one.state for one in encoders_of(pipe)]
    loaded = tuple(state for state in states if state is not None)
    return loaded if len(loaded) == len(states) else ()


def is_half_loaded(pipe: Any) -> bool:
    """Whether one of two text encoders was replaced after its concepts were loaded."""
    return not states_on(pipe) and any(one.state is not None for one in encoders_of(pipe))


def names_in(states: Sequence[EncoderState]) -> list[str]:
    """The concepts that every one of a pipeline's text encoders has."""
    return [
        name
        for name in (states[0].loaded if states else ())
        if all(name in state.loaded for state in states)
    ]
