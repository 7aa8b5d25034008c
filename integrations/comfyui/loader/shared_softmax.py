"""Concatenated attention: the keys and values of concepts beside a layer's own, in one softmax.

Equations (1) and (2) are in ``diffusers.py``. Nothing here knows where the query comes from: the
loader for diffusers and the nodes for ComfyUI hand the same tensors to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .loaded_concept import LoadedConcept


def overwritten(
    concepts: Sequence[LoadedConcept],
    bias: torch.Tensor,
    layer: int,
    heads: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """``output`` ``[B T N H]`` of a layer's own attention with the rows that call a concept
    replaced by equation (1); others are not touched.

    Args:
      concepts: the C concepts that act.
      bias: ``[C B T]`` float32, ``b + log s`` of equation (2) where a token of a row sees the
        concept, -inf where it does not.
      layer: number of the layer, from 0.
      heads: query, key and value, ``[B N T H]``.
      mask: boolean or additive, in a shape that broadcasts to ``[B N T T]``; None: causal.
      scaling: of the logits.
      output: what the layer makes without concepts.
    """
    adapted = [i for i, concept in enumerate(concepts) if layer in concept.layers]
    if not adapted:
        return output
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in heads)
    pairs = [concepts[i].at_layer(layer, q) for i in adapted]
    keys, values = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))  # [N P H]
    biases = [
        bias[i, :, :, None].expand(-1, -1, pairs[n][0].shape[1]) for n, i in enumerate(adapted)
    ]
    bias = torch.cat(biases, dim=-1).to(q)  # [B T P]
    logits = torch.matmul(q, keys.mT) * scaling + bias[:, None]  # [B N T P]
    own = _masked(torch.matmul(q, k.mT) * scaling, mask)  # [B N T T]
    mixed = torch.matmul(
        torch.cat([logits, own], dim=-1).softmax(dim=-1),
        torch.cat([values.expand(len(q), -1, -1, -1), v], dim=-2),
    )  # [B N T H]
    called = (bias > -torch.inf).any(dim=2).any(dim=1)[:, None, None, None]
    return torch.where(called, mixed.transpose(1, 2).to(output.dtype), output)


def _masked(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits ``[B N T T]`` with later tokens hidden; a given mask already says so."""
    if mask is None:  # CLIP hands SDPA no mask and is_causal=True
        size = logits.shape[-2:]
        mask = torch.ones(size, dtype=torch.bool, device=logits.device).tril()[None, None]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask.to(logits.dtype)
