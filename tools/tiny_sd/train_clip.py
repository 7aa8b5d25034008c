"""Stage 4: CLIP, whose text tower is the text encoder: ``python train_clip.py WORK --steps N``.

Contrastive, plus a cross-entropy head per attribute on both towers: what makes a short stage
enough. Where ``stages_of.py`` wrote a CLIP, training begins with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from compose import SIZE
from forms import RENDERINGS
from pool import SIZE_NAMES, Pool, load_pool
from tokens import CONTEXT, END, START, Tokens
from training import (
    Batch,
    Loss,
    Prepared,
    arguments,
    generators,
    in_bfloat16,
    rank,
    to_pixels,
    train,
)
from transformers import CLIPConfig, CLIPModel
from world import CLASSES, COLOUR_NAMES, KINDS, PLACE_NAMES, STYLES

TEXT_WIDTH = 160
CAPTION_TOKENS = 24  # the longest caption has 22


def make_clip(tokens: Tokens) -> CLIPModel:
    """Both towers."""
    ids = {
        "bos_token_id": tokens.ids[START],
        "eos_token_id": tokens.ids[END],
        "pad_token_id": tokens.ids[END],
    }
    text = {
        "vocab_size": len(tokens.ids),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 3 * TEXT_WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "max_position_embeddings": CONTEXT,
        "projection_dim": TEXT_WIDTH,
        **ids,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": TEXT_WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))


class Heads(torch.nn.Module):
    """CLIP with one linear classifier per attribute and tower."""

    def __init__(self, clip: CLIPModel, sizes: dict[str, int]):
        super().__init__()
        self.clip = clip
        self.image = torch.nn.ModuleDict(
            {k: torch.nn.Linear(TEXT_WIDTH, n) for k, n in sizes.items()}
        )
        self.text = torch.nn.ModuleDict(
            {k: torch.nn.Linear(TEXT_WIDTH, n) for k, n in sizes.items()}
        )


def attribute_sizes(pool: Pool) -> dict[str, int]:
    """Number of values of each attribute."""
    return {
        "class": len(CLASSES),
        "drawing": len(pool.sprites.drawings),
        "name": len(pool.names),
        "kind": len(KINDS),
        "first": len(COLOUR_NAMES),
        "second": len(COLOUR_NAMES),
        "place": len(PLACE_NAMES),
        "style": len(STYLES),
        "size": len(SIZE_NAMES),
        "rendering": len(RENDERINGS),
    }


def attributes(pool: Pool, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Labels ``[B]`` of every attribute; -1 where it has none. A drawing's own colours count."""
    labels = {name: pool.column(name, rows).copy() for name in attribute_sizes(pool)}
    drawings = [pool.sprites.drawings[i] for i in labels["drawing"]]
    for number, name in enumerate(("first", "second")):
        for i, drawing in enumerate(drawings):
            word = drawing.colours[number]
            if labels["kind"][i] == 0 and word:
                labels[name][i] = COLOUR_NAMES.index(word)
    return {name: torch.from_numpy(values) for name, values in labels.items()}


def main() -> None:
    """Train."""
    args = arguments(__doc__, steps=2400, batch=96, lr=1e-3)
    pool, tokens = load_pool(args.work), Tokens.load(args.work / "tokenizer")
    clip = load_clip(args.work) if (args.work / "clip").exists() else make_clip(tokens)
    # torch's own attention is slow in bfloat16 on a CPU
    clip.set_attn_implementation("eager")
    model = Heads(clip.requires_grad_(True), attribute_sizes(pool))

    def prepare(step: int) -> tuple[np.ndarray, np.ndarray]:
        batch = generators(args.seed, step, rank())
        rows = batch.numpy.integers(0, pool.num_train, args.batch)
        return rows, tokens(pool.captions(rows, batch.python), CAPTION_TOKENS)

    prepared = Prepared(prepare, args.loaders)

    def loss_fn(batch: Batch) -> Loss:
        rows, ids = prepared(batch.step)
        images = to_pixels(pool.images[rows], args.device)
        with in_bfloat16(args.device):
            out = model.clip(input_ids=torch.from_numpy(ids).to(args.device), pixel_values=images)
        target = torch.arange(len(rows), device=args.device)
        logits = out.logits_per_text.float()
        contrastive = (
            torch.nn.functional.cross_entropy(logits, target)
            + torch.nn.functional.cross_entropy(logits.T, target)
        ) / 2
        loss = contrastive
        scores: dict[str, float | torch.Tensor] = {"contrastive": contrastive.detach()}
        for name, labels in attributes(pool, rows).items():
            labels = labels.to(args.device)
            for tower, embeds in (("image", out.image_embeds), ("text", out.text_embeds)):
                guess = getattr(model, tower)[name](10 * embeds.float())
                if (labels >= 0).any():
                    part = torch.nn.functional.cross_entropy(guess, labels, ignore_index=-1)
                    loss = loss + 0.25 * part
                    right = (guess.argmax(-1) == labels)[labels >= 0].float().mean()
                    scores[f"{tower[0]}.{name}"] = right
        return loss, scores

    model = train("clip", model, loss_fn, args, weight_decay=0.05, betas=(0.9, 0.98))
    model.clip.cpu().save_pretrained(args.work / "clip")


def load_clip(work: Path) -> CLIPModel:
    """What this stage wrote, frozen."""
    return CLIPModel.from_pretrained(work / "clip").eval().requires_grad_(False)


if __name__ == "__main__":
    main()
