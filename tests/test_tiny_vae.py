"""TAESD against diffusers' AutoencoderTiny, and sample grids that are decoded by it."""

import jax
import numpy as np
import pytest

from catversion_jax.config import RecordingOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.models.tiny_vae import TinyVAE, TinyVAEConfig, with_tiny_vae
from catversion_jax.models.weights.network import abstract_network
from catversion_jax.sampling.denoising import decode_latents
from catversion_jax.training.validation import SampleGrids

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from torch_reference import draw, nchw, nhwc, randomise, relative_error  # noqa: E402

# config.json of madebyollin/taesd
TAESD = {
    "_class_name": "AutoencoderTiny",
    "act_fn": "relu",
    "block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
# two pixels per latent position, as the tiny model of these tests has
SMALL = TAESD | {
    "decoder_block_out_channels": [8, 8],
    "encoder_block_out_channels": [8, 8],
    "num_decoder_blocks": [2, 1],
    "num_encoder_blocks": [1, 1],
    "scaling_factor": 0.7,
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taesd")
    randomise(diffusers.AutoencoderTiny.from_config(SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder):
    return load_backbone(one_block_sd_folder)


def test_pictures_equal_diffusers(backbone, tiny_folder):
    """In the range that a picture has; ours are clipped to it."""
    latents = draw(2, 6, 8, 4)
    reference = diffusers.AutoencoderTiny.from_pretrained(tiny_folder)
    with torch.no_grad():
        expected = nhwc(reference.decode(nchw(latents) / SMALL["scaling_factor"]).sample)
    preview = with_tiny_vae(backbone, tiny_folder)
    found = preview.vae.call("decode", latents / preview.latent_scale)
    assert relative_error(found, expected) < 1e-4
    pixels = decode_latents(preview, latents)
    assert np.abs(pixels - np.clip(expected / 2 + 0.5, 0, 1)).max() < 1e-3
    assert pixels.std() > 0.05


def test_the_published_configuration_has_diffusers_tensors():
    config = TinyVAEConfig.from_hf(TAESD)
    ours = abstract_network(lambda rngs: TinyVAE(config, layers=LayerFactory(rngs)))
    with torch.device("meta"):
        reference = diffusers.AutoencoderTiny.from_config(TAESD)
    expected = sum(p.numel() for p in reference.decoder.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(ours.params)) == expected
    assert config.downsampling == 8


def test_sample_grids_are_decoded_by_it(backbone, tiny_folder):
    grids = SampleGrids(backbone, RecordingOptions(validation_vae=str(tiny_folder)), 16)
    plain = SampleGrids(backbone, RecordingOptions(), 16)
    assert grids._backbone.vae.graphdef != backbone.vae.graphdef
    assert plain._backbone is backbone


def test_what_is_no_tiny_autoencoder_is_refused_before_training(
    one_block_sd_folder, backbone, tmp_path
):
    def grids(folder):
        return SampleGrids(backbone, RecordingOptions(validation_vae=str(folder)), 16)

    with pytest.raises(CatVersionError, match=r"AutoencoderKL.*must be an AutoencoderTiny"):
        grids(one_block_sd_folder / "vae")
    with pytest.raises(CatVersionError, match=r"not found"):
        grids(tmp_path)
    for_four = SMALL | {
        "decoder_block_out_channels": [8] * 3,
        "num_decoder_blocks": [1, 1, 1],
        "latent_channels": 16,
    }
    diffusers.AutoencoderTiny.from_config(for_four).save_pretrained(tmp_path)
    with pytest.raises(CatVersionError, match=r"16 channels to 4 pixels.*have 4 and 2"):
        grids(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"upsample_fn": "bilinear"}, "upsample_fn"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"num_decoder_blocks": [3, 3]}, "as many entries"),
        ({"num_decoder_blocks": 3}, "num_decoder_blocks"),
        ({"num_decoder_blocks": [1e9] * 4}, "num_decoder_blocks"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
        ({"shift_factor": 0.3}, "shift_factor"),
    ],
)
def test_unsupported_config_is_named(change, named):
    with pytest.raises(CatVersionError, match=named):
        TinyVAEConfig.from_hf(TAESD | change)
