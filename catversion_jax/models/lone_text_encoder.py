"""One text encoder without the rest of a Stable Diffusion."""

from __future__ import annotations

import functools
from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.clip.vision import sub_config
from catversion_jax.models.weights.convert import load_network
from catversion_jax.models.weights.hf_config import read_config
from catversion_jax.models.weights.network import Network, named_dtype
from catversion_jax.runtime.bucket_paths import home_expanded


def load_text_encoder(folder: str | Path, dtype: str = "float32") -> Network:
    """Load the text encoder alone, from a transformers folder (``config.json`` and safetensors).

    Returns:
      A callable ``(token_ids [B T], learned=None) -> [B T D]``; the final layer norm is applied.

    Raises:
      CatVersionError: the folder is not a CLIP's, or its weights do not fit.
    """
    folder = home_expanded(folder)
    if (folder / "model_index.json").is_file():
        raise CatVersionError(
            f"{folder}: is a whole diffusers folder. Give {folder / 'text_encoder'} instead, or "
            "use load_backbone."
        )
    config = read_config(folder)
    ignore: tuple[str, ...] = ()
    if config.get("architectures") == ["CLIPTextModelWithProjection"]:
        ignore = (r"^text_projection\.",)
    if config.get("model_type") == "clip":
        source = str(folder / "config.json")
        config = dict(sub_config(config, "text_config", source=source))
        ignore = (r"^vision_model\.", r"^(visual|text)_projection\.", r"^logit_scale$")
    weights = named_dtype(dtype)
    text_config = CLIPTextConfig.from_hf(config, source=str(folder / "config.json"))
    return load_network(
        functools.partial(CLIPTextModel, text_config, dtype=weights, param_dtype=weights),
        folder,
        dtype=weights,
        ignore=ignore,
    )
