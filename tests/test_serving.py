"""One server, asked by its real clients: OpenAI's own package, and plain requests."""

import base64
import dataclasses
import io
import json
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

import catversion_jax
from catversion_jax.cli.serve import teaching_config
from catversion_jax.runtime.compilation import watch_compilation

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")
openai = pytest.importorskip("openai", reason="the client of OpenAI: pip install '.[test]'")

from serving_here import (  # noqa: E402
    DRAWING,
    KEYS,
    Caller,
    options,
    photo,
    pixels,
    sample,
    wait_until_ready,
    write_keys,
)
from starlette.testclient import TestClient  # noqa: E402

from catversion_jax.serving.app import make_app  # noqa: E402
from catversion_jax.serving.server import Server  # noqa: E402


@pytest.fixture(scope="module")
def serving(one_block_sd_folder, tmp_path_factory):
    """A server under way, and a client of it; ``ada`` has taught ``rex``, a dog. The model has a
    safety checker that flags nothing."""
    from tiny_pipelines import add_safety_checker

    folder = tmp_path_factory.mktemp("server")
    model = shutil.copytree(one_block_sd_folder, folder / "model")
    add_safety_checker(model)
    chosen = options(folder, model, keys=str(write_keys(folder)))
    server = Server(chosen, teaching_config(chosen))
    with TestClient(make_app(server)) as client:
        answer = client.get("/v1/models", headers={"Authorization": f"Bearer {KEYS['ada']}"})
        assert answer.status_code == 200  # while it loads
        wait_until_ready(client)
        ada = Caller(client, "ada")
        assert ada.ended(ada.teach("rex", "dog"))["status"] == "succeeded"
        yield server, client


@pytest.fixture
def ada(serving):
    return Caller(serving[1], "ada")


@pytest.fixture
def bo(serving):
    return Caller(serving[1], "bo")


# ---- drawing -------------------------------------------------------------------------------------


def test_pictures_of_two_keys_and_two_concepts_in_one_batch_are_those_drawn_alone(
    serving, ada, bo, tmp_path
):
    """The second implementation is ``catversion_jax.generate`` with the concept file that the
    server gives away."""
    server, _ = serving
    assert bo.ended(bo.teach("mug", "cup", photos=2))["status"] == "succeeded"
    batches = sample(server, "step_seconds_count", kind="draw")
    asked = [
        (ada, {"prompt": "a dog in snow", "model": "rex", "seed": 1}),
        (bo, {"prompt": "a cup in snow", "model": "mug", "seed": 2}),
        (ada, {"prompt": "a dog and a house", "model": "base", "seed": 3}),
        (bo, {"prompt": "two cups", "concepts": [{"id": "mug", "scale": 0.5}], "seed": 4}),
        (ada, {"prompt": "no such thing", "model": "rex", "seed": 5}),
    ]
    jobs = [who.ok("POST", "/v1/jobs", json={**DRAWING, **body}) for who, body in asked]
    for (who, body), job in zip(asked, jobs, strict=True):
        assert who.ended(job)["status"] == "succeeded"
        data = who("GET", f"/v1/jobs/{job['id']}/images/0").content
        named = {"rex": "rex", "mug": "mug"}.get(body.get("model"))
        named = named or next((one["id"] for one in body.get("concepts", [])), None)
        concepts = {}
        if named is not None:
            path = tmp_path / f"{named}.safetensors"
            path.write_bytes(who("GET", f"/v1/concepts/{named}/file").content)
            scale = body["concepts"][0]["scale"] if "concepts" in body else 1.0
            concepts = {str(path): scale}
        alone = catversion_jax.generate(
            body["prompt"],
            concepts,
            model=server.worker.backbone,
            seeds=body["seed"],
            batch_size=1,
            **DRAWING,
        )
        np.testing.assert_array_equal(pixels(data), alone.images[0])
    assert sample(server, "step_seconds_count", kind="draw") == batches + 1


