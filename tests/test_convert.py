"""Names, layouts, files and memory of weight loading; files are written by safetensors, diffusers
and torch.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax import nnx
from torch_reference import draw, randomise, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.models.weights.convert import convert_state_dict, load_network
from catversion_jax.models.weights.fingerprint import text_encoder_sha256
from catversion_jax.models.weights.network import abstract_network
from catversion_jax.models.weights.safetensors_files import open_checkpoint

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
}
IDS = np.array([[3, 1, 4, 1, 5]], np.int32)


class Layers(nnx.Module):
    """One of each kind of parameter."""

    def __init__(self, rngs):
        self.blocks = nnx.List(
            [nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 5, use_bias=False, rngs=rngs)]
        )
        self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(6, num_groups=2, rngs=rngs)
        self.table = nnx.Embed(7, 7, rngs=rngs)
        self.offset = nnx.Param(jnp.zeros(2))


def layers_state_dict() -> dict[str, np.ndarray]:
    shapes = {
        "blocks.0.weight": (3, 3),
        "blocks.0.bias": (3,),
        "blocks.1.weight": (5, 3),
        "conv.weight": (6, 4, 3, 3),
        "conv.bias": (6,),
        "norm.weight": (6,),
        "norm.bias": (6,),
        "table.weight": (7, 7),
        "offset": (2,),
    }
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def test_layouts_equal_torch():
    """Square weights included, where a forgotten transpose keeps the shape."""
    weights = layers_state_dict()
    network = convert_state_dict(weights, abstract_network(Layers))
    module = nnx.merge(network.graphdef, network.params)
    torch_weights = {name: torch.tensor(array) for name, array in weights.items()}
    x = draw(2, 3)
    expected = torch.tensor(x) @ torch_weights["blocks.0.weight"].T + torch_weights["blocks.0.bias"]
    assert relative_error(module.blocks[0](x), expected) < 1e-5
    image = draw(1, 8, 9, 4)
    expected = torch.nn.functional.conv2d(
        torch.tensor(image).permute(0, 3, 1, 2),
        torch_weights["conv.weight"],
        torch_weights["conv.bias"],
        padding="same",
    )
    assert relative_error(module.conv(image), expected.permute(0, 2, 3, 1)) < 1e-5
    np.testing.assert_array_equal(module.table(jnp.array([2])), weights["table.weight"][[2]])
    np.testing.assert_array_equal(network.params["offset"], weights["offset"])


def test_equal_networks_are_traced_once_and_share_nothing_that_changes():
    traced = []

    def make(sizes: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Linear:
        traced.append(sizes)
        return nnx.Linear(*sizes, rngs=rngs)

    first, second, other = (
        abstract_network(functools.partial(make, sizes)) for sizes in ((2, 3), (2, 3), (2, 4))
    )
    assert traced == [(2, 3), (2, 4)]
    assert first == second != other
    assert other.params["kernel"].shape == (2, 4)
    del first.params["kernel"]
    assert abstract_network(functools.partial(make, (2, 3))).params == second.params


def test_one_error_lists_missing_unexpected_and_misshaped():
    weights = layers_state_dict()
    del weights["norm.bias"], weights["offset"]
    weights |= {
        "stray.weight": np.zeros(2),
        "conv.weight": np.zeros((4, 6, 3, 3)),
        "table.weight": np.zeros((7, 8)),
    }
    with pytest.raises(CatVersionError) as error:
        convert_state_dict(weights, abstract_network(Layers), source="some/folder")
    message = str(error.value)
    for part in (
        "some/folder",
        "2 missing:\n  norm.bias\n  offset",
        "1 unexpected:\n  stray.weight",
        "2 misshaped:",
        "conv.weight: [4, 6, 3, 3], expected [6, 4, 3, 3]",
        "table.weight: [7, 8], expected [7, 7]",
        "Check that weights and config.json belong",
    ):
        assert part in message


def test_two_names_for_one_parameter():
    weights = layers_state_dict()
    weights["text_model.offset"] = weights["offset"]
    with pytest.raises(
        CatVersionError, match=r"text_model.offset \(the same parameter as offset\)"
    ):
        convert_state_dict(weights, abstract_network(Layers))


def old_attention(weights: dict[str, np.ndarray], *, conv: bool) -> dict[str, np.ndarray]:
    """What diffusers wrote before 0.17 for the autoencoder's attention."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in weights.items():
        for new, before in old.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{before}.")
                array = array[..., None, None] if conv and array.ndim == 2 else array
        renamed[name] = array
    return renamed


