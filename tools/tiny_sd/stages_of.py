"""A tiny-sd folder's networks where the stages look for them: ``stages_of.py WORK FOLDER``.

For a later sitting on another machine, after ``sprites.py`` and ``pool.py``: every stage then
begins with the folder's averaged networks, and those that need no more training can be left as they
are. Where the pool's words are more than the folder's tokenizer knows, the text encoder gets a row
for each: the mean of the pieces that the old tokenizer makes of the word.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokens import END, START, Tokens, split_word
from transformers import CLIPModel


def grow_vocabulary(clip: CLIPModel, old: Tokens, new: Tokens) -> None:
    """Give the token embedding the rows of a larger tokenizer, in place."""
    if old.ids == new.ids:
        return
    ranks = {pair: rank for rank, pair in enumerate(old.merges)}
    embeddings = clip.text_model.embeddings
    before = embeddings.token_embedding.weight.detach()
    grown = torch.nn.Embedding(len(new.ids), before.shape[1])
    with torch.no_grad():
        for word, number in new.ids.items():
            pieces = [word]
            if word not in old.ids:
                # a piece of a word has no end; the old tokenizer's pieces then end one
                pieces = split_word(word.removesuffix("</w>"), ranks)
            grown.weight[number] = before[[old.ids[piece] for piece in pieces]].mean(0)
    embeddings.token_embedding = grown
    config = clip.text_model.config
    config.vocab_size = len(new.ids)
    config.bos_token_id = new.ids[START]
    config.eos_token_id = config.pad_token_id = new.ids[END]
    clip.text_model.eos_token_id = new.ids[END]


def main() -> None:
    """Write ``vae.start.pt``, ``unet.start.pt`` and ``clip/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for kind, name in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet")):
        network = kind.from_pretrained(args.folder / name, torch_dtype=torch.float32)
        torch.save(network.state_dict(), args.work / f"{name}.start.pt")
    clip = CLIPModel.from_pretrained(args.folder / "clip", dtype=torch.float32)
    old = Tokens.load(args.folder / "tokenizer")
    grow_vocabulary(clip, old, Tokens.load(args.work / "tokenizer"))
    clip.save_pretrained(args.work / "clip")


if __name__ == "__main__":
    main()
