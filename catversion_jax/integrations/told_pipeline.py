"""Pipelines that say what a prompt is for.

The text encoder sees token ids only. A pipeline that loads a concept becomes one of a subclass of
its class, of the same name, that differs in two public methods. ``encode_prompt`` is done in two
calls of the method itself: the prompt, then the negative prompt with its documented parameter
``prompt_embeds`` set (and ``pooled_prompt_embeds`` in Stable Diffusion XL), inside :func:`plain`.
``save_pretrained`` warns that concepts are not saved.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from catversion_jax.integrations.asked_here import asking
from catversion_jax.integrations.context_states import (
    collected,
    has_states,
    hide_filling,
    num_tokens,
    show_filling,
    split_long,
    with_states,
)
from catversion_jax.integrations.encoder_state import (
    SWITCHING,
    TOLD_HERE,
    EncoderState,
)
from catversion_jax.integrations.loaded_concept import CatVersionLoadError
from catversion_jax.integrations.pipeline_encoders import (
    encoders_of,
    is_half_loaded,
    names_in,
    states_on,
)

_PARAMETERS = {
    "prompt",
    "num_images_per_prompt",
    "negative_prompt",
    "prompt_embeds",
    "negative_prompt_embeds",
}


def plain(pipe: Any) -> contextlib.AbstractContextManager[None]:
    """A block whose prompts call no concept, for code that calls the text encoder itself.

    Prompt weighting such as Compel, and pipelines without ``encode_prompt``, encode their negative
    prompts inside it. It holds for the thread or task that opened it; others are not touched. A
    pipeline without a concept may be given.
    """
    return scaled(pipe, 0.0)


@contextlib.contextmanager
def scaled(pipe: Any, scale: float | Mapping[str, float]) -> Iterator[None]:
    """A block in which active concepts have other scales, as ``set_catversion`` knows them.

    It holds for the thread or task that opened it, so calls side by side may have different scales.
    Of blocks within each other the innermost counts. (Generators that take turns share the context
    of their caller: of their blocks the one that began last counts.)

    Args:
      pipe: the pipeline.
      scale: one number for all active concepts, or numbers by name; the others keep theirs.

    Raises:
      CatVersionLoadError: a name that is not active, or a scale that is not a finite number >= 0.
    """
    states = own_states([one.state for one in encoders_of(pipe) if one.state is not None])
    for number in scale.values() if isinstance(scale, Mapping) else [scale]:
        check_scale(number)
    if isinstance(scale, Mapping):
        chosen = states[0].chosen_here() if states else None
        acting = states[0].active if states and chosen is None else chosen.scales if chosen else {}
        active = [name for name in names_in(states) if name in acting]
        for name in scale:
            if name not in active:
                raise CatVersionLoadError(
                    f"{name!r} is not active; active: {', '.join(active) or 'none'}. Use "
                    "set_catversion first."
                )
    with asking([(state, scale) for state in states]):
        yield


def own_states(states: Sequence[EncoderState]) -> Sequence[EncoderState]:
    """The states, which must be this code's: a block of another copy of it has no effect on them.

    Raises:
      CatVersionLoadError: an exported folder's code loaded them.
    """
    if any(type(state).__module__ != EncoderState.__module__ for state in states):
        raise CatVersionLoadError(
            "the concepts of this text encoder were loaded by the code of an exported folder. Use "
            "the methods of its pipeline: pipe.scaled(...), pipe.chosen(...), pipe.plain(), and "
            "pipe.enable_catversion(other) for another pipeline of the same components."
        )
    return states


def check_scale(number: Any) -> None:
    """Raise where a number is no scale."""
    try:
        valid = math.isfinite(number) and number >= 0
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise CatVersionLoadError(
            f"scale={number!r:.80}: must be a finite number >= 0 (0 = plain, 1 = as trained)."
        )


class ToldPipeline:
    """The two methods by which a pipeline with concepts differs from its class."""

    catversion_told = True  # as in every copy of this code, so that none is put on another
    _catversion_encoders: tuple[int, ...] = ()  # those that the concepts were loaded into

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own; no concept acts on the negative prompt."""
        with SWITCHING:  # another thread may just have unloaded the last concept
            told = isinstance(self, __class__)
            encode = super().encode_prompt if told else self.encode_prompt  # type: ignore[misc]
        _warn_replaced(self)
        return encoded_apart(self, encode, args, kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own, which knows no concepts."""
        if loaded := names_in(states_on(self)):
            names = ", ".join(loaded[:5]) + (" ..." if len(loaded) > 5 else "")
            warnings.warn(
                f"save_pretrained saves the plain model: the loaded concepts ({names}) are not in "
                "it. Keep their files beside it, or write a folder that has them with `catversion "
                "export SOURCE --format pipeline`.",
                stacklevel=2,
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def encoded_apart(
    pipe: Any,
    encode: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    guided_name: str = "do_classifier_free_guidance",
) -> Any:
    """What ``encode(*args, **kwargs)`` of diffusers returns, in two calls of it, so that no concept
    acts on the negative prompt; one call where it has not the parameters for that.

    Args:
      pipe: what holds the text encoders.
      encode: an ``encode_prompt``.
      args: its arguments.
      kwargs: its arguments by name.
      guided_name: its parameter that says whether there is a negative prompt.
    """
    signature = inspect.signature(encode)
    if not signature.parameters.keys() >= {*_PARAMETERS, guided_name}:
        return encode(*args, **kwargs)
    call = signature.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    token = TOLD_HERE.set(True)
    try:
        count = given["num_images_per_prompt"]
        given["prompt_embeds"], behind = split_long(pipe, given["prompt_embeds"])
        half = is_half_loaded(pipe)
        # a concept never acts in one of two text encoders alone
        with plain(pipe) if half else contextlib.nullcontext(), collected() as calls:
            if given["prompt_embeds"] is None:
                guided = given[guided_name]
                if not guided or given["negative_prompt_embeds"] is not None:
                    encoded = encode(*call.args, **call.kwargs)
                    return with_states(pipe, encoded, calls, count)
                given |= {guided_name: False, "num_images_per_prompt": 1}
                given |= _embeds(given, encode(*call.args, **call.kwargs))
                given |= {guided_name: guided, "num_images_per_prompt": count}
            with plain(pipe):
                encoded = encode(*call.args, **call.kwargs)
            return with_states(pipe, encoded, calls, count, behind)
    finally:
        TOLD_HERE.reset(token)


def _embeds(given: Mapping[str, Any], encoded: Sequence[Any]) -> dict[str, Any]:
    """What a call gave for the prompt, as arguments of the next call. Stable Diffusion XL's gives
    ``(prompt, negative, pooled, negative pooled)``.
    """
    if "pooled_prompt_embeds" in given:
        return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[2]}
    return {"prompt_embeds": encoded[0]}


@functools.cache
def told_class(base: type, name: str, *more: type) -> type:
    """The subclass of a pipeline class, and of ``more``, that says what a prompt is for."""

    def __reduce__(self: Any) -> tuple:  # it has no name to be found under
        return _rebuild, (base, name, *more), self.__dict__

    own: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
    own |= {"__reduce__": __reduce__}
    if not more:  # else it is so from the beginning, and stays so
        own["_catversion_base"] = base
    for method in ("encode_prompt", "save_pretrained"):
        if hasattr(base, method):
            own[method] = _documented(getattr(base, method), getattr(ToldPipeline, method))
    return type(name, (*more, ToldPipeline, base), own)


def _documented(original: Any, told: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return told(self, *args, **kwargs)

    return method


def _rebuild(base: type, name: str, *more: type) -> Any:
    kind: Any = told_class(base, name, *more)
    return kind.__new__(kind)


def tell(pipe: Any) -> None:
    """Make a pipeline say what its prompts are for."""
    if not hasattr(type(pipe), "encode_prompt"):
        return
    if not hasattr(type(pipe), "catversion_told"):
        kind: Any = type(pipe)
        pipe.__class__ = told_class(kind, kind.__name__)
    if vars(pipe).get("_catversion_encoders") != (ids := _ids(pipe)):
        pipe._catversion_encoders = ids
    if has_states(pipe):
        hide_filling(getattr(pipe, "unet", None), num_tokens(pipe))


def untell(pipe: Any) -> None:
    """Undo :func:`tell`."""
    base = vars(type(pipe)).get("_catversion_base")
    if base is not None:
        pipe.__class__ = base
        vars(pipe).pop("_catversion_encoders", None)
    show_filling(getattr(pipe, "unet", None))


def is_replaced(pipe: Any) -> bool:
    """Whether the pipeline has another text encoder than when its concepts were loaded."""
    before = getattr(pipe, "_catversion_encoders", ())
    return before not in ((), _ids(pipe)) and not states_on(pipe)


def _ids(pipe: Any) -> tuple[int, ...]:
    return tuple(id(one.model) for one in encoders_of(pipe))


def _warn_replaced(pipe: Any) -> None:
    if is_replaced(pipe):
        warnings.warn(
            "a text encoder of this pipeline was replaced, and its concepts went with the old "
            "one: load them again.",
            stacklevel=3,
        )
        pipe._catversion_encoders = ()
