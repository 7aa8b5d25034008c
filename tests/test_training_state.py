"""Start values of a residual, against hooks on transformers' own projections; caption dropout."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from training_cases import concept_data
from transformers import CLIPTextModel

from catversion_jax.config import make_config
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.training.start_values import init_learned
from catversion_jax.training.step import sample_batch

LAYERS = (1, 3)
PROMPT, BASE_CLASS = "a tea pot", "tea pot"


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder: Path) -> Backbone:
    return load_backbone(tiny_sd_folder)


def start(backbone: Backbone, **options: object) -> KVResidual:
    config = make_config({"concepts": "unused", "layers": "1,3", **options})
    token_ids = backbone.tokenizer([PROMPT])[0]
    positions = backbone.tokenizer.word_positions(token_ids, BASE_CLASS)
    learned = init_learned(
        config.method_options,
        backbone.text_encoders,
        backbone.text_facts,
        [token_ids],
        [positions],
        seed=7,
    )
    assert isinstance(learned, KVResidual)
    return learned


def projections(folder: Path, token_ids: np.ndarray) -> dict[str, np.ndarray]:
    """What ``k_proj`` and ``v_proj`` of the adapted layers give in PyTorch, ``[L T N H]``."""
    model = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text = getattr(model, "text_model", model)
    seen: dict[str, list[np.ndarray]] = {"k_proj": [], "v_proj": []}
    for layer in LAYERS:
        for name, outputs in seen.items():
            projection = getattr(text.encoder.layers[layer].self_attn, name)
            projection.register_forward_hook(
                lambda _module, _inputs, out, outputs=outputs: outputs.append(
                    out.detach().numpy()[0].reshape(out.shape[1], 4, 8)
                )
            )
    with torch.no_grad():
        model(torch.tensor(token_ids.astype(np.int64))[None])
    return {name: np.stack(outputs) for name, outputs in seen.items()}


@pytest.mark.parametrize(("init", "first"), [("class_word", None), ("bos", 0)])
def test_copied_start_values_are_the_encoders_own(
    backbone: Backbone, tiny_sd_folder: Path, init: str, first: int | None
) -> None:
    token_ids = backbone.tokenizer([PROMPT])[0]
    own = projections(tiny_sd_folder, token_ids)
    words = backbone.tokenizer.word_ids(BASE_CLASS)
    if first is None:
        first = next(i for i in range(20) if tuple(token_ids[i : i + len(words)]) == words)
    residual = start(backbone, init=init)
    for ours, theirs in ((residual.key, own["k_proj"]), (residual.value, own["v_proj"])):
        assert ours.shape == (2, 1, 4, 8)
        np.testing.assert_allclose(ours[:, 0], theirs[:, first], atol=1e-5 * np.abs(theirs).max())


def test_several_positions_start_apart(backbone: Backbone) -> None:
    for init in ("normal", "zero", "class_word", "bos"):
        residual = start(backbone, init=init, num_positions=3)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(residual.key[:, a] - residual.key[:, b]).min() > 0


def test_zero_and_normal(backbone: Backbone) -> None:
    assert not np.any(start(backbone, init="zero").key)
    normal = start(backbone, init="normal", num_positions=64, init_std=0.5)
    numbers = np.concatenate([np.ravel(normal.key), np.ravel(normal.value)])
    assert abs(numbers.mean()) < 0.03
    assert abs(numbers.std() - 0.5) < 0.03
    np.testing.assert_array_equal(normal.key, start(backbone, num_positions=64, init_std=0.5).key)


def test_caption_dropout_replaces_the_prompt_at_its_rate(backbone: Backbone) -> None:
    _, data = concept_data(backbone)
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], data)
    empty = jax.tree.map(lambda leaf: jnp.full_like(leaf[0], 7), one.text)
    one = dataclasses.replace(one, empty_text=empty)
    config = make_config({"concepts": "unused", "caption_dropout": 0.25})

    @jax.jit
    def dropped(step: jax.Array) -> jax.Array:
        batch = sample_batch(one, step, jnp.int32(0), 64, config.objective_options, 1000)
        return jnp.mean(jnp.all(batch.text[0].hidden == 7.0, axis=(1, 2)))

    rate = np.mean([dropped(jnp.int32(step)) for step in range(20)])
    assert abs(rate - 0.25) < 0.04  # 1280 draws: three standard deviations
