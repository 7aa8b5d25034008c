"""Strategies of hypothesis: what becomes of a file that is damaged, foreign or hostile.

Each takes the bytes of a whole file. Some know nothing of its format, others keep the format and
change what it says, so that the damage reaches the code behind the parser.
"""

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

MOST_BYTES = 64  # inserted or written over at one place

NASTY_NUMBERS = (0, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"))
NASTY_TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b]0;owned\x07",
    "\ud800",
    "../../secret",
    "/etc/passwd",
    "~nosuchuser/x",
    "C:\\pot\\1.png",
    "=cmd|' /C calc'!A0",
    "gs://nowhere/at all",
    "hf:",
    "x" * 5000,
    "二つの猫",
    "%s{}{0}{class}",
    "1e5",
    "null",
    "2026-11-28",
)


def nasty_values() -> st.SearchStrategy[Any]:
    """Values of every type of JSON, the unusual ones first."""
    leaves = st.one_of(
        st.sampled_from(NASTY_TEXTS),
        st.sampled_from(NASTY_NUMBERS),
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(max_size=20),
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=6,
    )


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Cut, bits turned, runs zeroed, repeated, inserted or taken out: one to four such things."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # most formats say what they are, and how much follows, at their start
        last = draw(st.sampled_from((len(data), min(len(data), 400))))
        place = draw(st.integers(0, max(last - 1, 0)))
        length = draw(st.integers(1, MOST_BYTES))
        match draw(st.sampled_from(("bits", "cut", "zero", "repeat", "insert", "remove", "large"))):
            case "bits" if data:
                data[place] ^= draw(st.integers(1, 255))
            case "cut":
                del data[place:]
            case "zero":
                data[place : place + length] = bytes(len(data[place : place + length]))
            case "repeat":
                data[place:place] = data[place : place + length] * draw(st.sampled_from((1, 2, 50)))
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=length))
            case "remove":
                del data[place : place + length]
            case "large":  # a length or a count that is far too large
                data[place : place + 4] = b"\xff\xff\xff\x7f"
    return bytes(data)


