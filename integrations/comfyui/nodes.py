"""The nodes: which inputs they have and which concept files they read."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import folder_paths
from safetensors import SafetensorError, safe_open

from .loader.loaded_concept import CatVersionLoadError, LoadedConcept, parse_concept
from .patched_clip import with_concept

FOLDER = "catversion"
NONE = "none"
AS_TRAINED = "as trained"
STACKED = 4  # concepts of one stack; stacks can follow one another

_SCALE: dict[str, Any] = {
    "default": 1.0,
    "min": 0.0,
    "max": 2.0,
    "step": 0.05,
    "tooltip": "Multiplies the concept's odds against the prompt's own words. 0 is the plain "
    "model, 1 is as trained.",
}
_WHEN: dict[str, Any] = {
    "default": AS_TRAINED,
    "tooltip": "class_word: acts on prompts that contain the class word. always: on every prompt "
    "but an empty one.",
}
_FORCE: dict[str, Any] = {
    "default": False,
    "tooltip": "Take the concept although it was trained with another text encoder of the same "
    "shape, such as a fine-tuned one.",
}
_KEEP_APART: dict[str, Any] = {
    "default": False,
    "tooltip": "Where a prompt calls several concepts, let each be seen from its own word up to "
    "the next concept's word only. Holds for all concepts on this CLIP.",
}
_CLIP: dict[str, Any] = {
    "tooltip": "Connect the result to the positive prompt. Give the checkpoint's own CLIP to the "
    "negative prompt, so that a concept never acts there."
}


def _register_folder() -> None:
    """``models/catversion`` and what extra_model_paths.yaml adds to it; .safetensors files."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    os.makedirs(own, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, own)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


_register_folder()


def _files() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def _path(name: str) -> Path:
    """Where a listed file is.

    Raises:
      CatVersionLoadError: it is gone.
    """
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise CatVersionLoadError(
            f"{name}: no such file in models/{FOLDER}. Copy a concept's catversion.safetensors "
            "there and press R in ComfyUI."
        )
    return Path(found)


def _changed(*names: str) -> tuple[float, ...]:
    """What differs when a file was trained anew."""
    return tuple(_path(name).stat().st_mtime_ns for name in names if name != NONE)


def read_parts(path: Path, when: str = AS_TRAINED) -> tuple[LoadedConcept, ...]:
    """What a concept file holds for each text encoder.

    Raises:
      CatVersionLoadError: it is no concept file, or one that another node loads.
    """
    _refuse_other_files(path)
    parts = parse_concept(path.read_bytes(), path.name)
    if when == AS_TRAINED:
        return parts
    return tuple(dataclasses.replace(part, when=when) for part in parts)


def _refuse_other_files(path: Path) -> None:
    """Say where a file belongs that is no concept of this method."""
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
    except (OSError, SafetensorError):
        return  # parse_concept says what is wrong
    method = metadata.get("catversion.method", "catversion")
    if method == "textual_inversion":
        raise CatVersionLoadError(
            f"{path.name}: a Textual Inversion, not keys and values. Move it to models/embeddings "
            f"and write embedding:{path.stem} in the prompt, in place of the class word."
        )
    if "catversion.format_version" not in metadata:
        raise CatVersionLoadError(
            f"{path.name}: no catversion metadata (it holds {', '.join(names[:3])}): not a concept "
            "file. A LoRA goes to models/loras and Load LoRA, an embedding to models/embeddings."
        )


class LoadCatVersionConcept:
    """One concept for a CLIP."""

    CATEGORY = "loaders"
    DESCRIPTION = (
        "Lets the class word of a prompt mean a concept that was taught with catversion_jax. "
        "Several of these nodes, one after the other, act together."
    )
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
        return {
            "required": {
                "clip": ("CLIP", _CLIP),
                "concept": (_files(), {"tooltip": f"A file in models/{FOLDER}."}),
                "scale": ("FLOAT", _SCALE),
                "when": ([AS_TRAINED, "class_word", "always"], _WHEN),
            },
            "optional": {
                "force": ("BOOLEAN", _FORCE),
                "keep_apart": ("BOOLEAN", _KEEP_APART),
            },
        }

    @classmethod
    def IS_CHANGED(cls, concept: str, **_: Any) -> tuple[float, ...]:
        """Read the file again when it was written again."""
        return _changed(concept)

    def load(
        self, clip: Any, concept: str, scale: float, when: str, **switches: bool
    ) -> tuple[Any]:
        """A CLIP on which the concept acts; the given one is not changed."""
        path = _path(concept)
        return (with_concept(clip, read_parts(path, when), scale, path.name, **switches),)


class LoadCatVersionStack:
    """Several concepts for a CLIP, the same as one node after the other."""

    CATEGORY = "loaders"
    DESCRIPTION = "Several concepts at once; each acts on the prompts that contain its class word."
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    SLOTS: ClassVar = tuple(range(1, STACKED + 1))

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
        slots: dict[str, Any] = {}
        for slot in cls.SLOTS:
            slots[f"concept_{slot}"] = ([NONE, *_files()], {"default": NONE})
            slots[f"scale_{slot}"] = ("FLOAT", _SCALE)
        return {
            "required": {"clip": ("CLIP", _CLIP), **slots},
            "optional": {
                "force": ("BOOLEAN", _FORCE),
                "keep_apart": ("BOOLEAN", _KEEP_APART),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> tuple[float, ...]:
        """Read the files again when they were written again."""
        return _changed(*(inputs.get(f"concept_{slot}", NONE) for slot in cls.SLOTS))

    def load(
        self, clip: Any, force: bool = False, keep_apart: bool = False, **slots: Any
    ) -> tuple[Any]:
        """A CLIP on which the chosen concepts act; the given one is not changed."""
        switches = {"force": force, "keep_apart": keep_apart}
        for slot in self.SLOTS:
            if (name := slots[f"concept_{slot}"]) != NONE:
                path = _path(name)
                scale = slots[f"scale_{slot}"]
                clip = with_concept(clip, read_parts(path), scale, path.name, **switches)
        return (clip,)


NODE_CLASS_MAPPINGS = {
    "LoadCatVersionConcept": LoadCatVersionConcept,
    "LoadCatVersionStack": LoadCatVersionStack,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadCatVersionConcept": "Load CatVersion concept",
    "LoadCatVersionStack": "Load CatVersion (stack)",
}
