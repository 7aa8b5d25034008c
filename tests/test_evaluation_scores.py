"""Each score against something we did not write: transformers, scipy, loops by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from PIL import Image
from torch_reference import draw, nchw, randomise, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation import bootstrap_interval
from catversion_jax.evaluation.alignment import (
    among_themselves,
    copy_limit,
    mean_pairwise_cosine,
    nearest_reference,
    overall,
)
from catversion_jax.evaluation.masked_crops import masked_crop
from catversion_jax.models.embedders import ImageEmbedder
from catversion_jax.models.vit import load_vit

VIT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    reference = randomise(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    reference.save_pretrained(folder)
    return folder, reference


def test_vit_equals_transformers(vit):
    folder, reference = vit
    network, size = load_vit(folder)
    pixels = draw(2, 32, 32, 3)
    expected = reference(nchw(pixels)).last_hidden_state[:, 0]
    assert size == 32
    assert relative_error(network.call("image_embeds", pixels), expected) < 1e-4


def test_another_network_is_no_vit(tmp_path):
    transformers.Dinov2Config(**VIT | {"mlp_ratio": 2}).save_pretrained(tmp_path)
    with pytest.raises(CatVersionError, match=r"'dinov2'.*needs a ViTModel.*dino-vits16"):
        load_vit(tmp_path)


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (50, 71), (31, 33), (90, 40)])
def test_preparation_equals_transformers(vit, shape):
    folder, _ = vit
    network, size = load_vit(folder)
    mean, std = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
    ours = ImageEmbedder(folder, network, size, mean, std)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=mean,
        image_std=std,
    )
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vector = vit[1](expected).last_hidden_state[0, 0].numpy()
    assert np.abs(ours.images([picture])[0] - vector / np.linalg.norm(vector)).max() < 1e-5


def test_a_vector_does_not_depend_on_the_other_pictures(vit):
    folder, _ = vit
    ours = ImageEmbedder(folder, *load_vit(folder), (0.5,) * 3, (0.5,) * 3)
    pictures = list(np.random.default_rng(1).integers(0, 256, (19, 40, 40, 3), dtype=np.uint8))
    np.testing.assert_array_equal(ours.images(pictures)[17:], ours.images(pictures[17:]))
    assert len(ours.images([])) == 0


def crop_by_hand(image, mask, fill):
    """Pixel by pixel, with lists."""
    height, width = mask.shape
    inside = [(y, x) for y in range(height) for x in range(width) if mask[y, x] >= 128]
    top, bottom = min(y for y, _ in inside), max(y for y, _ in inside)
    left, right = min(x for _, x in inside), max(x for _, x in inside)
    tall, wide = bottom - top + 1, right - left + 1
    side = max(tall, wide) + 2 * round(max(tall, wide) / 10)
    result = np.zeros((side, side, 3), np.uint8)
    for row in range(side):
        for column in range(side):
            y = top - (side - tall) // 2 + row
            x = left - (side - wide) // 2 + column
            for channel in range(3):
                value = 255 * fill[channel]
                if 0 <= y < height and 0 <= x < width:
                    share = mask[y, x] / 255
                    value = share * image[y, x, channel] + (1 - share) * value
                result[row, column, channel] = round(value)
    return result


@pytest.mark.parametrize(
    "box", [(10, 30, 5, 25), (0, 24, 20, 32), (3, 4, 3, 4), (0, 24, 0, 32), (20, 24, 0, 31)]
)
def test_masked_crop_equals_a_second_implementation(box):
    rng = np.random.default_rng(sum(box))
    image = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    mask = np.zeros((24, 32), np.uint8)
    mask[box[0] : box[1], box[2] : box[3]] = 255
    mask[0, 0] = 90  # a soft pixel outside the box
    fill = np.array([0.4815, 0.4578, 0.4082])
    ours = masked_crop(image, mask, fill)
    np.testing.assert_array_equal(ours, crop_by_hand(image, mask, fill))


def test_an_empty_mask_gives_no_crop():
    assert masked_crop(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 127), np.zeros(3)) is None


def test_alignment_equals_loops():
    rng = np.random.default_rng(0)
    generated, references = (
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (rng.normal(size=(5, 7)), rng.normal(size=(3, 7)))
    )
    cosines = [
        [sum(float(a) * float(b) for a, b in zip(g, r, strict=True)) for r in references]
        for g in generated
    ]
    pairs = [float(references[i] @ references[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_pairwise_cosine(generated, references) == pytest.approx(np.mean(cosines))
    assert among_themselves(references) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert copy_limit(references) == pytest.approx(max(pairs), rel=1e-5)
    assert nearest_reference(generated, references) == pytest.approx(np.max(cosines, axis=1))
    assert overall(0.8, 0.2) == pytest.approx(math.sqrt(0.16))
    assert overall(0.8, -0.1) == 0
    assert overall(None, 0.2) is None
    assert mean_pairwise_cosine(generated[:0], references) is None
    assert copy_limit(references[:1]) is None


def test_bootstrap_equals_scipy():
    values = np.random.default_rng(3).normal(0.7, 0.1, size=20)
    ours = bootstrap_interval(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=50_000, rng=np.random.default_rng(5)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(values.mean())
    assert abs(ours.low - theirs.low) < 0.03 * width
    assert abs(ours.high - theirs.high) < 0.03 * width
    assert bootstrap_interval(values) == ours


def test_bootstrap_of_two_concepts_in_closed_form():
    """The mean of two draws is low, middle or high with probability 1/4, 1/2, 1/4."""
    interval = bootstrap_interval([0.2, 0.4])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.3, 0.2, 0.4))
    middle = bootstrap_interval([0.2, 0.4], confidence=0.4)
    assert (middle.low, middle.high) == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [
        ([0.5], 0.95, "at least two"),
        ([0.5, math.nan], 0.95, "finite"),
        ([0.5, 0.6], 95, r"confidence=95: must be between 0 and 1"),
    ],
)
def test_no_interval_without_numbers(values, confidence, message):
    with pytest.raises(CatVersionError, match=message):
        bootstrap_interval(values, confidence=confidence)