@st.composite
def changed_value(draw: st.DrawFn, whole: Any) -> Any:
    """The same tree of dictionaries and lists with a value replaced, added, renamed or left out."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        value = _change(draw, value, depth=draw(st.integers(0, 4)))
    return value


def _change(draw: st.DrawFn, value: Any, depth: int) -> Any:
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return draw(nasty_values())
    if isinstance(value, list):
        index = draw(st.integers(0, len(value) - 1))
        value[index] = _change(draw, value[index], depth - 1)
        return value
    key = draw(st.sampled_from(sorted(value)))
    match draw(st.sampled_from(("change", "change", "change", "add", "rename", "remove"))):
        case "change":
            value[key] = _change(draw, value[key], depth - 1)
        case "add":
            value[draw(st.sampled_from(NASTY_TEXTS) | st.text(max_size=9))] = draw(nasty_values())
        case "rename":
            value[draw(st.sampled_from(NASTY_TEXTS) | st.text(max_size=9))] = value.pop(key)
        case "remove":
            del value[key]
    return value


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def json_text(whole: bytes) -> st.SearchStrategy[bytes]:
    """JSON that says something else; now and then a repeated key or brackets without end."""
    return st.one_of(
        changed_value(json.loads(whole)).map(_as_json),
        nasty_values().map(_as_json),
        st.sampled_from(
            (
                b"[" * 100_000,
                b'{"a":' * 100_000,
                b'{"base_class": ' + b"9" * 5000 + b"}",
                whole.rstrip()[:-1] + b', "base_class": "cat", "base_class": "dog"}',
                b"\xff\xfe" + whole.decode().encode("utf-16-le"),
                b"\xef\xbb\xbf" + whole,
                whole.decode().encode("utf-16"),
                b"",
            )
        ),
        damaged(whole),
    )


def lines_of_json(whole: bytes) -> st.SearchStrategy[bytes]:
    """JSON Lines in which one row says something else."""
    rows = whole.splitlines()

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        index = draw(st.integers(0, len(rows) - 1))
        return b"\n".join([*rows[:index], draw(json_text(rows[index])), *rows[index + 1 :]])

    return changed() | damaged(whole)


BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n".encode()
    for before, one in zip("abcdefgh", "bcdefghi", strict=True)
)


def yaml_text(whole: bytes) -> st.SearchStrategy[bytes]:
    """YAML as JSON that says something else, aliases, tags, dates, or plain damage."""
    import yaml

    return st.one_of(
        changed_value(yaml.safe_load(whole)).map(_as_json),
        st.sampled_from(
            (
                BOMB,
                b"- &x [*x]\n",
                b"<<: {a: 1}\n" + whole,
                b"? [a, b]\n: c\n",
                b"when: 2026-11-28\n",
                b"a: !!python/object/apply:os.getcwd []\n",
                b"a: !!binary aGVsbG8=\n",
                b"seed: 0x" + b"f" * 4000,
                b"seed: 1:" + b"59:" * 4000 + b"1",
                b"%YAML 9.9\n---\n" + whole,
                b"---\n".join([whole] * 3),
            )
        ),
        damaged(whole),
    )


def table(whole: bytes) -> st.SearchStrategy[bytes]:
    """A CSV file with cells replaced, other delimiters or encodings, or damage."""
    lines = whole.decode().splitlines()
    cells = st.one_of(
        st.sampled_from(NASTY_TEXTS), st.sampled_from(NASTY_NUMBERS).map(str), st.text(max_size=9)
    )

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        row = draw(st.integers(0, len(lines) - 1))
        parts = lines[row].split(",")
        parts[draw(st.integers(0, len(parts) - 1))] = draw(cells)
        parts += draw(st.lists(cells, max_size=2))
        text = "\n".join([*lines[:row], ",".join(parts), *lines[row + 1 :]])
        return text.encode("utf-8", "surrogatepass")

    text = whole.decode()
    return st.one_of(
        changed(),
        st.sampled_from(
            (
                text.replace(",", ";").encode(),
                text.encode("utf-16"),
                text.replace("\n", "\r").encode(),
                b'"' + whole,
                whole + b"x" * 200_000,
                whole.replace(b"\n", b"\x00\n"),
            )
        ),
        damaged(whole),
    )


def plain_text(whole: bytes) -> st.SearchStrategy[bytes]:
    """Lines of text."""
    lines = st.sampled_from(NASTY_TEXTS) | st.text(max_size=60)
    written = st.lists(lines, max_size=5).map(
        lambda found: "\n".join(found).encode("utf-8", "surrogatepass")
    )
    return written | damaged(whole)


def assignments(whole: bytes) -> st.SearchStrategy[bytes]:
    """Options of training on the command line, one a line, with any text as the value."""
    from catversion_jax.config import option_table

    names = st.sampled_from([row.name for row in option_table()])
    texts = st.one_of(
        st.sampled_from(NASTY_TEXTS),
        nasty_values().map(lambda value: json.dumps(value)),
        st.text(max_size=20),
    )
    said = st.tuples(names, texts).map("=".join) | texts
    lines = st.lists(said.map(lambda text: text.replace("\n", " ")), min_size=1, max_size=4)
    return lines.map(
        lambda found: whole + b"\n" + "\n".join(found).encode("utf-8", "surrogatepass")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(whole: bytes) -> st.SearchStrategy[bytes]:
    """A PNG whose header promises other things, with foreign chunks, or damaged."""
    start, size = 16, 13  # of the header's data

    @st.composite
    def header(draw: st.DrawFn) -> bytes:
        width, height = (draw(st.sampled_from((0, 1, 7, 13_300, 2**31 - 1))) for _ in range(2))
        kind = (draw(st.sampled_from((1, 2, 4, 8, 16, 3))), draw(st.integers(0, 6)), 0, 0, 0)
        data = struct.pack(">II5B", width, height, *kind)
        return whole[:8] + _chunk(b"IHDR", data) + whole[start + size + 4 :]

    @st.composite
    def chunk(draw: st.DrawFn) -> bytes:
        kind = draw(
            st.sampled_from((b"iCCP", b"gAMA", b"tRNS", b"PLTE", b"acTL", b"eXIf", b"pHYs"))
        )
        added = _chunk(kind, draw(st.binary(max_size=60)))
        return whole[: start + size + 4] + added + whole[start + size + 4 :]

    @st.composite
    def said(draw: st.DrawFn) -> bytes:
        text = draw(
            st.sampled_from(('{"seed": Infinity}', "[" * 10_000, '{"prompt": 5}', "{}", "null"))
            | nasty_values().map(lambda value: json.dumps(value))
        )
        added = _chunk(b"tEXt", b"parameters\0" + text.encode("latin-1", "replace"))
        return whole[: start + size + 4] + added + whole[start + size + 4 :]

    return st.one_of(header(), chunk(), said(), damaged(whole))


def safetensors(whole: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header says something else, or damaged."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def rebuilt(said: bytes) -> bytes:
        return struct.pack("<Q", len(said)) + said + data

    lengths = st.sampled_from((0, 1, length + 1, 2**31, 2**63, 2**64 - 1))
    return st.one_of(
        changed_value(header).map(_as_json).map(rebuilt),
        json_text(_as_json(header)).map(rebuilt),
        lengths.map(lambda other: struct.pack("<Q", other) + whole[8:]),
        _numbers(whole, 8 + length),
        damaged(whole),
    )


@st.composite
def _numbers(draw: st.DrawFn, whole: bytes, start: int) -> bytes:
    """With one float32 that is none."""
    index = draw(st.integers(0, (len(whole) - start) // 4 - 1))
    number = struct.pack("<f", draw(st.sampled_from((float("nan"), float("inf"), -3e38))))
    return whole[: start + 4 * index] + number + whole[start + 4 * index + 4 :]


def npy(whole: bytes) -> st.SearchStrategy[bytes]:
    """A .npy file whose header promises other types and shapes, or damaged."""
    (length,) = struct.unpack("<H", whole[8:10])
    data = whole[10 + length :]
    shapes = st.sampled_from(("()", "(0,)", "(1, 4, 8, 8)", "(99999999999,)", "(-1, 4)", "(1,)*9"))
    types = st.sampled_from(("<f4", "|O", "<i8", "<U9", "|V3", "<f2", ">c16", "nonsense"))

    def rebuilt(parts: tuple[str, str, bool]) -> bytes:
        shape, kind, order = parts
        said = f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
        return whole[:8] + struct.pack("<H", len(said)) + said + data

    return st.tuples(shapes, types, st.booleans()).map(rebuilt) | damaged(whole)


Mutation = Callable[[bytes], st.SearchStrategy[bytes]]
