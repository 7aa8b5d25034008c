"""Whom a server answers, and where; no model is loaded."""

import logging
import re
import socket
from urllib.parse import urlsplit

import pytest

from catversion_jax.cli import main
from catversion_jax.cli.serve import teaching_config
from catversion_jax.errors import CatVersionError

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")

from serving_here import options, write_keys
from starlette.testclient import TestClient

from catversion_jax.serving.app import make_app
from catversion_jax.serving.server import Server


def every_route(client):
    schema = client.app.openapi()
    return [(method, path) for path, ways in schema["paths"].items() for method in ways]


def test_every_route_but_health_needs_a_key(tmp_path):
    chosen = options(tmp_path, "tiny-sd", keys=str(write_keys(tmp_path)))
    server = Server(chosen, teaching_config(chosen))
    client = TestClient(make_app(server))  # never started
    assert client.get("/health").json() == {"status": "ok"}
    routes = every_route(client)
    assert len(routes) > 20
    for method, path in [*routes, ("get", "/openapi.json"), ("get", "/nothing"), ("get", "/")]:
        if path == "/health":
            continue
        for headers in ({}, {"Authorization": "Bearer wrong-0123456789abcdef"}):
            answer = client.request(
                method.upper(), path.replace("{", "").replace("}", ""), headers=headers
            )
            assert answer.status_code == 401, path
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    server.core.store.close()


def test_without_keys_only_this_machine_is_answered(tmp_path):
    chosen = options(tmp_path, "tiny-sd")
    server = Server(chosen, teaching_config(chosen))
    client = TestClient(make_app(server), base_url="http://127.0.0.1:8188")  # never started
    assert client.get("/v1/concepts").status_code == 200
    assert client.post("/v1/jobs", json={"prompt": "a cup"}).status_code == 503
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        assert client.get("/v1/concepts", headers=headers).status_code == 403
    with pytest.raises(CatVersionError, match="so it needs --keys"):
        options(tmp_path, "tiny-sd", host="0.0.0.0")
    server.core.store.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_address_that_is_told_can_be_opened(tmp_path, monkeypatch, host):
    """On a free port; an address of IPv6 stands in brackets."""
    try:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else 2):
            pass
    except OSError:
        pytest.skip(f"this machine has no {host}")
    opened = []

    class Opens(logging.Handler):
        def emit(self, record):
            if found := re.fullmatch("serving missing at (http:.+)", record.getMessage()):
                place = urlsplit(found[1])
                with socket.create_connection((place.hostname, place.port), timeout=10):
                    opened.append(place)

    logger, handler = logging.getLogger("catversion_jax"), Opens()
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    command = ["serve", "--model", "missing", "--port", "0", "--host", host]
    assert main([*command, "--output_dir", str(tmp_path)]) == 2  # it listens before it loads
    logger.removeHandler(handler)
    assert [place.hostname for place in opened] == [host]


def test_an_address_that_is_taken_is_an_error(tmp_path, capsys):
    """Found before anything is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = ["serve", "--port", str(taken.getsockname()[1])]
        assert main([*command, "--output_dir", str(tmp_path)]) == 2
    assert "no other process has" in capsys.readouterr().err
    command = ["serve", "--host", "192.0.2.1", "--keys", str(write_keys(tmp_path))]  # RFC 5737
    assert main([*command, "--output_dir", str(tmp_path)]) == 2
    assert "an address of this machine" in capsys.readouterr().err
