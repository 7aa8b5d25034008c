"""Textual Inversion against torch: gradients, diffusers' own loader, packs, the command line."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from random_model import write_toy_concepts
from running import arguments, final_files
from torch_reference import draw, relative_error
from training_cases import LAYERS, concept_data, config, distance, optimizer, train_step
from transformers import CLIPTextModel

from catversion_jax.cli import main
from catversion_jax.diffusion import noise_schedule
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.runtime.sharding import make_mesh
from catversion_jax.sampling.encoding import encode_prompt
from catversion_jax.sampling.requests import ConceptUse, check_concept
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses
from catversion_jax.training.state import TrainState, create_train_state

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder: Path) -> Backbone:
    return load_backbone(one_block_sd_folder)


def use(vectors: np.ndarray, word: str = "cat", **options: object) -> ConceptUse:
    return ConceptUse(f"my {word}", word, TokenEmbeddings(vectors), **options)


# ---- tokens --------------------------------------------------------------------------------------


def test_a_prompt_without_learned_tokens_is_the_tokenizers_own(backbone: Backbone) -> None:
    tokenizer = backbone.tokenizer
    for prompt in ("", "a cat", "a cat and a cat", "cat " * 30, "a toy car, red"):
        placed = tokenizer.place(prompt, ["cat", "toy car"], [None, None])
        np.testing.assert_array_equal(placed.token_ids, tokenizer([prompt])[0])
        for word, word_places in zip(("cat", "toy car"), placed.word_places, strict=True):
            first = tokenizer.word_positions(placed.token_ids, word)
            assert tuple(np.flatnonzero(word_places >= 0)[: len(first)]) == first
            assert word_places[list(first)].tolist() == list(range(len(first)))


def test_more_tokens_than_the_word_has_move_the_rest(backbone: Backbone) -> None:
    tokenizer = backbone.tokenizer
    word = len(tokenizer.word_ids("cat"))
    plain = tokenizer(["a cat on me"])[0]
    placed = tokenizer.place("a cat on me", ["cat"], [word + 2])
    where = np.flatnonzero(placed.word_places[0] >= 0)
    assert placed.word_places[0][where].tolist() == list(range(word + 2))
    start, after = where[0], where[-1] + 1
    np.testing.assert_array_equal(placed.token_ids[:start], plain[:start])
    np.testing.assert_array_equal(placed.token_ids[after:], plain[after - 2 : -2])
    assert tokenizer.place("cat " * 30, ["cat"], [9]).token_ids[-1] == plain[-1]


# ---- against torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_vectors", [1, 5])
def test_diffusers_loads_the_concept_file(
    backbone: Backbone, one_block_sd_folder: Path, tmp_path: Path, num_vectors: int
) -> None:
    vectors = draw(num_vectors, 32, seed=1)
    file = save_concept(
        tmp_path / "x.safetensors", TokenEmbeddings(vectors), base_class="cat", name="my cat"
    )
    np.testing.assert_array_equal(load_concept(file).learned.vectors, vectors)
    pipe = StableDiffusionPipeline.from_pretrained(one_block_sd_folder)
    pipe.load_textual_inversion(str(file))
    trigger = load_concept(file).metadata["modelspec.trigger_phrase"]
    assert trigger in pipe.tokenizer.get_added_vocab()
    assert f"'{trigger}'" in load_concept(file).metadata["modelspec.usage_hint"]
    for prompt in ("a cat on me", "cat", "a cat, a cat", "so many of these cat words"):
        theirs, _ = pipe.encode_prompt(prompt.replace("cat", trigger), "cpu", 1, False)
        ours = encode_prompt(backbone, prompt, [use(vectors)])
        assert relative_error(ours, theirs[0].detach()) < 1e-4, prompt
        assert relative_error(ours, encode_prompt(backbone, prompt, [])) > 1e-2


def test_loss_and_gradient_equal_torch(backbone: Backbone, one_block_sd_folder: Path) -> None:
    vectors, (latents, noise) = draw(2, 32, seed=3), draw(2, 2, 4, 8, 8, seed=4)
    timesteps = np.array([17, 801], np.int32)
    placed = [backbone.tokenizer.place(p, ["cat"], [2]) for p in ("a cat", "the cat on a hill")]
    token_ids = np.stack([one.token_ids for one in placed])
    word_places = np.stack([one.word_places[0] for one in placed])

    text_encoder = CLIPTextModel.from_pretrained(one_block_sd_folder / "text_encoder")
    vocabulary = text_encoder.get_input_embeddings().num_embeddings
    text_encoder.resize_token_embeddings(vocabulary + 2, mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    table.data[vocabulary:] = torch.tensor(vectors)
    ids = torch.tensor(
        np.where(word_places >= 0, vocabulary + word_places, token_ids).astype(np.int64)
    )
    unet = UNet2DConditionModel.from_pretrained(one_block_sd_folder / "unet")
    scheduler = DDPMScheduler.from_pretrained(one_block_sd_folder, subfolder="scheduler")
    steps = torch.tensor(timesteps, dtype=torch.long)
    noisy = scheduler.add_noise(torch.tensor(latents), torch.tensor(noise), steps)
    context = text_encoder(ids).last_hidden_state
    loss = ((unet(noisy, steps, context).sample - torch.tensor(noise)) ** 2).mean()
    loss.backward()

    hidden = backbone.text_encoder.call("lower", token_ids, 0)
    batch = DiffusionBatch(
        latents.transpose(0, 2, 3, 1),
        noise.transpose(0, 2, 3, 1),
        timesteps,
        (LowerStates(hidden, token_ids, word_places),),
    )

    @jax.jit
    def ours(learned, text_encoders, unet):
        schedule = noise_schedule(backbone.noise_schedule)
        one, of_one = jax.tree.map(lambda leaf: leaf[None], (learned, batch))
        return diffusion_losses(one, text_encoders, unet, of_one, schedule, first_layers=[0])[0]

    our_loss, grads = jax.value_and_grad(ours)(
        TokenEmbeddings(vectors), backbone.text_encoders, backbone.unet
    )
    np.testing.assert_allclose(our_loss, loss.item(), rtol=1e-4)
    assert relative_error(grads.vectors, table.grad[vocabulary:]) < 1e-3


# ---- the trainer ---------------------------------------------------------------------------------


def train_pack(backbone: Backbone, rows: slice) -> TrainState:
    """Six steps of a textual inversion of some of ``concept_data``'s eight concepts."""
    options = config(preset="none", method="textual_inversion", train_batch_size=1)
    _, data = concept_data(backbone)
    placed = [backbone.tokenizer.place(p, [w], [2]) for p, w in (("a tea", "tea"), ("c", "c"))]
    ids = np.stack([p.token_ids for p in placed])
    hidden = np.asarray(backbone.text_encoder.call("lower", ids, 0))
    text = LowerStates(hidden, ids, np.stack([p.word_places[0] for p in placed]))
    text = jax.tree.map(lambda leaf: np.stack([leaf] * 8), text)
    data = dataclasses.replace(data, text=(text,))
    learned, data = jax.tree.map(
        lambda leaf: leaf[rows], (TokenEmbeddings(draw(8, 2, 32, seed=9)), data)
    )
    tx, mesh = optimizer(options), make_mesh(1, jax.devices()[:1])
    step = train_step(backbone, tx, mesh, options)
    state = create_train_state(jax.tree.map(jnp.asarray, learned), tx)
    state, _ = step(state, data, backbone.text_encoders, backbone.unet, jnp.int32(6))
    return jax.tree.map(np.asarray, state)


