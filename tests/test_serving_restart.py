"""A server that starts where an earlier one was killed."""

import dataclasses
from pathlib import Path

import pytest

from catversion_jax.cli.serve import teaching_config

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")

from serving_here import DRAWING, Caller, options, photo, wait_until_ready, write_keys
from starlette.testclient import TestClient

from catversion_jax.serving.app import make_app
from catversion_jax.serving.server import Server


@pytest.mark.slow  # a server of its own, half a minute; test_serving_store.py has the bookkeeping
def test_a_restart_goes_on_with_what_was_promised(one_block_sd_folder, tmp_path):
    """What an earlier process had promised when it was killed: a drawing it had begun, one that it
    had begun twice, a concept that it had begun, and one that it had begun five times."""
    chosen = options(tmp_path, one_block_sd_folder, keys=str(write_keys(tmp_path)))
    server = Server(chosen, teaching_config(chosen))  # never started
    client = TestClient(make_app(server))
    ada = Caller(client, "ada")
    ada.ok("PUT", "/v1/concepts/rex", json={"base_class": "dog"})
    ada.ok("PUT", "/v1/concepts/rex/photos/1", content=photo(1))
    request = {"prompt": "a dog", "model": "base", "n": 2, "seed": 1, "concepts": []}
    request |= {"negative_prompt": "", "output_format": "png", "output_compression": 95}
    store, drawings = server.core.store, []
    for attempts in range(3):
        job = store.add_job("ada", "draw", {**request, **DRAWING, "warnings": []}, num_images=2)
        for _ in range(attempts):
            store.begin(job.id)
            store.requeue(job.id)
        drawings.append(job)
    concept = store.concept("ada", "rex")
    lesson = store.add_job("ada", "teach", {}, concept=concept)
    ada.ok("PUT", "/v1/concepts/tim", json={"base_class": "cat"})
    ada.ok("PUT", "/v1/concepts/tim/photos/1", content=photo(2))
    fatal = store.add_job("ada", "teach", {}, concept=store.concept("ada", "tim"))
    store.take_lesson(fatal.id)
    for _ in range(5):
        store.attempt(fatal.id)
    server.core.folders.describe(concept.folder, concept.fields, store.photos(concept.folder))
    store.take_lesson(lesson.id)
    store.attempt(lesson.id)
    store.close()
    before = server.worker._config.output_dir
    kept = Path(before) / "concepts" / lesson.id / "step.safetensors"
    kept.parent.mkdir(parents=True)  # of a training with other options
    kept.touch()
    chosen = dataclasses.replace(chosen, updates=3, sizes=("16x16",))

    again = Server(chosen, teaching_config(chosen))
    with TestClient(make_app(again)) as client:
        ada = Caller(client, "ada")
        wait_until_ready(client)
        ended = [ada.ended({"id": job.id}) for job in (*drawings, lesson, fatal)]
        states = ["succeeded", "succeeded", "failed", "succeeded", "failed"]
        assert [one["status"] for one in ended] == states
        assert "ended 2 times" in ended[2]["error"]
        assert ended[3]["attempts"] == 1  # of two, but an update was saved in the second
        assert "ended 5 times while it taught this" in ended[4]["error"]
        assert ada("GET", "/v1/concepts/tim/photos/1").content == photo(2)
        assert kept.exists()  # what was under way began anew, and lost nothing
        assert len(ended[0]["images"]) == 2
        waiting = ada.ok("POST", "/v1/jobs", json={"prompt": "a dog", "n": 3, **DRAWING})
        again.drain()  # as SIGTERM does
        for ask in (("POST", "/v1/jobs", {"prompt": "a dog"}), ("GET", "/ready", None)):
            refused = ada(*ask[:2], json=ask[2])
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) == 30
        assert ada.ok("GET", f"/v1/jobs/{waiting['id']}")["concept"] is None  # is still answered
        assert ada("DELETE", "/v1/concepts/rex").is_success
        assert not kept.exists()
    after = Server(chosen, teaching_config(chosen))
    assert after.core.store.job(waiting["id"]).state == "succeeded"  # it was drawn before the end
    after.core.store.close()

    changed = {"text_encoder": "0" * 64}
    backbone = again.worker.backbone
    other_model = dataclasses.replace(backbone, digests={**backbone.digests, **changed})
    for updates in (3, 5):  # with the same options, and with others
        chosen = dataclasses.replace(chosen, updates=updates)
        refused = Server(chosen, teaching_config(chosen), other_model)
        refused.start()
        assert refused.device.stop(60)
        assert "the model's text encoder has changed), and" in str(refused.device.failure)
        refused.close()
