"""SIGKILL at random moments under load: nothing that was promised is lost, no file is damaged."""

import concurrent.futures
import functools
import io
import json
import os
import random
import sys
import threading
import time
import urllib.error

import pytest
from PIL import Image
from serving_client import Client, free_port, photo, serve

from catversion_jax import load_concept

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")

KILLS = int(os.environ.get("CATVERSION_KILLS", "30"))


@pytest.mark.slow  # every start loads and compiles: half a minute each
def test_random_kills_lose_nothing(one_block_sd_folder, tmp_path, record_property):
    random.seed(0)
    client = Client(free_port())
    options = ("--updates", 12, "--max_wait_ms", 5)
    begin = functools.partial(serve, client, one_block_sd_folder, tmp_path / "out", *options)
    for number in range(KILLS):
        stop = threading.Event()
        threads = [
            threading.Thread(target=client.load, args=(10 * number + i, stop)) for i in range(3)
        ]
        with begin():
            for thread in threads:
                thread.start()
            time.sleep(random.uniform(0.0, 6.0))  # then it is killed
        stop.set()
        for thread in threads:
            thread.join()
    outcomes = {"succeeded": 0, "failed": 0}
    with begin() as process:
        for id, data in client.photos.items():
            assert client("GET", f"/v1/concepts/{id}/photos/1") == data
        for id, lesson in client.lessons.items():
            job = client.ended(lesson)
            assert job["status"] == "succeeded", job["error"]  # five times in one is not by chance
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
        assert process.wait(120) == 0
        assert "Traceback" not in (tmp_path / "out" / "log.txt").read_text()
    left = [path for path in (tmp_path / "out").rglob("*.tmp") if "/run-" not in str(path)]
    assert not left
    counts = {"kills": KILLS, "concepts": len(client.lessons), "drawings": outcomes}
    record_property("serving", counts)
    sys.stdout.write(f"{counts}\n")
    assert client.lessons


@pytest.mark.slow  # two starts of a process: half a minute each
def test_sigterm_ends_what_there_is_time_for_and_keeps_the_rest(one_block_sd_folder, tmp_path):
    client = Client(free_port())
    options = ("--updates", 400, "--max_wait_ms", 5, "--shutdown_timeout", 3)
    with serve(client, one_block_sd_folder, tmp_path / "out", *options) as process:
        client("PUT", "/v1/concepts/cup", base_class="cup")
        client("PUT", "/v1/concepts/cup/photos/1", content=photo(1))
        lesson = json.loads(client("POST", "/v1/jobs", kind="teach", concept="cup"))["id"]
        drawing = {"prompt": "a cup", "num_inference_steps": 100, "n": 10}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            short = {"prompt": "a cup", "num_inference_steps": 10, "n": 2}
            waiting = pool.submit(client, "POST", "/v1/images/generations", **short)
            while all(job["kind"] != "draw" for job in client.jobs()):
                time.sleep(0.01)
            later = [json.loads(client("POST", "/v1/jobs", **drawing))["id"] for _ in range(20)]
            process.terminate()
            began, refused = time.monotonic(), 0
            while process.poll() is None:
                try:
                    client("POST", "/v1/jobs", **drawing)
                except urllib.error.HTTPError as error:
                    refused += json.load(error)["error"]["code"] == "draining"
                except OSError:
                    break  # it has ended
                time.sleep(0.05)
            assert process.wait(60) == 0
            assert refused > 10
            assert time.monotonic() - began < 10
            assert len(json.loads(waiting.result())["data"]) == 2
    with serve(client, one_block_sd_folder, tmp_path / "out", *options):
        for id in later:
            job = client.ended(id)
            assert (job["status"], job["attempts"]) == ("succeeded", 1)  # the first was none
        assert client.ended(lesson)["status"] == "succeeded"