@pytest.mark.slow
def test_alone_it_learns_what_it_learns_in_a_pack(backbone: Backbone) -> None:
    packed, alone = train_pack(backbone, slice(4, 6)), train_pack(backbone, slice(5, 6))
    assert np.all(packed.learned.vectors != draw(8, 2, 32, seed=9)[4:6])
    assert distance(alone.learned, TokenEmbeddings(packed.learned.vectors[1:])) < 1e-3


@pytest.mark.slow
def test_the_command_trains_resumes_and_exports(
    one_block_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_concepts(tmp_path / "toys")
    run, again = tmp_path / "run", tmp_path / "again"
    options = {
        "method": "textual_inversion",
        "num_vectors": 2,
        "instance_prompt": "a {}",
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "train_batch_size": 1,
        "ema_decay": 0.9,
        "timestep_sampling": "stratified",
        "concepts_per_device": 3,
    }
    assert main(["train", *arguments(one_block_sd_folder, tmp_path / "toys", run, **options)]) == 0
    finished = final_files(run)
    concept = load_concept(run / "concepts" / "teal_cup")
    assert concept.train_config["learning_rate"] == 5e-4  # the preset came with the method
    assert concept.learned.vectors.shape == (2, 32)
    # As if it had been killed after step 2.
    shutil.copytree(run, again)
    for file in again.glob("concepts/*/catversion.safetensors"):
        file.unlink()
    shutil.rmtree(again / "checkpoints" / "process-0000" / "4")
    assert (
        main(["train", *arguments(one_block_sd_folder, tmp_path / "toys", again, **options)]) == 0
    )
    assert final_files(again) == finished

    capsys.readouterr()
    assert main(["inspect", str(run / "concepts" / "teal_cup")]) == 0
    shown = capsys.readouterr().out
    assert "Textual Inversion concept" in shown
    assert "<teal_cup>" in shown
    out = tmp_path / "out"
    assert main(["export", str(run / "checkpoints/process-0000/4"), "--output_dir", str(out)]) == 0
    assert (out / "teal_cup.safetensors").read_bytes() == finished["teal_cup"]
    export = ["export", str(run), "--format", "pipeline", "--output_dir", str(tmp_path / "p")]
    assert main(export) == 2
    assert "load_textual_inversion" in capsys.readouterr().err


# ---- what cannot be ------------------------------------------------------------------------------


def test_what_cannot_be_is_said(backbone: Backbone, tmp_path: Path) -> None:
    vectors = draw(2, 32)
    with pytest.raises(CatVersionError, match=r"scale=0\.5.*must be 1"):
        use(vectors, scale=0.5)
    with pytest.raises(CatVersionError, match=r"when=always.*class word"):
        use(vectors, when="always")
    np.testing.assert_array_equal(
        encode_prompt(backbone, "a cat", [use(vectors, scale=0.0)]),
        encode_prompt(backbone, "a cat", []),
    )
    twin = dataclasses.replace(use(vectors), name="other")
    with pytest.raises(CatVersionError, match=r"'my cat' and 'other'.*both would stand"):
        encode_prompt(backbone, "a cat", [use(vectors), twin])
    with pytest.raises(CatVersionError, match="another model"):
        check_concept(backbone, use(draw(2, 48)), {})
    ids = backbone.tokenizer(["a cat"])
    with pytest.raises(CatVersionError, match="word_places=None"):
        backbone.text_encoder(ids, TokenEmbeddings(vectors))
    with pytest.raises(CatVersionError, match="entering layer 0"):
        backbone.text_encoder.call("upper", draw(1, 24, 32), TokenEmbeddings(vectors), 1)
    from catversion_jax.integrations.diffusers import CatVersionLoadError, load_catversion

    file = save_concept(tmp_path / "x.safetensors", TokenEmbeddings(vectors), base_class="cat")
    with pytest.raises(CatVersionLoadError, match=r"load_textual_inversion.*<cat>"):
        load_catversion(object(), file)


def test_beside_a_residual_of_another_word(backbone: Backbone) -> None:
    """A learned token and a residual in one prompt: the residual sees the vectors' tokens."""
    vectors, (key, value) = draw(3, 32, seed=5), draw(2, len(LAYERS), 1, 4, 8, seed=6)
    residual = KVResidual(key, value, LAYERS, 0.0, "from_class_word")
    dog = ConceptUse("rex", "dog", residual)
    both = encode_prompt(backbone, "a dog, a cat", [dog, use(vectors)])
    placed = backbone.tokenizer.place("a dog, a cat", ["dog", "cat"], [None, 3])
    hidden = backbone.text_encoder.call("lower", placed.token_ids[None], 0)
    positions = hidden[0] - backbone.text_encoder.call("token_embeddings", placed.token_ids)
    for index in range(3):
        where = int(np.flatnonzero(placed.word_places[1] == index)[0])
        hidden = hidden.at[0, where].set(vectors[index] + positions[where])
    expected = backbone.text_encoder.call("upper", hidden, residual, 0, placed.word_places[0][None])
    assert relative_error(both, expected[0]) < 1e-5
