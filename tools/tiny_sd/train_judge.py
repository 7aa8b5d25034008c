"""The judge: a classifier that shares nothing with the model it judges, and is not shipped.

``python train_judge.py WORK --steps N``. A small convolutional network with one head per attribute
of a picture; it says whether a generated picture shows what its prompt asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pool import Pool, load_pool
from train_clip import attribute_sizes, attributes
from training import Batch, Loss, arguments, load_average, to_pixels, train


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
        hidden = self.body(x)
        features = torch.cat([hidden.amax((2, 3)), hidden.mean((2, 3))], -1)
        return {name: head(features) for name, head in self.heads.items()}


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


def main() -> None:
    """Train."""
    args = arguments(__doc__, steps=2500, batch=64, lr=2e-3)
    pool = load_pool(args.work)
    judge = Judge(attribute_sizes(pool))

    def loss_fn(batch: Batch) -> Loss:
        rows = batch.numpy.integers(0, pool.num_train, args.batch)
        # blur and noise: the judge must not fail generated pictures for being soft
        x = to_pixels(pool.images[rows]).to(args.device)
        if batch.python.random() < 0.5:
            x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
        x = x + 0.1 * batch.python.random() * torch.randn(
            x.shape, generator=batch.torch, device=x.device
        )
        loss = x.new_zeros(())
        scores: dict[str, float | torch.Tensor] = {}
        labels = {k: v.to(x.device) for k, v in attributes(pool, rows).items()}
        for name, guess in judge(x).items():
            wanted = labels[name]
            if (wanted >= 0).any():
                loss = loss + torch.nn.functional.cross_entropy(guess, wanted, ignore_index=-1)
                scores[name] = (guess.argmax(-1) == wanted)[wanted >= 0].float().mean()
        return loss, scores

    judge = train("judge", judge, loss_fn, args).cpu()
    rows = pool.num_train + torch.arange(2048).numpy()
    print(accuracies(judge, to_pixels(pool.images[rows]), attributes(pool, rows)))


if __name__ == "__main__":
    main()