@pytest.mark.parametrize("conv", [False, True])
def test_old_autoencoder_attention(conv):
    diffusers = pytest.importorskip("diffusers")
    sizes = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    reference = randomise(diffusers.AutoencoderKL(**sizes))
    weights = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    target = abstract_network(
        lambda rngs: AutoencoderKL(VAEConfig.from_hf(sizes), layers=LayerFactory(rngs))
    )
    present = convert_state_dict(weights, target)
    renamed = old_attention(weights, conv=conv)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    for ours, theirs in zip(
        jax.tree.leaves(convert_state_dict(renamed, target).params),
        jax.tree.leaves(present.params),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


# ---- files ---------------------------------------------------------------------------------------


def text_encoder() -> transformers.CLIPTextModel:
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES)))


def load(folder: Path, **options):
    config = CLIPTextConfig(**SIZES)
    return load_network(
        lambda rngs: CLIPTextModel(config, param_dtype=jnp.float32, rngs=rngs), folder, **options
    )


def nested(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()
    }


def flattened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def test_both_spellings_of_clip_and_position_ids(tmp_path):
    """SD 1.5's file: the prefix, and a buffer; today's transformers writes neither."""
    model = text_encoder()
    expected = model(torch.tensor(IDS)).last_hidden_state
    buffer = {"text_model.embeddings.position_ids": torch.arange(10)[None]}
    for name, weights in (
        ("old", nested(model.state_dict()) | buffer),
        ("new", flattened(model.state_dict())),
    ):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(weights, tmp_path / name / "model.safetensors")
        assert relative_error(load(tmp_path / name)(IDS), expected) < 1e-4


def test_shards_of_both_libraries(tmp_path):
    model = text_encoder()
    model.save_pretrained(tmp_path / "plain", max_shard_size="8KB")
    model.save_pretrained(tmp_path / "variant", max_shard_size="8KB", variant="fp16")
    assert len(list((tmp_path / "plain").glob("model-*-of-*.safetensors"))) > 1
    expected = model(torch.tensor(IDS)).last_hidden_state
    assert relative_error(load(tmp_path / "plain")(IDS), expected) < 1e-4
    assert relative_error(load(tmp_path / "variant", variant="fp16")(IDS), expected) < 1e-4

    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    for folder, variant in (("vae", None), ("vae16", "fp16")):
        vae.save_pretrained(tmp_path / folder, max_shard_size="8KB", variant=variant)
        tensors = open_checkpoint(tmp_path / folder, variant=variant)
        assert len({tensor.path for tensor in tensors.values()}) > 1
        for name, tensor in vae.state_dict().items():
            np.testing.assert_array_equal(np.asarray(tensors[name]), tensor.numpy())


