"""What is loaded into one text encoder, and which prompts of a call it acts on.

A public forward pre-hook on the encoder reads the token ids and hands :class:`Marks` to the
attention layers as an argument of the call.

Threads may load, choose and unload concepts while others encode. What is loaded changes under one
lock, and a call goes on with what it was told when it began: the attention implementation is not
taken away under it.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import inspect
import itertools
import math
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeGuard, TypeVar

import torch

from catversion_jax.integrations.asked_here import asked_of
from catversion_jax.integrations.concept_attention import (
    ATTENTION_PREFIX,
    CALLED_HERE,
    MARKS_ARGUMENTS,
    Called,
    Marks,
    register_attention,
)
from catversion_jax.integrations.encoder_wrapping import innermost
from catversion_jax.integrations.loaded_concept import CatVersionLoadError, LoadedConcept
from catversion_jax.integrations.word_places import (
    content,
    ids_inside_words,
    seeing_positions,
    word_positions,
)

_IMPLEMENTATIONS = ("sdpa", "eager")
CHOSEN_WHEN_COMPILED = (
    "{}: not active, and the text encoder is compiled, where a block can choose among active "
    "concepts only. Activate all that you draw with by set_catversion first."
)
_LACKS_STATES = " The concept's context states, which encode_prompt adds, are missing here."

SWITCHING = threading.RLock()  # held while what is loaded into any text encoder changes
# Calls that were told of concepts, while their layers may still ask: in which encoder and thread.
_CALLS: weakref.WeakKeyDictionary[Marks, tuple[EncoderState, int]]
_CALLS = weakref.WeakKeyDictionary()
_PATIENCE = 10.0  # seconds: an error's traceback can keep a call that is over

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Whether a pipeline that tells prompts from negative ones is calling its text encoder.
TOLD_HERE: contextvars.ContextVar[bool] = contextvars.ContextVar("catversion_told", default=False)


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function that changes what is loaded, made safe to call from several threads."""

    @functools.wraps(function)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with SWITCHING:
            return function(*args, **kwargs)

    return locked


def state_on(encoder: Any) -> EncoderState | None:
    """What is loaded into a text encoder; None where nothing is."""
    encoder = innermost(encoder)
    return None if encoder is None else vars(encoder).get("_catversion_state")


class Selection:
    """The concepts that act now and their scales; made anew by every switch, then not changed."""

    def __init__(
        self,
        state: EncoderState,
        concepts: Sequence[LoadedConcept],
        scales: Mapping[str, float],
        keep_apart: bool = False,
    ):
        self.state, self.concepts, self.scales = state, tuple(concepts), dict(scales)
        self.keep_apart = keep_apart
        number = next(_NUMBERS)
        _SELECTIONS[number] = self
        self.number = torch.tensor(number)  # a tensor, so that a switch needs no new compilation

    def __reduce__(self) -> tuple:
        # a copy has its own number
        return Selection, (self.state, self.concepts, self.scales, self.keep_apart)


def is_choice(asked: Any) -> TypeGuard[Selection]:
    """Whether a block asks for concepts, not for scales; by what it has, because diffusers runs the
    code of exported folders again under one name, and its classes with it.
    """
    return hasattr(asked, "concepts")


_NUMBERS = itertools.count()
_SELECTIONS: weakref.WeakValueDictionary[int, Selection] = weakref.WeakValueDictionary()


