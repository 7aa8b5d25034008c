"""Pipelines that say what a prompt is for.

The text encoder sees token ids only. A pipeline that loads a concept becomes one of a subclass of
its class, of the same name, that differs in two public methods. ``encode_prompt`` is done in two
calls of the method itself: the prompt, then the negative prompt with its documented parameter
``prompt_embeds`` set, inside :func:`plain`. ``save_pretrained`` warns that concepts are not saved.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from catversion_jax.integrations.encoder_state import (
    SCALES_HERE,
    TOLD_HERE,
    innermost,
    state_on,
)
from catversion_jax.integrations.loaded_concept import CatVersionLoadError

_PARAMETERS = {
    "prompt",
    "num_images_per_prompt",
    "do_classifier_free_guidance",
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
    Of blocks within each other the innermost counts.

    Args:
      pipe: the pipeline.
      scale: one number for all active concepts, or numbers by name; the others keep theirs.

    Raises:
      CatVersionLoadError: a name that is not active, or a scale that is not a finite number >= 0.
    """
    state = state_on(pipe.text_encoder)
    for number in scale.values() if isinstance(scale, Mapping) else [scale]:
        check_scale(number)
    if isinstance(scale, Mapping):
        for name in scale:
            if state is None or name not in state.active:
                active = ", ".join(state.active) if state is not None else ""
                raise CatVersionLoadError(
                    f"{name!r} is not active; active: {active or 'none'}. Use set_catversion first."
                )
    if state is None:
        yield
        return
    token = SCALES_HERE.set((*SCALES_HERE.get(), (state, scale)))
    try:
        yield
    finally:
        SCALES_HERE.reset(token)


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

    _catversion_encoder = 0  # which text encoder the concepts were loaded into

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own; no concept acts on the negative prompt."""
        encode = super().encode_prompt  # type: ignore[misc]
        signature = inspect.signature(encode)
        if not signature.parameters.keys() >= _PARAMETERS:
            return encode(*args, **kwargs)
        _warn_replaced(self)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        token = TOLD_HERE.set(True)
        try:
            if given["prompt_embeds"] is None:
                if given["negative_prompt_embeds"] is not None:
                    return encode(*call.args, **call.kwargs)
                guided, count = given["do_classifier_free_guidance"], given["num_images_per_prompt"]
                if not guided:
                    return encode(*call.args, **call.kwargs)
                given |= {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}
                given["prompt_embeds"] = encode(*call.args, **call.kwargs)[0]
                given |= {"do_classifier_free_guidance": guided, "num_images_per_prompt": count}
            with plain(self):
                return encode(*call.args, **call.kwargs)
        finally:
            TOLD_HERE.reset(token)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own, which knows no concepts."""
        state = state_on(self.text_encoder)  # type: ignore[attr-defined]
        if state is not None and state.loaded:
            names = ", ".join(list(state.loaded)[:5]) + (" ..." if len(state.loaded) > 5 else "")
            warnings.warn(
                f"save_pretrained saves the plain model: the loaded concepts ({names}) are not in "
                "it. Keep their files beside it, or write a folder that has them with `catversion "
                "export SOURCE --format pipeline`.",
                stacklevel=2,
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def told_class(base: type, name: str) -> type:
    """The subclass of a pipeline class that says what a prompt is for."""

    def __reduce__(self: Any) -> tuple:  # it has no name to be found under
        return _rebuild, (base, name), self.__dict__

    own: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
    own |= {"__reduce__": __reduce__, "_catversion_base": base}
    for method in ("encode_prompt", "save_pretrained"):
        if hasattr(base, method):
            own[method] = _documented(getattr(base, method), getattr(ToldPipeline, method))
    return type(name, (ToldPipeline, base), own)


def _documented(original: Any, told: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return told(self, *args, **kwargs)

    return method


def _rebuild(base: type, name: str) -> Any:
    kind: Any = told_class(base, name)
    return kind.__new__(kind)


def tell(pipe: Any) -> None:
    """Make a pipeline say what its prompts are for."""
    if not hasattr(type(pipe), "encode_prompt"):
        return
    if not isinstance(pipe, ToldPipeline):
        kind: Any = type(pipe)
        pipe.__class__ = told_class(kind, kind.__name__)
    encoder = id(innermost(pipe.text_encoder))
    if vars(pipe).get("_catversion_encoder") != encoder:
        pipe._catversion_encoder = encoder


def untell(pipe: Any) -> None:
    """Undo :func:`tell`."""
    base = vars(type(pipe)).get("_catversion_base")
    if base is not None:
        pipe.__class__ = base
        vars(pipe).pop("_catversion_encoder", None)


def is_replaced(pipe: Any) -> bool:
    """Whether the pipeline has another text encoder than when its concepts were loaded."""
    before = getattr(pipe, "_catversion_encoder", 0)
    return before not in (0, id(innermost(pipe.text_encoder))) and (
        state_on(pipe.text_encoder) is None
    )


def _warn_replaced(pipe: Any) -> None:
    if is_replaced(pipe):
        warnings.warn(
            "the text encoder of this pipeline was replaced, and its concepts went with the old "
            "one: load them again.",
            stacklevel=3,
        )
        pipe._catversion_encoder = 0
