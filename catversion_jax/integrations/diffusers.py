r"""CatVersion concepts in a PyTorch diffusers pipeline.

    from catversion_jax.integrations.diffusers import load_catversion
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    load_catversion(pipe, "out/concepts/my_teapot")           # or a hub id
    pipe("a teapot on the moon")                              # the class word calls the concept

A concept is a few keys and values per adapted layer of the text encoder's self-attention, concatenated before
the layer's own (CatVersion, arXiv 2311.14631), with an additive bias b on their logits:

    (1)  attn([K_c; K], [V_c; V]) = softmax([q K_c^T / sqrt(H) + b, q K^T / sqrt(H) + causal mask]) [V_c; V]
    (2)  scale s multiplies the concept's odds against the prompt's own tokens:  b + log s;  s = 0: not applied

How it acts. Through transformers' public attention interface: the encoder's own implementation (eager or SDPA)
runs unchanged for every row of the batch, then only the rows whose prompt calls a concept are overwritten with
(1), computed in float32. A public forward pre-hook on the text encoder finds those rows from the token ids. So
prompts about other things, the unconditional branch and everything while nothing is active stay bit-identical.

When it acts. ``class_word`` concepts: on prompts that contain the words of their base class, negative prompts
included if they do. ``always`` concepts: on every prompt except the empty one. A text encoder cannot see that a
prompt is a negative one, so name those that must stay plain: ``set_catversion(..., plain_prompts=["blurry"])``.

This file imports torch, safetensors, transformers and nothing of its own package: it can be copied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CONCEPT_FILE_NAME = "catversion.safetensors"
FORMAT_VERSION = 1
_IMPLEMENTATIONS = ("sdpa", "eager")
_PREFIX = "catversion_"  # our attention implementations are catversion_sdpa and catversion_eager


class CatVersionLoadError(ValueError):
    """A concept that cannot be used with this pipeline. The message says the value, the rule and the remedy."""


# ---- What a user calls ----------------------------------------------------------------------------------------


def load_catversion(
    pipe: Any, path_or_hub_id: str | Path, adapter_name: str | None = None, *, force: bool = False
) -> str:
    """Load a concept and make it active at scale 1, beside the active concepts of other base classes.

    An active concept of the same base class is set aside, and a loaded one of the same name is replaced; both
    cost no more than the few kB of the new one. Use :func:`set_catversion` for any other choice.

    Args:
      pipe: a pipeline with ``text_encoder`` (CLIP) and ``tokenizer``.
      path_or_hub_id: a concept file, a folder with ``catversion.safetensors``, or a hub id, optionally with a
        folder or file inside the repository: ``"user/repo"``, ``"user/repo/teapot"``.
      adapter_name: how to call it here; default: the concept's own name.
      force: load it although it was trained with another text encoder of the same shape.

    Returns:
      The name under which it is loaded.

    Raises:
      CatVersionLoadError: not a concept file, or it does not fit this pipeline's text encoder.
    """
    file = _resolve_file(path_or_hub_id)
    return _load_bytes(pipe, file.read_bytes(), str(file), adapter_name, force)


def set_catversion(
    pipe: Any,
    name: str | Sequence[str],
    scale: float | Sequence[float] = 1.0,
    *,
    plain_prompts: Sequence[str] = (),
) -> None:
    """Choose the active concepts and their scales; all other loaded ones rest.

    Several active concepts each act on the prompts that call them; a prompt that calls several gets all of them.

    Args:
      pipe: the pipeline.
      name: one or more loaded names.
      scale: one number for all or one per name; 0 = plain model exactly, 1 = as trained.
      plain_prompts: prompts that stay plain whatever they say, such as the negative prompt.

    Raises:
      CatVersionLoadError: a name that is not loaded, or a scale that is not a finite number >= 0.
    """
    state = _state_of(pipe)
    names = [name] if isinstance(name, str) else list(name)
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(names)
    if len(scales) != len(names):
        raise CatVersionLoadError(f"{len(names)} names and {len(scales)} scales: give one scale per name.")
    for one, number in zip(names, scales, strict=True):
        state.require(one)
        if not (math.isfinite(number) and number >= 0):
            raise CatVersionLoadError(f"scale={number}: must be a finite number >= 0 (0 = plain, 1 = as trained).")
    state.active = dict(zip(names, map(float, scales), strict=True))
    state.enabled = True
    given = [plain_prompts] if isinstance(plain_prompts, str) else plain_prompts
    limit = pipe.tokenizer.model_max_length - 2  # begin-of-text and end-of-text
    state.plain = {_word_ids(pipe.tokenizer, prompt)[:limit] for prompt in given}


def disable_catversion(pipe: Any) -> None:
    """Let every concept rest: the pipeline is bit-identical to the plain one until ``enable_catversion``."""
    _state_of(pipe).enabled = False


def enable_catversion(pipe: Any) -> None:
    """Undo ``disable_catversion``: the same concepts at the same scales act again."""
    _state_of(pipe).enabled = True


def unload_catversion(pipe: Any, name: str | None = None) -> None:
    """Forget one concept, or all; with the last one every hook and the attention implementation are undone.

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
    state = getattr(pipe.text_encoder, "_catversion_state", None)
    listed = []
    for name, one in state.loaded.items() if state else ():
        entry = {key: getattr(one, key) for key in ("base_class", "when", "layers", "base_model")}
        active = state.enabled and name in state.active
        listed.append({"name": name, "active": active, "scale": state.active.get(name), **entry})
    return listed


