"""The judge: a classifier that shares nothing with the model it judges.

``python train_judge.py WORK --steps N --export FOLDER``. A small convolutional network with one
head per attribute of a picture; it says whether a generated picture shows what its prompt asked
for. ``FOLDER`` (2.3 MB) is what ``catversion evaluate --dino FOLDER`` takes, and what ships as
``tiny-sd-judge``: the features before the heads, batch norms folded, and the world it was trained
on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from pool import Pool, load_pool
from train_clip import attribute_sizes, attributes
from training import Batch, Loss, arguments, in_bfloat16, load_average, to_pixels, train


class Judge(torch.nn.Module):
    """Four stages of two convolutions, global max pooling, linear heads."""

    def __init__(self, sizes: dict[str, int], widths: tuple[int, ...] = (32, 64, 96, 160)):
        super().__init__()
        layers: list[torch.nn.Module] = []
        before = 3
        for width in widths:
            for stride in (2, 1):
                conv = torch.nn.Conv2d(before, width, 3, stride, 1, bias=False)
                layers += [conv, torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
                before = width
        self.body = torch.nn.Sequential(*layers)
        width = 2 * before
        self.heads = torch.nn.ModuleDict({k: torch.nn.Linear(width, n) for k, n in sizes.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B 3 64 64]`` in [-1, 1] to logits per attribute."""
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """``[B 3 H W]`` in [-1, 1] to ``[B F]``: what the heads read."""
        hidden = self.body(x)
        return torch.cat([hidden.amax((2, 3)), hidden.mean((2, 3))], -1)


def load_judge(work: Path, pool: Pool) -> Judge:
    """What this stage wrote."""
    return load_average(work, "judge", Judge(attribute_sizes(pool)))


def accuracies(
    judge: Judge, images: torch.Tensor, labels: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Share of pictures whose attribute is recognised, where they have one."""
    with torch.inference_mode():
        guesses = [judge(part) for part in images.split(256)]
    out = {}
    for name, wanted in labels.items():
        guess = torch.cat([g[name] for g in guesses]).argmax(-1)
        out[name] = float((guess == wanted)[wanted >= 0].float().mean())
    return out


def folded(judge: Judge) -> dict[str, torch.Tensor]:
    """Its convolutions with batch norms folded in: w g / sqrt(v + eps), b - m g / sqrt(v + eps)."""
    tensors = {}
    layers = list(judge.body)
    for number, (conv, norm) in enumerate(zip(layers[::3], layers[1::3], strict=True)):
        assert isinstance(conv, torch.nn.Conv2d)
        assert isinstance(norm, torch.nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        tensors[f"body.{number}.weight"] = conv.weight * factor[:, None, None, None]
        tensors[f"body.{number}.bias"] = norm.bias - norm.running_mean * factor
    return tensors


def export(judge: Judge, images: torch.Tensor, folder: Path, *, world: str) -> None:
    """Write the judge for ``catversion evaluate``.

    Args:
      judge: in evaluation mode.
      images: ``[B 3 H W]`` in [-1, 1], whose mean features are taken away.
      folder: receives ``config.json`` and ``model.safetensors``.
      world: what it was trained on.
    """
    with torch.inference_mode():
        features = torch.cat([judge.features(part) for part in images.split(256)])
        tensors = {**folded(judge), "feature_mean": features.mean(0)}
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contents, folder / "model.safetensors")
    widths = [layer.out_channels for layer in judge.body if isinstance(layer, torch.nn.Conv2d)][::2]
    config = {
        "model_type": "catversion_judge",
        "widths": widths,
        "image_size": images.shape[-1],
        "world": world,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def world_digest() -> str:
    """SHA-256 of the drawings and the held-out list that a pool is made from."""
    here = Path(__file__).parent
    files = ("sprites.json", "held_out.json", "world.py", "compose.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in files)).hexdigest()


def main() -> None:
    """Train."""
    args = arguments(__doc__, steps=12000, batch=64, lr=2e-3, export="")
    pool = load_pool(args.work)
    judge = Judge(attribute_sizes(pool))

    def loss_fn(batch: Batch) -> Loss:
        rows = batch.numpy.integers(0, pool.num_train, args.batch)
        # blur and noise: the judge must not fail generated pictures for being soft
        x = to_pixels(pool.images[rows], args.device)
        if batch.python.random() < 0.5:
            x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
        x = x + 0.1 * batch.python.random() * torch.randn(
            x.shape, generator=batch.torch, device=x.device
        )
        loss = x.new_zeros(())
        scores: dict[str, float | torch.Tensor] = {}
        labels = {k: v.to(x.device) for k, v in attributes(pool, rows).items()}
        with in_bfloat16(args.device):
            guesses = judge(x.contiguous(memory_format=torch.channels_last))
        for name, guess in guesses.items():
            wanted = labels[name]
            if (wanted >= 0).any():
                error = torch.nn.functional.cross_entropy(guess.float(), wanted, ignore_index=-1)
                loss = loss + error
                scores[name] = (guess.argmax(-1) == wanted)[wanted >= 0].float().mean()
        return loss, scores

    judge = train("judge", judge, loss_fn, args).cpu()
    rows = pool.num_train + torch.arange(2048).numpy()
    print(accuracies(judge, to_pixels(pool.images[rows]), attributes(pool, rows)))
    if args.export:
        seen = to_pixels(pool.images[:2048])
        export(judge, seen, Path(args.export), world=f"tiny_sd sha256 {world_digest()}")


if __name__ == "__main__":
    main()
