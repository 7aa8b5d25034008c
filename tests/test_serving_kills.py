"""SIGKILL at random moments under load: nothing that was promised is lost, no file is damaged."""

import contextlib
import io
import json
import os
import random
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from running import start_command

from catversion_jax import load_concept

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")

KILLS = int(os.environ.get("CATVERSION_KILLS", "30"))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


class Client:
    """Asks, and remembers what was promised."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        self.photos, self.lessons, self.drawings = {}, {}, []

    def __call__(self, method, path, content=None, **body):
        data = content if content is not None else (json.dumps(body).encode() if body else None)
        headers = {"Content-Type": "application/json"} if body else {}
        request = urllib.request.Request(self.url + path, method=method, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def is_ready(self):
        with contextlib.suppress(OSError):
            self("GET", "/ready")
            return True
        return False

    def load(self, number, stop):
        """Teach and draw until the server is gone."""
        with contextlib.suppress(OSError):
            while not stop.is_set():
                id = f"c{number}-{len(self.lessons)}-{random.randrange(10**9)}"
                self("PUT", f"/v1/concepts/{id}", base_class="cup")
                data = photo(random.randrange(10**6))
                self("PUT", f"/v1/concepts/{id}/photos/1", content=data)
                self.photos[id] = data
                job = json.loads(self("POST", "/v1/jobs", kind="teach", concept=id))
                self.lessons[id] = job["id"]
                for seed in range(3):
                    drawing = self(
                        "POST", "/v1/jobs", prompt="a cup", num_inference_steps=4, n=3, seed=seed
                    )
                    self.drawings.append(json.loads(drawing)["id"])
                time.sleep(0.1)

    def ended(self, id):
        while True:
            job = json.loads(self("GET", f"/v1/jobs/{id}"))
            if job["status"] in ("succeeded", "failed", "canceled"):
                return job
            time.sleep(0.05)


@pytest.mark.slow  # every start loads and compiles: half a minute each
def test_random_kills_lose_nothing(one_block_sd_folder, tmp_path, record_property):
    random.seed(0)
    port = free_port()
    client = Client(port)

    def serve():
        where = ("--port", port, "--output_dir", tmp_path / "out")
        shapes = ("--updates", 12, "--max_wait_ms", 5)
        process = start_command("serve", "--model", one_block_sd_folder, *where, *shapes)
        while process.poll() is None and not client.is_ready():
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
        return process

    for number in range(KILLS):
        process, stop = serve(), threading.Event()
        threads = [
            threading.Thread(target=client.load, args=(10 * number + i, stop)) for i in range(3)
        ]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0.0, 6.0))
        process.kill()
        process.communicate()
        stop.set()
        for thread in threads:
            thread.join()
    process = serve()
    outcomes = {"succeeded": 0, "failed": 0}
    for id, data in client.photos.items():
        assert client("GET", f"/v1/concepts/{id}/photos/1") == data
    for id, lesson in client.lessons.items():
        assert client.ended(lesson)["status"] == "succeeded"
        (tmp_path / "file").write_bytes(client("GET", f"/v1/concepts/{id}/file"))
        concept = load_concept(tmp_path / "file")
        assert (concept.name, concept.step) == (id, 12)
    for drawing in client.drawings:
        job = client.ended(drawing)
        outcomes[job["status"]] += 1
        if job["status"] == "failed":
            assert "ended 2 times" in job["error"]
        for path in job["images"]:
            with Image.open(io.BytesIO(client("GET", path))) as picture:
                picture.load()
    process.terminate()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    left = [path for path in (tmp_path / "out").rglob("*.tmp") if "/run/" not in str(path)]
    assert not left
    counts = {"kills": KILLS, "concepts": len(client.lessons), "drawings": outcomes}
    record_property("serving", counts)
    sys.stdout.write(f"{counts}\n")
    assert client.lessons
