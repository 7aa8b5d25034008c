"""Writing a single-file checkpoint as a diffusers folder, one tensor at a time.

Numbers keep their dtype. The tensors of text encoders get the prefix ``text_model.``, which
transformers before 5.6 needs and newer ones read too.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.models.clip.vocabulary import write_clip_tokenizer
from catversion_jax.models.weights.families import Config, Family
from catversion_jax.models.weights.fingerprint import PREFIX
from catversion_jax.models.weights.model_index import MODEL_INDEX
from catversion_jax.models.weights.safetensors_files import DTYPES, STEMS, StoredTensor
from catversion_jax.models.weights.variants import COMPONENTS, SECOND_TEXT_ENCODER, TOKENIZERS
from catversion_jax.runtime.atomic_files import make_folder, unwritable, write_atomically

_CLASSES = COMPONENTS | SECOND_TEXT_ENCODER
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_PROJECTION = "text_projection."  # beside the text model, not in it
_ABSENT = [None, None]


def write_diffusers_folder(
    folder: Path,
    family: Family,
    configs: Mapping[str, Config],
    scheduler: Config,
    tensors: Mapping[str, Mapping[str, StoredTensor]],
) -> dict[str, Any]:
    """Write the components of one model to ``folder``.

    Args:
      folder: receives a folder for each component, the tokenizers and the scheduler, and
        ``model_index.json``.
      family: whose text encoders and pipeline these are.
      configs: ``config.json`` of each component with weights.
      scheduler: ``scheduler_config.json``.
      tensors: of each component, by today's names.

    Returns:
      The content of ``model_index.json``.

    Raises:
      CatVersionError: a file cannot be written.
    """
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "feature_extractor": _ABSENT,
    }
    if len(family.text_encoders) == 1:
        index |= {"safety_checker": _ABSENT, "requires_safety_checker": False}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for component, config in configs.items():
        is_text = component in family.text_encoders
        name = _CLASSES[component]
        index[component] = ["transformers" if is_text else "diffusers", name]
        said = {"architectures": [name]} if is_text else {"_class_name": name}
        _write_json(folder / component / "config.json", {**config, **said})
        named = tensors[component]
        if is_text:
            named = {
                name if name.startswith(_PROJECTION) else PREFIX + name: tensor
                for name, tensor in named.items()
            }
        write_tensors(folder / component / f"{STEMS[is_text]}.safetensors", named)
    for component, place in family.text_encoders.items():
        tokenizer = TOKENIZERS[component]
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
        make_folder(folder / tokenizer)
        length = configs[component]["max_position_embeddings"]
        write_clip_tokenizer(folder / tokenizer, place.pad_token, length)
    _write_json(folder / MODEL_INDEX, index)
    return index


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file; tensors are read, and written as they are, one after the other.

    Raises:
      CatVersionError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the format asks
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor).tobytes())
    except OSError as error:
        raise unwritable(path, error) from error


def _write_json(path: Path, value: Config) -> None:
    make_folder(path.parent)
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, text.encode())