def test_openais_own_client_draws_with_a_concept(serving, ada):
    _, client = serving
    theirs = openai.OpenAI(
        api_key=KEYS["ada"], base_url="http://testserver/v1", http_client=client, max_retries=0
    )
    assert {model.id for model in theirs.models.list()} == {"base", "rex"}
    assert theirs.models.retrieve("rex").owned_by == "ada"
    drawn = theirs.images.generate(
        model="rex",
        prompt="a dog on the beach",
        n=2,
        size="auto",
        output_format="jpeg",
        extra_body={**DRAWING, "seed": 7},
    )
    assert len(drawn.data) == 2
    one, other = (pixels(base64.b64decode(image.b64_json)) for image in drawn.data)
    assert one.shape == other.shape == (16, 16, 3)
    assert (one != other).any()
    seven = {**DRAWING, "seed": 7}
    link = theirs.images.generate(prompt="a dog", response_format="url", extra_body=seven)
    path = link.data[0].url.removeprefix("http://testserver")
    assert pixels(ada("GET", path).content).shape == (16, 16, 3)
    for mistake, param in (
        ({"model": "nobody"}, None),
        ({"size": "17x17"}, "size"),
        ({"n": 11}, "n"),
        ({"extra_body": {"sampler": "best"}}, "sampler"),
        ({"extra_body": {"num_inference_steps": 999}}, "num_inference_steps"),
        ({"extra_body": {"no_such_option": 1}}, "no_such_option"),
    ):
        with pytest.raises(openai.APIStatusError) as found:
            theirs.images.generate(**{"prompt": "a dog", **mistake})
        assert found.value.status_code == (404 if "model" in mistake else 422)
        assert found.value.param == param
        assert found.value.code
        assert found.value.type.endswith("error")


def test_the_file_of_a_picture_says_that_a_machine_made_it(serving, ada):
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    for format in ("png", "jpeg", "webp"):
        body = {"prompt": "a dog", **DRAWING, "output_format": format}
        drawn = ada.ok("POST", "/v1/images/generations", json=body)
        data = base64.b64decode(drawn["data"][0]["b64_json"])
        with Image.open(io.BytesIO(data)) as picture:
            packet = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"]
        text = packet.decode() if isinstance(packet, bytes) else packet
        described = ElementTree.fromstring(text[text.index("<x:") : text.index("<?xpacket end")])
        found = described.find(f"{rdf}RDF/{rdf}Description").get(name)
        assert found.endswith("/digitalsourcetype/trainedAlgorithmicMedia")


def test_a_picture_that_the_safety_checker_flags_is_black(serving, ada):
    assert ada.ok("GET", "/ready")["safety_checker"] == "the model's own"
    network = serving[0].worker._checker.network
    body = {"prompt": "a dog", **DRAWING, "seed": 3}
    plain = ada.ok("POST", "/v1/images/generations", json=body)
    network.concept_embeds_weights.data.fill_(-1.0)  # a cosine is larger
    flagged = ada.ok("POST", "/v1/images/generations", json=body)
    network.concept_embeds_weights.data.fill_(1.0)
    assert pixels(base64.b64decode(plain["data"][0]["b64_json"])).any()
    assert not pixels(base64.b64decode(flagged["data"][0]["b64_json"])).any()
    assert (plain["warnings"], len(flagged["warnings"])) == ([], 1)
    assert "safety checker has flagged" in flagged["warnings"][0]


