r"""CatVersion concepts in a PyTorch diffusers pipeline.

    from catversion_jax.integrations.diffusers import load_catversion
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    load_catversion(pipe, "out/concepts/my_teapot")           # or a hub id
    pipe("a teapot on the moon")                              # the class word calls the concept

A concept is a few keys and values per adapted layer of the text encoder's self-attention,
concatenated before the layer's own (CatVersion, arXiv 2311.14631), with an additive bias b on their
logits:

    (1)  attn([K_c; K], [V_c; V])
             = softmax([q K_c^T / sqrt(H) + b, q K^T / sqrt(H) + causal mask]) [V_c; V]
    (2)  scale s multiplies the concept's odds against the prompt's own tokens:
             b + log s;  s = 0: not applied

How it acts. Through transformers' public attention interface: the encoder's own implementation
(eager or SDPA) runs unchanged for every row of the batch, then only the rows whose prompt calls a
concept are overwritten with (1), computed in float32. A public forward pre-hook on the text encoder
finds those rows from the token ids. So prompts about other things, the unconditional branch and
everything while nothing is active stay bit-identical.

When it acts. ``class_word`` concepts: on prompts that contain the words of their base class, or one
of the forms that the file lists (``class_forms``, such as the plural), as words of their own.
``always`` concepts: on every prompt except the empty one. Never on negative prompts: those that a
pipeline, or a user, encodes with the pipeline's ``encode_prompt`` are recognised, because that
method has its ``prompt_embeds`` by then (``concept_attention.py``). The limit of that rule: code
that calls the text encoder itself (prompt weighting such as Compel, pipelines without
``encode_prompt``) does not say what a prompt is for, and all its prompts count as wanted ones.
There name those that must stay plain: ``set_catversion(..., plain_prompts=["blurry"])``.

This file, ``concept_attention.py`` and ``loaded_concept.py`` need torch, safetensors and
transformers, no jax. ``catversion export --format pipeline`` writes them into the ``pipeline.py``
of a model folder, which then needs no package of ours.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from catversion_jax.integrations.concept_attention import (
    CatVersionLoadError,
    EncoderState,
    LoadedConcept,
)
from catversion_jax.integrations.loaded_concept import CONCEPT_FILE_NAME, parse_concept

# ---- What a user calls ---------------------------------------------------------------------------


def load_catversion(
    pipe: Any,
    path_or_hub_id: str | Path,
    adapter_name: str | None = None,
    *,
    force: bool = False,
    revision: str | None = None,
) -> str:
    """Load a concept and make it active at scale 1, beside the active concepts of other base
    classes.

    An active concept of the same base class is set aside, and a loaded one of the same name is
    replaced; both cost no more than the few kB of the new one. Use :func:`set_catversion` for any
    other choice.

    Args:
      pipe: a pipeline with ``text_encoder`` (CLIP) and ``tokenizer``.
      path_or_hub_id: a concept file, a folder with ``catversion.safetensors``, or a hub id,
        optionally with a folder or file inside the repository: ``"user/repo"``,
        ``"user/repo/teapot"``.
      adapter_name: how to call it here; default: the concept's own name.
      force: load it although it was trained with another text encoder of the same shape.
      revision: of the hub repository.

    Returns:
      The name under which it is loaded.

    Raises:
      CatVersionLoadError: not a concept file, or it does not fit this pipeline's text encoder.
    """
    file = _resolve_file(path_or_hub_id, revision)
    return _load_bytes(pipe, file.read_bytes(), str(file), adapter_name, force)


def set_catversion(
    pipe: Any,
    name: str | Sequence[str],
    scale: float | Sequence[float] = 1.0,
    *,
    plain_prompts: Sequence[str] | None = None,
) -> None:
    """Choose the active concepts and their scales; all other loaded ones rest.

    Several active concepts each act on the prompts that call them; a prompt that calls several gets
    all of them.

    Args:
      pipe: the pipeline.
      name: one or more loaded names.
      scale: one number for all or one per name; 0 = plain model exactly, 1 = as trained.
      plain_prompts: prompts that stay plain whatever they say, for code that does not hand its
        negative prompt to ``pipe.encode_prompt`` as one; None keeps the earlier choice, () ends it.

    Raises:
      CatVersionLoadError: a name that is not loaded, or a scale that is not a finite number >= 0.
    """
    state = _state_of(pipe)
    names = [name] if isinstance(name, str) else list(name)
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(names)
    if len(scales) != len(names):
        raise CatVersionLoadError(
            f"{len(names)} names and {len(scales)} scales: give one scale per name."
        )
    for one, number in zip(names, scales, strict=True):
        state.require(one)
        if not (math.isfinite(number) and number >= 0):
            raise CatVersionLoadError(
                f"scale={number}: must be a finite number >= 0 (0 = plain, 1 = as trained)."
            )
    state.active = dict(zip(names, map(float, scales), strict=True))
    state.enabled = True
    if plain_prompts is not None:
        given = [plain_prompts] if isinstance(plain_prompts, str) else plain_prompts
        limit = pipe.tokenizer.model_max_length - 2  # begin-of-text and end-of-text
        state.plain = {_word_ids(pipe.tokenizer, prompt)[:limit] for prompt in given}


def disable_catversion(pipe: Any) -> None:
    """Let every concept rest: the pipeline is bit-identical to the plain one until
    ``enable_catversion``.
    """
    _state_of(pipe).enabled = False


def enable_catversion(pipe: Any) -> None:
    """Undo ``disable_catversion``: the same concepts at the same scales act again."""
    _state_of(pipe).enabled = True


def unload_catversion(pipe: Any, name: str | None = None) -> None:
    """Forget one concept, or all; with the last one every hook and the attention implementation are
    undone.

    Raises:
      CatVersionLoadError: ``name`` is not loaded.
    """
    if name is None and not hasattr(pipe.text_encoder, "_catversion_state"):
        return
    state = _state_of(pipe)
    for one in [name] if name is not None else list(state.loaded):
        state.require(one)
        del state.loaded[one]
        state.active.pop(one, None)
    if not state.loaded:
        state.uninstall(pipe.text_encoder)


def list_catversion(pipe: Any) -> list[dict[str, Any]]:
    """The loaded concepts: name, active, scale, base_class, when, layers, base_model."""
    state: EncoderState | None = getattr(pipe.text_encoder, "_catversion_state", None)
    listed: list[dict[str, Any]] = []
    if state is None:
        return listed
    for name, one in state.loaded.items():
        entry = {key: getattr(one, key) for key in ("base_class", "when", "layers", "base_model")}
        active = state.enabled and name in state.active
        listed.append({"name": name, "active": active, "scale": state.active.get(name), **entry})
    return listed


# ---- Concept files -------------------------------------------------------------------------------


def _resolve_file(path_or_hub_id: str | Path, revision: str | None) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        path = path / CONCEPT_FILE_NAME
        if not path.is_file():
            raise CatVersionLoadError(
                f"{path.parent}: no {CONCEPT_FILE_NAME} in it. Give a concept's folder."
            )
    if path.is_file():
        return path
    owner, *parts = str(path_or_hub_id).split("/")
    if not parts or owner in ("", ".", "..", "~"):
        raise CatVersionLoadError(
            f"{path_or_hub_id}: no such file. Give a concept file, its folder, or a hub id like "
            "user/repo."
        )
    inside = "/".join(
        parts[1:] if parts[-1].endswith(".safetensors") else [*parts[1:], CONCEPT_FILE_NAME]
    )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{parts[0]}", inside, revision=revision))
    except Exception as error:
        # the hub's exceptions differ by version; all mean that there is no file
        raise CatVersionLoadError(
            f"{path_or_hub_id}: no such file here, and no {inside} in a hub repository of that "
            f"name ({type(error).__name__}: {error}). Check the spelling, and the connection for a "
            "hub id."
        ) from error


def _load_bytes(pipe: Any, data: bytes, source: str, adapter_name: str | None, force: bool) -> str:
    concept = parse_concept(data, source)
    encoder = getattr(pipe, "text_encoder", None)
    if encoder is None or getattr(pipe, "tokenizer", None) is None:
        raise CatVersionLoadError(
            f"{type(pipe).__name__}: a concept needs a text_encoder and a tokenizer."
        )
    _check_shape(concept, encoder, source)
    state = getattr(encoder, "_catversion_state", None) or EncoderState(pipe.tokenizer)
    if not force:
        _check_fingerprint(state, concept, encoder, source)
    concept.class_ids = tuple(
        _word_ids(pipe.tokenizer, words) for words in (concept.base_class, *concept.class_forms)
    )
    if not concept.class_ids[0]:
        raise CatVersionLoadError(
            f"{source}: base class {concept.base_class!r} has no tokens. Export it again."
        )
    state.install(encoder)
    for rival, one in state.loaded.items():
        if one.class_ids[0] == concept.class_ids[0]:
            state.active.pop(rival, None)
    name = adapter_name or concept.name
    state.loaded[name] = concept
    state.active[name] = 1.0
    return name


def _check_shape(concept: LoadedConcept, encoder: Any, source: str) -> None:
    heads, num_layers = encoder.config.num_attention_heads, encoder.config.num_hidden_layers
    head_dim = encoder.config.hidden_size // heads
    top = max(concept.layers)
    if tuple(concept.key.shape[2:]) != (heads, head_dim) or top >= num_layers:
        raise CatVersionLoadError(
            f"{source}: made for a text encoder with {concept.key.shape[2]} heads of "
            f"{concept.key.shape[3]} and at least {top + 1} layers; this pipeline's has {heads} "
            f"heads of {head_dim} and {num_layers} layers. Load the model it was trained on: "
            f"{concept.base_model or 'not stated in the file'}."
        )


def _check_fingerprint(
    state: EncoderState, concept: LoadedConcept, encoder: torch.nn.Module, source: str
) -> None:
    if not concept.text_encoder_sha256:
        return
    state.fingerprint = state.fingerprint or text_encoder_sha256(encoder)
    if state.fingerprint is None:
        warnings.warn(
            f"{source}: whether this text encoder is the one it was trained with cannot be checked "
            f"in {getattr(encoder, 'dtype', 'this dtype')}; load the pipeline in float16 or "
            "float32 to check.",
            stacklevel=4,
        )
    elif state.fingerprint != concept.text_encoder_sha256:
        raise CatVersionLoadError(
            f"{source}: trained with the text encoder {concept.text_encoder_sha256[:12]} of "
            f"{concept.base_model or 'an unnamed model'}; this pipeline's is "
            f"{state.fingerprint[:12]}, and a concept means nothing to another one. Load that "
            "model, or pass force=True to try it."
        )


def text_encoder_sha256(encoder: torch.nn.Module) -> str | None:
    """Fingerprint of the weights, the same for float32 and float16 copies; None when it cannot be
    known.

    sha256 over the sorted state dict without ``token_embedding`` and ``position_ids``: key (freed
    of the ``text_model.`` prefix), then the tensor as little-endian float16.
    """
    tensors = {
        key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()
    }
    digest = hashlib.sha256()
    for key in sorted(tensors):
        if "token_embedding" in key or "position_ids" in key:
            continue
        tensor = tensors[key]
        if tensor.is_meta or tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            return None  # bfloat16 has dropped digits that float16 keeps
        digest.update(key.encode())
        digest.update(
            tensor.detach().cpu().to(torch.float16).contiguous().numpy().astype("<f2").tobytes()
        )
    return digest.hexdigest()


def _state_of(pipe: Any) -> EncoderState:
    state = getattr(pipe.text_encoder, "_catversion_state", None)
    if state is None:
        raise CatVersionLoadError(
            "no concept is loaded in this pipeline. Use load_catversion first."
        )
    return state


def _word_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)
