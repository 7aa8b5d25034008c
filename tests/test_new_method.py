"""A method nobody has written yet: one class and one row of the table are all it needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import write_toy_concepts

from catversion_jax.array_types import Array, Float
from catversion_jax.cli import main
from catversion_jax.config import MethodOptions, make_config, option_table
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import load_concept
from catversion_jax.methods.layer_choice import resolve_layers
from catversion_jax.methods.learned import LearnedPart
from catversion_jax.methods.start_values import StartingPoint
from catversion_jax.methods.table import METHODS
from catversion_jax.models.clip.adaptation import Heads
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.sampling.encoding import encode_prompt
from catversion_jax.sampling.requests import ConceptUse
from catversion_jax.training.start import train


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueShift(LearnedPart):
    """A vector added to the values of every token at the adapted layers, ``[*C L N H]``."""

    kind: ClassVar[str] = "value shift"
    modelspec_adapter: ClassVar[str] = "value-shift"
    modelspec_description: ClassVar[str] = "Value shift '{name}'"

    shift: Float[Array, "*C L N H"]
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def first_layer(self) -> int:
        return self.layers[0]

    @property
    def width(self) -> int:
        return self.shift.shape[-2] * self.shift.shape[-1]

    def process_heads(self, layer: int, query: Array, key: Array, value: Array) -> Heads:
        if layer in self.layers:
            value = value + self.shift[self.layers.index(layer)].astype(value.dtype)
        return query, key, value

    def check_fits(self, num_heads: int, head_dim: int, layers: range) -> None:
        expected = (len(self.layers), num_heads, head_dim)
        if self.shift.shape != expected or not set(self.layers) <= set(layers):
            raise CatVersionError(f"shift {self.shift.shape}: this encoder needs {expected}.")

    @classmethod
    def start(cls, options: MethodOptions, at: StartingPoint) -> Self:
        layers = resolve_layers(options.layers, at.num_layers)
        _, value = at.keys_values(layers)  # [L P N H], for the shape
        return cls(jnp.zeros_like(value[:, 0], jnp.float32), layers)

    @classmethod
    def option_problems(cls, options: MethodOptions) -> list[str]:
        return [] if options.scope == "all" else [f"scope={options.scope}: shifts have no scope."]


@pytest.fixture(autouse=True)
def row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "value_shift", ValueShift)


def test_it_is_trained_written_inspected_and_drawn_with(
    one_block_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_concepts(tmp_path / "toys")
    options = {
        "pretrained_model_name_or_path": str(one_block_sd_folder),
        "concepts": str(tmp_path / "toys"),
        "output_dir": str(tmp_path / "run"),
        "method": "value_shift",
        "layers": "1,3",
        "max_train_steps": 2,
        "train_batch_size": 1,
        "validation_steps": None,
        "report_to": "none",
        "compilation_cache_dir": None,
    }
    with pytest.raises(CatVersionError, match="shifts have no scope"):
        train(make_config({**options, "scope": "class_word"}))
    result = train(make_config(options))
    assert not result.failures

    file = tmp_path / "run" / "concepts" / "teal_cup" / "catversion.safetensors"
    assert file in [one.file for one in result.concepts]
    concept = load_concept(file)
    learned = concept.learned
    assert isinstance(learned, ValueShift)
    assert (learned.shift.shape, learned.layers) == ((2, 4, 8), (1, 3))
    assert np.abs(learned.shift).min() > 0  # AdamW moves every number
    written = concept.save(tmp_path / "again.safetensors").read_bytes()
    assert written == file.read_bytes()

    assert main(["inspect", str(file)]) == 0
    assert "value shift" in capsys.readouterr().out
    assert main(["export", str(file), "--format", "pipeline", "--output_dir", "x"]) == 2
    assert "--format prompt_embeds" in capsys.readouterr().err

    # A constant added to every value is added to the attention's result, so the last layer's shift
    # reaches the encoder's output through that layer's out_proj and MLP alone.
    backbone = load_backbone(one_block_sd_folder)
    use = ConceptUse(concept.name, concept.base_class, learned)
    prompt = f"a {concept.base_class}"
    plain, acting = encode_prompt(backbone, prompt, []), encode_prompt(backbone, prompt, [use])
    assert np.abs(acting - plain).max() > 1e-4
    with pytest.raises(CatVersionError, match="value shift has no strength"):
        ConceptUse(concept.name, concept.base_class, learned, scale=0.5)


def test_a_shift_of_the_values_shifts_the_attention_output(one_block_sd_folder: Path) -> None:
    """The weights of a softmax sum to one: softmax(QK)(V + s) = softmax(QK) V + s."""
    backbone = load_backbone(one_block_sd_folder)
    shift = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
    layer = backbone.num_text_layers - 1
    ids = backbone.tokenizer(["a cat"])
    params = backbone.text_encoder.params["encoder"]["layers"][layer]["self_attn"]
    out_proj = np.float64(params["out_proj"]["kernel"])
    value_bias = np.float64(params["v_proj"]["bias"]) + np.float64(shift).reshape(-1)
    moved = {**params, "v_proj": {**params["v_proj"], "bias": jnp.float32(value_bias)}}
    layers = {**backbone.text_encoder.params["encoder"]["layers"]}
    layers[layer] = {**layers[layer], "self_attn": moved}
    params = {**backbone.text_encoder.params, "encoder": {"layers": layers}}
    assert out_proj.shape == (32, 32)
    expected = dataclasses.replace(backbone.text_encoder, params=params)(ids)
    ours = backbone.text_encoder(ids, ValueShift(shift, (layer,)))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_help_names_every_method() -> None:
    (text,) = [row.help for row in option_table() if row.name == "method"]
    for name in METHODS:
        assert name in text or name == "value_shift"
