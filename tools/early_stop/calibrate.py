"""Which early-stop rule saves how many steps, and what it costs in score.

    python tools/early_stop/calibrate.py OUT

Trains concepts (the package's examples, and recoloured ones) for longer than they need, scores the
concept files of many steps, and asks every rule where it would have stopped. Writes
OUT/calibration.json and prints the table of docs/how_to/many_concepts.md. A stage that is finished
is not repeated; an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import catversion_jax as cv
from catversion_jax.config import OptimizerOptions, make_config
from catversion_jax.evaluation.intervals import bootstrap_interval
from catversion_jax.training.early_stop import should_stop

sys.path.append(str(Path(__file__).resolve().parents[1] / "fleet"))
from recoloured import make_concepts

NUM_CONCEPTS, NUM_STEPS, SCORED_EVERY = 12, 400, 40
OPTIONS = {
    "pretrained_model_name_or_path": "tiny-sd",
    "max_train_steps": NUM_STEPS,
    "num_positions": 4,
    "scope": "from_class_word",
    "learning_rate": 3e-2,
    "concepts_per_device": 6,
    "eval_steps": 10,
    "checkpointing_steps": SCORED_EVERY,
    "validation_steps": None,
    "report_to": "none",
}
WINDOWS = (40, 80, 120)
EPS = {"dvar": (0.02, 0.05, 0.1, 0.15, 0.3), "plateau": (0.0, 0.005, 0.01, 0.02, 0.05)}
PUBLISHED = ("dvar", 0.15, 200, 300)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One concept: its evaluation losses and its masked overall score, by step."""

    losses: Sequence[tuple[int, float]]
    scores: Sequence[tuple[int, float]]

    def stop(self, options: OptimizerOptions) -> int:
        """The first step at which the rule ends it, else the last one."""
        ends = (n for n in range(1, len(self.losses)) if should_stop(self.losses[:n], options))
        return self.losses[next(ends, len(self.losses)) - 1][0]

    def score(self, step: int) -> float:
        """Between the scored steps by a straight line."""
        steps, scores = zip(*self.scores, strict=True)
        return float(np.interp(step, steps, scores))


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    concepts, run = output / "concepts", output / "run"
    make_concepts(concepts, NUM_CONCEPTS)
    config = make_config({**OPTIONS, "concepts": str(concepts), "output_dir": str(run)})
    backbone = cv.train(config).backbone
    scores = run / "evaluation" / "scores.json"
    if not scores.exists():
        cv.evaluate(
            run,
            prompts="tiny",
            model=backbone,
            num_images_per_prompt=1,
            all_steps=True,
            plain=True,
            num_prior_images=0,
            sampler="dpmsolver++",
            num_inference_steps=15,
            guidance_scale=5.0,
            batch_size=12,
        )
    curves = read_curves(run, json.loads(scores.read_text()))
    rows = [outcome(curves, *rule) for rule in (PUBLISHED, *rules())]
    reached = {
        step: dataclasses.asdict(bootstrap_interval([curve.score(step) for curve in curves]))
        for step in range(0, NUM_STEPS + 1, SCORED_EVERY)
    }
    found = {"options": OPTIONS, "score_by_step": reached, "rules": rows}
    (output / "calibration.json").write_text(json.dumps(found, indent=1) + "\n")
    print("| rule | eps | window | min steps | steps saved | score lost |")
    print("|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["saved"]):
        lost = row["lost"]
        print(
            f"| {row['rule']} | {row['eps']} | {row['window']} | {row['min_steps']} | "
            f"{100 * row['saved']:.0f} % | {lost['mean']:+.3f} "
            f"[{lost['low']:+.3f}, {lost['high']:+.3f}] |"
        )
    for step, score in reached.items():
        print(f"step {step}: {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")


def read_curves(run: Path, scores: dict[str, Any]) -> list[Curve]:
    """Of every concept."""
    plain = {one["name"]: one for one in scores["methods"]["plain model"]["concepts"]}
    curves = []
    for name, points in scores["curves"].items():
        with (run / "concepts" / name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["eval_loss"]]
        losses = [(int(row["step"]), float(row["eval_loss"])) for row in rows]
        start = (0, plain[name]["overall_masked"])
        scored = [(point["step"], point["overall_masked"]) for point in points]
        curves.append(Curve(losses, [start, *scored]))
    return curves


def rules() -> list[tuple[str, float, int, int]]:
    """(rule, eps, window, minimal steps) that are tried beside the published one."""
    pairs = itertools.product(EPS, WINDOWS)
    return [(rule, eps, window, window) for rule, window in pairs for eps in EPS[rule]]


def outcome(
    curves: Sequence[Curve], rule: str, eps: float, window: int, min_steps: int
) -> dict[str, Any]:
    """What one rule would have done."""
    config = make_config(
        {
            "concepts": "-",
            "early_stop": rule,
            "early_stop_eps": eps,
            "early_stop_window": window,
            "early_stop_min_steps": min_steps,
            "eval_steps": OPTIONS["eval_steps"],
        }
    )
    stops = [curve.stop(config) for curve in curves]
    lost = [
        curve.score(NUM_STEPS) - curve.score(at) for curve, at in zip(curves, stops, strict=True)
    ]
    return {
        "rule": rule,
        "eps": eps,
        "window": window,
        "min_steps": min_steps,
        "stops": stops,
        "saved": 1 - float(np.mean(stops)) / NUM_STEPS,
        "lost": dataclasses.asdict(bootstrap_interval(lost)),
    }


if __name__ == "__main__":
    main()
