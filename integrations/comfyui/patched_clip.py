r"""Concepts on a cloned CLIP, through ComfyUI's own patching.

A clone gets three kinds of object patches, which ComfyUI sets when the clone is used and takes back
when another is:

- ``clip_l.forward`` reads the token ids of a call and marks the rows that call a concept;
- ``clip_l...layers.9.self_attn.forward`` of each adapted layer hands its attention function on
  wrapped: it runs unchanged, then marked rows are overwritten with the keys and values of every
  concept beside the layer's own, in ONE softmax;
- ``encode_token_weights`` of the whole, where a concept has states behind the encoder's output.

Rows that call nothing, and all of a CLIP without these nodes, stay bit for bit what they are. A
prompt of more than 75 tokens is several rows to ComfyUI, and each is looked at by itself.
"""

from __future__ import annotations

import contextvars
import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .loader.loaded_concept import CatVersionLoadError, LoadedConcept
from .loader.shared_softmax import overwritten
from .loader.weights_sha256 import BFLOAT16, same_numbers, weights_sha256
from .loader.word_places import content, ids_inside_words, seeing_positions, word_positions

KEY = "catversion"  # of the patcher's attachments
# The text encoders of a concept, as ComfyUI calls them; the only one of SD 1.x or of SD 2.x.
_PAIR = ("clip_l", "clip_g")
_SINGLE = (("clip_l",), ("clip_h",))
_LAYERS_USED = {"clip_h": 23}  # single files of SD 2.x hold a further layer, which feeds nothing
_PROJECTED = "clip_g"  # has a text projection in its fingerprint
_FINGERPRINTS: weakref.WeakKeyDictionary[Any, dict[str, str | None]]
_FINGERPRINTS = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Acting:
    """One concept on a CLIP: its part for each text encoder, its scale, and whether concepts of one
    prompt are kept apart.
    """

    parts: Mapping[str, LoadedConcept]
    scale: float
    keep_apart: bool


def with_concept(
    clip: Any,
    parts: Sequence[LoadedConcept],
    scale: float,
    source: str,
    *,
    force: bool = False,
    keep_apart: bool = False,
) -> Any:
    """A clone of a CLIP on which a concept acts beside those that act already.

    Args:
      clip: ComfyUI's.
      parts: what the concept file holds for each text encoder.
      scale: 0 = plain, 1 = as trained.
      source: names the file in messages.
      force: take it although it was trained with another text encoder of the same shape.
      keep_apart: where a prompt calls several concepts, let each of them be seen from its own word
        up to the next concept's word only.

    Raises:
      CatVersionLoadError: the concept does not fit this CLIP.
    """
    encoders = _encoders_for(clip, parts, source)
    named = {}
    for name, part in zip(encoders, parts, strict=True):
        _check_shape(getattr(clip.cond_stage_model, name), name, part, source)
        if not force:
            _check_weights(clip.patcher, name, part, source)
        tokenizer = getattr(clip.tokenizer, name).tokenizer
        words = (part.base_class, *part.class_forms)
        class_ids = tuple(tuple(tokenizer(word).input_ids[1:-1]) for word in words)
        if not class_ids[0]:
            raise CatVersionLoadError(
                f"{source}: base class {part.base_class!r} has no tokens. Export it again."
            )
        named[name] = dataclasses.replace(part, class_ids=class_ids)
    if scale <= 0:
        return clip
    clone = clip.clone()
    acting = (*(clone.patcher.get_attachment(KEY) or ()), Acting(named, scale, keep_apart))
    clone.patcher.set_attachments(KEY, acting)
    for name in encoders:
        _patch_encoder(clone, name, acting)
    return clone


def _patch_encoder(clone: Any, name: str, acting: Sequence[Acting]) -> None:
    patcher, encoder = clone.patcher, getattr(clone.cond_stage_model, name)
    inside_word = ids_inside_words(getattr(clone.tokenizer, name).tokenizer)
    own = [(one.parts[name], one.scale) for one in acting]
    rows = Rows(encoder, own, inside_word, any(one.keep_apart for one in acting))
    _patch(patcher, f"{name}.forward", lambda plain: EncoderForward(plain, rows))
    for layer in sorted({layer for part, _ in own for layer in part.layers}):
        path = f"{name}.transformer.text_model.encoder.layers.{layer}.self_attn.forward"
        _patch(patcher, path, lambda plain, layer=layer: AttentionForward(plain, layer))
    first = next(iter(acting[0].parts))
    if name == first and any(part.states is not None for part, _ in own):
        which = name.removeprefix("clip_")  # as tokenize_with_weights calls it
        patch = lambda plain: EncodeWithStates(plain, which, rows)  # noqa: E731
        _patch(patcher, "encode_token_weights", patch)


def _patch(patcher: Any, path: str, wrapped: Callable[[Any], Any]) -> None:
    """Wrap what stands at a path, in place of an earlier patch of ours."""
    plain = patcher.get_model_object(path)
    patcher.add_object_patch(path, wrapped(getattr(plain, "catversion_plain", plain)))


