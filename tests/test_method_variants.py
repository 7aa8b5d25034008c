"""Variants of the method: scope, one trained half, any layers, start values, timesteps, average."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from scipy.stats import qmc
from small_networks import (
    HEAD_DIM,
    HEADS,
    attention_layer,
    default_encoders,
    make_residual,
    token_ids,
)
from tiny_pipelines import load_pipe
from torch_reference import draw, relative_error
from training_cases import LAYERS, concept_data, config, optimizer

from catversion_jax.cli import main
from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.integrations.diffusers import load_catversion
from catversion_jax.methods.attention_mass import residual_attention_mass
from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.table import method_for
from catversion_jax.models.clip.adaptation import ExtraKeys
from catversion_jax.models.clip.text import causal_bias
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.sampling.encoding import encode_prompt
from catversion_jax.sampling.requests import ConceptUse
from catversion_jax.training.state import TrainState
from catversion_jax.training.step import apply_update, sample_batch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder: Path) -> Backbone:
    return load_backbone(tiny_sd_folder)


def tiny_residual(scope: str = "all", seed: int = 0, positions: int = 2) -> KVResidual:
    key, value = draw(2, len(LAYERS), positions, 4, 8, seed=seed)
    return KVResidual(key, value, LAYERS, 0.5, scope)


# ---- scope ---------------------------------------------------------------------------------------


def test_scope_hides_the_residual_from_what_stands_before_the_word() -> None:
    """Causal: before the word the plain states; from it on, those of an encoder that reads the
    plain keys of the tokens before, written out as two passes over one layer.
    """
    layer, hidden = attention_layer()
    key, value = draw(1, HEADS, HEAD_DIM, seed=6), draw(1, HEADS, HEAD_DIM, seed=7)
    bias, starts = causal_bias(7), np.array([2, 5])
    visible = np.arange(7)[None] >= starts[:, None]
    ours = layer(hidden, bias, [ExtraKeys(key, value, 0.3, visible)])
    everywhere, plain = layer(hidden, bias, [ExtraKeys(key, value, 0.3)]), layer(hidden, bias)
    np.testing.assert_allclose(ours, np.where(visible[..., None], everywhere, plain), atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("scope", ["from_class_word", "class_word"])
def test_scope_in_sampling_and_in_the_torch_loader(
    backbone: Backbone, tiny_sd_folder: Path, tmp_path: Path, implementation: str, scope: str
) -> None:
    cat, dog = tiny_residual(scope), tiny_residual(scope, seed=2)
    pipe = load_pipe(tiny_sd_folder, implementation)
    for name, residual in (("cat", cat), ("dog", dog)):
        options = {"base_class": name, "when": "always" if name == "dog" else "class_word"}
        load_catversion(pipe, save_concept(tmp_path / f"{name}.safetensors", residual, **options))
    uses = [ConceptUse("cat", "cat", cat), ConceptUse("dog", "dog", dog, when="always")]
    prompts = ("a cat", "so, a dog or a cat", "a cat is a cat", "nothing of it")
    theirs, _ = pipe.encode_prompt(list(prompts), "cpu", 1, False)
    for row, prompt in enumerate(prompts):
        ours = encode_prompt(backbone, prompt, uses)
        assert relative_error(ours, theirs[row].detach()) < 1e-4, prompt
    # Without its word a prompt is seen whole; what stands before the word stays plain.
    unscoped = [dataclasses.replace(uses[1], learned=dataclasses.replace(dog, scope="all"))]
    np.testing.assert_allclose(
        encode_prompt(backbone, "nothing of it", uses),
        encode_prompt(backbone, "nothing of it", unscoped),
        atol=1e-6,
    )
    one, plain = (encode_prompt(backbone, "so, a cat", use) for use in (uses[:1], []))
    start = backbone.tokenizer.word_positions(backbone.tokenizer(["so, a cat"])[0], "cat")[0]
    np.testing.assert_allclose(one[:start], plain[:start], atol=1e-5)
    assert np.abs(one[start:] - plain[start:]).max(axis=1).min() > 1e-3


def test_the_narrowest_scope_is_read_by_the_word_alone() -> None:
    """One layer: the plain output but at the word, each time it stands there."""
    residual = tiny_residual("class_word")
    word_places = np.array([[-1, -1, 0, 1, -1, 0, 1, -1], [-1] * 8], np.int32)
    seeing = np.asarray(residual.visible(word_places))
    np.testing.assert_array_equal(seeing[0], word_places[0] >= 0)
    assert seeing[1].all()


def test_another_place_of_the_word_compiles_nothing_new(backbone: Backbone) -> None:
    from catversion_jax.sampling import encoding

    use = [ConceptUse("cat", "cat", tiny_residual("from_class_word"))]
    encode_prompt(backbone, "a cat", use)
    compiled = encoding._encode._cache_size()
    encode_prompt(backbone, "far away sits a cat", use)
    assert encoding._encode._cache_size() == compiled


def test_scope_needs_the_place_of_the_word(backbone: Backbone) -> None:
    with pytest.raises(CatVersionError, match="word_places=None"):
        backbone.text_encoder(backbone.tokenizer(["a cat"]), tiny_residual("from_class_word"))


def test_a_dropped_caption_has_no_word(backbone: Backbone) -> None:
    _, data = concept_data(backbone)
    word_places = np.full((8, 2, 24), -1, np.int32)
    word_places[:, :, 3] = 0
    text = dataclasses.replace(data.text[0], word_places=word_places)
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], dataclasses.replace(data, text=(text,)))
    empty = LowerStates(
        *jax.tree.map(
            lambda leaf: jnp.full_like(leaf[0], 7), (text.hidden[0, 0], text.token_ids[0, 0])
        ),
        jnp.full(24, -1, jnp.int32),
    )
    one = dataclasses.replace(one, empty_text=(empty,))
    objective = config(caption_dropout=0.5).objective_options
    batch = jax.jit(lambda d: sample_batch(d, jnp.int32(3), jnp.int32(0), 64, objective, 1000))(one)
    dropped = np.all(np.asarray(batch.text[0].hidden) == 7.0, axis=(1, 2))
    assert 16 < dropped.sum() < 48
    np.testing.assert_array_equal((np.asarray(batch.text[0].word_places) >= 0).any(1), ~dropped)


# ---- attention mass ------------------------------------------------------------------------------


def test_attention_mass_is_lambda_in_float64() -> None:
    layer, hidden = attention_layer()
    key, value = draw(2, HEADS, HEAD_DIM, seed=6), draw(2, HEADS, HEAD_DIM, seed=7)
    ours = layer.call("extra_mass", hidden, causal_bias(7), ExtraKeys(key, value, 0.7))

    def project(name: str) -> np.ndarray:
        weights = layer.params[name]
        out = np.float64(hidden) @ np.float64(weights["kernel"]) + np.float64(weights["bias"])
        return out.reshape(2, 7, HEADS, HEAD_DIM)

    query, keys = project("q_proj"), project("k_proj")
    own = np.einsum("BTNH,BSNH->BNTS", query, keys) / math.sqrt(HEAD_DIM)
    own = np.where(np.tril(np.ones((7, 7))) > 0, np.exp(own), 0.0).sum(-1)
    odds = np.einsum("BTNH,PNH->BNTP", query, np.float64(key)) / math.sqrt(HEAD_DIM)
    odds = np.exp(odds + 0.7).sum(-1)
    assert relative_error(ours, odds / (odds + own)) < 1e-5


def test_attention_mass_of_every_layer_follows_the_logit_bias() -> None:
    """Equation (2) of residual.py at the first adapted layer; the layers above see its result."""
    _, encoder = default_encoders()
    ids, residual = token_ids(2, 9), make_residual(positions=2)
    mass = np.asarray(residual_attention_mass(encoder, ids, residual))
    assert mass.shape == (3, 2, HEADS, 9)
    stronger = np.asarray(residual_attention_mass(encoder, ids, residual.scaled(3.0)))
    first = mass[0]
    np.testing.assert_allclose(stronger[0], 3 * first / (1 - first + 3 * first), rtol=1e-4)
    assert np.abs(stronger[2] - mass[2]).max() > 1e-3


def test_inspect_prints_the_mass(
    tiny_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    residual = tiny_residual("from_class_word")
    file = save_concept(tmp_path / "x.safetensors", residual, base_class="cat")
    command = ["inspect", str(file), "--prompt", "a cat"]
    assert main([*command, "--model", str(tiny_sd_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (title,) = [i for i, line in enumerate(lines) if line.startswith("attention mass")]
    assert lines[title + 1].split() == ["<|startoftext|>", "[0.0,", "0.0,", "0.0]"]
    assert "0.0," not in lines[-1]  # the end token comes after the word
    assert main(command) == 2
    assert "Give --model" in capsys.readouterr().err


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize(("adapt", "frozen"), [("key", "value"), ("value", "key")])
def test_the_other_half_gets_no_update_and_no_decay(adapt: str, frozen: str) -> None:
    options = config(adapt=adapt, max_grad_norm=1.0, adam_weight_decay=0.1, learning_rate=0.1)
    both = config(max_grad_norm=1.0, adam_weight_decay=0.1, learning_rate=0.1)
    start = tiny_residual()
    grads = dataclasses.replace(start, **{frozen: start.key * 1e6, adapt: start.key * 1e-2})
    only = dataclasses.replace(grads, **{frozen: np.zeros_like(start.key)})
    tx, reference = optimizer(options), optimizer(both)
    updates, _ = tx.update(grads, tx.init(start), start)
    expected, _ = reference.update(only, reference.init(start), start)
    np.testing.assert_array_equal(getattr(updates, frozen), np.zeros_like(start.key))
    # The clip does not count what is not trained either.
    np.testing.assert_allclose(getattr(updates, adapt), getattr(expected, adapt), rtol=1e-5)


@pytest.mark.parametrize("layers", [(0,), (0, 3), (2,), (0, 1, 2, 3)])
def test_any_layers_from_their_cached_input(backbone: Backbone, layers: tuple[int, ...]) -> None:
    key, value = draw(2, len(layers), 2, 4, 8, seed=3)
    residual = KVResidual(key, value, layers)
    ids = backbone.tokenizer(["a cat on me"])
    hidden = backbone.text_encoder.call("lower", ids, residual.first_layer)
    cached = backbone.text_encoder.call("upper", hidden, residual, residual.first_layer)
    np.testing.assert_allclose(cached, backbone.text_encoder(ids, residual), atol=1e-6)
    assert relative_error(cached, backbone.text_encoder(ids)) > 1e-2


# ---- timesteps and average -----------------------------------------------------------------------


def drawn_timesteps(backbone: Backbone, batch: int, steps: int, **options: object) -> np.ndarray:
    _, data = concept_data(backbone)
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[2], data)
    objective = config(train_batch_size=batch, **options).objective_options
    draws = jax.jit(
        jax.vmap(lambda s: sample_batch(one, s, jnp.int32(0), batch, objective, 1000).timesteps)
    )
    return np.asarray(draws(jnp.arange(steps)))


def test_stratified_timesteps_are_even_in_a_batch_and_over_steps(backbone: Backbone) -> None:
    even = drawn_timesteps(backbone, 4, 256, timestep_sampling="stratified")
    uniform = drawn_timesteps(backbone, 4, 256)
    np.testing.assert_array_equal(even * 4 // 1000, np.broadcast_to(np.arange(4), even.shape))
    for window in (1, 8, 64):
        spread, plain = (
            np.mean(
                [
                    qmc.discrepancy((t[i : i + window].reshape(-1, 1) + 0.5) / 1000)
                    for i in range(0, 256, window)
                ]
            )
            for t in (even, uniform)
        )
        assert spread < plain / 3, window
    assert len(np.unique(even)) > 600  # of 1024 draws: not a coarse grid
    counts = np.bincount(even.ravel() // 50, minlength=20)
    assert np.abs(counts - 1024 / 20).max() <= 4


def test_proportional_timesteps_are_even_in_their_square(backbone: Backbone) -> None:
    """``P(t) = (2 t + 1) / N^2``: the squares of ``t / N`` are spread as stratified ones are."""
    for batch in (1, 2, 4):
        drawn = drawn_timesteps(backbone, batch, 1024 // batch, timestep_sampling="proportional")
        assert drawn.min() >= 0
        assert drawn.max() <= 999
        share = ((drawn + 0.5) / 1000) ** 2
        # the i-th of a batch lies in the i-th stratum, but for the timestep at its border
        assert np.abs(share - (np.arange(batch) + 0.5) / batch).max() <= 0.5 / batch + 2e-3
        counts = np.bincount((share.ravel() * 20).astype(int), minlength=20)
        assert np.abs(counts - 1024 / 20).max() <= 4, batch


def test_average_is_diffusers_ema() -> None:
    tx = optimizer(config(ema_decay=0.5))
    start = jax.tree.map(jnp.asarray, tiny_residual())
    state = TrainState(jnp.int32(0), start, tx.init(start), jnp.int32(-1), start)
    parameter = torch.nn.Parameter(torch.tensor(np.asarray(start.key)))
    ema = EMAModel([parameter], decay=0.5)
    for step in range(12):
        grads = jax.tree.map(lambda leaf, s=step: jnp.sin(leaf + s), start)
        state = apply_update(state, jnp.float32(1.0), grads, tx, 0.5)
        parameter.data = torch.tensor(np.asarray(state.learned.key))
        ema.step([parameter])
        np.testing.assert_allclose(state.average.key, ema.shadow_params[0].numpy(), atol=1e-6)
    assert state.exported is state.average
    assert np.abs(state.average.key - state.learned.key).max() > 1e-4


# ---- options -------------------------------------------------------------------------------------


def test_the_method_brings_its_usual_settings() -> None:
    alone = make_config({"concepts": "a", "method": "textual_inversion", "seed": 3})
    named = make_config({"concepts": "a", "preset": "textual_inversion", "seed": 3})
    assert alone == named
    # diffusers examples/textual_inversion/README.md: 5e-4, 3000 steps, batch 1 accumulated 4 times
    assert (alone.learning_rate, alone.max_train_steps, alone.train_batch_size) == (5e-4, 3000, 4)
    assert (alone.init, alone.instance_prompt) == ("class_word", "object")
    bare = make_config({"concepts": "a", "method": "textual_inversion", "preset": "none"})
    assert bare.learning_rate == make_config({"concepts": "a"}).learning_rate


@pytest.mark.parametrize(
    "options", [{"when": "always"}, {"adapt": "key"}, {"scope": "from_class_word"}]
)
def test_options_that_only_keys_and_values_have(options: dict[str, str]) -> None:
    with pytest.raises(CatVersionError, match="with method=textual_inversion"):
        method_for(make_config({"concepts": "a", "method": "textual_inversion", **options}))


def test_a_method_that_does_not_exist() -> None:
    with pytest.raises(CatVersionError, match=r"one of catversion.*Did you mean 'catversion'"):
        method_for(make_config({"concepts": "a", "method": "catversoin"}))


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(CatVersionError, match=r"ema_decay=.*within 0\.\.1"):
        make_config({"concepts": "a", "ema_decay": decay})
