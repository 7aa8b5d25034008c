"""What a newcomer costs, against the number of rows: ``python benchmarks/bench_refill.py``.

Eight virtual devices hold 8, 64 and 192 rows of tiny-sd. One row after the other is given to
another concept, as the queue does it: its arrays are brought to its device, the plain model's and
its own evaluation loss are measured, its row is written. Apart from that, one row is evaluated in
the middle of its training. The seconds are medians; ``send and put`` is the refill without its two
losses, whose compiled programs take what they take.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from machine import describe_machine, spread, write_results

from catversion_jax.concepts import read_concepts
from catversion_jax.config import TrainConfig, make_config
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.runtime.sharding import make_mesh, replicated
from catversion_jax.training.preparation import PreparedConcept, describe_concept, prepare_concept
from catversion_jax.training.programs import Programs
from catversion_jax.training.rows import Rows
from catversion_jax.training.state import make_optimizer

RESULTS = Path(__file__).parent / "results" / "refill.json"
DEVICES = 8


def timed(work: Callable[[], object]) -> float:
    """Seconds until it and all that it has started on the devices have ended."""
    started = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - started


def measure(
    num_rows: int, prepared: PreparedConcept, backbone: Backbone, config: TrainConfig, repeats: int
) -> dict[str, float]:
    """Median seconds by what was done."""
    mesh = make_mesh(1, jax.devices()[:DEVICES])
    tx = make_optimizer(config.optimizer_options, config.method_options)
    networks = jax.device_put((backbone.text_encoders, backbone.unet), replicated(mesh))
    on_mesh = dataclasses.replace(backbone, text_encoders=networks[0], unet=networks[1])
    rows = Rows(
        num_rows,
        mesh,
        on_mesh,
        config.objective_options,
        tx,
        averaged=False,
        max_images=len(prepared.encoded.mean),
        max_prompts=len(prepared.prompts),
    )
    programs = Programs(
        on_mesh,
        tx,
        mesh,
        config.objective_options,
        config.device_options,
        ema_decay=None,
        first_layers=[part.first_layer for part in prepared.learned.parts],
        num_eval_samples=config.num_eval_samples,
    )

    def refill(row: int, *, with_losses: bool = True) -> object:
        newcomers = rows.send({row: prepared}, {})
        if with_losses:
            programs.evaluate(None, newcomers.plain, newcomers.is_there)
            programs.evaluate(newcomers.state.exported, newcomers.data, newcomers.is_there)
        rows.put(newcomers, 0.0)
        return rows.state, rows.data

    def evaluate(row: int) -> object:
        learned, data = rows.take([row])
        return programs.evaluate(learned, data, rows.is_there([row]))

    for group in rows.groups(range(num_rows)):
        rows.put(rows.send(dict.fromkeys(group, prepared), {}), 0.0)
    refill(0), evaluate(0)  # compiled here
    chosen = np.linspace(0, num_rows - 1, repeats, dtype=int).tolist()
    without_losses = functools.partial(refill, with_losses=False)
    seconds = {
        "refill": [timed(functools.partial(refill, row)) for row in chosen],
        "send and put": [timed(functools.partial(without_losses, row)) for row in chosen],
        "one row is due": [timed(functools.partial(evaluate, row)) for row in chosen],
    }
    return {what: round(spread(values)[0], 4) for what, values in seconds.items()}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 192])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    config = make_config(
        {
            "concepts": "tiny-sd-examples",
            "pretrained_model_name_or_path": "tiny-sd",
            "num_positions": 4,
            "scope": "from_class_word",
        }
    )
    backbone = load_backbone("tiny-sd")
    spec = read_concepts("tiny-sd-examples").concepts[0]
    data, method = config.data_options, config.method_options
    record = describe_concept(
        spec, backbone, data, method, seed=0, recorded={}, images={}, networks={}
    )
    prepared = prepare_concept(spec, record, backbone, data, method, config.objective_options)
    found = {}
    for num_rows in args.rows:
        found[f"{num_rows} rows"] = measure(num_rows, prepared, backbone, config, args.repeats)
        print(num_rows, "rows:", json.dumps(found[f"{num_rows} rows"]), flush=True)
    write_results(args.results, {"devices": DEVICES, "seconds": found})
    print(json.dumps(describe_machine()))


if __name__ == "__main__":
    main()
