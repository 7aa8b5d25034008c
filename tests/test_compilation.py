"""What the persistent compilation cache did, as the log tells it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.compilation import use_compilation_cache, watch_compilation


@pytest.fixture
def cache(tmp_path: Path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_program_is_compiled_once_and_then_found(cache: Path) -> None:
    x = jnp.ones(7)

    def make():
        return jax.jit(lambda x: jnp.sin(x) * 41)

    with watch_compilation() as first:
        program = make()
        program(x).block_until_ready()
    assert (first.programs, first.hits) == (1, 0)
    assert str(first) == f"was not in the compilation cache {cache}"
    with watch_compilation() as again:
        program(x).block_until_ready()
    assert again.programs == 0
    jax.clear_caches()
    with watch_compilation() as found:
        make()(x).block_until_ready()
    assert (found.programs, found.hits) == (1, 1)
    assert str(found) == f"found in the compilation cache {cache}"


def test_without_a_folder_it_says_so(cache: Path) -> None:
    use_compilation_cache(None)  # leaves JAX as it is
    with watch_compilation() as found:
        jax.jit(lambda x: x * 43)(jnp.ones(3)).block_until_ready()
    assert str(found) == f"was not in the compilation cache {cache}"
    use_compilation_cache(str(cache / "other"))
    assert jax.config.values["jax_compilation_cache_dir"] == str(cache / "other")
    assert (cache / "other").is_dir()
    jax.config.update("jax_compilation_cache_dir", None)
    assert str(found) == "no compilation cache"


@pytest.mark.parametrize("home", ["under a file", "of nobody"])
def test_without_a_home_folder_there_is_no_cache_and_one_line_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, home: str
) -> None:
    (tmp_path / "file").write_text("precious")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    folder = "~/.cache/catversion/xla" if home == "under a file" else "~nosuchuser/xla"
    use_compilation_cache(folder)
    (record,) = caplog.records
    assert record.getMessage().startswith("no compilation cache, so every start compiles anew: ")
    assert len(record.getMessage().splitlines()) == 1
    assert jax.config.values["jax_compilation_cache_dir"] == str(cache)  # as before
    with pytest.raises(CatVersionError, match="cannot be written"):  # one that was asked for
        use_compilation_cache(str(tmp_path / "file" / "xla"))
