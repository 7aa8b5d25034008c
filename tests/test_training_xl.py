"""Training on Stable Diffusion XL: gradients as autograd's, concepts apart, the whole command."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from random_model import write_toy_concepts
from running import arguments, final_files
from safetensors.numpy import load_file
from tiny_pipelines import save_clip
from tiny_xl import load_xl, residuals
from torch_reference import concatenated_attention, draw, relative_error
from training_cases import config, optimizer, train_step

from catversion_jax.cli import main
from catversion_jax.concepts.images import size_conditions
from catversion_jax.config import make_config
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.diffusion import noise_schedule
from catversion_jax.errors import CatVersionError
from catversion_jax.integrations.diffusers import load_catversion
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.learned import stack_learned
from catversion_jax.methods.per_encoder import PerEncoder
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import Backbone, abstract_backbone, load_backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.runtime.sharding import make_mesh, place_by_concept, replicated
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.requests import ConceptUse, ImageRequest
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses
from catversion_jax.training.planning.abstract import abstract_arguments
from catversion_jax.training.run.manifest import check_same_run, write_manifest
from catversion_jax.training.start import planned_step
from catversion_jax.training.state import ConceptData, concept_key, create_train_state

FIRST_LAYERS = (1, 3)
TIME_IDS = np.array([[48, 64, 0, 8, 32, 32], [32, 32, 0, 0, 32, 32]], np.float32)


@pytest.fixture(scope="module")
def backbone(one_block_xl_folder: Path) -> Backbone:
    return load_backbone(one_block_xl_folder)


def lower_text(backbone: Backbone, prompts: list[str]) -> tuple[LowerStates, ...]:
    """The prompts before the first adapted layer of both encoders, ``[K T D]``."""
    ids = [tokenizer(prompts) for tokenizer in backbone.tokenizers]
    parts = zip(backbone.text_encoders, ids, FIRST_LAYERS, strict=True)
    return tuple(
        LowerStates(np.asarray(encoder.call("lower", rows, layer)), rows)
        for encoder, rows, layer in parts
    )


@pytest.mark.parametrize("num_states", [0, 2])
def test_losses_and_gradients_equal_torch_autograd(one_block_xl_folder, backbone, num_states):
    """Of two concepts with two images each, to both residuals and to what stands behind both
    encoders, through context and pooled; with such states outside a mask the plain model is
    preserved.
    """
    rng = np.random.default_rng(5)
    latents, noise = rng.normal(size=(2, 2, 2, 4, 16, 16)).astype(np.float32)
    timesteps = np.array([[10, 700], [420, 999]])
    prompts = [["a teapot", "the teapot on a hill"], ["a red cat!", "cat"]]
    concepts = [residuals(seed) for seed in range(2)]
    names = ("key", "value")
    if num_states:
        names += ("states",)
        concepts = [
            concept.with_parts(
                lambda part, seed=seed: dataclasses.replace(
                    part, states=draw(num_states, part.width, seed=seed)
                )
            )
            for seed, concept in enumerate(concepts)
        ]
    given = [
        [[torch.tensor(getattr(part, n), requires_grad=True) for n in names] for part in c.parts]
        for c in concepts
    ]
    preserved = 0.5 if num_states else 0.0
    mask = (draw(2, 2, 16, 16, seed=8) > 0).astype(np.float32) if num_states else None
    pipe = load_xl(one_block_xl_folder)
    plain = [pipe.encode_prompt(rows, do_classifier_free_guidance=False) for rows in prompts]

    def torch_loss(concept: int) -> torch.Tensor:
        for encoder, part, pair in zip(
            (pipe.text_encoder, pipe.text_encoder_2),
            concepts[concept].parts,
            given[concept],
            strict=True,
        ):
            layers = getattr(encoder, "text_model", encoder).encoder.layers
            for row, layer in enumerate(part.layers):
                module = layers[layer].self_attn
                module.forward = functools.partial(
                    concatenated_attention, module, *(array[row] for array in pair[:2])
                )
        context, _, pooled, _ = pipe.encode_prompt(
            prompts[concept], do_classifier_free_guidance=False
        )
        steps = torch.tensor(timesteps[concept])
        clean, eps = torch.tensor(latents[concept]), torch.tensor(noise[concept])
        added = {"text_embeds": pooled, "time_ids": torch.tensor(TIME_IDS)}
        noisy = peer_schedule(backbone).add_noise(clean, eps, steps)
        if num_states:
            behind = torch.cat([states for *_, states in given[concept]], dim=-1)
            context = torch.cat([context, behind.expand(len(context), -1, -1)], dim=1)
        prediction = pipe.unet(noisy, steps, context, added_cond_kwargs=added).sample
        error = (prediction - eps) ** 2
        if mask is None:
            return error.mean()
        with torch.no_grad():
            context, _, pooled, _ = plain[concept]
            own = pipe.unet(
                noisy, steps, context, added_cond_kwargs=added | {"text_embeds": pooled}
            )
        on = torch.tensor(mask[concept])[:, None]
        weighed = on * error + preserved * (1 - on) * (prediction - own.sample) ** 2
        return (weighed / (on + preserved * (1 - on)).mean((1, 2, 3), keepdim=True)).mean()

    losses = [torch_loss(concept) for concept in range(2)]
    sum(losses).backward()

    lower = [lower_text(backbone, rows) for rows in prompts]
    batch = DiffusionBatch(
        latents.transpose(0, 1, 3, 4, 2),
        noise.transpose(0, 1, 3, 4, 2),
        timesteps.astype(np.int32),
        jax.tree.map(lambda *rows: np.stack(rows), *lower),
        mask,
        np.stack([TIME_IDS] * 2),
        plain=TextStates(*(torch.stack([one[i] for one in plain]).detach().numpy() for i in (0, 2)))
        if num_states
        else None,
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(learned, text_encoders, unet):
        schedule = noise_schedule(backbone.noise_schedule)
        found = diffusion_losses(
            learned,
            text_encoders,
            unet,
            batch,
            schedule,
            first_layers=FIRST_LAYERS,
            unmasked_weight=0.0,
            preserve_weight=preserved,
        )
        return found.sum(), found

    stacked = jax.tree.map(jnp.asarray, stack_learned(concepts))
    (_, found), grads = ours(stacked, backbone.text_encoders, backbone.unet)
    np.testing.assert_allclose(found, [loss.item() for loss in losses], rtol=1e-4)
    for index, part in enumerate(grads.parts):
        for place, name in enumerate(names):
            mine = getattr(part, name)
            theirs = torch.stack([given[concept][index][place].grad for concept in range(2)])
            # every layer's, the last one's too, and every state's
            assert theirs.abs().amax((0, *range(2, theirs.ndim))).min() > 0
            assert relative_error(mine, theirs) < 1e-3


def peer_schedule(backbone: Backbone):
    import diffusers

    return diffusers.DDPMScheduler.from_pretrained(backbone.folder, subfolder="scheduler")


# ---- the compiled step -----------------------------------------------------------------------


def trained(backbone: Backbone, rows: slice, devices: int = 1, data_parallel: int = 1):
    """Three steps of four concepts with 1..2 images and prompts, on the host."""
    rng, numbers = np.random.default_rng(0), np.arange(4)
    text = lower_text(backbone, ["a teapot", "the cat!"])
    shape = (4, 2, 2, 16, 16, 4)
    data = ConceptData(
        rng=jnp.stack([concept_key(i) for i in numbers]),
        latent_mean=rng.normal(size=shape).astype(np.float32),
        latent_std=np.full(shape, 0.1, np.float32),
        mask=None,
        num_images=(1 + numbers % 2).astype(np.int32),
        flip=np.full(4, 0.5, np.float32),
        text=jax.tree.map(lambda leaf: np.stack([leaf] * 4), text),
        num_prompts=(1 + numbers // 2).astype(np.int32),
        empty_text=None,
        time_ids=np.stack([TIME_IDS] * 4),
    )
    learned = stack_learned([residuals(seed) for seed in range(4)])
    learned, data = jax.tree.map(lambda leaf: leaf[rows], (learned, data))
    options = config(data_parallel=data_parallel, steps_per_dispatch=3)
    tx, mesh = optimizer(options), make_mesh(data_parallel, jax.devices()[:devices])
    networks = jax.device_put((backbone.text_encoders, backbone.unet), replicated(mesh))
    state = jax.tree.map(np.asarray, create_train_state(learned, tx))
    state, data = place_by_concept((state, data), mesh)
    state, _ = train_step(backbone, tx, mesh, options)(state, data, *networks, jnp.int32(3))
    return jax.tree.map(np.asarray, state.learned)


@pytest.mark.slow
def test_alone_a_concept_learns_what_it_learns_in_a_pack_on_a_mesh(backbone):
    alone = trained(backbone, slice(2, 3))
    packed = trained(backbone, slice(0, 4), devices=4, data_parallel=2)
    start = stack_learned([residuals(seed) for seed in range(4)])
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(packed), strict=True):
        assert np.all(before != after)
    of_one = jax.tree.map(lambda leaf: leaf[2:3], packed)
    travelled = 3 * 1e-3
    for mine, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(of_one), strict=True):
        assert np.abs(mine - theirs).max() < 1e-3 * travelled


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ((100, 60), "center", (60, 100, 0, 10, 32, 32)),  # 53 x 32 before the crop
        ((60, 100), "center", (100, 60, 10, 0, 32, 32)),
        ((64, 64), "center", (64, 64, 0, 0, 32, 32)),
        ((100, 60), "squash", (60, 100, 0, 0, 32, 32)),
    ],
)
def test_what_the_unet_is_told_of_an_images_size(size, crop, expected):
    assert size_conditions(size, resolution=32, crop=crop) == expected


def test_the_planned_step_is_that_of_training(one_block_xl_folder):
    shapes = abstract_backbone(one_block_xl_folder)
    options = make_config({"concepts": "x", "resolution": 32, "steps_per_dispatch": 2})
    planned = planned_step(options, shapes)
    mesh = make_mesh(1, jax.devices()[:1])
    state, data, *_ = abstract_arguments(planned, mesh, num_rows=3, max_images=5, max_prompts=2)
    assert [part.key.shape for part in state.learned.parts] == [(3, 3, 1, 4, 8), (3, 3, 1, 4, 12)]
    assert [text.hidden.shape for text in data.text] == [(3, 2, 24, 32), (3, 2, 24, 48)]
    assert data.time_ids.shape == (3, 5, 6)


def test_another_second_text_encoder_is_another_model(backbone, tmp_path):
    settings = {**backbone.fingerprints, "base_model": "m", "options": {}, "digests": {}}
    write_manifest(tmp_path, settings, None)
    check_same_run(tmp_path, settings, retrains=False)
    other = {**settings, "text_encoder_2_sha256": "0" * 64}
    with pytest.raises(CatVersionError, match="the model's second text encoder has changed since"):
        check_same_run(tmp_path, other, retrains=False)
    digests = {"digests": {"text_encoder_2": "a"}}, {"digests": {"text_encoder_2": "b"}}
    write_manifest(tmp_path, settings | digests[0], None)
    with pytest.raises(CatVersionError, match="the model's second text encoder has changed since"):
        check_same_run(tmp_path, settings | digests[1], retrains=False)


# ---- the command -----------------------------------------------------------------------------


def test_the_command_trains_resumes_draws_and_exports(
    one_block_xl_folder, backbone, tmp_path, capsys
):
    write_toy_concepts(tmp_path / "toys")
    run, options = tmp_path / "run", {"train_batch_size": 1, "eval_steps": 2, "logging_steps": 1}
    options |= {"caption_dropout": 0.1, "checkpointing_steps": 2}
    given = functools.partial(arguments, one_block_xl_folder, tmp_path / "toys", run, **options)
    assert main(["train", *given(max_train_steps=2)]) == 0
    assert main(["train", *given(max_train_steps=4)]) == 0
    assert len(final_files(run)) == 3
    file = run / "concepts" / "teal_cup" / "catversion.safetensors"
    concept = load_concept(file)
    assert isinstance(concept.learned, PerEncoder)
    assert concept.step == 4
    assert [part.layers for part in concept.learned.parts] == [(0, 1, 2), (1, 2, 3)]
    assert all(concept.fingerprints.values())
    capsys.readouterr()

    pictures = tmp_path / "pictures"
    draw = ["--prompt", "a cup", "--num_inference_steps", "2", "--output_dir", str(pictures)]
    model = ["--model", str(one_block_xl_folder)]
    assert main(["generate", *model, "--concept", str(file), *draw]) == 0
    with Image.open(next(pictures.glob("*.png"))) as image:
        said = " ".join(str(value) for value in image.info.values())
    assert concept.text_encoder_2_sha256 in said
    out = tmp_path / "out"
    assert main(["export", str(run), "--concept", "teal_cup", "--output_dir", str(out)]) == 0
    assert (out / "teal_cup.safetensors").read_bytes() == file.read_bytes()

    latents = np.random.default_rng(3).normal(size=(1, 4, 16, 16)).astype(np.float32)
    settings = SamplingSettings(num_inference_steps=2).over(backbone.drawing_defaults)
    request = ImageRequest("a cup", (ConceptUse.of(concept),))
    ours = draw_requests(backbone, [request], settings, latents=latents).pixels
    pipe = load_xl(one_block_xl_folder)
    if settings.sampler == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    load_catversion(pipe, out / "teal_cup.safetensors")
    theirs = pipe(
        "a cup", latents=torch.from_numpy(latents), num_inference_steps=2, output_type="np",
        guidance_scale=settings.guidance_scale,
    ).images  # fmt: skip
    assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.slow  # trains once more
def test_textual_inversion_learns_tokens_of_both_encoders(one_block_xl_folder, tmp_path):
    write_toy_concepts(tmp_path / "toys")
    run = tmp_path / "run"
    options = {"method": "textual_inversion", "num_vectors": 2, "init": "class_word"}
    options |= {"train_batch_size": 1, "max_train_steps": 2, "instance_prompt": "a {}"}
    given = arguments(one_block_xl_folder, tmp_path / "toys", run, **options)
    assert main(["train", *given]) == 0
    for name, array in load_file(run / "concepts" / "teal_cup" / "catversion.safetensors").items():
        assert array.shape == (2, {"clip_l": 32, "clip_g": 48}[name])
    parts = load_concept(run / "concepts" / "teal_cup").learned.parts
    backbone = load_backbone(one_block_xl_folder)
    for part, encoder, tokenizer in zip(
        parts, backbone.text_encoders, backbone.tokenizers, strict=True
    ):
        word = np.asarray(encoder.call("token_embeddings", np.array(tokenizer.word_ids("cup"))))
        moved = np.abs(part.vectors[0] - word[0])
        assert 0 < moved.max() < 0.5  # from the word's own embedding, apart by the spread


@pytest.mark.slow  # compiles the UNet twice more, and a CLIP
def test_evaluate_draws_masks_and_scores_a_concept(one_block_xl_folder, tmp_path):
    write_toy_concepts(tmp_path / "toys")
    run, out = tmp_path / "run", tmp_path / "out"
    file = run / "concepts" / "teal_cup" / "catversion.safetensors"
    given = {"base_class": "cup", "name": "teal_cup", "base_model": str(one_block_xl_folder)}
    fingerprints = load_backbone(one_block_xl_folder).fingerprints
    save_concept(file, residuals(), **given, **fingerprints)
    save_clip(tmp_path / "clip", one_block_xl_folder / "tokenizer")
    (tmp_path / "prompts.txt").write_text("a {} in the snow\n")
    options = {
        "--model": one_block_xl_folder,
        "--clip": tmp_path / "clip",
        "--concepts": tmp_path / "toys",
        "--prompts": tmp_path / "prompts.txt",
        "--output_dir": out,
        "--num_inference_steps": 2,
        "--num_images_per_prompt": 1,
        "--num_prior_images": 1,
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert main(["evaluate", str(run), *words]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["protocol"]["text encoder 2 sha256"] == fingerprints["text_encoder_2_sha256"]
    assert list(out.glob("images/teal_cup/**/*.png"))
