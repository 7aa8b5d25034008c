"""What the model can do, in figures: ``python gates.py WORK MODEL --out FOLDER``.

- names: training instances asked for by proper name, recognised by the judge
- attributes: class, drawing, colours, place of pictures drawn from captions that no training step
  saw, beside the judge's own accuracy on real pictures of the same captions
- retrieval: the right picture of 64 for a caption, by the shipped CLIP, beside real pictures
- VAE PSNR, seconds per image, and an 8 x 8 grid for the eye
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from compose import SIZE
from diffusers import StableDiffusionPipeline
from PIL import Image
from pool import VALIDATION, Pool, load_pool
from tokens import Tokens
from train_clip import attributes
from train_judge import Judge, accuracies, load_judge
from train_unet import draw_captions
from train_vae import psnr
from training import generators, to_pixels
from transformers import CLIPModel
from world import CLASSES, COLOUR_NAMES, PLACE_NAMES, PLACES, SCENES, named_instances

STEPS, GUIDANCE, BATCH = 25, 5.0, 32


def draw(pipe: StableDiffusionPipeline, prompts: list[str], seed: int = 0) -> torch.Tensor:
    """``[B 3 64 64]`` in [-1, 1]; picture ``i`` starts from the noise of seed + i."""
    images = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        out = pipe(
            part,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="np",
            height=SIZE,
            width=SIZE,
        )
        images.append(out.images)
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).float() * 2 - 1


def seen_captions(pool: Pool, sittings: list[list[int]], workers: int) -> set[str]:
    """Every caption of the denoiser's training, replayed: (seed, steps, batch) of each sitting."""
    seen: set[str] = set()
    for seed, steps, batch in sittings:
        for step in range(steps):
            for worker in range(workers):
                seen.update(draw_captions(pool, generators(seed, step, worker), batch)[1])
    return seen


def names_gate(pipe: StableDiffusionPipeline, pool: Pool, judge: Judge) -> dict:
    """Accuracy over all named instances, two prompts each."""
    rng, prompts, labels = random.Random(0), [], []
    for number, instance in enumerate(named_instances(pool.sprites.drawings)):
        word = instance.drawing.split("/")[0]
        for form in (instance.name, f"a photo of {instance.name} the {word}"):
            prompts.append(f"{form} {rng.choice(PLACES[rng.choice(SCENES)])}")
            labels.append(number)
    images = draw(pipe, prompts)
    right = accuracies(judge, images, {"name": torch.tensor(labels)})["name"]
    return {"accuracy": right, "prompts": len(prompts), "chance": 1 / len(pool.names)}


def attribute_scores(
    pipe: StableDiffusionPipeline, pool: Pool, judge: Judge, seen: set[str], count: int
) -> tuple[dict, torch.Tensor, list[str], np.ndarray]:
    """Accuracies of generated and of real pictures, and the pictures.

    Captions that name a colour, so that every attribute was asked for.
    """
    rng, rows, prompts = random.Random(1), [], []
    for row in range(pool.num_train, pool.num_train + VALIDATION):
        if pool.labels[row, 5] != 0 or pool.labels[row, 1] == 0:
            continue
        text = pool.captions(np.array([row]), rng)[0]
        described = " with " in text or " and " in text or pool.labels[row, 1] == 1
        asked = any(phrase in text for phrase in PLACES[_place(pool, row)])
        if (
            text in seen
            or text in prompts
            or not described
            or not asked
            or _first(pool, row) not in text
        ):
            continue
        rows.append(row)
        prompts.append(text)
        if len(rows) == count:
            break
    chosen = np.array(rows)
    labels = {
        k: v
        for k, v in attributes(pool, chosen).items()
        if k in ("class", "first", "place", "kind")
    }
    images = draw(pipe, prompts, seed=10_000)
    generated = accuracies(judge, images, labels)
    real = accuracies(judge, to_pixels(pool.images[chosen]), labels)
    ratio = {name: generated[name] / real[name] for name in generated}
    report = {"generated": generated, "real": real, "ratio": ratio, "prompts": len(prompts)}
    return report, images, prompts, chosen


def retrieval(clip: CLIPModel, ids: torch.Tensor, images: torch.Tensor) -> float:
    """Share of captions whose own picture is the most similar among groups of 64."""
    with torch.inference_mode():
        out = clip(input_ids=ids, pixel_values=images)
    right = []
    for start in range(0, len(ids) - 63, 64):
        part = slice(start, start + 64)
        best = (out.text_embeds[part] @ out.image_embeds[part].T).argmax(-1)
        right.append((best == torch.arange(64)).float().mean())
    return float(torch.stack(right).mean())


def grid(images: torch.Tensor, columns: int = 8) -> Image.Image:
    """The first 64 pictures."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(pixels[i : i + columns]), 1) for i in range(0, 64, columns)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Measure and write ``gates.json``, ``grid.png`` and ``grid.txt``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--sitting",
        type=int,
        nargs=3,
        action="append",
        metavar=("SEED", "STEPS", "BATCH"),
        default=[],
        help="how train_unet.py was run, once for each run",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=256, help="captions to draw")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pool = load_pool(args.work)
    judge = load_judge(args.work, pool)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(args.model / "clip", dtype=torch.float32).eval()
    tokens = Tokens.load(args.work / "tokenizer")
    started = time.perf_counter()
    draw(pipe, ["a cat on the beach"])
    report: dict = {"seconds_per_image_alone": time.perf_counter() - started}
    seen = seen_captions(pool, args.sitting, args.workers)
    report["attributes"], images, prompts, rows = attribute_scores(
        pipe, pool, judge, seen, args.count
    )
    ids = torch.from_numpy(tokens(prompts))
    mine = retrieval(clip, ids, images)
    real = retrieval(clip, ids, to_pixels(pool.images[rows]))
    report["retrieval"] = {"generated": mine, "real": real, "ratio": mine / real}
    report["names"] = names_gate(pipe, pool, judge)
    x = to_pixels(pool.images[-512:])
    with torch.inference_mode():
        y = torch.cat([pipe.vae(part).sample for part in x.split(32)])
    report["vae_psnr"] = float(psnr(x, y))
    report["classes"] = len(CLASSES)
    grid(images).save(args.out / "grid.png")
    (args.out / "grid.txt").write_text("\n".join(prompts[:64]) + "\n")
    (args.out / "gates.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def _place(pool: Pool, row: int) -> str:
    return PLACE_NAMES[pool.labels[row, 4]]


def _first(pool: Pool, row: int) -> str:
    return COLOUR_NAMES[pool.labels[row, 2]]


if __name__ == "__main__":
    main()
