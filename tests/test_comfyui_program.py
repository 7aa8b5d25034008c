"""The example workflow of ``integrations/comfyui`` in the whole ComfyUI, started as a program.

    COMFYUI_PATH=folder pytest -m slow tests/test_comfyui_program.py

where the folder is a clone of ComfyUI whose requirements are installed.
"""

import dataclasses
import json
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_nodes import COMFYUI, NODES, learned
from safetensors.torch import save_file
from torch_reference import TEXT_ENCODERS
from transformers import CLIPTextConfig, CLIPTextModel

from catversion_jax.methods.concept_file import save_concept


def api_form(workflow: dict) -> dict:
    """What the page makes of a workflow when it is queued."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    widgets = {
        "CheckpointLoaderSimple": ["ckpt_name"],
        "LoadCatVersionConcept": ["concept", "scale", "when", "force", "keep_apart"],
        "CLIPTextEncode": ["text"],
        "EmptyLatentImage": ["width", "height", "batch_size"],
        "KSampler": ["seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        "VAEDecode": [],
        "SaveImage": ["filename_prefix"],
    }
    prompt = {}
    for node in workflow["nodes"]:
        named = zip(widgets[node["type"]], node["widgets_values"], strict=True)
        inputs = {name: value for name, value in named if name}
        inputs |= {one["name"]: links[one["link"]] for one in node["inputs"]}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def write_checkpoint(path: Path) -> None:
    """A file of Stable Diffusion 1.5's form: its text encoder and VAE, a shallow UNet."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from single_files import original_state_dict
    from torch_reference import SD15_UNET, SD15_VAE

    from catversion_jax.models.weights.families import SD1

    shallow = SD15_UNET | {
        "block_out_channels": [320, 640],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    }
    family = dataclasses.replace(SD1, configs=SD1.configs | {"unet": shallow, "vae": SD15_VAE})
    torch.manual_seed(0)
    parts = types.SimpleNamespace(
        unet=UNet2DConditionModel.from_config(shallow),
        vae=AutoencoderKL.from_config(SD15_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS["SD 1.5"])),
    )
    state = original_state_dict(parts, family)
    save_file({name: tensor.half() for name, tensor in state.items()}, path)


@pytest.mark.slow  # starts the whole program and makes a checkpoint of 600 MB: a minute
def test_the_example_workflow_runs_in_the_whole_program(tmp_path):
    """Headless on the CPU, the workflow as it is shipped but for size and steps; the concept is
    seen.
    """
    models = tmp_path / "models"
    (models / "checkpoints").mkdir(parents=True)
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "user").mkdir()
    (tmp_path / "custom_nodes" / "catversion").symlink_to(NODES)
    what = learned("SD 1.5", 0, logit_bias=3.0)
    save_concept(models / "catversion" / "catversion.safetensors", what, base_class="teapot")
    write_checkpoint(models / "checkpoints" / "v1-5-pruned-emaonly.safetensors")
    prompt = api_form(
        json.loads((NODES / "example_workflows" / "catversion_sd15.json").read_text())
    )
    prompt["5"]["inputs"] |= {"width": 64, "height": 64}
    prompt["6"]["inputs"]["steps"] = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["main.py", "--cpu", "--disable-api-nodes", "--disable-auto-launch"]
    command += ["--base-directory", str(tmp_path), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([sys.executable, *command], cwd=COMFYUI, stdout=log, stderr=log) as server,
    ):
        try:
            pictures = []
            for scale in (1.0, 0.0):
                prompt["2"]["inputs"]["scale"] = scale
                pictures.append(drawn(address, prompt, tmp_path, server))
        finally:
            server.terminate()
    assert pictures[0].shape == (64, 64, 3)
    assert not np.array_equal(*pictures)


def drawn(address: str, prompt: dict, folder: Path, server) -> np.ndarray:
    from PIL import Image

    def ask(path: str, data: dict | None = None) -> dict:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(address + path, body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    end = time.monotonic() + 240
    while True:
        try:
            ask("/system_stats")
            break
        except OSError:
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < end, "ComfyUI did not start"
            time.sleep(1)
    accepted = ask("/prompt", {"prompt": prompt})
    assert not accepted["node_errors"]
    while not (done := ask(f"/history/{accepted['prompt_id']}")):
        assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(1)
    (result,) = done.values()
    assert result["status"]["status_str"] == "success", result["status"]
    (image,) = result["outputs"]["8"]["images"]
    with Image.open(folder / "output" / image["filename"]) as picture:
        return np.asarray(picture.convert("RGB"))
