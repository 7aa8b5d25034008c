"""The concept encoder's formula and file, and what a fit shows it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_encoder import (
    ConceptEncoder,
    EncoderWeights,
    Whitening,
    load_concept_encoder,
    new_weights,
)
from catversion_jax.methods.residual import KVResidual
from catversion_jax.training.fit_start import is_held_out
from catversion_jax.training.fit_step import _some_others

torch = pytest.importorskip("torch")


def residual(seed: int) -> KVResidual:
    key, value = np.random.default_rng(seed).normal(size=(2, 2, 2, 4, 8)).astype(np.float32)
    return KVResidual(key, value, (1, 2))


def random_encoder(seed: int = 0) -> ConceptEncoder:
    rng = np.random.default_rng(seed)
    weights = new_weights(7, 256, 128, seed)
    weights = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float16).astype(np.float32), weights
    )
    return ConceptEncoder(
        Whitening.of(rng.normal(size=(40, 20)), 5),
        Whitening.of(rng.normal(size=(40, 12)), 2),
        weights,
        {
            **dict(method="catversion", num_positions=2, layers="last2", logit_bias=0.0),
            **dict(scope="all", context_states=0),
        },
        3,
        {"text_encoder_sha256": "a" * 64},
        "clip",
        "b" * 64,
        ("one", "zwei ü"),
    )


def test_the_prediction_is_the_formula_in_torch():
    encoder, rng = random_encoder(), np.random.default_rng(1)
    photos = rng.normal(size=(3, 20)).astype(np.float32)
    word = rng.normal(size=12).astype(np.float32)
    own = residual(2)
    found = encoder.start(photos, word, own)
    t = {
        f.name: torch.tensor(getattr(encoder.weights, f.name))
        for f in dataclasses.fields(EncoderWeights)
    }
    whitened = (torch.tensor(photos) - torch.tensor(encoder.photos.mean)) @ torch.tensor(
        encoder.photos.components
    )
    said = (torch.tensor(word) - torch.tensor(encoder.words.mean)) @ torch.tensor(
        encoder.words.components
    )
    x = torch.cat([whitened.mean(0), said])
    hidden = torch.nn.functional.gelu(x @ t["hidden"] + t["hidden_bias"], approximate="tanh")
    added = (x @ t["linear"] + hidden @ t["out"]) @ t["basis"]
    expected = np.concatenate([own.key.ravel(), own.value.ravel()]) + added.numpy()
    mine = np.concatenate([found.key.ravel(), found.value.ravel()])
    assert np.abs(mine - expected).max() < 1e-5 * np.abs(expected).max()


def test_whitened_vectors_are_uncorrelated_and_of_variance_one():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 10)) + 5  # of rank 6
    whitening = Whitening.of(vectors, 96)
    white = whitening(vectors.astype(np.float32))
    assert white.shape == (200, 6)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(6), atol=1e-3)
    assert Whitening.of(vectors, 3).components.shape == (10, 3)
    assert Whitening.of(np.ones((4, 10)), 3).components.shape == (10, 0)


def test_a_file_comes_back_and_damage_is_named(tmp_path):
    encoder = random_encoder()
    path = encoder.save(tmp_path / "start.safetensors")
    again = load_concept_encoder(path)
    assert again.to_bytes() == encoder.to_bytes() == path.read_bytes()
    assert again.fitted_on == ("one", "zwei ü")

    def refused(match, **changes):
        dataclasses.replace(encoder, **changes).save(tmp_path / "bad.safetensors")
        with pytest.raises(CatVersionError, match=match):
            load_concept_encoder(tmp_path / "bad.safetensors")

    refused(
        "weights.linear .* expected",
        weights=dataclasses.replace(encoder.weights, linear=np.zeros((8, 128), np.float32)),
    )
    nan = np.full_like(encoder.photos.mean, np.nan)
    refused("photos.mean must be finite", photos=dataclasses.replace(encoder.photos, mean=nan))
    refused("damaged", options={"method": "catversion"})
    concept = (
        Path(__file__).parents[1]
        / "catversion_jax/assets/tiny-sd/unet/diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(CatVersionError, match="is no start file"):
        load_concept_encoder(concept)
    with pytest.raises(CatVersionError, match="cannot be read"):
        load_concept_encoder(tmp_path / "none.safetensors")
    for length in (0, 7, 8, 100):
        (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:length])
        with pytest.raises(CatVersionError, match=r"start=/.*Give the file that catversion fit-st"):
            load_concept_encoder(tmp_path / "cut.safetensors")


def test_what_the_encoder_sees_is_never_the_target():
    places = jnp.arange(6)
    for seed in range(30):
        for count in (2, 3, 5):
            target = seed % count
            seen = _some_others(jax.random.key(seed), places, jnp.int32(target), jnp.int32(count))
            assert seen.any()
            assert not seen[target]
            assert not seen[count:].any()
    alone = _some_others(jax.random.key(0), places, jnp.int32(0), jnp.int32(1))
    assert alone.tolist() == [True] + [False] * 5


def test_who_is_held_out_does_not_depend_on_the_others():
    names = [f"thing {i}" for i in range(2000)]
    share = np.mean([is_held_out(name, 0.1) for name in names])
    assert share == pytest.approx(0.1, abs=0.02)
    assert {n for n in names if is_held_out(n, 0.1)} <= {n for n in names if is_held_out(n, 0.2)}
    assert not any(is_held_out(name, 0.0) for name in names)
