"""Say what a file seems to be when it is not a concept file, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from catversion_jax.methods.official_adapter import ADAPTER_FILE_NAME
from catversion_jax.models.weights.model_index import exported_concepts

_TEXTUAL_INVERSION_KEYS = {"emb_params", "emp_params", "string_to_param", "clip_l", "clip_g"}


def describe_bytes(data: bytes) -> str | None:
    """What the first bytes give away, with the remedy; None when it may be a safetensors file."""
    if data.startswith(b"PK\x03\x04"):
        return (
            "a zip archive, probably saved by PyTorch. If it is the `pytorch_adapter.bin` of the "
            "authors' code, convert it: catversion import FILE."
        )
    # A header of 128 modulo 256 bytes starts with the same byte.
    if data.startswith(b"\x80") and data[8:9] != b"{":
        return (
            "a pickle, probably saved by an old PyTorch. Save it again with PyTorch 1.6 or newer "
            "first."
        )
    if data.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer. Fetch the real file: git lfs pull."
    if len(data) < 8:
        return (
            f"{len(data)} bytes long, too short for any safetensors file. Copy or export it again."
        )
    if data[8:9] != b"{":
        return "something else than safetensors. Give a catversion.safetensors written by training."
    return None


def describe_folder(folder: Path) -> str | None:
    """What a folder without a concept file holds instead, with the remedy; None when unknown."""
    if (folder / ADAPTER_FILE_NAME).is_file():
        return (
            f"an adapter of the authors' code ({ADAPTER_FILE_NAME}); convert it with `catversion "
            f"import {folder} --base_class WORD`."
        )
    if (inside := exported_concepts(folder)) and (folder / "model_index.json").is_file():
        return f"an exported pipeline. Give one of its concepts, such as {inside[0]}."
    if (folder / "model_index.json").is_file():
        return "a whole diffusers model. Give it as the model, not as a concept."
    return None


def describe_tensors(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What the tensor names of a safetensors file give away, with the remedy."""
    names = list(shapes)
    if any("lora" in name.lower() for name in names):
        return "what seems to be a LoRA. Load it with diffusers' `pipe.load_lora_weights`."
    few = len(names) <= 4 and all(len(shape) in (1, 2) for shape in shapes.values())
    if _TEXTUAL_INVERSION_KEYS.intersection(names) or (names and few):
        return (
            "what seems to be a textual inversion embedding. Load it with diffusers' "
            "`load_textual_inversion`."
        )
    if any(name.startswith(("model.diffusion_model.", "cond_stage_model.")) for name in names):
        return "a whole Stable Diffusion checkpoint. Give it as the model, not as a concept."
    if any(
        name.startswith(("text_model.", "encoder.", "down_blocks.", "decoder.")) for name in names
    ):
        return "the weights of a network. Give its model folder as the model, not as a concept."
    if {"prompt_embeds", "negative_prompt_embeds"}.intersection(names):
        return "a file of prompt embeddings. Pass its tensors to a pipeline as `prompt_embeds=`."
    listed = ", ".join(names[:3]) or "nothing"
    return (
        f"a safetensors file without catversion metadata (it holds {listed}). Give a "
        "catversion.safetensors."
    )
