"""A client of a server in a process of its own, which remembers what it was promised."""

import contextlib
import io
import json
import random
import socket
import time
import urllib.request

import numpy as np
from PIL import Image
from running import start_command


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
        self.port, self.url = port, f"http://127.0.0.1:{port}"
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

    def jobs(self):
        return json.loads(self("GET", "/v1/jobs"))["data"]

    def ended(self, id):
        while True:
            job = json.loads(self("GET", f"/v1/jobs/{id}"))
            if job["status"] in ("succeeded", "failed", "canceled"):
                return job
            time.sleep(0.05)


@contextlib.contextmanager
def serve(client, model, folder, *options):
    """``catversion serve`` in a process of its own, once it is ready; what it says goes to
    ``log.txt`` in the folder, since nobody reads while it runs. Leaving the block kills it."""
    where = ("--port", client.port, "--output_dir", folder)
    folder.mkdir(exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        process = start_command("serve", "--model", model, *where, *options, output=log)
    try:
        while process.poll() is None and not client.is_ready():
            time.sleep(0.05)
        assert process.poll() is None, (folder / "log.txt").read_text()
        yield process
    finally:
        process.kill()
        process.wait()
