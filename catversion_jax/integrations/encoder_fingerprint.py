"""Whether a text encoder is the one a concept was trained with, a fine-tune of it, or another.

The fingerprint is that of ``models/weights/fingerprint.py``. What peft and ``torch.compile`` put
around the weights is no part of it: a concept goes with an encoder that carries a LoRA.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catversion_jax.integrations.encoder_state import EncoderState
from catversion_jax.integrations.encoder_wrapping import innermost
from catversion_jax.integrations.loaded_concept import PAIR, CatVersionLoadError, LoadedConcept
from catversion_jax.integrations.weights_sha256 import BFLOAT16, same_numbers, weights_sha256

_WRAPPINGS = ("_orig_mod.", "base_model.model.")
_LARGEST_CHANGE = 0.5  # of the weights' own size; unrelated networks differ by about 1.4


def check_shape(concept: LoadedConcept, encoder: Any, source: str) -> None:
    """Raise where a concept was made for a text encoder of another shape."""
    config = encoder.config
    name = concept.component or "text encoder"
    if config.model_type != "clip_text_model":
        raise CatVersionLoadError(
            f"{source}: acts in a CLIP text encoder, and the {name} of this pipeline is a "
            f"{type(encoder).__name__}. Load the model it was trained on: "
            f"{concept.base_model or 'not stated in the file'}."
        )
    heads, num_layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = config.hidden_size // heads
    top = max(concept.layers)
    if tuple(concept.key.shape[2:]) != (heads, head_dim) or top >= num_layers:
        raise CatVersionLoadError(
            f"{source}: made for a {name} with {concept.key.shape[2]} heads of "
            f"{concept.key.shape[3]} and at least {top + 1} layers; this pipeline's has {heads} "
            f"heads of {head_dim} and {num_layers} layers. Load the model it was trained on: "
            f"{concept.base_model or 'not stated in the file'}."
        )


def check_weights(
    state: EncoderState, concept: LoadedConcept, encoder: torch.nn.Module, source: str
) -> None:
    """Warn where the text encoder is a fine-tune of the one the concept was trained with.

    Raises:
      CatVersionLoadError: it is another encoder of the same shape.
    """
    trained = concept.text_encoder_sha256
    if not trained or ("accepted", trained) in state.warned:
        return
    weights = {} if state.fingerprint else encoder_weights(encoder)
    state.fingerprint = state.fingerprint or weights_sha256(weights)
    model = concept.base_model or "an unnamed model"
    name = concept.component or "text encoder"
    if same_numbers(state.fingerprint, trained):
        return
    if BFLOAT16 in trained and state.fingerprint:
        weights = weights or encoder_weights(encoder)
        if same_numbers(weights_sha256({k: v.bfloat16() for k, v in weights.items()}), trained):
            return
    if state.fingerprint is None or BFLOAT16 in trained + state.fingerprint:
        state.warn_once(
            ("accepted", trained),
            f"{source}: whether this {name} is the one it was trained with cannot be checked, "
            "because one of the two is in bfloat16 or has fewer digits still; use a float16 or "
            "float32 model for both to check.",
        )
        return
    pair = f"the {name} {trained[:12]} of {model}; this pipeline's is "
    pair = f"{source}: trained with {pair}{state.fingerprint[:12]}"
    original = _weights_of(concept)
    if original is None:
        state.warn_once(
            ("accepted", trained),
            f"{pair}, of the same shape. It must be a fine-tuned text encoder of that model: how "
            "many numbers changed cannot be said, because that model is not on this machine. The "
            "concept may look different.",
        )
        return
    share, size = _change(original, weights or encoder_weights(encoder))
    change = f"{100 * share:.3g} % of numbers changed, by {100 * size:.2g} % of their size"
    if not size < _LARGEST_CHANGE:
        raise CatVersionLoadError(
            f"{pair}, which is no fine-tune of it ({change}), and a concept means nothing to "
            "another one. Load that model, or pass force=True to try it."
        )
    state.warn_once(
        ("accepted", trained),
        f"{pair}, a fine-tuned text encoder, {change}. The concept may look different.",
    )


def text_encoder_sha256(encoder: torch.nn.Module) -> str | None:
    """Fingerprint of the weights, the same for float32 and float16 copies, with and without
    adapters of peft; ``bfloat16:`` stands before that of weights in bfloat16. None when it cannot
    be known.

    sha256 over the sorted state dict without ``token_embedding`` and ``position_ids``: key (freed
    of the ``text_model.`` prefix), then the tensor as little-endian float16.
    """
    return weights_sha256(encoder_weights(encoder))


def encoder_weights(encoder: Any) -> dict[str, torch.Tensor]:
    """The tensors of the text encoder itself by name, without what was added to it."""
    encoder = innermost(encoder)
    tensors = encoder.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()) and hasattr(encoder, "_hf_hook"):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        tensors = get_state_dict_offloaded_model(encoder)
    wrapped = {key.split(".base_layer.")[0] for key in tensors if ".base_layer." in key}
    weights = {}
    for key, tensor in tensors.items():
        adapter = any(key.startswith(f"{name}.") for name in wrapped)
        if adapter and ".base_layer." not in key:
            continue
        for wrapping in _WRAPPINGS:
            key = key.replace(wrapping, "")
        key = key.replace(".base_layer.", ".").removeprefix("text_model.")
        if "lora_" not in key and "token_embedding" not in key and "position_ids" not in key:
            weights[key] = tensor
    return weights


def _weights_of(concept: LoadedConcept) -> dict[str, torch.Tensor] | None:
    """The text encoder that a concept was trained with, if its model is on this machine; None where
    it is not, or has changed, or is a single file and this package is not here to read it.
    """
    import safetensors.torch
    from huggingface_hub import hf_hub_download

    if not concept.base_model:
        return None
    name = concept.component or PAIR[0]
    inside = f"{name}/model.safetensors"
    try:
        model = Path(concept.base_model)
        if model.is_file():
            # by name: an exported pipeline, which has this function too, has no such package
            reader = importlib.import_module("catversion_jax.models.weights.single_file")
            stored = reader.SingleFile(model).tensors(name)
            tensors = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in stored.items()}
        elif (model / inside).is_file():
            tensors = safetensors.torch.load_file(model / inside)
        else:
            tensors = safetensors.torch.load_file(
                hf_hub_download(concept.base_model, inside, local_files_only=True)
            )
    except Exception:  # the hub's exceptions differ by version; all mean that there is none
        return None
    left_out = ("token_embedding", "position_ids")
    weights = {
        key.removeprefix("text_model."): tensor
        for key, tensor in tensors.items()
        if not any(part in key for part in left_out)
    }
    return weights if same_numbers(weights_sha256(weights), concept.text_encoder_sha256) else None


def _change(
    original: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """The share of numbers that differ in float16, and the difference's norm relative to the
    original's; infinite where the tensors are others.
    """
    if any(key not in weights or weights[key].shape != x.shape for key, x in original.items()):
        return 1.0, float("inf")
    changed, total, difference, size = 0, 0, 0.0, 0.0
    for key, before in original.items():
        before, now = before.half(), weights[key].detach().cpu().half()
        changed, total = changed + int((before != now).sum()), total + before.numel()
        difference += float((before.float() - now.float()).square().sum())
        size += float(before.float().square().sum())
    return changed / total, (difference / size) ** 0.5
