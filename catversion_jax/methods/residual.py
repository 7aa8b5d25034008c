r"""CatVersion: key and value vectors concatenated in the text encoder's self-attention.

Concatenating one pair ``(k_c, v_c)`` to the keys ``K`` and values ``V`` of a frozen attention layer
adds a residual to that layer's own output, because the softmax is shared (CatVersion, arXiv
2311.14631):

    (1)  attn([k_c; K], [v_c; V]) = attn(K, V) + lambda * (v_c - attn(K, V))
    (2)  lambda = exp(l_c) / (exp(l_c) + sum_j exp(l_j)),   l_c = q . k_c / sqrt(H) + b

``b`` is the ``logit_bias``: 0 in the clean formula, 1 in the authors' released code, whose additive
causal mask is padded with ones. Multiplying the odds ``lambda / (1 - lambda)`` by ``s`` is the same
as ``b + log s``; that is how :meth:`KVResidual.scaled` strengthens or weakens a concept.
``tests/test_residual.py`` proves (1).

With ``context_states`` the same idea acts one floor further up. S learned states stand behind the
text encoder's output, and the UNet's cross-attention reads them as further keys and values:

    (3)  context = [c_1 .. c_T; c_T + f (s_1 - c_T) .. c_T + f (s_S - c_T)],    f = 1 as trained

``f`` is the scale: towards 0 every state becomes the prompt's own last one ``c_T`` (padding, as a
rule), which says nothing new, and at 0 itself the states are left out. So a weaker concept is an
ordinary context, which any UNet reads in any precision; a bias on the logits would need one that
takes it.

As published every query token sees the pair. With ``scope="from_class_word"`` only the class word
and what follows it do: tokens before it cannot know of it in a causal encoder, so what they say
stays the plain model's. With ``scope="class_word"`` the class word's own tokens alone do; the rest
of the prompt learns of the concept by attending to them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Bool, Float, Int
from catversion_jax.config import MethodOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.layer_choice import resolve_layers
from catversion_jax.methods.learned import LearnedPart
from catversion_jax.methods.start_values import StartingPoint, start_values
from catversion_jax.methods.stored_values import (
    check_shape,
    choice,
    finite_number,
    layer_numbers,
    whole_number,
)
from catversion_jax.models.clip.adaptation import HIDDEN, ExtraKeys

Scope = Literal["all", "from_class_word", "class_word"]
SCOPES: tuple[str, ...] = get_args(Scope)
STATES_STREAM = 1
"""Of a concept's key for start values; keys and values are drawn from its halves."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVResidual(LearnedPart):
    """Keys and values of one concept (or of many, stacked on leading axes).

    Attributes:
      key: ``[*C L P N H]`` float32, concatenated before the layer's own keys, after ``k_proj`` and
        the split into heads, not scaled, without position embedding.
      value: ``[*C L P N H]`` float32.
      layers: 0-based indices of the adapted encoder layers, ascending, one per entry of ``L``.
        Static.
      logit_bias: added to every concatenated logit (``b`` in equation 2). Static.
      scope: which query tokens see the pair: ``all``, those ``from_class_word`` on, or those of the
        ``class_word``. Static.
      states: ``[*C S D]`` float32, the states of equation (3) behind this encoder's output; None
        where there are none.
      fade: ``f`` of equation (3), for one use; no file holds it. Static.
    """

    kind: ClassVar[str] = "CatVersion concept"
    modelspec_adapter: ClassVar[str] = "catversion"
    modelspec_description: ClassVar[str] = (
        "CatVersion concept '{name}': keys and values for the text encoder's self-attention"
    )
    adds_keys: ClassVar[bool] = True
    pipeline_obstacle: ClassVar[str] = ""

    key: Float[Array, "*C L P N H"]
    value: Float[Array, "*C L P N H"]
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    logit_bias: float = dataclasses.field(default=0.0, metadata={"static": True})
    scope: Scope = dataclasses.field(default="all", metadata={"static": True})
    states: Float[Array, "*C S D"] | None = None
    fade: float = dataclasses.field(default=1.0, metadata={"static": True, "passing": True})

    @property
    def num_positions(self) -> int:
        """Concatenated positions per layer, ``P``."""
        return self.key.shape[-3]

    @property
    def first_layer(self) -> int:
        """The lowest encoder layer whose output depends on what is learned."""
        return self.layers[0]

    @property
    def shape_text(self) -> str:
        """What it was made for, in words."""
        layers, _, heads, head_dim = self.key.shape
        beside = "" if self.states is None else f" and {self.num_context_states} context states"
        layers_text = f"{layers} layers up to number {max(self.layers)}"
        return f"{heads} heads x {head_dim} on {layers_text}{beside}"

    @property
    def width(self) -> int:
        """Width D of the text encoder."""
        return self.key.shape[-2] * self.key.shape[-1]

    @property
    def reads_word_places(self) -> bool:
        """Whether the encoder must be told where the class word stands."""
        return self.scope != "all"

    @property
    def num_context_states(self) -> int:
        """States behind the encoder's output, ``S``."""
        return 0 if self.states is None else self.states.shape[-2]

    def at_layer(self, layer: int) -> tuple[Array, Array] | None:
        """Key and value ``[*C P N H]`` of encoder layer ``layer``, or None where it is not
        adapted.
        """
        skipped = isinstance(self.logit_bias, float) and self.logit_bias == -math.inf
        if layer not in self.layers or skipped:
            return None
        index = self.layers.index(layer)
        return self.key[..., index, :, :, :], self.value[..., index, :, :, :]

    def extra_keys(self, layer: int, word_places: Int[Array, "B T"] | None) -> ExtraKeys | None:
        """The left-hand side of equation (1) at ``layer``; None where it is not adapted."""
        pair = self.at_layer(layer)
        if pair is None:
            return None
        return ExtraKeys(*pair, self.logit_bias, self.visible(word_places))

    def context_states(self, output: Float[Array, "B T D"]) -> Float[Array, "B S D"] | None:
        """The states behind the encoder's output of equation (3), or None."""
        is_known = isinstance(self.fade, float)  # else an argument of the program, above 0
        if self.states is None or (is_known and self.fade == 0):
            return None
        states = self.states.astype(output.dtype)
        whole = jnp.broadcast_to(states, (output.shape[0], *states.shape))
        if is_known and self.fade == 1:
            return whole
        last = output[:, -1:].astype(jnp.float32)
        faded = (last + self.fade * (self.states - last)).astype(output.dtype)
        return jnp.where(self.fade == 1, whole, faded)

    def visible(self, word_places: Int[Array, "B T"] | None) -> Bool[Array, "B T"] | None:
        """Which query tokens see the pair; None where all do.

        Args:
          word_places: ``[B T]``, at least 0 on the tokens of the class word, ``HIDDEN`` on those
            that are not to see it. A prompt without the word (an empty one in training, or any
            with ``when=always``) is seen whole.
        """
        if word_places is None or not self.reads_word_places:
            return None
        is_word = word_places >= 0
        seeing = is_word if self.scope == "class_word" else jnp.cumsum(is_word, axis=-1) > 0
        seeing &= word_places != HIDDEN
        return seeing | ~jnp.any(is_word, axis=-1, keepdims=True)

    def within_words(self) -> Self:
        """The same concept, seen from its class word on where it is seen everywhere."""
        return dataclasses.replace(self, scope="from_class_word") if self.scope == "all" else self

    def scaled(self, scale: float) -> Self:
        """The same concept with its odds against the prompt's own tokens multiplied by ``scale``,
        and its states as far from the prompt's last one, equation (3).

        ``scale=1`` changes nothing; ``scale=0`` gives exactly the plain encoder (the residual is
        skipped).

        Raises:
          CatVersionError: ``scale`` is negative or not finite.
        """
        if not (math.isfinite(scale) and scale >= 0):
            raise CatVersionError(
                f"scale={scale}: must be a finite number >= 0 (0 = plain model, 1 = as trained)."
            )
        bias = self.logit_bias + math.log(scale) if scale > 0 else -math.inf
        fade = self.fade if self.states is None else self.fade * scale
        return dataclasses.replace(self, logit_bias=bias, fade=fade)

    @property
    def strength(self) -> tuple[float, float]:
        """``b`` and ``f`` of one use, which a program may take as arguments."""
        return self.logit_bias, self.fade

    def with_strength(self, strength: Sequence[float] | Array) -> Self:
        """The same with other ``b`` and ``f``, which may be traced; ``f`` is above 0 then."""
        bias: Any
        fade: Any
        bias, fade = strength
        return dataclasses.replace(self, logit_bias=bias, fade=fade)

    def check_fits(self, num_heads: int, head_dim: int, layers: range) -> None:
        """Check that one concept's residual fits an encoder of which ``layers`` run.

        Raises:
          CatVersionError: other heads, stacked concepts, or an adapted layer that does not run.
        """
        positions = self.key.shape[-3] if self.key.ndim >= 3 else "P"
        expected = (len(self.layers), positions, num_heads, head_dim)
        if self.key.shape != expected or self.value.shape != expected:
            raise CatVersionError(
                f"residual with key {list(self.key.shape)}, value {list(self.value.shape)} "
                f"and layers {self.layers}: this text encoder needs [layers, positions, heads, "
                f"head size] = {list(expected)}. Use a concept trained on this model; vmap over "
                "concepts outside."
            )
        width = num_heads * head_dim
        if self.states is not None and (self.states.ndim != 2 or self.states.shape[1] != width):
            raise CatVersionError(
                f"context states {list(self.states.shape)}: this text encoder needs [states, width]"
                f" = [S, {width}]. Use a concept trained on this model; vmap over concepts outside."
            )
        if not set(self.layers) <= set(layers):
            raise CatVersionError(
                f"residual on layers {self.layers}: only layers "
                f"{layers.start}..{layers.stop - 1} run here. Use a concept trained on this model."
            )

    def summary(self, name: str) -> dict[str, Any]:
        """Shapes, and per layer the mean length of its per-head vectors (sqrt(head dim) for the
        random start).
        """
        _, positions, heads, head_dim = self.key.shape
        norms = {
            part: [
                round(float(x), 4)
                for x in np.linalg.norm(np.asarray(leaf), axis=-1).mean(axis=(1, 2))
            ]
            for part, leaf in (("key", self.key), ("value", self.value))
        }
        summary = {
            "layers": list(self.layers),
            "num_positions": positions,
            "num_heads": heads,
            "head_dim": head_dim,
            "logit_bias": self.logit_bias,
            "scope": self.scope,
            "num_parameters": 2 * self.key.size,
            "key_norms": norms["key"],
            "value_norms": norms["value"],
        }
        if self.states is None:
            return summary
        lengths = np.linalg.norm(np.asarray(self.states), axis=-1)
        return {
            **summary,
            "num_parameters": 2 * self.key.size + self.states.size,
            "context_states": len(lengths),
            "state_norms": [round(float(x), 4) for x in lengths],
        }

    @classmethod
    def start(cls, options: MethodOptions, at: StartingPoint) -> Self:
        """Start values ``[L P N H]`` of one concept, as ``init`` says."""
        layers = resolve_layers(options.layers, at.num_layers, at.num_reaching_layers)
        own_key, own_value = at.keys_values(layers)
        rng_key, rng_value = jax.random.split(at.rng)
        return cls(
            key=start_values(options, own_key, rng_key),
            value=start_values(options, own_value, rng_value),
            layers=layers,
            logit_bias=options.logit_bias,
            scope=options.scope,
            states=None
            if at.own_states is None
            else start_values(
                dataclasses.replace(options, num_positions=options.context_states),
                at.own_states,
                jax.random.fold_in(at.rng, STATES_STREAM),
            ),
        )

    @classmethod
    def frozen_fields(cls, options: MethodOptions) -> tuple[str, ...]:
        """The half of each pair that ``adapt`` leaves out."""
        return {"key_value": (), "key": ("value",), "value": ("key",)}[options.adapt]

    @property
    def format_version(self) -> int:
        """1 as far as that version could say it, with ``scope="all"``; 4 with context states."""
        if self.states is not None:
            return 4
        return 1 if self.scope == "all" else 2

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """``layers.{i}.key`` and ``layers.{i}.value``, ``[P N H]``, for each adapted layer ``i``,
        and ``states``, ``[S D]``, where there are some.

        Heads stay a separate axis on purpose: a tensor whose last axis were the model width would
        be taken for a word embedding by programs that use the first tensor they find. ``states``
        comes after them.

        Raises:
          CatVersionError: this is not one concept, key and value differ in shape, or a scale other
            than 1 acts on its states.
        """
        key, value = (np.asarray(x, dtype=np.float32) for x in (self.key, self.value))
        if key.ndim != 4 or key.shape != value.shape or len(self.layers) != key.shape[0]:
            raise CatVersionError(
                f"key {key.shape} and value {value.shape} for {len(self.layers)} layers; a file "
                "holds one concept, both must be [layers, positions, heads, head dim]. Take one "
                "entry of a stacked residual."
            )
        tensors = {}
        for index, layer in enumerate(self.layers):
            tensors[f"layers.{layer}.key"] = key[index]
            tensors[f"layers.{layer}.value"] = value[index]
        if self.states is None:
            return tensors
        if self.states.ndim != 2 or self.fade != 1:
            raise CatVersionError(
                f"context states {self.states.shape} at scale {self.fade:g}; a file holds those of "
                "one concept as trained, [states, width] at scale 1. Save what scaled() was asked "
                "of, and give the scale where it is drawn."
            )
        return {**tensors, "states": np.asarray(self.states, dtype=np.float32)}

    def facts(self, name: str) -> dict[str, str]:
        """Layers, shape, logit bias, and the scope where it is not ``all``."""
        _, num_positions, num_heads, head_dim = self.key.shape
        facts = {
            "layers": json.dumps(self.layers, separators=(",", ":")),
            "num_positions": str(num_positions),
            "num_heads": str(num_heads),
            "head_dim": str(head_dim),
            "logit_bias": repr(float(self.logit_bias)),
        }
        if self.scope != "all":
            facts["scope"] = self.scope
        if self.states is not None:
            facts["context_states"] = str(self.states.shape[0])
        return facts

    @classmethod
    def tensor_names(cls, facts: Mapping[str, str]) -> list[str]:
        """Those of :meth:`tensors` for the layers and states that the metadata list."""
        names = [
            f"layers.{i}.{part}"
            for i in layer_numbers(facts, "layers")
            for part in ("key", "value")
        ]
        return [*names, "states"] if "context_states" in facts else names

    @classmethod
    def from_file(cls, facts: Mapping[str, str], tensors: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`tensors` and :meth:`facts`; numpy leaves.

        Raises:
          KeyError, ValueError: the file is damaged.
        """
        layers = layer_numbers(facts, "layers")
        num_positions, num_heads, head_dim = (
            whole_number(facts, key) for key in ("num_positions", "num_heads", "head_dim")
        )
        for name in sorted(set(tensors) - {"states"}):
            check_shape(name, tensors[name], (num_positions, num_heads, head_dim))
        if "context_states" in facts:
            number = whole_number(facts, "context_states")
            check_shape("states", tensors["states"], (number, num_heads * head_dim))
        scope = choice(facts, "scope", SCOPES, "all")
        arrays: dict[str, Any] = {  # [L P N H]
            part: np.stack([tensors[f"layers.{i}.{part}"] for i in layers])
            for part in ("key", "value")
        }
        return cls(
            **arrays,
            layers=layers,
            logit_bias=finite_number(facts, "logit_bias"),
            scope=cast(Scope, scope),
            states=tensors.get("states"),
        )
