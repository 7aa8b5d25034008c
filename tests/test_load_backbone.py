"""Loading a whole folder or hub id, and what is said when it cannot be."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from torch_reference import draw, nchw, nhwc, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.models.lone_text_encoder import load_text_encoder
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.models.weights.hub import locate_model
from catversion_jax.models.weights.network import Network


def check_equals_torch(folder: Path, prompt: str, tolerance: float = 1e-4) -> None:
    """Every network of a folder against the diffusers pipeline of the same folder, float32."""
    ours = load_backbone(folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    ids = ours.tokenizer([prompt])
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    pixels, latents = draw(1, 2 * size, 2 * size, 3), draw(1, size, size, channels, seed=1)
    with torch.no_grad():
        text = pipe.text_encoder(torch.tensor(ids).long())[0]
        noise = pipe.unet(nchw(latents), 37, text).sample
        posterior = pipe.vae.encode(nchw(pixels)).latent_dist
        image = pipe.vae.decode(nchw(latents)).sample
    assert relative_error(ours.text_encoder(ids), text) < tolerance
    assert (
        relative_error(jax.jit(Network.__call__)(ours.unet, latents, 37, text.numpy()), nhwc(noise))
        < tolerance
    )
    call = jax.jit(Network.call, static_argnums=1)
    mean, std = call(ours.vae, "encode", pixels)
    assert relative_error(mean, nhwc(posterior.mean)) < tolerance
    assert relative_error(std, nhwc(posterior.std)) < tolerance
    assert relative_error(call(ours.vae, "decode", latents), nhwc(image)) < tolerance
    assert relative_error(load_text_encoder(folder / "text_encoder")(ids), text) < tolerance


def test_every_network_equals_the_pipeline(tiny_sd_folder):
    check_equals_torch(tiny_sd_folder, "a teapot")


@pytest.mark.slow
def test_every_network_of_the_real_model_equals_the_pipeline(embedded_model):
    """Its weights are stored in float16 and read into float32 on both sides."""
    check_equals_torch(embedded_model, "a red ball on the beach")


def test_facts_about_the_folder(tiny_sd_folder):
    ours = load_backbone(str(tiny_sd_folder))
    assert (ours.name, ours.folder) == (str(tiny_sd_folder), tiny_sd_folder)
    assert (ours.num_text_layers, ours.num_heads, ours.head_dim) == (4, 4, 8)
    assert (ours.latent_downsampling, ours.latent_channels, ours.default_resolution) == (2, 4, 16)
    assert ours.latent_scale == 0.18215
    assert ours.noise_schedule.num_train_timesteps == 1000
    assert len(ours.text_encoder_sha256) == 64


def test_bfloat16_leaves_the_autoencoder_in_float32(tiny_sd_folder):
    ours = load_backbone(tiny_sd_folder, dtype="bfloat16")
    dtypes = {
        name: {leaf.dtype.name for leaf in jax.tree.leaves(getattr(ours, name))}
        for name in ("text_encoder", "unet", "vae")
    }
    assert dtypes == {"text_encoder": {"bfloat16"}, "unet": {"bfloat16"}, "vae": {"float32"}}
    assert ours.text_encoder_sha256 == load_backbone(tiny_sd_folder).text_encoder_sha256
    assert ours.text_encoder(ours.tokenizer(["a cat"])).dtype == jnp.bfloat16


def test_sharding_places_every_weight(tiny_sd_folder):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    ours = load_backbone(tiny_sd_folder, sharding=everywhere)
    for network in (ours.text_encoder, ours.unet, ours.vae):
        assert {leaf.sharding for leaf in jax.tree.leaves(network)} == {everywhere}


# ---- variants ------------------------------------------------------------------------------------


def test_a_component_without_the_variant_is_read_plain(tiny_sd_folder, tmp_path, caplog):
    """An fp16 UNet beside a plain text encoder, as many models on the hub are."""
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "mixed")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    pipe.unet.save_pretrained(folder / "unet", variant="fp16")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    # The remedy of the one message leads to a model that loads.
    with pytest.raises(CatVersionError, match=r"unet: no safetensors .*Pass variant='fp16'"):
        load_backbone(folder)
    mixed, plain = load_backbone(folder, variant="fp16"), load_backbone(tiny_sd_folder)
    assert "text_encoder and vae has no weights of variant 'fp16'; its plain" in caplog.text
    assert mixed.text_encoder_sha256 == plain.text_encoder_sha256
    same = {key for key in plain.digests if plain.digests[key] == mixed.digests[key]}
    assert same == {"text_encoder", "vae", "scheduler"}
    with pytest.raises(CatVersionError, match=r"variant 'bf16'"):  # a slip
        load_backbone(folder, variant="bf16")


def test_fp16_variant_equals_the_fp16_pipeline(tiny_sd_folder, tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd_folder).to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.glob("unet/diffusion_pytorch_model.safetensors"))
    ours = load_backbone(tmp_path, variant="fp16")
    weight = ours.unet.params["conv_in"]["kernel"]
    expected = pipe.unet.conv_in.weight.detach().float().permute(2, 3, 1, 0).numpy()
    np.testing.assert_array_equal(weight, expected)
    assert ours.text_encoder_sha256 == load_backbone(tiny_sd_folder).text_encoder_sha256
    with pytest.raises(
        CatVersionError, match=r"text_encoder: no safetensors weights; .*Pass variant='fp16'"
    ):
        load_backbone(tmp_path)
    with pytest.raises(CatVersionError, match=r"of variant 'bf16'; found .*Pass variant='fp16'"):
        load_backbone(tmp_path, variant="bf16")


# ---- folders that are not a Stable Diffusion -----------------------------------------------------


@pytest.fixture
def broken(tiny_sd_folder, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_sd_folder, tmp_path / "model"))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae", "tokenizer", "scheduler"])
def test_missing_component_is_named(broken, component):
    shutil.rmtree(broken / component)
    with pytest.raises(
        CatVersionError, match=rf"missing component {component}; expected .*Download"
    ):
        load_backbone(broken)


@pytest.mark.parametrize("name", ["text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_missing_configuration_is_named(broken, name):
    (broken / name).unlink()
    with pytest.raises(CatVersionError, match=rf"{name}: not found \(the folder holds"):
        load_backbone(broken)
    (broken / name).write_text("[]")
    with pytest.raises(CatVersionError, match=rf"{name}: holds a list"):
        load_backbone(broken)
    (broken / name).write_text("{")
    with pytest.raises(CatVersionError, match=rf"{name}: cannot be read as JSON"):
        load_backbone(broken)


def test_folder_of_something_else(tmp_path, tiny_sd_folder):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(
        CatVersionError, match=r"not a diffusers folder; expected model_index.json.*photo.jpg"
    ):
        load_backbone(tmp_path)
    with pytest.raises(
        CatVersionError, match=r"not a diffusers folder.*Give the folder that holds model_index"
    ):
        load_backbone(tiny_sd_folder / "unet")


@pytest.mark.parametrize(
    "path", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere", "~/nowhere", ""]
)
def test_folder_that_does_not_exist(path):
    with pytest.raises(CatVersionError, match=r"folder does not exist|not a diffusers folder"):
        load_backbone(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("v1-5-pruned.safetensors", r"not a safetensors file .*Download it again"),
        ("model.ckpt", r"pickled checkpoint.*from_single_file\(file\).save_pretrained"),
    ],
)
def test_an_empty_single_file(tmp_path, name, remedy):
    (tmp_path / name).touch()
    with pytest.raises(CatVersionError, match=remedy):
        load_backbone(tmp_path / name)


def test_pickled_folder(broken):
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        CatVersionError, match=r"unet: no safetensors weights.*Pickled weights can run"
    ):
        load_backbone(broken)


def test_other_pipelines(broken):
    change(
        broken / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]
    )
    with pytest.raises(CatVersionError, match="missing component text_encoder_2, tokenizer_2"):
        load_backbone(broken)
    change(
        broken / "model_index.json", text_encoder_2=[None, None], unet=["diffusers", "UNet2DModel"]
    )
    with pytest.raises(
        CatVersionError, match="its unet is a UNet2DModel, must be a UNet2DConditionModel"
    ):
        load_backbone(broken)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("unet", {"in_channels": 5}, "in_channels = 5.*or 9 for inpainting"),
        (
            "unet",
            {"cross_attention_dim": 64},
            "cross_attention_dim = 64 but text_encoder hidden_size = 32",
        ),
        ("unet", {"sample_size": [8, 16]}, r"sample_size = \[8, 16\]"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("vae", {"shift_factor": 0.1}, "shift_factor"),
        ("text_encoder", {"hidden_act": "relu"}, r"text_encoder/config.json: .*\n.*hidden_act"),
        ("text_encoder", {"intermediate_size": 65}, r"misshaped:\n.*mlp.fc1"),
        ("text_encoder", {"num_hidden_layers": 5}, r"16 missing:\n.*encoder.layers.4"),
        ("text_encoder", {"num_hidden_layers": 3}, r"16 unexpected:\n.*encoder.layers.3"),
    ],
)
def test_configuration_that_does_not_fit(broken, name, values, message):
    change(broken / name / "config.json", **values)
    with pytest.raises(CatVersionError, match=message):
        load_backbone(broken)


def test_unknown_dtype(tiny_sd_folder):
    with pytest.raises(CatVersionError, match=r"dtype='float16': must be one of float32, bfloat16"):
        load_backbone(tiny_sd_folder, dtype="float16")


# ---- the text encoder alone ----------------------------------------------------------------------


def test_text_encoder_of_a_whole_clip_and_with_projection(tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 2,
        "max_position_embeddings": 10,
        "bos_token_id": 58,
        "eos_token_id": 59,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    vision |= {"image_size": 8, "patch_size": 4}
    ids = np.array([[1, 2, 3]], np.int32)
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=sizes, vision_config=vision)
    ).eval()
    projected = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**sizes)
    ).eval()
    for name, model in (("whole", whole), ("projected", projected)):
        model.save_pretrained(tmp_path / name)
        expected = model.text_model(torch.tensor(ids)).last_hidden_state.detach()
        assert relative_error(load_text_encoder(tmp_path / name)(ids), expected) < 1e-4


def test_text_encoder_from_a_pipeline_folder(tiny_sd_folder):
    with pytest.raises(CatVersionError, match=r"whole diffusers folder. Give .*text_encoder"):
        load_text_encoder(tiny_sd_folder)


# ---- hub ids -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_id_from_the_cache(hub, tiny_sd_folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub / "models--someone--tiny"
    shutil.copytree(tiny_sd_folder, repo / "snapshots" / commit)
    for name in ("main", "v2"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    for revision in (None, "v2", commit):
        ours = load_backbone("someone/tiny", revision=revision)
        assert (ours.name, ours.folder) == ("someone/tiny", repo / "snapshots" / commit)
    with pytest.raises(CatVersionError, match=r"someone/tiny: .*offline"):
        load_backbone("someone/tiny", revision="v3")
    with pytest.raises(CatVersionError, match=r"someone/tiny, text_encoder: .* of variant 'fp16'"):
        load_backbone("someone/tiny", variant="fp16")


def test_hub_id_without_network(hub):
    with pytest.raises(
        CatVersionError, match=r"someone/unknown: neither a folder here.*offline.*Connect once"
    ):
        load_backbone("someone/unknown")
    with pytest.raises(
        CatVersionError, match="copies are at stable-diffusion-v1-5/stable-diffusion-v1-5"
    ):
        load_backbone("runwayml/stable-diffusion-v1-5")


def test_local_folder_comes_before_the_hub(hub, tiny_sd_folder, monkeypatch, tmp_path):
    shutil.copytree(tiny_sd_folder, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert locate_model("someone/tiny") == Path("someone/tiny")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            401,
            "RepoNotFound",
            r"neither a folder here nor a model on the Hugging Face hub.*hf auth login",
        ),
        (
            404,
            "RepoNotFound",
            r"neither a folder here nor a model on the Hugging Face hub.*spelling.*search=gated",
        ),
        (
            403,
            "GatedRepo",
            r"access is restricted. Accept the terms on https://huggingface.co/someone/gated",
        ),
        (404, "RevisionNotFound", r"has no revision 'v9'.*tree/main"),
        (401, "Invalid credentials in Authorization header", r"Log in again with 'hf auth login'"),
        (500, "", r"cannot be reached|cannot be downloaded"),
    ],
)
def test_what_the_hub_answers(tmp_path, status, code, message):
    """A server on this machine answers as the hub does; a fresh process, because the address is
    read once.
    """

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "from catversion_jax.models.weights.hub import locate_model\n"
        "from catversion_jax.errors import CatVersionError\n"
        "try: locate_model('someone/gated', revision='v9')\n"
        "except CatVersionError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
    }
    environment |= {"HF_HUB_OFFLINE": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    server.shutdown()
    assert re.search(message, done.stdout), done.stdout + done.stderr
