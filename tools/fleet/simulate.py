"""What a process costs beside its compiled steps, over very many concepts.

    python tools/fleet/simulate.py OUT [--concepts 100000] [--stop-after 1000] [--as-if 99700]

Trains a small random model (Stable Diffusion's architecture, pictures of 64 pixels) on as many
concepts, one update and one picture each. The pictures are the package's examples, recoloured when
a concept's turn comes, so that nothing of the list is on disk. Every 1,000 concepts it prints
seconds and resident memory. The same command goes on with what is not done; ``--stop-after`` asks
the run to stop after so many concepts of this process, to see what going on costs. ``--as-if`` puts
copies of a finished concept in place of others, until so many are finished, without training them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import catversion_jax as cv
from catversion_jax.concepts import ConceptList, ConceptSpec, ImageSource
from catversion_jax.training.run.index import FINISHED

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = Path(cv.__file__).parent / "assets" / "tiny-sd-examples"
GOLDEN = (5**0.5 - 1) / 2
SIDE = 64
OPTIONS: dict[str, Any] = {
    "concepts": "given",
    "max_train_steps": 1,
    "train_batch_size": 1,
    "num_eval_samples": 1,
    "instance_prompt": "a {base_class}",
    "concepts_per_device": 16,
    "validation_steps": None,
    "report_to": "none",
}


class RecolouredList:
    """A long list (:class:`~catversion_jax.concepts.long_lists.LongList`) that exists nowhere."""

    notes = ()

    def __init__(self, count: int):
        self.names = [f"concept_{number:07d}" for number in range(count)]
        sources = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())
        self._pictures = [
            np.asarray(Image.open(path / "1.png").convert("HSV").resize((SIDE, SIDE)))
            for path in sources
        ]
        self._classes = [
            json.loads((path / "concept.json").read_text())["base_class"] for path in sources
        ]

    def read(self, name: str) -> ConceptSpec:
        """A concept with one recoloured picture."""
        number = int(name.rpartition("_")[2])
        kind, turn = number % len(self._pictures), number // len(self._pictures)
        hsv = self._pictures[kind].copy()
        hsv[..., 0] += np.uint8(256 * (GOLDEN * turn % 1))
        hsv[..., 2] -= np.minimum(hsv[..., 2], np.uint8(turn // 256 % 64))  # hues come back
        data = io.BytesIO()
        Image.fromarray(hsv, "HSV").convert("RGB").save(data, "PNG", compress_level=1)
        image = ImageSource("1.png", data=data.getvalue())
        return ConceptSpec(name, self._classes[kind], (image,))

    def part(self, _: object) -> RecolouredList:
        """All of it: this process is the only one."""
        return self

    def blocks(self, size: int) -> Iterator[ConceptList]:
        """All concepts in order, so many at a time."""
        for start in range(0, len(self.names), size):
            yield ConceptList(tuple(map(self.read, self.names[start : start + size])))


def resident_mb() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


class Watch(threading.Thread):
    """Prints a line for every 1,000 finished concepts, and stops the run where that is asked."""

    def __init__(self, output: Path, stop: threading.Event, stop_after: int | None):
        super().__init__(daemon=True)
        self._timeline, self._stop, self._after = output / "timeline.csv", stop, stop_after
        self.rows: list[dict[str, float]] = []
        self.first: float | None = None
        self.done = 0
        self.started = time.perf_counter()
        self._read = self._timeline.stat().st_size if self._timeline.exists() else 0
        self._header = 0 if self._read else 1

    def run(self) -> None:
        """Watch ``timeline.csv`` grow, reading only what is new."""
        done = -self._header
        while not self._stop.is_set():
            time.sleep(0.25)
            if not self._timeline.exists():
                continue
            with self._timeline.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += len(new)
            before, done = done, done + new.count(b"\n")
            self.done = done
            seconds = round(time.perf_counter() - self.started, 1)
            if done > 0 and self.first is None:
                self.first = seconds
            if done // 1000 > max(before, 0) // 1000:
                self.rows.append({"done": done, "seconds": seconds, "mb": resident_mb()})
                print(json.dumps(self.rows[-1]), flush=True)
            if self._after is not None and done >= self._after:
                self._stop.set()


def put_in_place(run: Path, finished: int) -> None:
    """Let the first ``finished`` concepts of a stopped run be as finished as one of them is."""
    with (run / "index.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    model = next(row for row in rows if row[1] == "done")
    folder = run / "concepts" / model[0]
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    for row in rows[:finished]:
        if row[1] in FINISHED:
            continue
        name = row[0]
        row[1:] = [cell.replace(model[0], name) for cell in model[1:]]
        (run / "concepts" / name).mkdir(exist_ok=True)
        for part, data in parts.items():
            (run / "concepts" / name / part).write_bytes(
                data.replace(model[0].encode(), name.encode())
            )
    with (run / "index.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def main() -> None:
    """Run, and print what there is to say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--concepts", type=int, default=100_000)
    parser.add_argument("--stop-after", type=int, metavar="N")
    parser.add_argument("--as-if", type=int, metavar="N")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model, output = args.output / "model", args.output / "run"
    if not (model / "model_index.json").is_file():
        sys.path.insert(0, str(ROOT / "tests"))
        from random_model import write_random_model

        write_random_model(model)
    if args.as_if is not None:
        put_in_place(output, args.as_if)
    stop = threading.Event()
    output.mkdir(parents=True, exist_ok=True)
    watch = Watch(output, stop, args.stop_after)
    watch.start()
    concepts: Any = RecolouredList(args.concepts)
    given = {**OPTIONS, "output_dir": str(output), "pretrained_model_name_or_path": str(model)}
    result = cv.train(cv.TrainConfig(**given), concepts=concepts, stop=stop)
    seconds = time.perf_counter() - watch.started
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    done = max(1, watch.done)
    steps = last.get("training", 0) + last.get("evaluation", 0)
    summary = {
        "finished": len(result.finished),
        "of_this_process": done,
        "seconds": round(seconds, 1),
        "seconds_to_the_first_finished": watch.first,
        "seconds_by_kind": last,
        "ms_per_concept": round(1e3 * seconds / done, 2),
        "ms_per_concept_outside_of_steps": round(1e3 * (sum(last.values()) - steps) / done, 2),
        "memory": watch.rows[:: max(1, len(watch.rows) // 20)],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cores": os.cpu_count(),
    }
    (args.output / "simulation.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