# ---- Concept files --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _LoadedConcept:
    """A concept file's content; ``key`` and ``value`` are ``[L P N H]`` float32 on the CPU."""

    name: str
    base_class: str
    when: str
    base_model: str
    text_encoder_sha256: str
    layers: tuple[int, ...]
    key: torch.Tensor
    value: torch.Tensor
    logit_bias: float
    class_ids: tuple[int, ...] = ()
    placed: dict[Any, list[torch.Tensor]] = dataclasses.field(default_factory=dict)

    def at_layer(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Key and value ``[N P H]`` on the device and in the dtype of ``like``; None where it is not adapted."""
        if layer not in self.layers:
            return None
        place = (like.device, like.dtype)
        if place not in self.placed:  # the encoder may have moved since loading
            self.placed = {place: [x.permute(0, 2, 1, 3).to(*place) for x in (self.key, self.value)]}
        key, value = self.placed[place]
        index = self.layers.index(layer)
        return key[index], value[index]


def _resolve_file(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        path = path / CONCEPT_FILE_NAME
        if not path.is_file():
            raise CatVersionLoadError(f"{path.parent}: no {CONCEPT_FILE_NAME} in it. Give a concept's folder.")
    if path.is_file():
        return path
    owner, *parts = str(path_or_hub_id).split("/")
    if not parts or owner in ("", ".", "..", "~"):
        raise CatVersionLoadError(
            f"{path_or_hub_id}: no such file. Give a concept file, its folder, or a hub id like user/repo."
        )
    inside = "/".join(parts[1:] if parts[-1].endswith(".safetensors") else [*parts[1:], CONCEPT_FILE_NAME])
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{parts[0]}", inside))
    except Exception as error:  # the hub's exceptions differ by version; all mean that there is no file
        raise CatVersionLoadError(
            f"{path_or_hub_id}: no such file here, and no {inside} in a hub repository of that name "
            f"({type(error).__name__}: {error}). Check the spelling, and the connection for a hub id."
        ) from error


def _parse_concept(data: bytes, source: str) -> _LoadedConcept:
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        digest = "0x" + hashlib.sha256(data[8 + length :]).hexdigest()
        if "catversion.format_version" in metadata and metadata["modelspec.hash_sha256"] != digest:
            raise ValueError("its tensors do not have the checksum it states")
    except Exception as error:  # SafetensorError, or anything json and torch raise on garbage
        raise CatVersionLoadError(
            f"{source}: not a complete safetensors file ({error}). Give a {CONCEPT_FILE_NAME}; copy it again."
        ) from error
    own = {k.removeprefix("catversion."): v for k, v in metadata.items() if k.startswith("catversion.")}
    version = own.get("format_version")
    if version is None:
        raise CatVersionLoadError(
            f"{source}: no catversion metadata (it holds {', '.join(list(tensors)[:3])}): not a concept file. "
            "LoRAs load with load_lora_weights, embeddings with load_textual_inversion."
        )
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise CatVersionLoadError(
            f"{source}: format version {version}, this code reads up to {FORMAT_VERSION}. Update catversion-jax."
        )
    try:
        layers = tuple(int(i) for i in json.loads(own["layers"]))
        key, value = (
            torch.stack([tensors[f"layers.{i}.{part}"] for i in layers]).float() for part in ("key", "value")
        )
        texts = ("name", "base_class", "when", "base_model", "text_encoder_sha256")
        return _LoadedConcept(*(own[text] for text in texts), layers, key, value, float(own["logit_bias"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CatVersionLoadError(f"{source}: damaged concept file ({error!r}). Export it again.") from error


def _load_bytes(pipe: Any, data: bytes, source: str, adapter_name: str | None, force: bool) -> str:
    concept = _parse_concept(data, source)
    encoder = getattr(pipe, "text_encoder", None)
    if encoder is None or getattr(pipe, "tokenizer", None) is None:
        raise CatVersionLoadError(f"{type(pipe).__name__}: a concept needs a text_encoder and a tokenizer.")
    _check_shape(concept, encoder, source)
    state = getattr(encoder, "_catversion_state", None) or _State(pipe.tokenizer)
    if not force:
        state.check_fingerprint(concept, encoder, source)
    concept.class_ids = _word_ids(pipe.tokenizer, concept.base_class)
    if not concept.class_ids:
        raise CatVersionLoadError(f"{source}: base class {concept.base_class!r} has no tokens. Export it again.")
    state.install(encoder, getattr(pipe, "unet", None))
    for rival, one in state.loaded.items():
        if one.class_ids == concept.class_ids:
            state.active.pop(rival, None)
    name = adapter_name or concept.name
    state.loaded[name] = concept
    state.active[name] = 1.0
    return name


def _check_shape(concept: _LoadedConcept, encoder: Any, source: str) -> None:
    heads, num_layers = encoder.config.num_attention_heads, encoder.config.num_hidden_layers
    head_dim = encoder.config.hidden_size // heads
    top = max(concept.layers)
    if tuple(concept.key.shape[2:]) != (heads, head_dim) or top >= num_layers:
        raise CatVersionLoadError(
            f"{source}: made for a text encoder with {concept.key.shape[2]} heads of {concept.key.shape[3]} and "
            f"at least {top + 1} layers; this pipeline's has {heads} heads of {head_dim} and {num_layers} layers. "
            f"Load the model it was trained on: {concept.base_model or 'not stated in the file'}."
        )


def text_encoder_sha256(encoder: torch.nn.Module) -> str | None:
    """Fingerprint of the weights, the same for float32 and float16 copies; None when it cannot be known.

    sha256 over the sorted state dict without ``token_embedding`` and ``position_ids``: key (freed of the
    ``text_model.`` prefix), then the tensor as little-endian float16.
    """
    tensors = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    digest = hashlib.sha256()
    for key in sorted(tensors):
        if "token_embedding" in key or "position_ids" in key:
            continue
        tensor = tensors[key]
        if tensor.is_meta or tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            return None  # bfloat16 has dropped digits that float16 keeps
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().to(torch.float16).contiguous().numpy().astype("<f2").tobytes())
    return digest.hexdigest()


# ---- Which rows, and what happens to them ---------------------------------------------------------------------

# Rows of the batch that share the same concepts, with each concept's bias of equation (2).
_Group = tuple[list[tuple[_LoadedConcept, float]], list[int]]


def _state_of(pipe: Any) -> _State:
    state = getattr(pipe.text_encoder, "_catversion_state", None)
    if state is None:
        raise CatVersionLoadError("no concept is loaded in this pipeline. Use load_catversion first.")
    return state


class _State:
    """All that is loaded into one text encoder. Lives on the encoder, so pipelines that share it share this."""

    def __init__(self, tokenizer: Any):
        self.loaded: dict[str, _LoadedConcept] = {}
        self.active: dict[str, float] = {}
        self.enabled = True
        self.plain: set[tuple[int, ...]] = set()
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.groups: list[_Group] = []
        self.fingerprint: str | None = None
        self.original = ""
        self.handles: list[Any] = []
        self.negative_expected = False

    def require(self, name: str) -> None:
        if name not in self.loaded:
            listed = ", ".join(self.loaded) or "none"
            raise CatVersionLoadError(f"{name!r} is not loaded; loaded: {listed}. Use load_catversion first.")

    def check_fingerprint(self, concept: _LoadedConcept, encoder: torch.nn.Module, source: str) -> None:
        if not concept.text_encoder_sha256:
            return
        self.fingerprint = self.fingerprint or text_encoder_sha256(encoder)
        if self.fingerprint is None:
            warnings.warn(
                f"{source}: whether this text encoder is the one it was trained with cannot be checked in "
                f"{getattr(encoder, 'dtype', 'this dtype')}; load the pipeline in float16 or float32 to check.",
                stacklevel=4,
            )
        elif self.fingerprint != concept.text_encoder_sha256:
            raise CatVersionLoadError(
                f"{source}: trained with the text encoder {concept.text_encoder_sha256[:12]} of "
                f"{concept.base_model or 'an unnamed model'}; this pipeline's is {self.fingerprint[:12]}, and "
                "a concept means nothing to another one. Load that model, or pass force=True to try it."
            )

    def install(self, encoder: Any, unet: Any) -> None:
        """Hooks and the attention implementation; again after a change of the latter, else without effect."""
        current = encoder.config._attn_implementation
        if not current.startswith(_PREFIX):
            if current not in _IMPLEMENTATIONS:
                raise CatVersionLoadError(
                    f"attention implementation {current!r} of the text encoder: must be one of "
                    f"{', '.join(_IMPLEMENTATIONS)}. Use pipe.text_encoder.set_attn_implementation('sdpa')."
                )
            self.original = current
            encoder.set_attn_implementation(_register(current))
        if self.handles:
            return
        for layer, attention in enumerate(_attention_modules(encoder)):
            attention._catversion = (self, layer)
        encoder._catversion_state = self
        self.handles = [
            encoder.register_forward_pre_hook(self.before_encoding, with_kwargs=True),
            encoder.register_forward_hook(self.after_encoding, always_call=True),
        ]
        if isinstance(unet, torch.nn.Module):
            self.handles.append(unet.register_forward_pre_hook(self.before_denoising))

    def uninstall(self, encoder: Any) -> None:
        for handle in self.handles:
            handle.remove()
        if encoder.config._attn_implementation.startswith(_PREFIX):
            encoder.set_attn_implementation(self.original)
        for attention in _attention_modules(encoder):
            del attention._catversion
        del encoder._catversion_state

    def before_encoding(self, encoder: Any, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the text encoder: group the rows by the concepts their prompts call."""
        self.groups = []
        acting = {name: scale for name, scale in self.active.items() if scale > 0}
        if not self.enabled or not acting:
            return
        self.install(encoder, None)  # the user may have set another attention implementation since
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            warnings.warn("no input_ids: which prompts call a concept is unknown, all stay plain.", stacklevel=2)
            return
        prompts = [self._content(row) for row in ids.reshape(-1, ids.shape[-1]).tolist()]
        rows_by_names: dict[tuple[str, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            if names := tuple(name for name in acting if self._calls(prompt, self.loaded[name])):
                rows_by_names.setdefault(names, []).append(row)
        self.groups = [
            ([(self.loaded[n], self.loaded[n].logit_bias + math.log(acting[n])) for n in names], rows)
            for names, rows in rows_by_names.items()
        ]
        self._warn_uncalled(prompts, {row for _, rows in self.groups for row in rows})

    def after_encoding(self, encoder: Any, args: tuple, output: Any) -> None:
        """Forward hook of the text encoder: the marks belong to one call only."""
        self.groups = []

    def before_denoising(self, unet: Any, args: tuple) -> None:
        """Forward pre-hook of the UNet: this picture's prompts are encoded, the next ones are a new picture's."""
        self.negative_expected = False

    def _content(self, ids: list[int]) -> tuple[int, ...]:
        """A row's own tokens, between begin-of-text and the first end-of-text."""
        start = 1 if ids[:1] == [self.bos] else 0
        stop = ids.index(self.eos, start) if self.eos in ids[start:] else len(ids)
        return tuple(ids[start:stop])

    def _calls(self, prompt: tuple[int, ...], concept: _LoadedConcept) -> bool:
        if not prompt or prompt in self.plain:
            return False
        word = concept.class_ids
        starts = range(len(prompt) - len(word) + 1)
        return concept.when == "always" or any(prompt[i : i + len(word)] == word for i in starts)

    def _warn_uncalled(self, prompts: list[tuple[int, ...]], called: set[int]) -> None:
        """Warn about prompts that call nothing, once per picture.

        Pipelines encode the prompts first, then the negative ones, which call nothing on purpose: after a first
        encoding, one that calls nothing is taken for them until the UNet has run.
        """
        plain = [row for row, ids in enumerate(prompts) if ids and ids not in self.plain and row not in called]
        is_negative = self.negative_expected and not called
        self.negative_expected = not is_negative
        if plain and not is_negative:
            words = " or ".join(repr(word) for word in sorted({self.loaded[n].base_class for n in self.active}))
            warnings.warn(
                f"prompt {', '.join(map(str, plain))} of this batch calls no active concept and is drawn by the "
                f"plain model. Write {words} in it.",
                stacklevel=2,
            )

    def overwrite(
        self,
        layer: int,
        heads: list[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """``output`` ``[B T N H]`` with the marked rows replaced by equation (1); others are not touched.

        ``heads`` are query, key and value, ``[B N T H]``; ``mask`` ``[B or 1, 1, T, T]`` boolean or additive.
        """
        wide = torch.promote_types(output.dtype, torch.float32)
        for concepts, rows in self.groups:
            index = torch.tensor(rows, device=output.device)
            q, k, v = (x[index].to(wide) for x in heads)
            parts = [(pair, bias) for one, bias in concepts if (pair := one.at_layer(layer, q)) is not None]
            if not parts:
                continue
            logits = [torch.matmul(q, pair[0].mT) * scaling + bias for pair, bias in parts]  # [R N T P]
            logits.append(_masked(torch.matmul(q, k.mT) * scaling, mask, index))  # [R N T T]
            values = torch.cat([*(pair[1].expand(len(rows), -1, -1, -1) for pair, _ in parts), v], dim=-2)
            mixed = torch.matmul(torch.cat(logits, dim=-1).softmax(dim=-1), values)  # [R N T H]
            output = output.index_copy(0, index, mixed.transpose(1, 2).to(output.dtype))
        return output


def _masked(logits: torch.Tensor, mask: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
    """Logits ``[R N T T]`` with later tokens hidden; a given mask already says so."""
    if mask is None:  # CLIP hands SDPA no mask and is_causal=True
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()[None, None]
    if mask.shape[0] > 1:
        mask = mask[index]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask.to(logits.dtype)


def _attention_modules(encoder: Any) -> list[Any]:
    """Self-attention of every layer; transformers >= 5.6 has no ``.text_model`` level."""
    return [layer.self_attn for layer in getattr(encoder, "text_model", encoder).encoder.layers]


def _word_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _register(original: str) -> str:
    """Register our attention on top of ``original``, and ``original``'s masks under the same name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _PREFIX + original
    AttentionInterface.register(name, _make_attention(original, AttentionInterface()))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[original])
    return name


def _make_attention(original: str, registered: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def catversion_attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if original == "eager":  # not in the registry: every model file brings its own
            plain = sys.modules[type(module).__module__].eager_attention_forward
        else:
            plain = registered[original]
        output, weights = plain(module, query, key, value, attention_mask, **kwargs)
        state, layer = getattr(module, "_catversion", (None, 0))
        if state is None or not state.groups:
            return output, weights
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        # The plain weights would be wrong for the marked rows and have another number of columns.
        return state.overwrite(layer, [query, key, value], attention_mask, scaling, output), None

    return catversion_attention
