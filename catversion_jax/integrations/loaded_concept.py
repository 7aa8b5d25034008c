"""A concept file as the PyTorch loader holds it: what it says, checked before it is used.

``docs/reference/concept_file.md`` has the format. A file is refused whole where one tensor or one
value of its metadata is out of its rule, and the message names that.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

CONCEPT_FILE_NAME = "catversion.safetensors"
FORMAT_VERSION = 4
# The text encoders of a concept for Stable Diffusion XL, in version 3 and later.
PAIR = ("text_encoder", "text_encoder_2")


class CatVersionLoadError(ValueError):
    """A concept that cannot be used with this pipeline. The message says the value, the rule and
    the remedy.
    """


# All tokens, the class word and what follows it, or the class word alone.
SCOPES = ("all", "from_class_word", "class_word")
_MOST_FORMS = 100


@dataclasses.dataclass
class LoadedConcept:
    """What a concept file holds for one text encoder; ``key`` and ``value`` are ``[L P N H]``
    float32 on the CPU.
    """

    layers: tuple[int, ...]
    key: torch.Tensor
    value: torch.Tensor
    logit_bias: float
    scope: str  # which tokens see it, one of SCOPES
    name: str
    base_class: str
    when: str
    base_model: str
    text_encoder_sha256: str
    component: str = ""  # one of PAIR, or '' for the only text encoder
    class_forms: tuple[str, ...] = ()  # further words that call it, such as a plural
    class_ids: tuple[tuple[int, ...], ...] = ()  # token ids of the base class and of the forms
    states: torch.Tensor | None = None  # [S D] behind all encoders' outputs, since version 4
    file: bytes = b""  # that it was read from; nothing where its tensors were given
    forced: bool = False  # it was loaded whatever text encoder it was trained with

    def at_layer(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value ``[N P H]`` of an adapted layer on the device and in the dtype of
        ``like``.
        """
        if self.key.device != like.device:  # the encoder may have moved since loading
            self.key, self.value = self.key.to(like.device), self.value.to(like.device)
        index = self.layers.index(layer)
        key, value = (x[index].transpose(0, 1).to(like) for x in (self.key, self.value))
        return key, value

    def states_at(self, scale: float, last: torch.Tensor) -> torch.Tensor:
        """The states ``[S D]`` at a scale, beside the prompt's last one ``[D]``; beside one of the
        last text encoder alone, those of that one.
        """
        assert self.states is not None
        own = last.float()
        states = self.states[:, -len(last) :].to(own.device)
        return (own + scale * (states - own)).to(last.dtype)


def parse_concept(data: bytes, source: str) -> tuple[LoadedConcept, ...]:
    """What the bytes of a concept file hold for each text encoder; ``source`` names it in messages.

    Raises:
      CatVersionLoadError: not a concept file, damaged, or of a newer version.
    """
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_repetition)
        metadata = header.get("__metadata__") or {}
        digest = "0x" + hashlib.sha256(data[8 + length :]).hexdigest()
        if "catversion.format_version" in metadata and metadata["modelspec.hash_sha256"] != digest:
            raise ValueError("its tensors do not have the checksum it states")
    except Exception as error:  # SafetensorError, or anything json and torch raise on garbage
        raise CatVersionLoadError(
            f"{source}: not a complete safetensors file ({error}). Give a {CONCEPT_FILE_NAME}; "
            "copy it again."
        ) from error
    parts = concept_of(tensors, metadata, source)
    for part in parts:
        part.file = data
    return parts


def concept_of(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: str
) -> tuple[LoadedConcept, ...]:
    """What a file's tensors and metadata hold for each text encoder; ``source`` names it in
    messages.

    Raises:
      CatVersionLoadError: not those of a concept file, damaged, or of a newer version.
    """
    own = {
        k.removeprefix("catversion."): v for k, v in metadata.items() if k.startswith("catversion.")
    }
    version = own.get("format_version")
    if version is None:
        raise CatVersionLoadError(
            f"{source}: no catversion metadata (it holds {', '.join(list(tensors)[:3])}): not a "
            "concept file. LoRAs load with load_lora_weights, embeddings with "
            "load_textual_inversion."
        )
    if version not in map(str, range(1, FORMAT_VERSION + 1)):
        raise CatVersionLoadError(
            f"{source}: format version {version:.20}, this code reads up to {FORMAT_VERSION}. "
            "Update catversion-jax."
        )
    if own.get("method", "catversion") != "catversion":
        raise CatVersionLoadError(
            f"{source}: a concept of method {own['method']}, not keys and values. "
            + _how_to_load(own, source)
        )
    try:
        return _checked_parts(own, tensors)
    except (KeyError, ValueError) as error:
        raise CatVersionLoadError(
            f"{source}: damaged concept file ({error!r}). Export it again."
        ) from error


def _how_to_load(own: Mapping[str, str], source: str) -> str:
    """What to do with a Textual Inversion file."""
    if token := own.get("placeholder_token"):
        return f"Use pipe.load_textual_inversion({source!r}) and write {token} in the prompt."
    return (
        "Hand its tensors clip_l and clip_g to pipe.load_textual_inversion, each with token=, "
        "text_encoder= and tokenizer= (clip_g with those of text_encoder_2), and write "
        f"{own.get('text_encoder.placeholder_token')} in the prompt."
    )


