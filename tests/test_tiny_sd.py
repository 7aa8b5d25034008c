"""The embedded model and the examples: complete, small, the same in PyTorch, and not memorised."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.assets import embedded_folder
from catversion_jax.concepts import read_concepts
from catversion_jax.concepts.images import load_image
from catversion_jax.config import make_config
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.requests import ImageRequest
from catversion_jax.training.predicted_start import StartPredictor

ROOT = Path(__file__).resolve().parents[1]
FOLDER = embedded_folder("tiny-sd")
EXAMPLES = embedded_folder("tiny-sd-examples")
PROMPT = "a red cat on the beach"


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(ROOT / "tools" / "tiny_sd"))
    try:
        import world
    finally:
        sys.path.pop(0)
    return world


def test_the_package_holds_a_complete_folder_of_at_most_25_mb():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    parts = {path.name for path in FOLDER.iterdir()}
    assert {"text_encoder", "unet", "vae", "tokenizer", "scheduler", "clip", "README.md"} <= parts
    assert size <= 25e6


def test_the_clip_text_tower_is_the_text_encoder():
    from safetensors.numpy import load_file

    clip = load_file(FOLDER / "clip" / "model.safetensors")
    text = load_file(FOLDER / "text_encoder" / "model.safetensors")
    prefix = "text_model."
    tower = {k.removeprefix(prefix): v for k, v in clip.items() if k.startswith(prefix)}
    assert all(name.startswith(prefix) for name in text)  # transformers < 5.6 reads no others
    text = {k.removeprefix(prefix): v for k, v in text.items()}
    assert len(text) > 90
    assert all(np.array_equal(tower[name], value) for name, value in text.items())


def test_its_concept_encoder_is_for_this_very_model_and_no_example():
    config = make_config({"concepts": "x", "preset": "fast", "init": "predicted"})
    predictor = StartPredictor.of(config.method_options, load_backbone(FOLDER))
    assert predictor is not None  # text encoder, CLIP and options are those of the fit
    rng = np.random.default_rng(0)
    own = KVResidual(*rng.normal(size=(2, 3, 4, 5, 32)).astype(np.float32), (3, 4, 5))
    found = {}
    for spec in read_concepts(EXAMPLES).concepts:
        assert spec.name not in predictor.encoder.fitted_on
        images = [load_image(source, resolution=64) for source in spec.images]
        starts = [predictor.start(images, spec.base_class, own) for _ in range(2)]
        assert np.array_equal(starts[0].value, starts[1].value)
        found[spec.name] = starts[0].value - own.value
    assert len(predictor.encoder.fitted_on) == 578
    flat = np.stack([value.ravel() for value in found.values()])
    cosines = np.corrcoef(flat) - np.eye(len(flat))
    assert cosines.max() < 0.95  # every thing has its own


def test_the_same_image_as_diffusers_draws_from_the_unchanged_folder():
    """Twelve guided DDIM steps; a whole network's tolerance, 1e-4."""
    import torch
    from diffusers import StableDiffusionPipeline

    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT,
        num_inference_steps=12,
        guidance_scale=5.0,
        latents=torch.from_numpy(latents),
        output_type="np",
        height=64,
        width=64,
    ).images
    settings = SamplingSettings(sampler="ddim", num_inference_steps=12, guidance_scale=5.0)
    images = draw_requests(
        load_backbone("tiny-sd"), [ImageRequest(PROMPT, (), 0)], settings, latents=latents
    ).pixels
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_the_examples_are_held_out_concepts_with_masks(world):
    concepts = read_concepts("tiny-sd-examples").concepts
    held_out = world.held_out()
    assert len(concepts) >= 4
    for spec in concepts:
        assert spec.name in held_out
        assert spec.base_class == held_out[spec.name].drawing.split("/")[0]
        assert 3 <= len(spec.images) <= 5
        assert all(image.mask is not None for image in spec.images)


def test_no_named_instance_is_a_held_out_one(world):
    """At least 20 concepts of 10 classes, fixed, and outside what captions call by name."""
    held_out = list(world.held_out().values())
    assert len(held_out) >= 20
    assert len({instance.drawing.split("/")[0] for instance in held_out}) >= 10
    entries = json.loads((ROOT / "tools/tiny_sd/sprites.json").read_text())
    drawings = [
        world.Drawing(e["class_word"], e["family"], tuple(e["colours"]), e["form"]) for e in entries
    ]
    named = world.named_instances(drawings)
    assert len(named) > 100
    assert not {i.drawing for i in named} & world.held_out_drawings()
    taken = {(i.drawing, i.colouring.first) for i in named if i.colouring.kind != "natural"}
    assert not taken & {
        (i.drawing, i.colouring.first) for i in held_out if i.colouring.kind != "natural"
    }


def test_the_tokenizer_knows_every_word_as_one_token(world):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    words = {
        word for phrases in world.PLACES.values() for phrase in phrases for word in phrase.split()
    } | {word for name in world.CLASSES for word in name.split()}
    assert len(words) > 60
    assert all(len(tokenizer(word)["input_ids"]) == 3 for word in words)
