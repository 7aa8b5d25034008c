"""The page as a browser gets it, without a device: teach, draw, library."""

import hashlib
import html.parser
import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")

from starlette.testclient import TestClient

from catversion_jax.cli.serve import teaching_config
from catversion_jax.config.serving import ServeOptions
from catversion_jax.serving.app import make_app
from catversion_jax.serving.faces.page import FOLDER, curve
from catversion_jax.serving.server import Server

NPM = {
    "htmx-2.0.11.min.js": "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717",
    "htmx-ext-sse-2.2.4.min.js": "98a46496de0c3605fbffdce9167ba427bdd9553184f83f149c261891a92c0136",
}
"""SHA-256 of the files in the npm packages htmx.org 2.0.11 and htmx-ext-sse 2.2.4."""
KEY = "ada-0123456789abcdef"


class Page(html.parser.HTMLParser):
    """What assistive programs need: controls and their labels, pictures and their texts."""

    VOID = ("input", "img", "meta", "link", "br", "line", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.labels, self.controls, self.links, self.ids = [], set(), [], [], []
        self.feed(text)
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "label":
            self.labels.add(given.get("for"))
        if tag in ("input", "textarea"):
            self.controls.append(given)
        if tag == "img":
            assert "alt" in given
        self.links += [given[name] for name in ("href", "src") if name in given]
        assert "style" not in given
        assert not any(name.startswith("on") for name in given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def photo(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def client(tmp_path):
    """Of a server that never loads its model."""
    (tmp_path / "keys").write_text(f"ada {KEY}\nbo bo-0123456789abcdef\n")
    chosen = ServeOptions(output_dir=str(tmp_path / "out"), keys=str(tmp_path / "keys"))
    server = Server(chosen, teaching_config(chosen))
    client = TestClient(make_app(server), follow_redirects=False)
    client.auth = ("ada", KEY)  # as browsers ask for it
    yield client
    server.core.store.close()


def test_every_page_is_sound_and_every_control_has_a_label(client):
    client.put("/v1/concepts/my-cup", json={"base_class": "cup"})
    client.put("/v1/concepts/my-cup/photos/1.png", content=photo())
    for path in (
        "/teach",
        "/teach/my-cup",
        "/draw",
        "/library",
        "/teach/my-cup/photos",
        "/teach/my-cup/samples",
    ):
        answer = client.get(path)
        assert answer.status_code == 200, answer.text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        page = Page(answer.text)
        for control in page.controls:
            named = control.get("id") in page.labels or "aria-label" in control
            assert named or control.get("type") == "hidden", control
        for link in page.links:
            assert link.startswith(("/", "#"))
            if link.startswith(("/static/", "/v1/")):
                assert client.get(link).status_code == 200, link
    assert client.get("/").headers["location"] == "/teach"


def test_what_is_vendored_is_what_npm_has(client):
    static = FOLDER / "static"
    for name, digest in NPM.items():
        assert hashlib.sha256((static / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in static.glob("*.min.js")} == set(NPM)
    assert "Zero-Clause BSD" in (static / "LICENSES.txt").read_text()
    assert client.get("/static/..%2fserver.sqlite").status_code == 404


def test_a_concept_is_begun_with_a_form(client):
    made = client.post("/teach", data={"id": "my-cup", "base_class": "cup"})
    assert (made.status_code, made.headers["location"]) == (303, "/teach/my-cup")
    assert client.get("/v1/concepts/my-cup").json()["base_class"] == "cup"
    for data, message in (
        ({"id": "", "base_class": "cup"}, "Give it a name"),
        ({"id": "../x", "base_class": "cup"}, "should match pattern"),
        ({"id": "x", "base_class": "{}"}, "must be plain words"),
        ({"id": "x", "base_class": "<script>"}, "&lt;script&gt;"),
        ({"id": "x", "base_class": "old man"}, "has agreed"),
    ):
        answer = client.post("/teach", data=data)
        assert answer.status_code == 422
        assert message in answer.text
        Page(answer.text)
    agreed = {"id": "joe", "base_class": "old man", "consent": "yes"}
    assert client.post("/teach", data=agreed).status_code == 303
    assert "being loaded" in client.post("/teach/joe/start").text
    assert client.post("/library/joe/delete").status_code == 200
    assert client.get("/teach/joe").status_code == 404


def test_a_form_that_no_page_sends(client):
    """Numbers are not cut to whole ones, and nothing is an error of the server's."""
    for data, message in (
        (b"prompt=a+cup&n=1.9", "n=1.9: must be whole"),
        (b"prompt=a+cup&seed=1.5", "seed=1.5: must be whole"),
        (b"prompt=a+cup&use:x=on&scale:x=nan", "must be a number"),
        (b"&".join(b"a%d=1" % number for number in range(600)), "The form cannot be read"),
        (b"prompt=a+cup&seed=1e3", "being loaded"),
    ):
        answer = client.post("/draw", content=data)
        assert answer.status_code == 200
        assert message in answer.text
    assert client.post("/teach", content=b"&".join([b"a=1"] * 600)).status_code == 422


def test_no_concept_is_called_as_the_plain_model(client):
    answer = client.put("/v1/concepts/base", json={"base_class": "cup"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_id")
    assert (
        "model without a concept"
        in client.post("/teach", data={"id": "base", "base_class": "cup"}).text
    )


def test_what_a1111_calls_a_network_with_is_understood_or_refused(client):
    """A call that no concept is meant by would be read as words, and the plain model would draw."""
    for call in (
        "<lora:rex:-1>", "<lora:rex:1.>", "<lora:rex:1e0>", "<lora:rex:1,0>", "<lora:rex:0.5:1>",
        "<lora:rex:te=1>", "< lora:rex:1>", "<LORA:rex:1>", "<lyco:rex:1>", "<hypernet:rex:1>",
        "<lora:rex:1",
    ):  # fmt: skip
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": f"a dog {call}", "steps": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_lora"), call
    for numbers in ({"steps": True}, {"steps": "2"}, {"steps": 2.5}, {"cfg_scale": False}):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a dog", **numbers})
        assert answer.status_code == 422, numbers
    asked = {"prompt": "a dog <lora:rex:1>", "steps": 2.0, "cfg_scale": 3}
    answer = client.post("/sdapi/v1/txt2img", json=asked)
    assert answer.json()["error"]["code"] == "loading"


def test_the_page_is_its_users_and_other_sites_cannot_use_it(client):
    client.put("/v1/concepts/my-cup", json={"base_class": "cup"})
    client.auth = ("bo", "bo-0123456789abcdef")
    assert client.get("/teach/my-cup").status_code == 404
    assert "my-cup" not in client.get("/library").text
    client.auth = None
    asked = client.get("/teach", headers={"Accept": "text/html"})
    assert (asked.status_code, asked.headers["www-authenticate"][:5]) == (401, "Basic")
    client.auth = ("ada", KEY)
    for origin in ("https://evil.example", "null", "http://testserver:81"):
        answer = client.post("/library/my-cup/delete", headers={"Origin": origin})
        assert answer.status_code == 403
    own = {"Origin": "http://testserver"}
    assert client.post("/library/my-cup/delete", headers=own).status_code == 200


def test_the_loss_curve_lies_in_its_box():
    drawn = curve([(0, 2.0), (5, 1.0), (10, 1.5)], 10, 3.0)
    points = [tuple(map(float, point.split(","))) for point in drawn["points"].split()]
    assert [x for x, _ in points] == [0.0, 160.0, 320.0]
    ys = [y for _, y in points]
    assert ys[1] > ys[2] > ys[0] > drawn["plain"]  # y counts downwards
    assert max(ys) == 90.0
    assert curve([(0, float("nan"))], 10, None)["points"] == ""