def test_missing_shard(tmp_path):
    text_encoder().save_pretrained(tmp_path, max_shard_size="8KB")
    lost = sorted(tmp_path.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(CatVersionError, match=rf"shards are missing beside it: \['{lost.name}'\]"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtypes(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in text_encoder().state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    ours = load(tmp_path)
    table = ours.params["embeddings"]["token_embedding"]["embedding"]
    assert table.dtype == jnp.float32
    stored = flattened(weights)["embeddings.token_embedding.weight"]
    np.testing.assert_array_equal(table, stored.float().numpy())


def test_variant_that_is_not_there_says_what_is(tmp_path):
    model = text_encoder()
    model.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(CatVersionError, match=r"no safetensors weights; found .*variant='fp16'"):
        load(tmp_path)
    with pytest.raises(CatVersionError, match=r"of variant 'bf16'; .*variant='fp16'"):
        load(tmp_path, variant="bf16")
    model.save_pretrained(tmp_path)
    with pytest.raises(CatVersionError, match=r"variant=None or variant='fp16'"):
        load(tmp_path, variant="bf16")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", "model.pt"]
)
def test_pickled_weights_are_refused_with_the_remedy(tmp_path, name):
    torch.save({}, tmp_path / name)
    with pytest.raises(CatVersionError, match=rf"{name}.*run arbitrary code.*save_pretrained"):
        load(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CatVersionError, match=r"found \[\]\. Expected .* or model.safetensors"):
        load(tmp_path)
    with pytest.raises(CatVersionError, match="folder does not exist"):
        load(tmp_path / "nowhere")


def test_damaged_files(tmp_path):
    text_encoder().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], r"lies outside the file .*Download it again"),
        (whole[:4], r"not a safetensors file \(4 bytes"),
        (b"", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (whole[:8] + b"?" + whole[9:], "damaged safetensors header"),
    ):
        path.write_bytes(content)
        with pytest.raises(CatVersionError, match=message):
            load(tmp_path)


# ---- the text encoder's hash ---------------------------------------------------------------------


def torch_sha256(state_dict: dict[str, torch.Tensor]) -> str:
    """Equation (1) of fingerprint.py on the torch side."""
    import hashlib

    digest = hashlib.sha256()
    for key, tensor in sorted(flattened(state_dict).items()):
        if "token_embedding" not in key and "position_ids" not in key:
            digest.update(key.encode() + tensor.half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_fingerprint_is_that_of_torch_whatever_the_folder(tmp_path):
    model = text_encoder()
    weights = model.state_dict()
    folders = {
        "single": nested(weights) | {"text_model.embeddings.position_ids": torch.arange(10)[None]},
        "flat": flattened(weights),
        "half": {name: tensor.half() for name, tensor in weights.items()},
    }
    for name, content in folders.items():
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(content, tmp_path / name / "model.safetensors")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    hashes = {text_encoder_sha256(open_checkpoint(folder)) for folder in tmp_path.iterdir()}
    assert hashes == {torch_sha256(weights)}


def test_fingerprint_sees_weights_but_not_added_tokens():
    weights = flattened(text_encoder().state_dict())
    before = text_encoder_sha256(weights)
    more = weights["embeddings.token_embedding.weight"]
    assert (
        text_encoder_sha256(
            weights | {"embeddings.token_embedding.weight": torch.cat([more, more])}
        )
        == before
    )
    changed = weights["final_layer_norm.bias"].clone()
    changed[3] += 0.01
    assert text_encoder_sha256(weights | {"final_layer_norm.bias": changed}) != before


# ---- memory --------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import jax, jax.numpy as jnp
from flax import nnx
from catversion_jax.models.weights.convert import load_network

class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(2048, 2048, use_bias=False, rngs=rngs) for _ in range(24)]
        )

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

jax.block_until_ready(jnp.ones(3) + 1)
before = peak()
network = load_network(Stack, sys.argv[1], dtype=sys.argv[2])
print(json.dumps([before, peak(), sum(leaf.nbytes for leaf in jax.tree.leaves(network.params))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak is read from Linux' /proc"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_while_loading(tmp_path, dtype):
    """A 400 MB checkpoint. On a CPU the weights themselves are host memory; beyond them stay a few
    tensors.
    """
    weights = {f"layers.{i}.weight": np.full((2048, 2048), i, np.float32) for i in range(24)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    checkpoint = (tmp_path / "model.safetensors").stat().st_size
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    before, peak, placed = json.loads(result.stdout.splitlines()[-1])
    assert peak - before < placed + 200e6  # measured: 84 MB and 102 MB over the weights
    assert peak - before < checkpoint + 1e9
