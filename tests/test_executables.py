"""Executables that are kept: what a second start reads is the program, without tracing it."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from catversion_jax.runtime.compilation import watch_compilation
from catversion_jax.runtime.executables import FOLDER, StoredProgram, source_of
from catversion_jax.runtime.sharding import make_mesh, on_every_device, place_by_concept

LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    names = ("jax_compilation_cache_dir", LEAST_SECONDS)
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update(LEAST_SECONDS, 1000.0)  # JAX's own cache keeps nothing
    compilation_cache.reset_cache()
    yield tmp_path / FOLDER
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Started:
    """A process that starts: the program is made anew; counts how often it is traced."""

    def __init__(self, decided_by: str = "sine"):
        self.traced = 0
        mesh = make_mesh()
        rows = jax.sharding.PartitionSpec("concept")

        def step(state: dict, data: jax.Array, weights: jax.Array) -> tuple[dict, jax.Array]:
            self.traced += 1
            return {"learned": state["learned"] + jnp.sin(data) * weights}, data.sum(-1)

        in_specs = (rows, rows, jax.sharding.PartitionSpec())
        spread = on_every_device(step, mesh, in_specs=in_specs, out_specs=rows)
        jitted = jax.jit(spread, donate_argnums=0)
        self.program = StoredProgram(jitted, "step", decided_by, varying=2, donated=(0,))
        self.mesh = mesh

    def run(self, width: int = 3) -> np.ndarray:
        size = 8 * width
        values = np.arange(size, dtype=np.float32).reshape(8, width)
        state, data = place_by_concept(({"learned": values}, values / size), self.mesh)
        new, sums = self.program(state, data, jnp.float32(2))
        assert state["learned"].is_deleted()  # it was donated
        np.testing.assert_allclose(new["learned"], values + 2 * np.sin(values / size), rtol=1e-6)
        np.testing.assert_allclose(sums, (values / size).sum(-1), rtol=1e-6)
        return np.asarray(new["learned"])


def test_a_second_start_traces_nothing(cache: Path) -> None:
    first, second = Started(), Started()
    before = first.run()
    first.run()
    assert (first.traced, len(list(cache.iterdir()))) == (1, 1)
    with watch_compilation() as found:
        np.testing.assert_array_equal(second.run(), before)
    assert second.traced == 0
    assert found.hits == 1
    second.run(5)  # other shapes are another program, beside the first
    second.run(3)
    assert (second.traced, len(list(cache.iterdir()))) == (1, 2)


def test_what_decides_the_program_is_part_of_its_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Started().run()
    other = Started("cosine")
    other.run()
    assert other.traced == 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    flags = Started()
    flags.run()
    assert flags.traced == 1
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_file_is_compiled_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    Started().run()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # in the machine code, which would run
    for damaged in (b"", whole[: len(whole) // 2], b"no pickle", bytes(flipped)):
        file.write_bytes(damaged)
        caplog.clear()
        started = Started()
        started.run()
        assert started.traced == 1
        assert "compiling again" in caplog.text
        assert file.read_bytes() != damaged  # written anew


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners")
@pytest.mark.parametrize("by", ["mode", "owner"])
def test_what_a_stranger_could_have_written_is_not_unpickled(
    cache: Path, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    Started().run()
    (file,) = cache.iterdir()
    if by == "mode":
        file.chmod(0o666)
    elif os.geteuid() == 0:
        os.chown(file, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    started = Started()
    started.run()
    assert started.traced == 1
    assert "another user owns it or may write it" in caplog.text
    again = Started()
    again.run()
    assert again.traced == 0  # it was replaced by this user's own


def test_what_jaxs_own_cache_gives_is_right(cache: Path) -> None:
    """XLA for CPUs would store a program that does not run."""
    jax.config.update(LEAST_SECONDS, 0.0)
    before = Started().run()
    (file,) = cache.iterdir()
    file.unlink()
    for _ in range(2):
        np.testing.assert_array_equal(Started().run(), before)


def test_without_a_cache_nothing_is_kept(cache: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    started = Started()
    started.run()
    assert started.traced == 1
    assert not cache.exists()


def test_a_method_of_another_package_decides_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for shift in (1, 2):
        (tmp_path / "foreign_method.py").write_text(f"class Shift:\n    by = {shift}\n")
        found.append(source_of(importlib.import_module("foreign_method").Shift))
    assert None not in found
    assert found[0] != found[1]
    assert source_of(type("Cell", (), {"__module__": "nowhere"})) is None
