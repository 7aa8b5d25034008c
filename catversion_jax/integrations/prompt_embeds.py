"""Prompt embeddings baked with a concept: the form that any stock diffusers pipeline takes, without
our code. The file beside them says how:

    tensors = safetensors.torch.load_file("prompt_embeds.safetensors")
    pipe(**{name: tensor[:1] for name, tensor in tensors.items()})

The names are those of the pipeline's arguments; Stable Diffusion XL has pooled ones too. What a
concept learned acts inside the text encoders and behind their output, so the embeddings carry all
of it. What is lost is the freedom to write other prompts.

A concept with states behind the output makes its prompts longer, and a pipeline takes prompts and
negative prompts of one length only. Shorter rows are filled up with copies of their last state,
which is padding as a rule. A stock pipeline reads the filling as more padding; one that has a
concept with states loaded hides it (``context_states.py``).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.runtime.safetensors_bytes import serialize_safetensors
from catversion_jax.sampling.encoding import encode_requests
from catversion_jax.sampling.requests import (
    ConceptUse,
    ImageRequest,
    active_concepts,
    prompt_warnings,
)

logger = logging.getLogger(__name__)

_README = """# Prompt embeddings of {model}

| row | prompt | concepts that act |
|-----|--------|-------------------|
{rows}

Negative prompt: {negative}, encoded without any concept.

They need a pipeline of the same model and no code of ours:

```python
from safetensors.torch import load_file

tensors = load_file("{file}")
row = 0
embeds = {{
    name: tensor[row : row + 1].to(pipe.device, pipe.unet.dtype)
    for name, tensor in tensors.items()
}}
pipe(**embeds).images[0]
```

{tensors}
{filled}"""

_FILLED = """
The concepts that act on a prompt add states of their own, and a pipeline takes prompts and negative
prompts of one length, so rows of fewer states are filled up with copies of their state {tokens}: as
more padding, which changes what is drawn a little.
"""


def export_prompt_embeds(
    path: str | Path,
    backbone: Backbone,
    prompts: Sequence[str],
    concepts: Sequence[ConceptUse],
    *,
    negative_prompt: str = "",
) -> Path:
    """Write ``prompt_embeds`` and ``negative_prompt_embeds``, both float32 ``[prompts T D]``, and
    for Stable Diffusion XL ``pooled_prompt_embeds`` and ``negative_pooled_prompt_embeds``
    ``[prompts P]``.

    Args:
      path: the safetensors file to write; a text file of the same name says how to use it.
      backbone: the model whose pipeline will use the file.
      prompts: at least one; each with the concepts that it calls.
      concepts: as for :func:`~catversion_jax.sampling.denoising.draw_requests`.
      negative_prompt: encoded without any concept, repeated for every prompt; an empty one is
        zeros where the model says so, as Stable Diffusion XL does.

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
    acting = [active_concepts(backbone.tokenizers[0], prompt, concepts) for prompt in prompts]
    # Concepts of the other prompts are no mistake in a prompt that names one.
    requests = [
        ImageRequest(prompt, uses or tuple(concepts), negative_prompt=negative_prompt)
        for prompt, uses in zip(prompts, acting, strict=True)
    ]
    for message in prompt_warnings(backbone.tokenizers, requests):
        logger.warning(message)
    tensors = {}
    rows = encode_requests(backbone, requests, guidance_scale=math.inf)
    length = max(len(one.context) for states in rows for one in states)
    for begin, states in zip(("", "negative_"), rows, strict=True):
        tensors[f"{begin}prompt_embeds"] = np.stack(
            [_filled_up(np.asarray(one.context), backbone.context_length, length) for one in states]
        )
        pooled = [one.pooled for one in states if one.pooled is not None]
        if pooled:
            tensors[f"{begin}pooled_prompt_embeds"] = np.stack(pooled)
    metadata = {
        "format": "pt",
        "catversion.prompts": json.dumps(list(prompts)),
        "catversion.concepts": json.dumps([[use.name for use in uses] for uses in acting]),
        "catversion.scales": json.dumps({use.name: use.scale for use in concepts}),
        "catversion.negative_prompt": negative_prompt,
        "catversion.base_model": backbone.name,
        **{f"catversion.{name}": sha256 for name, sha256 in backbone.fingerprints.items()},
    }
    make_folder(path.parent)
    write_atomically(path, serialize_safetensors(tensors, metadata))
    rows_of = "\n".join(
        f"| {row} | {_cell(prompt)} | {_cell(', '.join(use.name for use in uses) or 'none')} |"
        for row, (prompt, uses) in enumerate(zip(prompts, acting, strict=True))
    )
    said = _README.format(
        file=path.name,
        model=backbone.name,
        rows=rows_of,
        negative=_cell(negative_prompt) or "empty",
        tensors="\n".join(f"- `{name}` {list(array.shape)}" for name, array in tensors.items()),
        filled=_FILLED.format(tokens=backbone.context_length)
        if length > backbone.context_length
        else "",
    )
    write_atomically(path.with_suffix(".md"), said.encode())
    return path


def _filled_up(context: np.ndarray, tokens: int, length: int) -> np.ndarray:
    """``[length D]``, with copies of the last token's state at the end."""
    filling = np.repeat(context[tokens - 1 : tokens], length - len(context), axis=0)
    return np.concatenate([context, filling])


def _cell(text: str) -> str:
    """Text on one line of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
