"""A server under load: ``python benchmarks/bench_serve.py``.

First the bare sampler (``draw_requests`` in a process of its own), then ``catversion serve`` with
many clients that draw, each with its own key, then the same while concepts are taught, then the
bare sampler again, since other jobs of the machine come and go. Latency is what a client waits for
one picture, waiting in the queue included. A client has one picture in the queue at a time and the
keys take turns, so none may wait for more than one of every other and the picture under way, drawn
at the rate of drawing alone in the drawing's share of the device: ``bound_seconds``. What drawing
has of its own rate while concepts are taught is ``share_while_teaching``. The clients run on the
same cores: ``seconds_of_clients`` is the processor time that a picture costs them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import io
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_step import RESULTS
from machine import write_results
from PIL import Image

from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.config.serving import ServeOptions
from catversion_jax.models.stable_diffusion import load_model
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.requests import ImageRequest

PROMPT = "a teapot on the beach"


def bare(model: str, steps: int, images: int) -> float:
    """Pictures per second without a server."""
    backbone = load_model(model, max_devices=1)
    settings = SamplingSettings(num_inference_steps=steps)
    requests = [ImageRequest(PROMPT, seed=seed) for seed in range(images)]
    draw_requests(backbone, requests[:1], settings)
    began = time.perf_counter()
    draw_requests(backbone, requests, settings)
    return images / (time.perf_counter() - began)


def key_of(number: int) -> str:
    """Of a client."""
    return f"key-{number:032d}"


class Client:
    """One connection, of one key."""

    def __init__(self, port: int, number: int = 0):
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        self._key = {"Authorization": f"Bearer {key_of(number)}"}

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        """What a request is answered with."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self._http.request(method, path, data, {"Content-Type": kind, **self._key})
        answer = self._http.getresponse()
        text = answer.read()
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
        return json.loads(text)


def photo(seed: int) -> bytes:
    """Coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def teach(port: int, number: int) -> str:
    """Ask for a concept to be taught; the job's id."""
    client, id = Client(port), f"concept-{number}"
    client("PUT", f"/v1/concepts/{id}", {"base_class": "teapot"})
    for index in range(4):
        client("PUT", f"/v1/concepts/{id}/photos/{index}", photo(10 * number + index))
    return client("POST", "/v1/jobs", {"kind": "teach", "concept": id})["id"]


def wait_for(client: Client, jobs: list[str]) -> list[str]:
    """What became of the jobs."""
    while True:
        found = [client("GET", f"/v1/jobs/{job}")["status"] for job in jobs]
        if not {"queued", "processing"} & set(found):
            return found
        time.sleep(0.2)


def draw_all(port: int, clients: int, images: int, steps: int) -> dict[str, float]:
    """Pictures of so many clients at once: how long each waited, how many per second, and what a
    picture costs the clients.
    """

    def one(number: int) -> list[float]:
        client, waited = Client(port, number), []
        for seed in range(number, images, clients):
            began = time.perf_counter()
            body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}
            client("POST", "/v1/images/generations", body)
            waited.append(time.perf_counter() - began)
        return waited

    began, used = time.perf_counter(), time.process_time()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        waited = sorted(w for found in pool.map(one, range(clients)) for w in found)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    return {
        "images_per_second": round(images / seconds, 3),
        "p50_seconds": round(statistics.median(waited), 2),
        "p95_seconds": round(waited[int(0.95 * len(waited))], 2),
        "longest_seconds": round(waited[-1], 2),
        "seconds_of_clients": round(used / images, 4),
    }


def memory_mb(pid: int) -> float:
    """Of a process, resident."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGESIZE") / 1e6, 1)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--concepts", type=int, default=20)
    parser.add_argument("--preset", choices=("quality", "fast"), default="quality")
    parser.add_argument("--updates", type=int, help="of each concept [as the preset has]")
    parser.add_argument("--rounds", type=int, default=3, help="of drawing alone, for the memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    args = parser.parse_args()

    def sampler() -> float:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as alone:
            return alone.submit(bare, args.model, args.steps, min(args.images, 100)).result()

    spawned = multiprocessing.get_context("spawn")
    without = [sampler()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text("".join(f"user-{n} {key_of(n)}\n" for n in range(args.clients)))
        process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-c",
                    "from catversion_jax.cli import main; raise SystemExit(main())",
                ),
                *("serve", "--model", args.model, "--port", str(port), "--output_dir", folder),
                *("--preset", args.preset, "--max_wait_ms", "10", "--keys", str(keys)),
                *(() if args.updates is None else ("--updates", str(args.updates))),
            ]
        )
        try:
            began = time.perf_counter()
            while True:
                try:
                    Client(port)("GET", "/ready")
                    break
                except (OSError, RuntimeError):
                    time.sleep(0.2)
            ready = round(time.perf_counter() - began, 1)
            drawings, memory = [], []
            for _ in range(args.rounds):
                drawings.append(draw_all(port, args.clients, args.images, args.steps))
                memory.append(memory_mb(process.pid))
            began = time.perf_counter()
            wait_for(Client(port), [teach(port, args.concepts)])
            alone = round(time.perf_counter() - began, 1)
            lessons = [teach(port, number) for number in range(args.concepts)]
            began = time.perf_counter()
            both = draw_all(port, args.clients, args.images, args.steps)
            taught = wait_for(Client(port), lessons)
            seconds_until_all_taught = round(time.perf_counter() - began, 1)
            memory.append(memory_mb(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    without.append(sampler())
    rate = statistics.mean(without)
    served = statistics.median(drawing["images_per_second"] for drawing in drawings)
    result = {
        **vars(args),
        "out": str(args.out.name),
        "bare_images_per_second": [round(one, 3) for one in without],
        "seconds_until_ready": ready,
        "drawing": drawings,
        "share_of_bare": round(served / rate, 3),
        "drawing_while_teaching": both,
        "share_while_teaching": round(both["images_per_second"] / served, 3),
        "bound_seconds": round((args.clients + 1) / served / ServeOptions.drawing_share, 1),
        "seconds_of_a_lesson_alone": alone,
        "taught": taught.count("succeeded"),
        "seconds_until_all_taught": seconds_until_all_taught,
        "memory_mb": memory,
    }
    print(json.dumps(result, indent=1))
    write_results(args.out, result)


if __name__ == "__main__":
    main()
