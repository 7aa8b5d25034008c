"""The autoencoder against torch diffusers' AutoencoderKL."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

torch = pytest.importorskip(
    "torch", reason="parity needs torch and diffusers: pip install '.[test]'"
)
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install '.[test]'")

from torch_reference import SD15_VAE, as_network, draw, nchw, nhwc, randomise, relative_error  # noqa: E402

from catversion_jax.errors import CatVersionError  # noqa: E402
from catversion_jax.models.layers.resnet import LayerFactory  # noqa: E402
from catversion_jax.models.vae import AutoencoderKL, VAEConfig, vae_decode, vae_encode  # noqa: E402
from catversion_jax.models.weights.convert import convert_state_dict, load_network  # noqa: E402
from catversion_jax.models.weights.network import abstract_network  # noqa: E402

SMALL = SD15_VAE | {
    "block_out_channels": [8, 16, 24],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
}
NEWER_KEYS = {
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
    "scaling_factor": 0.5,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
VARIANTS = {
    "sd": SMALL,
    "newer-keys": SMALL | NEWER_KEYS,
    "bare": SMALL
    | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
    "odd-channels": SMALL
    | {"in_channels": 5, "out_channels": 2, "latent_channels": 3, "layers_per_block": 1},
    "gelu": SMALL | {"act_fn": "gelu", "norm_num_groups": 8},
    "one-block": SMALL
    | {
        "block_out_channels": [12],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
}


# Each program runs once: compiling well would cost more than it saves.
QUICK = {"xla_backend_optimization_level": 0}


@jax.jit(compiler_options=QUICK)
def encode(vae, images):
    return vae_encode(vae, images)


@jax.jit(compiler_options=QUICK)
def decode(vae, latents):
    return vae_decode(vae, latents)


def build(config):
    """A torch autoencoder with random weights and our network holding the same."""
    reference = randomise(diffusers.AutoencoderKL.from_config(config))
    return reference, as_network(
        reference, lambda rngs: AutoencoderKL(VAEConfig.from_hf(config), layers=LayerFactory(rngs))
    )


@pytest.fixture(scope="module")
def pair():
    return build(SMALL)


@pytest.mark.parametrize("name", VARIANTS)
def test_encode_and_decode_equal_diffusers(name):
    config = VARIANTS[name]
    reference, vae = build(config)
    images = draw(2, 16, 24, config["in_channels"])
    posterior = reference.encode(nchw(images)).latent_dist
    mean, std = encode(vae, images)
    assert relative_error(mean, nhwc(posterior.mean)) < 1e-4
    assert relative_error(std, nhwc(posterior.std)) < 1e-4

    latents = draw(2, 4, 6, config["latent_channels"], seed=1)
    decoded = decode(vae, latents)
    assert relative_error(decoded, nhwc(reference.decode(nchw(latents)).sample)) < 1e-4


@pytest.mark.parametrize("size", [(17, 16), (19, 23)])
def test_sizes_that_do_not_halve_evenly(size, pair):
    reference, vae = pair
    images = draw(1, *size, 3)
    mean, _ = encode(vae, images)
    assert relative_error(mean, nhwc(reference.encode(nchw(images)).latent_dist.mean)) < 1e-4


def test_each_part_equals_diffusers(pair):
    reference, vae = pair
    ours = nnx.merge(vae.graphdef, vae.params)
    parts = {
        "encoder.down_blocks.0": (8, ours.encoder.down_blocks[0]),
        "encoder.down_blocks.1": (8, ours.encoder.down_blocks[1]),
        "encoder.down_blocks.2": (16, ours.encoder.down_blocks[2]),
        "encoder.down_blocks.0.downsamplers.0": (8, ours.encoder.down_blocks[0].downsamplers[0]),
        "encoder.mid_block.resnets.0": (24, ours.encoder.mid_block.resnets[0]),
        "encoder.mid_block.attentions.0": (24, ours.encoder.mid_block.attentions[0].over_image),
        "decoder.mid_block": (24, ours.decoder.mid_block),
        "decoder.up_blocks.0": (24, ours.decoder.up_blocks[0]),
        "decoder.up_blocks.1": (24, ours.decoder.up_blocks[1]),
        "decoder.up_blocks.2": (16, ours.decoder.up_blocks[2]),
        "quant_conv": (8, ours.quant_conv),
    }
    errors = {}
    for path, (channels, part) in parts.items():
        inputs = draw(2, 10, 6, channels)
        inputs = draw(2, 10, 6, channels)
        no_time = (None,) if "resnets" in path else ()
        expected = reference.get_submodule(path)(nchw(inputs), *no_time)
        errors[path] = relative_error(part(inputs), nhwc(expected))
    assert {path: error for path, error in errors.items() if not error < 1e-5} == {}


def test_log_variance_is_clamped():
    reference, vae = build(SMALL)
    with torch.no_grad():  # far beyond both ends of [-30, 20]
        reference.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, -40.0, 30.0])
    vae = convert_state_dict(reference.state_dict(), vae)
    images = draw(1, 16, 16, 3)
    expected = nhwc(reference.encode(nchw(images)).latent_dist.std)
    _, std = encode(vae, images)
    assert relative_error(std, expected) < 1e-5
    assert float(std[..., 0].max()) == pytest.approx(float(jnp.exp(-15.0)))


def test_published_names_of_the_old_attention_load(pair):
    reference, vae = pair
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in reference.state_dict().items():
        for new, old in old_names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
    loaded = convert_state_dict(
        tensors,
        abstract_network(
            lambda rngs: AutoencoderKL(VAEConfig.from_hf(SMALL), layers=LayerFactory(rngs))
        ),
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded.params, vae.params))


def test_concept_axis(pair):
    _, vae = pair
    images = draw(2, 1, 16, 16, 3)
    mean, std = jax.vmap(encode, in_axes=(None, 0))(vae, images)
    flat_mean, flat_std = encode(vae, images[:, 0])
    assert relative_error(mean[:, 0], flat_mean) < 1e-5
    assert relative_error(std[:, 0], flat_std) < 1e-5


def test_the_published_config_makes_the_published_number_of_parameters():
    vae = abstract_network(
        lambda rngs: AutoencoderKL(VAEConfig.from_hf(SD15_VAE), layers=LayerFactory(rngs))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(vae.params)) == 83_653_863


# latents_mean and latents_std of vae/config.json of playground-v2.5-1024px-aesthetic
PLAYGROUND = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
    "shift_factor": 0.0,
}


def test_whitened_latents_are_those_of_diffusers_pipelines():
    """``StableDiffusionXLPipeline`` decodes ``latents * std / scaling_factor + mean``."""
    reference = randomise(diffusers.AutoencoderKL.from_config(SMALL))
    vae = as_network(
        reference,
        lambda rngs: AutoencoderKL(
            VAEConfig.from_hf(SMALL | PLAYGROUND), layers=LayerFactory(rngs)
        ),
    )
    mean, std = (
        torch.tensor(PLAYGROUND[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std")
    )
    images, latents = draw(1, 8, 8, 3), draw(1, 2, 2, 4, seed=1)
    posterior = reference.encode(nchw(images)).latent_dist
    found_mean, found_std = encode(vae, images)
    assert relative_error(found_mean, nhwc((posterior.mean - mean) / std)) < 1e-4
    assert relative_error(found_std, nhwc(posterior.std / std)) < 1e-4
    expected = reference.decode(nchw(latents) * std + mean).sample
    assert relative_error(decode(vae, latents), nhwc(expected)) < 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"latents_mean": [0.0] * 4}, "latents_mean .*given together"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 0.0]}, "latents_std .*above 0"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "a list of 4 numbers"),
        ({"latents_mean": ["0"] * 4, "latents_std": [1.0] * 4}, "latents_mean = '0'"),
        ({"latents_std": [1.0] * 4}, "latents_std"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "once for each entry"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"layers_per_block": [1, 2, 1]}, "layers_per_block"),
        ({"use_quant_conv": None}, "use_quant_conv"),
    ],
)
def test_unsupported_config_is_named(change, named):
    with pytest.raises(CatVersionError, match=named):
        VAEConfig.from_hf(SMALL | change)


def test_the_embedded_model(embedded_model):
    folder = embedded_model / "vae"
    reference = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    vae = load_network(
        lambda rngs: AutoencoderKL(VAEConfig.from_hf(reference.config), layers=LayerFactory(rngs)),
        folder,
    )
    images, latents = draw(1, 64, 64, 3), draw(1, 16, 16, 4)
    with torch.no_grad():
        posterior = reference.encode(nchw(images)).latent_dist
        decoded = reference.decode(nchw(latents)).sample
    mean, std = encode(vae, images)
    assert relative_error(mean, nhwc(posterior.mean)) < 1e-4
    assert relative_error(std, nhwc(posterior.std)) < 1e-4
    assert relative_error(decode(vae, latents), nhwc(decoded)) < 1e-4
