"""A real ComfyUI with the nodes of ``integrations/comfyui``, and diffusers with the same concepts.

Tests that import this file are skipped where ``COMFYUI_PATH`` is not set to a clone of ComfyUI.
"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch_reference import draw
from transformers import CLIPTokenizer

from catversion_jax.integrations import diffusers as loader
from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.per_encoder import PerEncoder
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.clip.vocabulary import write_clip_tokenizer

if "COMFYUI_PATH" not in os.environ:
    pytest.skip(
        "needs the real ComfyUI: COMFYUI_PATH is not set to a clone of it", allow_module_level=True
    )

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "integrations" / "comfyui"
COMFYUI = Path(os.environ["COMFYUI_PATH"])
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def comfyui_here(base: Path):
    """ComfyUI's modules and our nodes in this process, with models in a folder of their own."""
    sys.path.append(str(COMFYUI))
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, str(base)
    import comfy.lora
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.text_encoders.sd2_clip
    import folder_paths

    spec = importlib.util.spec_from_file_location("comfyui_nodes_of_ours", NODES / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return types.SimpleNamespace(
        comfy=comfy, folder=Path(folder_paths.models_dir), nodes=module.NODE_CLASS_MAPPINGS
    )


@dataclasses.dataclass
class Both:
    """One random model in diffusers and in ComfyUI."""

    pipe: object
    clip: object


def tokenizer(folder: Path, pad: str):
    folder.mkdir(parents=True)
    write_clip_tokenizer(folder, pad, 77)
    return CLIPTokenizer.from_pretrained(folder)


def comfy_clip(comfy, kind: str, models: dict, **options):
    """A CLIP as ComfyUI's checkpoint loader makes it, with weights of transformers."""
    sd1, xl = comfy.comfy.sd1_clip, comfy.comfy.sdxl_clip
    sd2 = comfy.comfy.text_encoders.sd2_clip
    classes = {
        "SD 1.5": (sd1.SD1ClipModel, sd1.SD1Tokenizer),
        "SD 2.x": (sd2.SD2ClipModel, sd2.SD2Tokenizer),
        "SDXL": (xl.SDXLClipModel, xl.SDXLTokenizer),
    }
    for name, model in models.items():
        sizes = {key: getattr(model.config, key) for key in SMALL}
        sizes["num_hidden_layers"] = model.config.num_hidden_layers + (name == "clip_h")
        options[f"{name}_model_config"] = sizes
    target = types.SimpleNamespace(params={}, clip=classes[kind][0], tokenizer=classes[kind][1])
    embeddings = str(comfy.folder / "embeddings")
    clip = comfy.comfy.sd.CLIP(target, embedding_directory=embeddings, model_options=options)
    for name, model in models.items():
        state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
        if name == "clip_h":  # the layer behind the one that feeds the UNet
            last = {k: v for k, v in state.items() if "layers.22." in k}
            state |= {k.replace("layers.22.", "layers.23."): v for k, v in last.items()}
        apart = {k: state.pop(k) for k in list(state) if k == "text_projection.weight"}
        state = {f"text_model.{k}": v for k, v in state.items()} | apart
        transformer = getattr(clip.cond_stage_model, name).transformer
        missing, unexpected = transformer.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {"text_projection.weight"}
        if missing:
            torch.nn.init.eye_(transformer.text_projection.weight)
    return clip


def residual(seed: int, heads: int, width: int, layers, **settings) -> KVResidual:
    shape = (len(layers), settings.pop("positions", 1), heads, width)
    return KVResidual(
        draw(*shape, seed=seed), draw(*shape, seed=seed + 1), tuple(layers), **settings
    )


def learned(kind: str, seed: int, **settings):
    if kind == "SD 1.5":
        return residual(seed, 12, 64, (9, 10, 11), **settings)
    if kind == "SD 2.x":
        return residual(seed, 4, 16, (20, 22), **settings)
    return PerEncoder((
        residual(seed, 4, 16, (8, 10), **settings), residual(seed + 5, 4, 16, (28, 30), **settings)
    ))  # fmt: skip


def write(comfy, name: str, base_class: str, what, **settings) -> str:
    """A concept in ``models/catversion``, as the node lists it."""
    path = comfy.folder / "catversion" / name / "catversion.safetensors"
    save_concept(path, what, base_class=base_class, name=name, **settings)
    return f"{name}/catversion.safetensors"


def loaded(comfy, clip, file: str, scale: float = 1.0, when: str = "as trained", **switches):
    return comfy.nodes["LoadCatVersionConcept"]().load(clip, file, scale, when, **switches)[0]


def load_both(comfy, pair: Both, files: dict[str, float]):
    """The patched CLIP; the pipeline has the same concepts."""
    clip = pair.clip
    with contextlib.suppress(loader.CatVersionLoadError):
        loader.unload_catversion(pair.pipe)
    names = []
    for file, scale in files.items():
        clip = loaded(comfy, clip, file, scale)
        names.append(loader.load_catversion(pair.pipe, comfy.folder / "catversion" / file))
    loader.set_catversion(pair.pipe, names, list(files.values()))
    return clip


@torch.no_grad()
def encoded(clip, prompt: str):
    return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)


@torch.no_grad()
def of_diffusers(pipe, prompt: str, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                 do_classifier_free_guidance=False, **options)  # fmt: skip
    return out[0], (out[2] if len(out) > 2 else None)