def _checked_parts(
    own: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> tuple[LoadedConcept, ...]:
    """The parts that a file's ``catversion.`` metadata and its tensors describe.

    Raises:
      KeyError, ValueError: one of them is missing or out of its rule; the message names it.
    """
    second = any(key.startswith(_prefix(PAIR[1])) for key in own)
    version = int(own["format_version"])
    components = PAIR if version == 3 or (version > 3 and second) else ("",)
    layers = [_checked_layers(own, f"{_prefix(component)}layers") for component in components]
    names = [
        f"{_prefix(component)}layers.{i}.{half}"
        for component, own_layers in zip(components, layers, strict=True)
        for i in own_layers
        for half in ("key", "value")
    ]
    names += [
        f"{_prefix(component)}states"
        for component in components
        if f"{_prefix(component)}context_states" in own
    ]
    if unknown := set(tensors).difference(names):
        listed = " and ".join(map(str, layers))
        raise ValueError(f"tensor {min(unknown)} belongs to no layer of {listed}")
    texts = _checked_texts(own)
    parts = tuple(
        _checked_part(own, tensors, component, own_layers, texts)
        for component, own_layers in zip(components, layers, strict=True)
    )
    states = [part.states for part in parts if part.states is not None]
    if len({len(one) for one in states}) > 1 or len(states) not in (0, len(parts)):
        raise ValueError(f"{len(states)} of {len(parts)} parts have states, of equal number")
    for part in parts:  # side by side, as the UNet reads them
        part.states = torch.cat(states, dim=-1) if states else None
    return parts


def _checked_part(
    own: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    component: str,
    layers: Sequence[int],
    texts: Mapping[str, Any],
) -> LoadedConcept:
    """What the file holds for one text encoder."""
    prefix = _prefix(component)
    shape = tuple(
        _value(own, f"{prefix}{key}", int) for key in ("num_positions", "num_heads", "head_dim")
    )
    halves = []
    for half in ("key", "value"):
        names = [f"{prefix}layers.{i}.{half}" for i in layers]
        for name in names:
            _check_tensor(name, tensors[name], shape)
        halves.append(torch.stack([tensors[name] for name in names]))
    key, value = halves
    states = None
    if f"{prefix}context_states" in own:
        states = tensors[f"{prefix}states"]
        number = _value(own, f"{prefix}context_states", int)
        _check_tensor(f"{prefix}states", states, (number, shape[1] * shape[2]))
    logit_bias = _value(own, f"{prefix}logit_bias", float)
    scope = own.get(f"{prefix}scope", "all")
    if not math.isfinite(logit_bias):
        raise ValueError(f"{prefix}logit_bias={logit_bias}, must be finite")
    if scope not in SCOPES:
        raise ValueError(f"{prefix}scope={scope!r:.80}")
    sha256 = own[f"{component or PAIR[0]}_sha256"]
    return LoadedConcept(
        tuple(layers),
        key,
        value,
        logit_bias,
        scope,
        text_encoder_sha256=sha256,
        component=component,
        states=states,
        **texts,
    )


def _prefix(component: str) -> str:
    """What the names of a part begin with."""
    return component and f"{component}."


def _checked_layers(own: Mapping[str, str], key: str) -> list[int]:
    layers: Any = _value(own, key, json.loads)
    numbers = isinstance(layers, list) and all(type(i) is int and i >= 0 for i in layers)
    if not numbers or not layers or sorted(set(layers)) != layers:
        raise ValueError(f"{key}={own[key]:.80}, must be ascending numbers, each once")
    return layers


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.is_sparse:
        raise ValueError(f"{name} is no tensor that holds its numbers")
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or 0 in shape:
        raise ValueError(
            f"tensor {name}: {tensor.dtype} of shape {tuple(tensor.shape)}, must be torch.float32 "
            f"of shape {shape}"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"tensor {name} holds NaN or infinite numbers")


def _checked_texts(own: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of the concept as a whole."""
    texts: dict[str, Any] = {
        text: own[text] for text in ("name", "base_class", "when", "base_model")
    }
    class_forms = _value({"class_forms": "[]", **own}, "class_forms", json.loads)
    listed = (
        isinstance(class_forms, list)
        and len(class_forms) <= _MOST_FORMS
        and all(isinstance(form, str) and form.strip() for form in class_forms)
    )
    for valid, text in (
        (texts["when"] in {"class_word", "always"}, f"when={texts['when']!r:.80}"),
        (texts["base_class"].strip(), "base_class is empty"),
        (texts["name"].strip(), "name is empty"),
        (
            listed,
            f"class_forms={own.get('class_forms', '')!r:.80}, must be a list of at most "
            f"{_MOST_FORMS} texts",
        ),
    ):
        if not valid:
            raise ValueError(text)
    return {**texts, "class_forms": tuple(class_forms)}


def _value(own: Mapping[str, str], key: str, convert: Callable[[str], Any]) -> Any:
    """A value of the metadata, which are strings."""
    try:
        return convert(own[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}={own[key]!r:.80} cannot be read") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name appears twice; parsers would keep the last."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice:.80} appears twice")
    return unique
