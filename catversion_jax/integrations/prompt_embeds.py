"""Prompt embeddings baked with a concept: the form that any stock diffusers pipeline takes, without
our code.

    tensors = safetensors.torch.load_file("prompt_embeds.safetensors")
    pipe(
        prompt_embeds=tensors["prompt_embeds"][:1],
        negative_prompt_embeds=tensors["negative_prompt_embeds"][:1],
    )

The keys and values act inside the text encoder only, so its output carries all of a concept. What
is lost is the freedom to write other prompts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.runtime.safetensors_bytes import serialize_safetensors
from catversion_jax.sampling.encoding import encode_prompt
from catversion_jax.sampling.requests import (
    ConceptUse,
    ImageRequest,
    active_concepts,
    prompt_warnings,
)

logger = logging.getLogger(__name__)


def export_prompt_embeds(
    path: str | Path,
    backbone: Backbone,
    prompts: Sequence[str],
    concepts: Sequence[ConceptUse],
    *,
    negative_prompt: str = "",
) -> Path:
    """Write ``prompt_embeds`` and ``negative_prompt_embeds``, both float32 ``[prompts T D]``.

    Args:
      path: the safetensors file to write.
      backbone: the model whose pipeline will use the file.
      prompts: at least one; each with the concepts that it calls.
      concepts: as for :func:`~catversion_jax.sampling.denoising.draw_requests`.
      negative_prompt: encoded without any concept, repeated for every prompt.

    Returns:
      ``path``. Its metadata lists the prompts and which concepts act on each. Prompts that name
      none of the concepts, and those that are cut off, are logged as warnings.

    Raises:
      CatVersionError: no prompts, or the file cannot be written.
    """
    path = as_path(path)
    if not prompts:
        raise CatVersionError(
            "no prompts: embeddings are of fixed prompts. Give at least one --prompt."
        )
    acting = [active_concepts(backbone.tokenizer, prompt, concepts) for prompt in prompts]
    # Concepts of the other prompts are no mistake in a prompt that names one.
    requests = [
        ImageRequest(prompt, uses or tuple(concepts), negative_prompt=negative_prompt)
        for prompt, uses in zip(prompts, acting, strict=True)
    ]
    for message in prompt_warnings(backbone.tokenizers, requests):
        logger.warning(message)
    prompted = np.stack([encode_prompt(backbone, prompt, concepts) for prompt in prompts])
    plain = encode_prompt(backbone, negative_prompt, ())
    metadata = {
        "format": "pt",
        "catversion.prompts": json.dumps(list(prompts)),
        "catversion.concepts": json.dumps([[use.name for use in uses] for uses in acting]),
        "catversion.scales": json.dumps({use.name: use.scale for use in concepts}),
        "catversion.negative_prompt": negative_prompt,
        "catversion.base_model": backbone.name,
        "catversion.text_encoder_sha256": backbone.text_encoder_sha256,
    }
    tensors = {
        "prompt_embeds": np.asarray(prompted, np.float32),
        "negative_prompt_embeds": np.broadcast_to(np.asarray(plain, np.float32), prompted.shape),
    }
    make_folder(path.parent)
    write_atomically(path, serialize_safetensors(tensors, metadata))
    return path
