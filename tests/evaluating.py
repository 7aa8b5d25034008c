"""A run that ``catversion evaluate`` scores quickly, and the same scores from transformers."""

import json

import numpy as np
import torch
import transformers
from PIL import Image
from random_model import write_random_model, write_toy_concepts
from tiny_pipelines import save_clip, save_vit

from catversion_jax.cli import main
from catversion_jax.config import TrainConfig, dump_config
from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.residual import KVResidual

PROMPTS = ["a {} in the snow", "a wet {} & <script>document.title = 'owned'</script>"]
NAMES = {"striped_ball": "ball", "teal_cup": "cup"}
QUICK = ["--num_inference_steps", "2", "--num_images_per_prompt", "2", "--num_prior_images", "2"]


def write_world(root):
    """A model, a CLIP, a DINO, toy concepts and a run that learned two of them (random numbers)."""
    write_random_model(root / "model")
    write_toy_concepts(root / "concepts")
    save_clip(root / "clip", root / "model" / "tokenizer")
    save_vit(root / "dino")
    run = root / "run"
    for seed, (name, word) in enumerate(NAMES.items()):
        for file, step in (("catversion-000010", 10), ("catversion", 20)):
            rng = np.random.default_rng(seed + step)
            key, value = rng.normal(size=(2, 3, 1, 4, 16)).astype(np.float32)
            residual = KVResidual(key, value, (3, 4, 5))
            path = run / "concepts" / name / f"{file}.safetensors"
            save_concept(path, residual, base_class=word, name=name, step=step)
        rows = "step,loss,eval_loss\n0,,0.9\n10,0.5,0.8\n20,0.4,0.7\n"
        (run / "concepts" / name / "metrics.csv").write_text(rows)
    config = TrainConfig(concepts=str(root / "concepts"), output_dir=str(run))
    (run / "config.resolved.yaml").write_text(dump_config(config))
    (run / "run.json").write_text(json.dumps({"base_model": str(root / "model")}))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))


def evaluate(world, source, output, *more):
    given = {"--clip": world / "clip", "--output_dir": output, "--prompts": world / "prompts.txt"}
    options = [str(word) for pair in given.items() for word in pair]
    return main(["evaluate", str(source), *options, *QUICK, *map(str, more)])


def evaluate_fully(world, output):
    """Everything the command can do."""
    more = ["--plain", "--all_steps", "--dino", world / "dino"]
    assert evaluate(world, world / "run", output, *more) == 0


def scores_of(output):
    return json.loads((output / "scores.json").read_text())


class TorchClip:
    """The same scores from transformers in torch."""

    def __init__(self, folder):
        self.model = transformers.CLIPModel.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )

    @torch.no_grad()
    def images(self, arrays):
        pixels = [
            self.processor(Image.fromarray(a), return_tensors="pt")["pixel_values"] for a in arrays
        ]
        pooled = self.model.vision_model(torch.cat(pixels)).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled)).numpy()

    @torch.no_grad()
    def texts(self, prompts):
        ids = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=48, return_tensors="pt"
        )["input_ids"]
        pooled = self.model.text_model(ids).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled)).numpy()


def pictures_of(folder, key):
    return [np.asarray(Image.open(p)) for p in sorted(folder.glob(f"*{key}*_?.png"))]


@torch.no_grad()
def dino_vectors(model, arrays):
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    pixels = [processor(Image.fromarray(a), return_tensors="pt")["pixel_values"] for a in arrays]
    states = model(torch.cat(pixels)).last_hidden_state[:, 0]
    return torch.nn.functional.normalize(states).numpy()
