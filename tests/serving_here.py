"""A server in this process: its options, its keys, and requests of whoever holds one."""

import io
import time

import numpy as np
from PIL import Image

from catversion_jax.config.serving import ServeOptions

KEYS = {"ada": "ada-0123456789abcdef", "bo": "bo-0123456789abcdef"}
DRAWING = {"num_inference_steps": 2, "guidance_scale": 3.0}


def options(folder, model, **given):
    # evaluated every second update, so for the first time after the one that compiles everything
    usual = {"updates": 10, "rows": 1, "max_wait_ms": 300.0, "shutdown_timeout": 5.0}
    return ServeOptions(model=str(model), output_dir=str(folder), **{**usual, **given})


def photo(seed, size=80, format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


class Caller:
    """Requests of one key."""

    def __init__(self, client, name):
        self.client, self.headers = client, {"Authorization": f"Bearer {KEYS[name]}"}

    def __call__(self, method, path, **more):
        headers = {**self.headers, **more.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **more)

    def ok(self, method, path, **more):
        answer = self(method, path, **more)
        assert answer.status_code in (200, 202), answer.text
        return answer.json()

    def ended(self, job, seconds=120):
        for _ in range(int(seconds / 0.02)):
            now = self.ok("GET", f"/v1/jobs/{job['id']}")
            if now["status"] in ("succeeded", "failed", "canceled"):
                return now
            time.sleep(0.02)
        raise AssertionError(now)

    def teach(self, id, word, photos=3, **fields):
        self.ok("PUT", f"/v1/concepts/{id}", json={"base_class": word, **fields})
        for number in range(photos):
            name = f"/v1/concepts/{id}/photos/{number}.png"
            self.ok("PUT", name, content=photo(len(id) + 100 * number))
        return self.ok("POST", "/v1/jobs", json={"kind": "teach", "concept": id})


def wait_until_ready(client):
    headers = {"Authorization": f"Bearer {KEYS['ada']}"}
    for _ in range(6000):
        answer = client.get("/ready", headers=headers)
        if answer.status_code == 200:
            return
        assert answer.status_code == 503
        time.sleep(0.05)
    raise AssertionError(answer.text)


def write_keys(folder):
    """A file of the keys, for ``--keys``."""
    path = folder / "keys"
    path.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    return path


def sample(server, name, **labels):
    """What the server's meter shows."""
    return server.core.meters.registry.get_sample_value(f"catversion_{name}", labels) or 0.0


def pixels(data):
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)