@dataclasses.dataclass(frozen=True, eq=False)
class Marks:
    """What one call of a text encoder tells its layers: the concepts, and ``[C B T]`` float32 the
    bias of each where a token sees it, -inf where it does not.
    """

    concepts: Sequence[LoadedConcept]
    bias: torch.Tensor


# Of the text encoder that this thread is calling.
_MARKS: contextvars.ContextVar[Marks | None]
_MARKS = contextvars.ContextVar("catversion_marks", default=None)


class Rows:
    """Reads the rows of a call of one text encoder."""

    def __init__(
        self,
        encoder: Any,
        concepts: Sequence[tuple[LoadedConcept, float]],
        inside_word: frozenset[int],
        keep_apart: bool,
    ):
        self.concepts, self.inside_word, self.keep_apart = concepts, inside_word, keep_apart
        self.width = encoder.transformer.get_input_embeddings().weight.shape[-1]
        self.bos, self.eos = encoder.special_tokens["start"], encoder.special_tokens["end"]

    def marks(self, tokens: Sequence[Sequence[Any]]) -> Marks | None:
        """Which rows call which concepts; None where none does."""
        rows = [self._flat(row) for row in tokens]
        length = max(map(len, rows), default=0)
        biases = torch.full((len(self.concepts), len(rows), length), -torch.inf)
        for i, row in enumerate(rows):
            prompt, start = content(row, self.bos, self.eos), int(row[:1] == [self.bos])
            if not prompt:
                continue
            words = [
                [start + p for p in word_positions(prompt, one.class_ids, self.inside_word)]
                for one, _ in self.concepts
            ]
            every = {p for own in words for p in own} if self.keep_apart else set()
            for (concept, scale), own, bias in zip(self.concepts, words, biases, strict=True):
                if own or concept.when == "always":
                    seeing = seeing_positions(concept.scope, own, every - set(own), length)
                    bias[i, list(seeing)] = concept.logit_bias + math.log(scale)
        called = (biases > -torch.inf).flatten(1).any(dim=1).tolist()
        if not any(called):
            return None
        acting = [
            one for (one, _), is_called in zip(self.concepts, called, strict=True) if is_called
        ]
        return Marks(acting, biases[called])

    def states(self, tokens: Sequence[Sequence[Any]]) -> list[tuple[LoadedConcept, float]]:
        """The concepts with states of their own that a prompt calls, and their scales."""
        marks = self.marks(tokens)
        called = set(map(id, marks.concepts)) if marks else set()
        return [x for x in self.concepts if id(x[0]) in called and x[0].states is not None]

    def _flat(self, row: Sequence[Any]) -> list[int | None]:
        """Token ids; None for each learned embedding, which stands in the row as a tensor.

        ComfyUI leaves an embedding of another width out and fills up behind the end.
        """
        flat: list[int | None] = []
        for entry in row:
            if isinstance(entry, dict):
                entry = entry.get("data")
            if not isinstance(entry, torch.Tensor):
                flat += [] if entry is None else [int(entry)]
            elif entry.shape[-1] == self.width:
                flat += [None] * (entry.numel() // self.width)
        return flat + [None] * (len(row) - len(flat))


class EncoderForward:
    """``SDClipModel.forward`` that tells its layers which rows call a concept."""

    def __init__(self, plain: Callable[..., Any], rows: Rows):
        self.catversion_plain, self.rows = plain, rows

    def __call__(self, tokens: Sequence[Sequence[Any]], *args: Any, **kwargs: Any) -> Any:
        """What it returns otherwise."""
        if _MARKS.get() is not None:  # one that stands around this one has its concepts too
            return self.catversion_plain(tokens, *args, **kwargs)
        token = _MARKS.set(self.rows.marks(tokens))
        try:
            return self.catversion_plain(tokens, *args, **kwargs)
        finally:
            _MARKS.reset(token)


class AttentionForward:
    """``CLIPAttention.forward`` whose attention function knows the concepts of a call."""

    def __init__(self, plain: Callable[..., Any], layer: int):
        self.catversion_plain, self.layer = plain, layer

    def __call__(
        self, x: torch.Tensor, mask: Any = None, optimized_attention: Any = None, **kwargs: Any
    ) -> Any:
        """What it returns otherwise."""
        marks = _MARKS.get()
        # One that stands around another of ours has its concepts too: one softmax for all.
        if marks is not None and not isinstance(optimized_attention, ConceptAttention):
            optimized_attention = ConceptAttention(optimized_attention, marks, self.layer)
        return self.catversion_plain(x, mask, optimized_attention, **kwargs)


class ConceptAttention:
    """An attention function of ComfyUI, whose marked rows are then overwritten."""

    def __init__(self, plain: Callable[..., torch.Tensor], marks: Marks, layer: int):
        self.plain, self.marks, self.layer = plain, marks, layer

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """``[B T D]`` of the same shapes."""
        output = self.plain(q, k, v, heads, mask, **kwargs)
        split = [x.unflatten(-1, (heads, -1)) for x in (q, k, v, output)]  # [B T N H]
        by_head = [x.transpose(1, 2) for x in split[:3]]  # [B N T H]
        scaling = split[0].shape[-1] ** -0.5
        bias = self.marks.bias.to(output.device)
        return overwritten(
            self.marks.concepts, bias, self.layer, by_head, mask, scaling, split[3]
        ).flatten(2)


class EncodeWithStates:
    """``encode_token_weights`` of all text encoders, with the concepts' states behind its output.

    The UNet reads them beside the prompt's tokens. ComfyUI draws prompts of several lengths one by
    one, so that shorter ones need no filling.
    """

    def __init__(self, plain: Callable[..., Any], which: str, rows: Rows):
        self.catversion_plain, self.which, self.rows = plain, which, rows

    def __call__(self, token_weight_pairs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What it returns otherwise, with ``[1 T D]`` longer by the states."""
        encoded, *rest = self.catversion_plain(token_weight_pairs, *args, **kwargs)
        tokens = [[entry[0] for entry in row] for row in token_weight_pairs[self.which]]
        added = [
            concept.states_at(scale, encoded[0, -1]) for concept, scale in self.rows.states(tokens)
        ]
        return torch.cat([encoded, *(one[None] for one in added)], dim=1), *rest


def _encoders_for(clip: Any, parts: Sequence[LoadedConcept], source: str) -> tuple[str, ...]:
    """The names of the text encoders that the parts of a concept act on.

    Raises:
      CatVersionLoadError: this CLIP has others.
    """
    model = clip.cond_stage_model
    found = tuple(
        name for name, child in model.named_children() if hasattr(child, "special_tokens")
    )
    fitting = (_PAIR,) if len(parts) > 1 else _SINGLE
    for names in fitting:
        if set(found) == set(names):
            return names
    known = "Stable Diffusion XL" if len(parts) > 1 else "Stable Diffusion 1.x or 2.x"
    raise CatVersionLoadError(
        f"{source}: was trained for the {len(parts)} text encoder(s) of {known}, and this CLIP "
        f"({type(model).__name__}) has {', '.join(found) or 'none of CLIP'}. Connect the CLIP of "
        f"the checkpoint it was trained on: {parts[0].base_model or 'not stated in the file'}."
    )


def _check_shape(encoder: Any, name: str, part: LoadedConcept, source: str) -> None:
    layers = encoder.transformer.text_model.encoder.layers
    count = min(len(layers), _LAYERS_USED.get(name, len(layers)))
    heads = layers[0].self_attn.heads
    width = encoder.transformer.get_input_embeddings().weight.shape[-1]
    top = max(part.layers)
    if tuple(part.key.shape[2:]) != (heads, width // heads) or top >= count:
        raise CatVersionLoadError(
            f"{source}: made for a text encoder with {part.key.shape[2]} heads of "
            f"{part.key.shape[3]} and at least {top + 1} layers; {name} of this CLIP has {heads} "
            f"heads of {width // heads} and {count} layers. Connect the CLIP of the checkpoint it "
            f"was trained on: {part.base_model or 'not stated in the file'}."
        )


def _check_weights(patcher: Any, name: str, part: LoadedConcept, source: str) -> None:
    """Refuse a text encoder that is not the one the concept was trained with."""
    trained = part.text_encoder_sha256
    known = _FINGERPRINTS.setdefault(patcher.model, {})
    if trained and name not in known:
        known[name] = weights_sha256(_original_weights(patcher, name))
    found = known.get(name)
    if not trained or same_numbers(found, trained):
        return
    if found is None or BFLOAT16 in trained + found:
        return  # fewer digits than a fingerprint needs: it cannot be said
    raise CatVersionLoadError(
        f"{source}: trained with the text encoder {trained[:12]} of "
        f"{part.base_model or 'an unnamed model'}; {name} of this CLIP is {found[:12]}, another "
        "one or a fine-tune of it, in which the concept may look different or mean nothing. "
        "Connect the CLIP of the checkpoint it was trained on, or set force to true to try it."
    )


def _original_weights(patcher: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a text encoder by the names of its fingerprint, without a LoRA's patches."""
    weights = {}
    prefix = f"{name}.transformer."
    for key, tensor in patcher.model.state_dict().items():
        own = key.removeprefix(f"{prefix}text_model.")
        if own == key:
            own = key.removeprefix(prefix)
            if own != "text_projection.weight" or name != _PROJECTED:
                continue
        layer = own.split(".")[2] if own.startswith("encoder.layers.") else "-1"
        if int(layer) >= _LAYERS_USED.get(name, math.inf) or "token_embedding" in own:
            continue
        if key in patcher.backup:
            tensor = patcher.backup[key].weight
        elif key in patcher.hook_backup:
            tensor = patcher.hook_backup[key][0]
        weights[own] = tensor
    return weights
