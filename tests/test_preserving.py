"""``preserve_weight`` and ``context_states``: in a pack, alone, on a mesh, resumed."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_model import write_toy_concepts
from running import final_files, run_here
from tiny_pipelines import load_pipe
from torch_reference import draw, relative_error
from training_cases import concept_data, config, distance, optimizer, train_step

from catversion_jax.methods.learned import Learned
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.runtime.sharding import make_mesh, place_by_concept, replicated
from catversion_jax.training.prompt_states import plain_states
from catversion_jax.training.state import create_train_state


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder: Path) -> Backbone:
    return load_backbone(one_block_sd_folder)


def learned_after(
    backbone: Backbone, rows: slice, devices: int = 1, **options: object
) -> tuple[Learned, np.ndarray]:
    """Six steps of some of the eight concepts, and their losses."""
    chosen = config(preserve_weight=0.5, timestep_sampling="proportional", **options)
    learned, data = concept_data(backbone)
    learned = dataclasses.replace(learned, states=draw(8, 3, 32, seed=4))
    plain = backbone.text_encoder(data.text[0].token_ids[0])
    data = dataclasses.replace(
        data,
        mask=(draw(8, 4, 2, 8, 8, seed=3) > 0).astype(np.float32),
        plain=TextStates(np.stack([np.asarray(plain)] * 8)),
    )
    learned, data = jax.tree.map(lambda leaf: leaf[rows], (learned, data))
    mesh = make_mesh(chosen.data_parallel, jax.devices()[:devices])
    tx = optimizer(chosen)
    step = train_step(backbone, tx, mesh, chosen)
    networks = jax.device_put((backbone.text_encoders, backbone.unet), replicated(mesh))
    state = place_by_concept(jax.tree.map(np.asarray, create_train_state(learned, tx)), mesh)
    state, metrics = step(state, place_by_concept(data, mesh), *networks, jnp.int32(6))
    return jax.tree.map(np.asarray, (state.learned, metrics.losses))


@pytest.mark.slow  # half a minute; every run compares the plain objective in test_training_step.py
def test_neither_company_nor_mesh_changes_what_is_learned(backbone: Backbone) -> None:
    alone, own = learned_after(backbone, slice(5, 6))
    meshed, losses = learned_after(backbone, slice(None), devices=8, data_parallel=2)
    assert distance(alone, jax.tree.map(lambda leaf: leaf[5:6], meshed)) < 1e-3
    np.testing.assert_allclose(own[:, 0], losses[:, 5], rtol=1e-5)
    assert np.all(meshed.states != draw(8, 3, 32, seed=4))


@pytest.mark.slow  # half a minute; every run resumes one in test_interruptions.py
@pytest.mark.parametrize("method", ["catversion", "textual_inversion"])
def test_the_command_resumes_to_the_same_bytes(
    one_block_sd_folder: Path, tmp_path: Path, method: str
) -> None:
    toys, run, again = (tmp_path / name for name in ("toys", "run", "again"))
    write_toy_concepts(toys)  # with masks beside the photos
    options = {
        "method": method,
        "context_states": 3 if method == "catversion" else 0,
        "num_positions": 2,
        "instance_prompt": "a {}",
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "train_batch_size": 1,
        "caption_dropout": 0.5,
        "preserve_weight": 1.5,
        "timestep_sampling": "proportional",
        "concepts_per_device": 3,
    }
    assert run_here(one_block_sd_folder, toys, run, **options) == 0
    finished = final_files(run)
    assert len(finished) == 3
    shutil.copytree(run, again)  # as if it had been killed after step 2
    for file in again.glob("concepts/*/catversion.safetensors"):
        file.unlink()
    shutil.rmtree(again / "checkpoints" / "process-0000" / "4")
    assert run_here(one_block_sd_folder, toys, again, **options) == 0
    assert final_files(again) == finished


def test_plain_states_are_the_pipelines_own(backbone: Backbone, one_block_sd_folder: Path) -> None:
    """From the prompts in front of the first layer, each encoded alone."""
    prompts = ["a cat", "so, a dog on the hill"]
    ids = backbone.tokenizer(prompts)
    hidden = backbone.text_encoder.call("lower", ids, 0)
    text = LowerStates(np.asarray(hidden), ids, np.full_like(ids, -1))
    ours = plain_states(backbone, [text], TokenEmbeddings(draw(2, 32)))
    with torch.no_grad():
        theirs, _ = load_pipe(one_block_sd_folder).encode_prompt(prompts, "cpu", 1, False)
    assert relative_error(ours.context, theirs) < 1e-4
