r"""CatVersion concepts in a PyTorch diffusers pipeline.

    from catversion_jax.integrations.diffusers import load_catversion
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    load_catversion(pipe, "out/concepts/my_teapot")           # or a hub id
    pipe("a teapot on the moon")                              # the class word calls the concept

A concept of Stable Diffusion XL has a part for each of its two text encoders and is loaded into
both; all that follows holds for each, with its own tokenizer and its own prompt.

A concept is a few keys and values per adapted layer of the text encoder's self-attention,
concatenated before the layer's own (CatVersion, arXiv 2311.14631), with an additive bias b on their
logits:

    (1)  attn([K_c; K], [V_c; V])
             = softmax([q K_c^T / sqrt(H) + b, q K^T / sqrt(H) + causal mask]) [V_c; V]
    (2)  scale s multiplies the concept's odds against the prompt's own tokens:
             b + log s;  s = 0: not applied

How it acts. Through transformers' public attention interface: the encoder's own implementation
(eager or SDPA) runs unchanged for every row of the batch, then the rows whose prompt calls a
concept are overwritten with (1), computed in float32. A public forward pre-hook on the text encoder
finds those rows from the token ids and hands them to the layers as an argument of the call. So
prompts about other things, the unconditional branch and everything while nothing is active stay
bit-identical, and threads may share a pipeline, also while one of them loads or unloads.

When it acts. ``class_word`` concepts: on prompts that contain the words of their base class.
``always`` concepts: on every prompt except the empty one. Never on negative prompts: a pipeline
that is handed to a function of this module encodes its negative prompt apart
(``told_pipeline.py``). Code that calls the text encoder itself (prompt weighting such as Compel,
pipelines without ``encode_prompt``) does not say what a prompt is for, and all its prompts count as
wanted ones: there ``with plain(pipe):`` surrounds the encoding of negative prompts.

The files of this room that this one imports need torch, safetensors and transformers, no jax.
``catversion export --format pipeline`` writes them into the ``pipeline.py`` of a model folder,
which then needs no package of ours.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.integrations.asked_here import asking
from catversion_jax.integrations.concept_source import read_concept
from catversion_jax.integrations.encoder_fingerprint import (
    check_shape,
    check_weights,
    text_encoder_sha256,
)
from catversion_jax.integrations.encoder_state import (
    CHOSEN_WHEN_COMPILED,
    SWITCHING,
    EncoderState,
    Selection,
    check_implementation,
    one_at_a_time,
)
from catversion_jax.integrations.encoder_wrapping import is_compiled
from catversion_jax.integrations.loaded_concept import (
    PAIR,
    CatVersionLoadError,
    LoadedConcept,
)
from catversion_jax.integrations.pipeline_encoders import (
    encoders_for,
    encoders_of,
    names_in,
    states_on,
)
from catversion_jax.integrations.told_pipeline import (
    check_scale,
    is_replaced,
    own_states,
    plain,
    scaled,
    tell,
    untell,
)

__all__ = [
    "CatVersionLoadError",
    "chosen",
    "disable_catversion",
    "enable_catversion",
    "list_catversion",
    "load_catversion",
    "plain",
    "scaled",
    "set_catversion",
    "text_encoder_sha256",
    "unload_catversion",
]


def load_catversion(
    pipe: Any,
    path_or_hub_id: str | Path | Mapping[str, Any],
    adapter_name: str | None = None,
    *,
    force: bool = False,
    subfolder: str | None = None,
    weight_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> str:
    """Load a concept and make it active at scale 1, beside the active concepts of other base
    classes.

    After :func:`disable_catversion` it rests like the others until :func:`enable_catversion`, and a
    warning says so. An active concept of the same base class is set aside, and a loaded one of the
    same name is replaced; both cost no more than the few kB of the new one. Use
    :func:`set_catversion` for any other choice. A text encoder that carries a LoRA or is compiled
    is taken as it is; one that is a fine-tune of the one the concept was trained with is taken with
    a warning.

    Args:
      pipe: a pipeline with ``text_encoder`` (CLIP) and ``tokenizer``, and for a concept of Stable
        Diffusion XL ``text_encoder_2`` and ``tokenizer_2``.
      path_or_hub_id: a concept file; ``concepts.arrow#NAME`` of a pack; a folder with
        ``catversion.safetensors`` or one concept file of another name; a hub id, optionally with a
        folder or file inside the repository:
        ``"user/repo"``, ``"user/repo/teapot"``; or the tensors of a concept file by name.
      adapter_name: how to call it here; default: the concept's own name.
      force: load it although it was trained with another text encoder of the same shape.
      subfolder: folder inside the folder or repository.
      weight_name: name of the file there, where it is not ``catversion.safetensors``.
      metadata: the metadata of the file whose tensors are given (``safe_open(file,
        "pt").metadata()``).
      revision: of the hub repository.
      token: for a private hub repository.
      cache_dir: where downloads are kept.
      local_files_only: take what was downloaded before.

    Returns:
      The name under which it is loaded.

    Raises:
      CatVersionLoadError: not a concept file, or it does not fit this pipeline's text encoders.
    """
    if adapter_name is not None:
        (adapter_name,) = _texts("adapter_name", [adapter_name])
    parts, source = read_concept(
        path_or_hub_id,
        subfolder,
        weight_name,
        metadata,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return load_parts(pipe, parts, source, adapter_name, force=force)


@one_at_a_time
def set_catversion(
    pipe: Any,
    name: str | Sequence[str],
    scale: float | Sequence[float] = 1.0,
    *,
    plain_prompts: Sequence[str] | None = None,
    keep_apart: bool | None = None,
) -> None:
    """Choose the active concepts and their scales; all other loaded ones rest.

    Several active concepts each act on the prompts that call them; a prompt that calls several gets
    all of them.

    Args:
      pipe: the pipeline.
      name: one or more loaded names.
      scale: one number for all or one per name; 0 = plain model exactly, 1 = as trained.
      plain_prompts: prompts that stay plain whatever they say; None keeps the earlier choice, ()
        ends it. :func:`plain` says the same of all prompts in a block.
      keep_apart: where a prompt calls several concepts, let each be seen from its own word up to
        the next concept's word only; None keeps the earlier choice, which is False at first.

    Raises:
      CatVersionLoadError: a name that is not loaded, or a scale that is not a finite number >= 0.
    """
    states = _states_of(pipe)
    scales = _scales_by_name(states, name, scale)
    for state in states:
        state.active = dict(scales)
        state.enabled = True
        state.keep_apart = state.keep_apart if keep_apart is None else bool(keep_apart)
        state.select()
    if plain_prompts is not None:
        given = _texts("plain_prompts", plain_prompts)
        for state, encoder in zip(states, encoders_of(pipe), strict=True):
            state.plain = set(map(encoder.word_ids, given))


@contextlib.contextmanager
def chosen(
    pipe: Any,
    name: str | Sequence[str],
    scale: float | Sequence[float] = 1.0,
    *,
    keep_apart: bool | None = None,
) -> Iterator[None]:
    """A block in which these loaded concepts act, active or not, and no others.

    What :func:`set_catversion` says for every later call, this says for the calls of one thread or
    task, so calls side by side may draw with different concepts, also of one base class. Of blocks
    within each other the innermost counts; :func:`scaled` within it changes its scales. In a
    compiled text encoder it chooses among the active concepts.

    Args:
      pipe: the pipeline.
      name: one or more loaded names; () for none.
      scale: as in :func:`set_catversion`.
      keep_apart: as in :func:`set_catversion`.

    Raises:
      CatVersionLoadError: a name that is not loaded, a scale that is not a finite number >= 0, or
        a name that is not active where the text encoder is compiled.
    """
    with SWITCHING:
        states = own_states(_states_of(pipe))
        scales = _scales_by_name(states, name, scale)
        compiled = any(is_compiled(getattr(pipe, component, None)) for component in PAIR)
        if compiled and (rest := [one for one in scales if one not in states[0].selection.scales]):
            raise CatVersionLoadError(CHOSEN_WHEN_COMPILED.format(", ".join(rest)))
        choices = tuple(
            (
                state,
                Selection(
                    state,
                    [state.loaded[one] for one in scales],
                    scales,
                    state.keep_apart if keep_apart is None else bool(keep_apart),
                ),
            )
            for state in states
        )
    with asking(choices):
        yield


@one_at_a_time
def disable_catversion(pipe: Any) -> None:
    """Let every concept rest: the pipeline is bit-identical to the plain one until
    ``enable_catversion``.
    """
    for state in _states_of(pipe):
        state.enabled = False
        state.select()


@one_at_a_time
def enable_catversion(pipe: Any) -> None:
    """Undo ``disable_catversion``: the same concepts at the same scales act again.

    A second pipeline that shares the text encoder (``from_pipe``, ``components``) shares its
    concepts; handed to this function, it too spares its negative prompts.
    """
    for state in _states_of(pipe):
        state.enabled = True
        state.select()


@one_at_a_time
def unload_catversion(pipe: Any, name: str | None = None) -> None:
    """Forget one concept, or all; with the last one the hook and the attention implementation are
    undone. A block of :func:`chosen` that has begun keeps what it chose to its end.

    Raises:
      CatVersionLoadError: ``name`` is not loaded.
    """
    if name is not None:
        for state in _states_of(pipe):
            state.require(name)
    for encoder in encoders_of(pipe):
        held = encoder.state
        if held is None:
            continue
        for one in [name] if name is not None else list(held.loaded):
            held.forget(one)
        held.select()
        if not held.loaded:
            held.uninstall(encoder.model)
    if not states_on(pipe):
        untell(pipe)


@one_at_a_time
def list_catversion(pipe: Any) -> list[dict[str, Any]]:
    """The loaded concepts: name, active, scale, base_class, when, layers (in Stable Diffusion XL
    those of each text encoder), base_model.
    """
    states = states_on(pipe)
    listed: list[dict[str, Any]] = []
    for name in names_in(states):
        first, *others = (state.loaded[name] for state in states)
        entry = {key: getattr(first, key) for key in ("base_class", "when", "layers", "base_model")}
        if others:
            entry["layers"] = (first.layers, *(other.layers for other in others))
        active = states[0].enabled and name in states[0].active
        scale = states[0].active.get(name)
        listed.append({"name": name, "active": active, "scale": scale, **entry})
    return listed


def _scales_by_name(
    states: Sequence[EncoderState], name: Any, scale: float | Sequence[float]
) -> dict[str, float]:
    """The scales of loaded concepts that a user names, one or several of each."""
    names = _texts("name", name)
    if len(set(names)) < len(names):
        raise CatVersionLoadError(f"name={names!r:.200}: give each name once.")
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(names)
    if len(scales) != len(names):
        raise CatVersionLoadError(
            f"{len(names)} names and {len(scales)} scales: give one scale per name."
        )
    for one, number in zip(names, scales, strict=True):
        for state in states:
            state.require(one)
        check_scale(number)
    return dict(zip(names, map(float, scales), strict=True))


def _texts(argument: str, value: Any) -> list[str]:
    """One text or several as a list."""
    listed = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    for one in listed:
        if not isinstance(one, str):
            raise CatVersionLoadError(f"{argument}={one!r:.80}: must be text or a list of texts.")
    return listed


@one_at_a_time
def load_parts(
    pipe: Any,
    parts: Sequence[LoadedConcept],
    source: str,
    adapter_name: str | None = None,
    *,
    force: bool = False,
    activate: bool = True,
) -> str:
    """Load a concept that was read already, as :func:`load_catversion` does; without ``activate``
    it rests, and the active ones stay.
    """
    encoders = encoders_for(pipe, parts, source)
    states = [one.state or EncoderState(one.tokenizer) for one in encoders]
    for encoder, state, part in zip(encoders, states, parts, strict=True):
        check_shape(part, encoder.model, source)
        check_implementation(encoder.model)
        state.warned = states[0].warned  # what is said of one is not said of the other again
        if not force:
            check_weights(state, part, encoder.model, source)
        part.forced = force
        part.class_ids = tuple(map(encoder.word_ids, (part.base_class, *part.class_forms)))
        if not part.class_ids[0]:
            raise CatVersionLoadError(
                f"{source}: base class {part.base_class!r} has no tokens. Export it again."
            )
    name = adapter_name or parts[0].name
    known = names_in(states)
    tell(pipe)  # before anything acts on what another thread encodes
    for encoder, state, part in zip(encoders, states, parts, strict=True):
        state.install(encoder.model)
        for rival, one in list(state.loaded.items()):
            if rival not in known:  # it was in a text encoder that was replaced, too
                state.forget(rival)
            elif activate and one.class_ids[0] == part.class_ids[0]:
                state.active.pop(rival, None)
        state.loaded[name] = part
        if activate:
            state.active[name] = 1.0
        state.select()
    if activate and not states[0].enabled:
        warnings.warn(
            f"concept {name!r} rests like all of this pipeline, because disable_catversion was "
            "called: enable_catversion(pipe) lets them act.",
            stacklevel=4,
        )
    return name


def _states_of(pipe: Any) -> tuple[EncoderState, ...]:
    states = states_on(pipe)
    if not states:
        why = (
            "its text encoder was replaced, and the concepts went with the old one"
            if is_replaced(pipe)
            else "no concept is loaded in this pipeline"
        )
        raise CatVersionLoadError(f"{why}. Use load_catversion first.")
    tell(pipe)
    return states
