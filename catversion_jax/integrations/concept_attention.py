"""Concatenated attention inside transformers' CLIP text encoder, for the rows of a batch that ask
for it.

Equations (1) and (2) are in ``diffusers.py``. :class:`EncoderState` is all that is loaded into one
text encoder; its methods are public torch hooks, and the attention function is registered in
transformers' public interface.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from catversion_jax.integrations.loaded_concept import CatVersionLoadError, LoadedConcept

_IMPLEMENTATIONS = ("sdpa", "eager")
_ENCODE_PROMPT = {"negative_prompt", "prompt_embeds"}  # parameters that tell the pipelines' method
_PREFIX = "catversion_"  # our attention implementations are catversion_sdpa and catversion_eager


@dataclasses.dataclass
class _Acting:
    """One concept in some rows: its bias of equation (2), and which tokens ``[R T]`` do not see
    it; None where all do.
    """

    concept: LoadedConcept
    logit_bias: float
    hidden: torch.Tensor | None


# Rows of the batch that share the same concepts.
_Group = tuple[list[_Acting], list[int]]


class _HookHandles(list):
    """Handles for removing hooks. A deep copy of an encoder gets none: handles of a copy refer to
    nothing, so the copy's hooks stay after unloading there, without effect.
    """

    def __deepcopy__(self, memo: dict) -> _HookHandles:
        return _HookHandles()


class EncoderState:
    """All that is loaded into one text encoder. Lives on the encoder, so pipelines that share it
    share this.
    """

    def __init__(self, tokenizer: Any):
        self.loaded: dict[str, LoadedConcept] = {}
        self.active: dict[str, float] = {}
        self.enabled = True
        self.plain: set[tuple[int, ...]] = set()
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.inside_word = _ids_inside_words(tokenizer)
        self.groups: list[_Group] = []
        self.fingerprint: str | None = None
        self.original = ""
        self.installed = False
        self.handles = _HookHandles()

    def require(self, name: str) -> None:
        """Raise when ``name`` is not loaded."""
        if name not in self.loaded:
            listed = ", ".join(self.loaded) or "none"
            raise CatVersionLoadError(
                f"{name!r} is not loaded; loaded: {listed}. Use load_catversion first."
            )

    def install(self, encoder: Any) -> None:
        """Hooks and the attention implementation; again after a change of the latter, else without
        effect.
        """
        current = encoder.config._attn_implementation
        if not current.startswith(_PREFIX):
            if current not in _IMPLEMENTATIONS:
                raise CatVersionLoadError(
                    f"attention implementation {current!r} of the text encoder: must be one of "
                    f"{', '.join(_IMPLEMENTATIONS)}. Use "
                    "pipe.text_encoder.set_attn_implementation('sdpa')."
                )
            self.original = current
            encoder.set_attn_implementation(_register(current))
        if self.installed:
            return
        self.installed = True
        for layer, attention in enumerate(_attention_modules(encoder)):
            attention._catversion = (self, layer)
        encoder._catversion_state = self
        self.handles.append(
            encoder.register_forward_pre_hook(self.before_encoding, with_kwargs=True)
        )
        self.handles.append(encoder.register_forward_hook(self.after_encoding, always_call=True))

    def uninstall(self, encoder: Any) -> None:
        """Undo :meth:`install`."""
        for handle in self.handles:
            handle.remove()
        if encoder.config._attn_implementation.startswith(_PREFIX):
            encoder.set_attn_implementation(self.original)
        for attention in _attention_modules(encoder):
            del attention._catversion
        del encoder._catversion_state

    def before_encoding(self, encoder: Any, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the text encoder: group the rows by the concepts their prompts
        call.
        """
        self.groups = []
        acting = {name: scale for name, scale in self.active.items() if scale > 0}
        if not self.enabled or not acting or _encodes_negative_prompt():
            return
        self.install(encoder)  # the user may have set another attention implementation since
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            warnings.warn(
                "no input_ids: which prompts call a concept is unknown, all stay plain.",
                stacklevel=2,
            )
            return
        prompts = [self._content(row) for row in ids.reshape(-1, ids.shape[-1]).tolist()]
        rows_by_names: dict[tuple[str, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            if names := tuple(name for name in acting if self._calls(prompt, self.loaded[name])):
                rows_by_names.setdefault(names, []).append(row)
        offset, length = 1 if ids.reshape(-1)[0] == self.bos else 0, ids.shape[-1]
        self.groups = [
            (
                [
                    _Acting(
                        self.loaded[n],
                        self.loaded[n].logit_bias + math.log(acting[n]),
                        self._hidden(
                            [prompts[row] for row in rows], self.loaded[n], offset, length
                        ),
                    )
                    for n in names
                ],
                rows,
            )
            for names, rows in rows_by_names.items()
        ]
        self._warn_uncalled(prompts, {row for _, rows in self.groups for row in rows})

    def after_encoding(self, encoder: Any, args: tuple, output: Any) -> None:
        """Forward hook of the text encoder: the marks belong to one call only."""
        self.groups = []

    def _content(self, ids: list[int]) -> tuple[int, ...]:
        """A row's own tokens, between begin-of-text and the first end-of-text."""
        start = 1 if ids[:1] == [self.bos] else 0
        stop = ids.index(self.eos, start) if self.eos in ids[start:] else len(ids)
        return tuple(ids[start:stop])

    def _calls(self, prompt: tuple[int, ...], concept: LoadedConcept) -> bool:
        if not prompt or prompt in self.plain:
            return False
        return concept.when == "always" or bool(self._word_positions(prompt, concept))

    def _word_positions(self, prompt: tuple[int, ...], concept: LoadedConcept) -> list[int]:
        """Where the class word or one of its forms stands among a prompt's own tokens, every time.

        It is a word of its own: the token before it ends a word, so "cat" is not in "housecat".
        Where several forms begin at one token the longest counts.
        """
        words = sorted(filter(None, concept.class_ids), key=len, reverse=True)
        found: list[int] = []
        end = 0
        for position in range(len(prompt)):
            if position < end or (position and prompt[position - 1] in self.inside_word):
                continue
            for word in words:
                if prompt[position : position + len(word)] == word:
                    end = position + len(word)
                    found += range(position, end)
                    break
        return found

    def _hidden(
        self, prompts: list[tuple[int, ...]], concept: LoadedConcept, offset: int, length: int
    ) -> torch.Tensor | None:
        """Which tokens ``[R T]`` do not see the concept; None where all do.

        Args:
          prompts: the rows' own tokens, before which stand ``offset`` others.
          concept: a prompt without its word is seen whole.
          offset: 1 where rows begin with begin-of-text.
          length: T.
        """
        if concept.scope == "all":
            return None
        hidden = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, prompt in zip(hidden, prompts, strict=True):
            positions = [position + offset for position in self._word_positions(prompt, concept)]
            if positions and concept.scope == "class_word":
                row[:] = True
                row[positions] = False
            elif positions:
                row[: positions[0]] = True
        return hidden

    def _warn_uncalled(self, prompts: list[tuple[int, ...]], called: set[int]) -> None:
        """Warn about prompts that call nothing, the empty and the named plain ones aside."""
        plain = [
            row
            for row, ids in enumerate(prompts)
            if ids and ids not in self.plain and row not in called
        ]
        if plain:
            words = " or ".join(
                repr(word) for word in sorted({self.loaded[n].base_class for n in self.active})
            )
            warnings.warn(
                f"prompt {', '.join(map(str, plain))} of this batch calls no active concept and is "
                f"drawn by the plain model. Write {words} in it as a separate word (add spaces "
                "around it, or list the form in class_forms).",
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
        """``output`` ``[B T N H]`` with the marked rows replaced by equation (1); others are not
        touched.

        ``heads`` are query, key and value, ``[B N T H]``; ``mask`` ``[B or 1, 1, T, T]`` boolean or
        additive.
        """
        wide = torch.promote_types(output.dtype, torch.float32)
        for concepts, rows in self.groups:
            index = torch.tensor(rows, device=output.device)
            q, k, v = (x[index].to(wide) for x in heads)
            parts = [
                (pair, one)
                for one in concepts
                if (pair := one.concept.at_layer(layer, q)) is not None
            ]
            if not parts:
                continue
            # [R N T P]
            logits = [
                _hide(torch.matmul(q, pair[0].mT) * scaling + one.logit_bias, one.hidden)
                for pair, one in parts
            ]
            logits.append(_masked(torch.matmul(q, k.mT) * scaling, mask, index))  # [R N T T]
            values = torch.cat(
                [*(pair[1].expand(len(rows), -1, -1, -1) for pair, _ in parts), v], dim=-2
            )
            mixed = torch.matmul(torch.cat(logits, dim=-1).softmax(dim=-1), values)  # [R N T H]
            output = output.index_copy(0, index, mixed.transpose(1, 2).to(output.dtype))
        return output


def _ids_inside_words(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens after which a word goes on: CLIP's byte pairs end a word with ``</w>``,
    and special and added tokens are words by themselves.
    """
    whole = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    vocabulary = tokenizer.get_vocab().items()
    return frozenset(i for token, i in vocabulary if not token.endswith("</w>")) - whole


def _hide(logits: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """Logits ``[R N T P]`` of a concept without those of the tokens that do not see it."""
    if hidden is None:
        return logits
    hidden = hidden.to(logits.device)[:, None, :, None]
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)


def _encodes_negative_prompt() -> bool:
    """Whether a pipeline's public method ``encode_prompt`` is encoding its negative prompt now.

    The text encoder sees token ids only, and their order does not tell: a guided call encodes the
    prompt, then the negative prompt; an unguided one the prompt alone; one that was handed
    ``prompt_embeds`` the negative prompt alone; one that fails leaves the next in doubt. So the
    method is asked: ``encode_prompt`` encodes the prompt into its public parameter
    ``prompt_embeds`` where the caller left that None; once it is set, the negative prompt is all
    that is left to encode. Nothing is remembered from one call to the next.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if code.co_name == "encode_prompt" and _ENCODE_PROMPT.issubset(parameters):
            return frame.f_locals.get("prompt_embeds") is not None
        frame = frame.f_back
    return False


def _masked(logits: torch.Tensor, mask: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
    """Logits ``[R N T T]`` with later tokens hidden; a given mask already says so."""
    if mask is None:  # CLIP hands SDPA no mask and is_causal=True
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()[
            None, None
        ]
    if mask.shape[0] > 1:
        mask = mask[index]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask.to(logits.dtype)


def _attention_modules(encoder: Any) -> list[Any]:
    """Self-attention of every layer; transformers >= 5.6 has no ``.text_model`` level."""
    return [layer.self_attn for layer in getattr(encoder, "text_model", encoder).encoder.layers]


def _register(original: str) -> str:
    """Register our attention on top of ``original``, and ``original``'s masks under the same
    name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _PREFIX + original
    AttentionInterface.register(name, _make_attention(original, AttentionInterface()))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[original])
    return name


def _make_attention(
    original: str, registered: Any
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def catversion_attention(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
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
