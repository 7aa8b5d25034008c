"""Requests that nobody has thought of: schemathesis, against the server's own OpenAPI.

schemathesis is a command with many dependencies of its own, so it lives in an environment of its
own: ``python -m venv st && st/bin/pip install schemathesis``, then
``PATH=$PATH:st/bin pytest -m slow -s tests/test_serving_requests.py``.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from serving_client import Client, free_port, photo, serve

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")

PER_ROUTE = int(os.environ.get("CATVERSION_REQUESTS_PER_ROUTE", "130"))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",  # of errors: {"error": {message, type, param, code}}
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
# A1111's own server takes "steps": true and "20" for numbers; so does this face.
LENIENT = """
[[operations]]
include-name = "POST /sdapi/v1/txt2img"
checks.negative_data_rejection.enabled = false
"""
GIVEN = """
[[operations]]
include-path-regex = "^/v1/{}/"
parameters = {{ id = "{}" }}
"""


@pytest.mark.slow  # minutes, and it needs a command that CI does not install
def test_no_request_makes_an_error_of_the_servers(one_block_sd_folder, tmp_path, record_property):
    program = shutil.which("schemathesis")
    if program is None:
        pytest.skip("needs the command schemathesis, in an environment of its own")
    client = Client(free_port())
    with serve(client, one_block_sd_folder, tmp_path / "out", "--updates", 4) as process:
        client("PUT", "/v1/concepts/rex", base_class="dog")
        client("PUT", "/v1/concepts/rex/photos/1", content=photo(1))
        taught = json.loads(client("POST", "/v1/jobs", kind="teach", concept="rex"))
        drawn = json.loads(client("POST", "/v1/jobs", prompt="a dog", num_inference_steps=2))
        for job in (taught, drawn):
            assert client.ended(job["id"])["status"] == "succeeded"
        # Once with ids from nowhere, once with some that exist.
        anything, existing = tmp_path / "anything.toml", tmp_path / "existing.toml"
        anything.write_text(LENIENT)
        ids = {"jobs": drawn["id"], "concepts": "rex", "models": "rex"}
        existing.write_text(LENIENT + "".join(GIVEN.format(*pair) for pair in ids.items()))
        requests = 0
        for number, config in enumerate((anything, existing)):
            report = tmp_path / f"{number}.json"
            asked = subprocess.run(
                [
                    *(program, "--config-file", str(config), "run", f"{client.url}/openapi.json"),
                    *("--phases", "examples,coverage,fuzzing", "--seed", "1"),
                    *("--max-examples", str(PER_ROUTE), "--continue-on-failure"),
                    *("--checks", ",".join(CHECKS), "--request-timeout", "120"),
                    *(("--exclude-method", "DELETE") if config is existing else ()),
                    *("--report", "json", "--report-json-path", str(report)),
                ],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert asked.returncode == 0, asked.stdout
            requests += json.loads(report.read_text())["test_cases"]["generated"]
        assert client.is_ready()
        process.terminate()
        assert process.wait(120) == 0
        assert "Traceback" not in (tmp_path / "out" / "log.txt").read_text()
    record_property("requests", requests)
    sys.stdout.write(f"{requests} requests\n")
