"""JSON and YAML from strangers: the parsers' own results for good text, one error for bad."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml

from catversion_jax.config.documents import parse_json, parse_yaml, read_text
from catversion_jax.errors import CatVersionError

GOOD = """
- {name: red cup, path: cups/red, seed: 3, ratio: 1.5, none: ~, yes: no}
- name: cat
  prompts: ["a {}", 'b {}']
  text: |
    two
    lines
"""


def test_good_text_gives_what_the_parsers_give() -> None:
    assert parse_yaml(GOOD, "x") == yaml.safe_load(GOOD)
    text = json.dumps(yaml.safe_load(GOOD))
    assert parse_json(text, "x") == json.loads(text)


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
)
BAD_YAML = {
    BOMB: "line 2: aliases",
    "a: &x {b: 1}\nc: {<<: *x}": "aliases",
    "a: {<<: {b: 1}}": "line 1: merge keys",
    "a: 1\nb: 2\na: 3": "line 3: the key 'a' appears twice",
    "? [a, b]\n: 1": r"\['a', 'b'\] cannot be a key",
    "a: [": "line [12]: ",
    "a: 1\n--- \nb: 2": "another document",
    "a: 2024-99-99": "month must be in",
    "a: !!python/object/apply:os.system ['true']": "could not determine a constructor",
    "a: " + "9" * 5000: "4300 digits",
    "[" * 101 + "]" * 101: "nested deeper than 100",
    "[" * 100_000: "nested deeper than 100",
    "a: \x00": "control characters",
    'a: "\\ud83d"': "Unicode",
    "a: 1\nb: 0200": "line 2: '0200' is a number to the base 8",
    "[1:30]": "line 1: '1:30' is a number to the base 8 or 60",
    "a: -00": "or quote it if it is text",
    "a: !!timestamp x": "NoneType",
    "a: !!int ''": "index out of range",
    "a: !!bool x": "x",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml(text: str) -> None:
    tracemalloc.start()
    with pytest.raises(CatVersionError, match=f"^x: is not valid YAML.*{BAD_YAML[text]}") as caught:
        parse_yaml(text, "x")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert len(str(caught.value)) < 400


BAD_JSON = {
    "[" * 100_000: "nested too deeply",
    '{"a": ' * 100_000: "nested too deeply",
    '{"a": 1, "b": 2, "a": 3}': "the key 'a' appears twice",
    '{"seed": ' + "9" * 5000 + "}": "4300 digits",
    '{"seed": NaN}': "NaN is no number of JSON",
    '{"a": ["x", {"b": "\\ud83d"}]}': "holds half of a character",
    "[{]": "Expecting property name",
    "": "Expecting value",
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json(text: str) -> None:
    with pytest.raises(CatVersionError, match=f"^x: is not valid JSON.*{BAD_JSON[text]}") as caught:
        parse_json(text, "x")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_bytes("é;ü\r\n".encode(encoding))
    assert read_text(tmp_path / "a") == "é;ü\r\n"


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(CatVersionError, match=r"latin: is not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "latin")
    (tmp_path / "unmarked").write_bytes("name;path".encode("utf-16-le"))
    with pytest.raises(CatVersionError, match=r"unmarked: is not UTF-8 text \(zero bytes\)"):
        read_text(tmp_path / "unmarked")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte on no disk
    with pytest.raises(CatVersionError, match="larger than 64 MB"):
        read_text(tmp_path / "large")
    with pytest.raises(CatVersionError, match="cannot be read"):
        read_text(tmp_path / ("x" * 5000))


def test_a_repeated_key_among_many_is_found_in_no_time() -> None:
    text = "{" + ",".join(f'"{number}": 0' for number in range(200_000)) + ', "7": 1}'
    started = time.monotonic()
    with pytest.raises(CatVersionError, match="the key '7' appears twice"):
        parse_json(text, "many")
    assert time.monotonic() - started < 10