class EncoderState:
    """All that is loaded into one text encoder. Lives on the encoder, so pipelines that share it
    share this. Nothing of a single call is kept here.

    The two text encoders of Stable Diffusion XL have a state each, of the same concepts.
    """

    def __init__(self, tokenizer: Any):
        self.loaded: dict[str, LoadedConcept] = {}
        self.active: dict[str, float] = {}
        self.enabled = True
        self.keep_apart = False
        self.plain: set[tuple[int, ...]] = set()
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.inside_word = ids_inside_words(tokenizer)
        self.fingerprint: str | None = None
        self.warned: set[Any] = set()  # every warning is given once
        self.original = ""
        self.argument = ""
        self.handle: Any = None
        self.selections: collections.deque[Selection] = collections.deque(maxlen=4)
        self.selection = Selection(self, (), {})

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """Unpickled in another process, where our attention may not be registered yet."""
        self.__dict__.update(attributes)
        if self.original:
            register_attention(self.original)

    def require(self, name: str) -> None:
        """Raise when ``name`` is not loaded."""
        if name not in self.loaded:
            listed = ", ".join(self.loaded) or "none"
            raise CatVersionLoadError(
                f"{name!r} is not loaded; loaded: {listed}. Use load_catversion first."
            )

    def forget(self, name: str) -> None:
        """Drop one concept; :meth:`select` makes it so."""
        del self.loaded[name]
        self.active.pop(name, None)

    def select(self) -> None:
        """Make what is loaded, active and enabled the selection that later calls use."""
        acting = self.active if self.enabled else {}
        self.selections.append(self.selection)  # a call that has begun with it may still ask
        concepts = [self.loaded[name] for name in acting]
        self.selection = Selection(self, concepts, acting, self.keep_apart)

    def install(self, encoder: Any) -> None:
        """Hook and attention implementation; again after a change of the latter, else without
        effect. The caller holds the lock.
        """
        current = encoder.config._attn_implementation
        if not current.startswith(ATTENTION_PREFIX):
            check_implementation(encoder)
            self.original = current
            encoder.set_attn_implementation(register_attention(current))
        if self.argument:
            return
        kinds = [p.kind for p in inspect.signature(type(encoder).forward).parameters.values()]
        self.argument = MARKS_ARGUMENTS[0 if inspect.Parameter.VAR_KEYWORD in kinds else 1]
        for layer, attention in enumerate(_attention_modules(encoder)):
            attention.catversion_layer = layer
        encoder._catversion_state = self
        self.handle = encoder.register_forward_pre_hook(_before_encoding, with_kwargs=True)

    def uninstall(self, encoder: Any) -> None:
        """Undo :meth:`install`, once the calls of other threads that it acts on are over."""
        self.handle.remove()
        end = time.monotonic() + _PATIENCE
        while self._is_asked() and time.monotonic() < end:
            time.sleep(1e-3)
        if encoder.config._attn_implementation.startswith(ATTENTION_PREFIX):
            encoder.set_attn_implementation(self.original)
        for attention in _attention_modules(encoder):
            del attention.catversion_layer
        del encoder._catversion_state

    def _is_asked(self) -> bool:
        here = threading.get_ident()
        return any(state is self and thread != here for state, thread in list(_CALLS.values()))

    @one_at_a_time
    def begin_call(self, encoder: Any, marks: Marks) -> bool:
        """Whether a call of the text encoder may be told ``marks``: not if all was unloaded since
        it began.
        """
        if state_on(encoder) is not self:
            return False
        self.install(encoder)  # the user may have set another attention implementation since
        _CALLS[marks] = self, threading.get_ident()
        return True

    def called(self, selection: Selection, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """The bias ``[B T]`` of equation (2) of the concepts that any row calls, by their number in
        the selection; -inf where a token does not see the concept.
        """
        chosen = self.chosen_here() or selection
        scales = self._scales_here(selection, chosen)
        if not any(scales.values()):
            return {}
        rows = ids.reshape(-1, ids.shape[-1]).tolist()
        starts = [1 if row[:1] == [self.bos] else 0 for row in rows]
        prompts = [content(row, self.bos, self.eos) for row in rows]
        biases: dict[int, torch.Tensor] = {}
        acting: list[tuple[LoadedConcept, float, frozenset[int]]] = []
        unnamed = {row for row, prompt in enumerate(prompts) if prompt and prompt not in self.plain}
        uncalled = set(unnamed)
        asked = list(zip(selection.concepts, scales.values(), strict=True))
        words = [  # of each concept, by row
            {row: self._word_positions(prompts[row], one) for row in unnamed} if scale > 0 else {}
            for one, scale in asked
        ]
        for i, (concept, scale) in enumerate(asked):
            for row, positions in words[i].items():
                if not positions and concept.when != "always":
                    continue
                uncalled.discard(row)
                bias = biases.setdefault(i, torch.full((len(rows), len(rows[0])), -torch.inf))
                apart = words if chosen.keep_apart else ()
                others = {starts[row] + p for one in apart for p in one.get(row, ())}
                own = [starts[row] + p for p in positions]
                seeing = seeing_positions(concept.scope, own, others - set(own), len(rows[0]))
                bias[row, list(seeing)] = 0
            if i in biases:
                seen = (biases[i] > -torch.inf).any(dim=1).nonzero().flatten().tolist()
                acting.append((concept, scale, frozenset(seen)))
                biases[i] += concept.logit_bias + math.log(scale)
        if (calls := CALLED_HERE.get()) is not None:
            calls.append(Called(self, acting))
        self._warn_of_call(selection, uncalled, bool(biases))
        return {i: bias.to(ids.device) for i, bias in biases.items()}

    def chosen_here(self) -> Selection | None:
        """What the innermost block of this thread or task that chooses concepts has chosen."""
        return next((one for one in asked_of(self) if is_choice(one)), None)

    def _scales_here(self, selection: Selection, chosen: Selection) -> Mapping[str, float]:
        """The scales of the concepts of ``selection``, which in a compiled graph is that of the
        active concepts even where a block has chosen others.
        """
        if missing := sorted(set(chosen.scales) - set(selection.scales)):
            raise CatVersionLoadError(CHOSEN_WHEN_COMPILED.format(", ".join(missing)))
        asked = next(iter(asked_of(self)), chosen)
        scales = chosen.scales
        if isinstance(asked, Mapping):
            scales = {name: asked.get(name, scale) for name, scale in scales.items()}
        elif not is_choice(asked):
            number: Any = asked
            scales = dict.fromkeys(scales, number)
        return {name: scales.get(name, 0.0) for name in selection.scales}

    def _word_positions(self, prompt: tuple[int, ...], concept: LoadedConcept) -> list[int]:
        return word_positions(prompt, concept.class_ids, self.inside_word)

    def warn_once(self, about: Any, message: str) -> None:
        """Give a warning, the first time only."""
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(message, stacklevel=2)

    def _warn_of_call(self, selection: Selection, uncalled: set[int], any_called: bool) -> None:
        """Warn of prompts that call nothing, and of prompts of which nobody says what they are."""
        if uncalled:
            words = sorted({concept.base_class for concept in selection.concepts})
            component = selection.concepts[0].component
            reader = f"read in {component}" if component else "drawn"
            listed = " or ".join(map(repr, words[:5])) + (" ..." if len(words) > 5 else "")
            self.warn_once(
                tuple(words),
                f"prompt {', '.join(map(str, sorted(uncalled)))} of this batch calls no active "
                f"concept and is {reader} by the plain model. Write {listed} in it as a separate "
                "word (add spaces around it, or list the form in class_forms). This is said once.",
            )
        if any_called and not TOLD_HERE.get():
            self.warn_once(
                "told",
                "the text encoder was called by other code than the encode_prompt of a pipeline "
                "with a loaded concept: all its prompts count as wanted ones. Encode negative "
                "prompts inside `with plain(pipe):`, and hand another pipeline that shares this "
                "text encoder to enable_catversion(pipe) once."
                + _LACKS_STATES * any(one.states is not None for one in selection.concepts)
                + " This is said once.",
            )


def check_implementation(encoder: Any) -> None:
    """Raise where a text encoder computes its attention in a way that takes no concepts."""
    current = encoder.config._attn_implementation
    if not current.startswith(ATTENTION_PREFIX) and current not in _IMPLEMENTATIONS:
        raise CatVersionLoadError(
            f"attention implementation {current!r} of {type(encoder).__name__}: must be one of "
            f"{', '.join(_IMPLEMENTATIONS)}. Use the text encoder's "
            "set_attn_implementation('sdpa')."
        )


def _before_encoding(
    encoder: Any, args: tuple, kwargs: dict | None = None
) -> tuple[tuple, dict] | None:
    """Forward pre-hook of the text encoder: add the marks to the arguments of the call.

    torch hands no keywords to a hook that another thread is just adding or removing.
    """
    state: EncoderState | None = getattr(encoder, "_catversion_state", None)
    if state is None or kwargs is None:
        return None
    compiling = torch.compiler.is_compiling()  # no context variable is read in a compiled graph
    selection = state.selection if compiling else state.chosen_here() or state.selection
    if not selection.concepts:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        state.warn_once(
            "no ids", "no input_ids: which prompts call a concept is unknown, all stay plain."
        )
        return None
    said = kwargs.get("output_attentions")
    if said is None:
        said = encoder.config.output_attentions
    if compiling:
        state.install(encoder)
        bias = _TRACED_BIAS(ids, selection.number, len(selection.concepts))
        marks = Marks(selection.concepts, bias, said)
    else:
        called = state.called(selection, ids)
        concepts = [selection.concepts[i] for i in called]
        if not called:
            return None
        marks = Marks(concepts, torch.stack(list(called.values())), said)
        if not state.begin_call(encoder, marks):
            return None
    return args, {**kwargs, state.argument: marks}


def _bias(ids: torch.Tensor, number: torch.Tensor, count: int) -> torch.Tensor:
    """The biases ``[C B T]`` of a selection in a compiled graph, where the rows are known when it
    runs.
    """
    selection = _SELECTIONS.get(int(number))
    bias = torch.full((count, ids.numel() // ids.shape[-1], ids.shape[-1]), -torch.inf)
    if selection is None:
        raise RuntimeError("the active concepts were switched several times during one call")
    for i, one in selection.state.called(selection, ids).items():
        bias[i] = one
    return bias.to(ids.device)


def _traced(name: str) -> Any:
    """:func:`_bias` as an operator that ``torch.compile`` keeps as it is."""
    operator = torch.library.custom_op(
        name, _bias, mutates_args=(), schema="(Tensor ids, Tensor number, int count) -> Tensor"
    )
    operator.register_fake(
        lambda ids, number, count: ids.new_empty(
            (count, ids.numel() // ids.shape[-1], ids.shape[-1]), dtype=torch.float32
        )
    )
    return operator


# The code of an exported pipeline is a copy of this one with an operator of its own.
_TRACED_BIAS = _traced(
    f"catversion_{uuid.uuid4().hex}::bias"
    if hasattr(torch.ops.catversion, "bias")
    else "catversion::bias"
)


def _attention_modules(encoder: Any) -> list[Any]:
    """Self-attention of every layer; transformers >= 5.6 has no ``.text_model`` level."""
    return [layer.self_attn for layer in getattr(encoder, "text_model", encoder).encoder.layers]