def test_programs_for_a1111_draw(ada):
    assert ada.ok("GET", "/sdapi/v1/options") == {"sd_model_checkpoint": "base"}
    titles = [one["title"] for one in ada.ok("GET", "/sdapi/v1/sd-models")]
    assert titles == ["base", "rex"]
    assert "DDIM" in [one["name"] for one in ada.ok("GET", "/sdapi/v1/samplers")]
    assert [one["name"] for one in ada.ok("GET", "/sdapi/v1/loras")] == ["rex"]
    asked = {"prompt": "a dog <lora:rex:0.5>", "steps": 2, "cfg_scale": 3, "seed": 4}
    twice = {**asked, "batch_size": 2, "restore_faces": False}
    answer = ada.ok("POST", "/sdapi/v1/txt2img", json=twice)
    info = json.loads(answer["info"])
    assert (info["prompt"], info["all_seeds"]) == ("a dog", [4, 5])
    body = {"prompt": "a dog", "concepts": [{"id": "rex", "scale": 0.5}], "seed": 5, **DRAWING}
    same = ada.ok("POST", "/v1/images/generations", json=body)
    theirs, ours = answer["images"][1], same["data"][0]["b64_json"]
    np.testing.assert_array_equal(*(pixels(base64.b64decode(one)) for one in (theirs, ours)))
    assert ada("POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "rex"}).is_success
    assert ada.ok("GET", "/sdapi/v1/options") == {"sd_model_checkpoint": "rex"}
    assert ada("POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "x"}).status_code == 422
    ada.ok("POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "base"})
    half = ada("POST", "/sdapi/v1/txt2img", json={**asked, "width": 128})  # the other is usual
    assert half.json()["error"]["code"] == "invalid_size"
    answer = ada.ok("POST", "/sdapi/v1/txt2img", json={**asked, "prompt": "a cat <lora:rex>"})
    assert "never names concept 'rex'" in json.loads(answer["info"])["warnings"][0]


# ---- teaching ------------------------------------------------------------------------------------


def test_what_arrives_is_taught_without_compiling_anything(ada, bo):
    """Other words, other numbers of photos, pictures with two concepts, while others are taught."""
    with watch_compilation() as found:
        jobs = [
            (ada, ada.teach("old-teapot", "tea pot", photos=5, seed=3)),
            (bo, bo.teach("suit", "stuffed animal", photos=1, prompts=["a {}", "one {} at night"])),
        ]
        for who, job in jobs:
            assert job["check"]["problems"] == []
            done = who.ended(job)
            assert done["status"] == "succeeded", done
        body = {"prompt": "a dog beside a tea pot", "seed": 1, **DRAWING}
        body["concepts"] = [{"id": "rex"}, {"id": "old-teapot", "scale": 0.7}]
        assert ada("POST", "/v1/images/generations", json=body).status_code == 200
        assert ada("POST", "/v1/images/generations", json={**body, "n": 3}).status_code == 200
    assert found.programs == 0
    for who, id in ((ada, "old-teapot"), (bo, "suit")):
        assert who.ok("DELETE", f"/v1/concepts/{id}")["deleted"]
        assert who("GET", f"/v1/concepts/{id}").status_code == 404


def test_the_file_is_the_one_of_catversion_train(serving, ada, tmp_path):
    """The same photos through ``catversion_jax.train`` give the same numbers. As many as a concept
    may have: then both compile the same programs."""
    server, _ = serving
    prompts = [f"a cup {place}" for place in ("", "here", "there", "up", "down", "in", "out", "on")]
    (tmp_path / "full").mkdir()
    ada.ok("PUT", "/v1/concepts/full", json={"base_class": "cup", "prompts": prompts, "seed": 3})
    for number in range(server.options.max_images):
        data = photo(number, size=16)
        ada.ok("PUT", f"/v1/concepts/full/photos/{number}", content=data)
        (tmp_path / "full" / f"{number}.png").write_bytes(data)
    taught = ada.ended(ada.ok("POST", "/v1/jobs", json={"kind": "teach", "concept": "full"}))
    assert taught["status"] == "succeeded"
    fields = {"base_class": "cup", "prompts": prompts, "seed": 3}
    (tmp_path / "full" / "concept.json").write_text(json.dumps(fields))
    config = teaching_config(server.options)
    overrides = {"concepts": str(tmp_path / "full"), "output_dir": str(tmp_path / "run")}
    result = catversion_jax.train(
        dataclasses.replace(config, **overrides), backbone=server.worker.backbone
    )
    (tmp_path / "theirs").write_bytes(ada("GET", "/v1/concepts/full/file").content)
    ours = catversion_jax.load_concept(tmp_path / "theirs")
    expected = catversion_jax.load_concept(result.concepts[0].file)
    assert (ours.name, ours.base_class, ours.step) == ("full", "cup", 10)
    for name, leaf in expected.learned.tensors("full").items():
        np.testing.assert_array_equal(ours.learned.tensors("full")[name], leaf)
    ada.ok("DELETE", "/v1/concepts/full")


def test_photos_are_looked_at_before_they_are_kept(serving):
    server, ada = serving[0], Caller(serving[1], "ada")
    ada.ok("PUT", "/v1/concepts/pics", json={"base_class": "cup"})
    path = "/v1/concepts/pics/photos"
    # As many cameras write: a JPEG with a preview behind it.
    camera, preview = (Image.new("RGB", (side, side), "red") for side in (80, 20))
    file = io.BytesIO()
    camera.save(file, "MPO", save_all=True, append_images=[preview])
    camera.resize((40, 80)).save(oblong := io.BytesIO(), "PNG")
    ada.ok("PUT", f"{path}/camera", content=file.getvalue())
    folder = server.core.concept("ada", "pics").folder
    server.core.folders.describe(folder, {"base_class": "cup"}, server.core.store.photos(folder))
    assert len(server.core.folders.spec(folder, "pics").images) == 1
    ada.ok("DELETE", f"{path}/camera")
    kept = ada.ok("PUT", f"{path}/1.jpg", content=photo(1, format="JPEG"))
    assert (kept["width"], kept["height"], kept["has_mask"]) == (80, 80, False)
    assert ada.ok("PUT", f"{path}/1.jpg", content=photo(1, format="JPEG")) == kept
    assert ada("GET", f"{path}/1.jpg").headers["content-type"] == "image/jpeg"
    assert ada("PUT", "/v1/concepts/pics/masks/2", content=photo(2)).status_code == 404
    ada.ok("PUT", "/v1/concepts/pics/masks/1.jpg", content=oblong.getvalue())
    for content, status, code in (
        (b"", 422, "invalid_image"),
        *((data, 422, "invalid_image") for data in (b"%!PS-Adobe", photo(1)[:300])),
        (b"x" * 20_000_001, 413, "body_too_large"),
    ):
        answer = ada("PUT", f"{path}/2", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    (problem,) = ada.ok("GET", "/v1/concepts/pics/check")["problems"]
    assert problem.startswith("mask of 1.jpg: the mask is 40 x 80, its image 1.jpg is 80 x 80")
    ada.ok("PUT", "/v1/concepts/pics/masks/1.jpg", content=photo(2))
    for name in ("..%2f..%2fx", ".hidden", "a b", "x" * 65):
        assert ada("PUT", f"{path}/{name}", content=photo(1)).status_code in (404, 422)
    for number in range(2, 21):
        ada.ok("PUT", f"{path}/{number}", content=photo(number, size=8))
    answer = ada("PUT", f"{path}/21", content=photo(1))
    assert answer.json()["error"]["code"] == "too_many_photos"
    warned = ada.ok("GET", "/v1/concepts/pics/check")
    assert warned["problems"] == []
    assert any("small" in text for text in warned["warnings"])
    for name in ("1.jpg", *map(str, range(2, 21))):
        ada.ok("DELETE", f"{path}/{name}")
    answer = ada("POST", "/v1/jobs", json={"kind": "teach", "concept": "pics"})
    assert answer.json()["error"]["code"] == "no_photos"
    ada.ok("DELETE", "/v1/concepts/pics")


def test_whoever_watches_a_concept_sees_samples_of_it(serving, ada):
    drawn = sample(serving[0], "pictures_drawn_total")
    for _ in range(500):
        page = ada("GET", "/teach/rex/samples").text
        if "<img" in page:
            break
        assert "hx-get" in page  # it asks again
        time.sleep(0.02)
    assert (page.count("<img"), page.count("taught"), page.count("hx-get")) == (2, 2, 0)
    path = re.search(r'src="(.*?)"', page)[1]
    body = {"prompt": "a photo of a dog", "model": "rex", "seed": 0}
    same = base64.b64decode(
        ada.ok("POST", "/v1/images/generations", json=body)["data"][0]["b64_json"]
    )
    np.testing.assert_array_equal(pixels(ada("GET", path).content), pixels(same))
    assert ada("GET", "/teach/rex/samples").text == page
    assert sample(serving[0], "pictures_drawn_total") == drawn + 3
    assert path not in ada("GET", "/draw").text  # nobody ordered it


def test_a_concept_that_is_taught_can_be_followed_and_canceled(ada):
    job = ada.teach("slow", "cup")
    busy = ada("PUT", "/v1/concepts/slow/photos/9", content=photo(9))
    assert busy.status_code == 200 or busy.json()["error"]["code"] == "concept_is_taught"
    assert ada.ended(job)["status"] == "succeeded"
    events = ada("GET", "/v1/concepts/slow/events").text.split("\n\n")
    assert json.loads(events[0].partition("data: ")[2])["status"] == "succeeded"
    again = ada.ok("POST", "/v1/jobs", json={"kind": "teach", "concept": "slow"})
    canceled = ada.ok("POST", f"/v1/jobs/{again['id']}/cancel")
    assert canceled["status"] in ("canceled", "succeeded")
    assert ada("GET", "/v1/concepts/slow/file").status_code == 200  # of the first time
    ada.ok("DELETE", "/v1/concepts/slow")
    assert ada("GET", f"/v1/jobs/{job['id']}").status_code == 404


# ---- who may do what -----------------------------------------------------------------------------


def test_what_is_anothers_is_not_there(ada, bo):
    job = ada.ok("POST", "/v1/jobs", json={"prompt": "a dog", **DRAWING})
    ada.ended(job)
    for method, path in (
        ("GET", f"/v1/jobs/{job['id']}"),
        ("POST", f"/v1/jobs/{job['id']}/cancel"),
        ("GET", f"/v1/jobs/{job['id']}/images/0"),
        ("GET", f"/v1/jobs/{job['id']}/events"),
        ("GET", "/v1/concepts/rex"),
        ("DELETE", "/v1/concepts/rex"),
        ("GET", "/v1/concepts/rex/file"),
        ("GET", "/v1/concepts/rex/photos/0.png"),
        ("PUT", "/v1/concepts/rex/photos/0.png"),
        ("GET", "/v1/models/rex"),
    ):
        answer = bo(method, path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["type"] == "not_found_error"
    drawing = bo("POST", "/v1/images/generations", json={"prompt": "a dog", "model": "rex"})
    assert drawing.status_code == 404


def test_an_idempotency_key_gives_the_same_job(ada):
    body = {"prompt": "a dog", **DRAWING}
    asked = {"json": body, "headers": {"Idempotency-Key": "one"}}
    first = ada.ok("POST", "/v1/jobs", **asked)
    assert ada.ok("POST", "/v1/jobs", **asked)["id"] == first["id"]
    asked["json"] = {**body, "seed": 1}
    answer = ada("POST", "/v1/jobs", **asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_key_reused")
    ada.ended(first)


def test_a_full_queue_is_429_and_a_wrong_body_422(serving, ada):
    server, _ = serving
    body = {"prompt": "a dog", "n": 10, **DRAWING, "num_inference_steps": 100}
    answers = [ada("POST", "/v1/jobs", json=body) for _ in range(40)]
    full = [answer for answer in answers if answer.status_code == 429]
    assert full
    assert full[0].json()["error"]["code"] == "queue_full"
    assert int(full[0].headers["retry-after"]) >= 1
    waiting = [answer.json() for answer in answers if answer.status_code == 202]
    places = [ada.ok("GET", f"/v1/jobs/{job['id']}")["queue_position"] for job in waiting[-2:]]
    assert places[0] < places[1]
    for job in waiting:
        ada.ok("POST", f"/v1/jobs/{job['id']}/cancel")
    assert sample(server, "rejected_total", reason="queue_full") == len(full)
    for content in (b"", b"{", b"[]", b"null", b'{"prompt": 1}', b'{"prompt": ""}', b"\xff"):
        answer = ada("POST", "/v1/images/generations", content=content)
        assert answer.status_code in (400, 422), content
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    text = ada("GET", "/metrics").text
    for name in (
        "requests_running",
        "requests_waiting",
        "rows_used_ratio",
        "queue_seconds_bucket",
    ):
        assert f"catversion_{name}" in text
