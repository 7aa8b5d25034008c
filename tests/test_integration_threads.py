"""The PyTorch loader in several threads: encodings side by side, loading meanwhile, and blocks that
hold for their thread alone.
"""

import concurrent.futures
import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the loader is a PyTorch one: pip install '.[torch]'")
pytest.importorskip("diffusers", reason="the loader is for diffusers: pip install '.[torch]'")

from tiny_pipelines import (  # noqa: E402
    encode,
    load_pipe,
    make_residual,
    token_ids,
    write,
    write_cat_and_dog,
)

from catversion_jax.integrations import diffusers as loader  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return write_cat_and_dog(tmp_path)


@pytest.fixture
def pipe(tiny_sd_folder, files):
    pipe = load_pipe(tiny_sd_folder)
    for file in files.values():
        loader.load_catversion(pipe, file)
    return pipe


@contextlib.contextmanager
def switching_every(seconds: float) -> Iterator[None]:
    """Threads take turns as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_eight_threads(work: Callable[[int], int]) -> list[int]:
    """What work gives for 0 to 7, side by side."""
    with switching_every(1e-4), concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, range(8)))


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_eight_threads_with_two_concepts(tiny_sd_folder, pipe, count):
    prompts = ("a cat", "a dog", "a cat and a dog", "a house", "")
    right = {prompt: encode(pipe, prompt) for prompt in prompts}
    assert torch.equal(right["a house"], encode(load_pipe(tiny_sd_folder), "a house"))
    assert not torch.equal(right["a cat"], encode(load_pipe(tiny_sd_folder), "a cat"))
    ids = {prompt: token_ids(pipe, prompt) for prompt in prompts}
    start = threading.Barrier(8)

    @torch.no_grad()
    def wrong(thread: int) -> int:
        start.wait()
        chosen = [prompts[(thread + i) % len(prompts)] for i in range(count)]
        return sum(
            not torch.equal(pipe.text_encoder(ids[prompt]).last_hidden_state, right[prompt])
            for prompt in chosen
        )

    assert sum(in_eight_threads(wrong)) == 0


def test_threads_load_and_unload_while_others_encode(tiny_sd_folder, tmp_path):
    """Every encoding is the plain model's or the one with the concept, and nothing is left over."""
    pipe, words = load_pipe(tiny_sd_folder), ("cat", "dog", "pot", "bird")
    files = {w: write(tmp_path, w, w, make_residual(i)) for i, w in enumerate(words)}
    plain = {word: encode(pipe, word) for word in words}
    right = {}
    for word, file in files.items():
        loader.load_catversion(pipe, file)
        right[word] = encode(pipe, word)
        loader.unload_catversion(pipe)
    ids = {word: token_ids(pipe, word) for word in words}
    kind, start = type(pipe), threading.Barrier(5)

    @torch.no_grad()
    def wrong(word: str) -> int:
        start.wait()
        count = 0
        for _ in range(25):
            loader.load_catversion(pipe, files[word])
            found = pipe.text_encoder(ids[word]).last_hidden_state
            count += not torch.equal(found, right[word])
            if word == "dog":  # in one thread: diffusers' own tokenizer is not made for several
                found, negative = pipe.encode_prompt(word, "cpu", 1, True, negative_prompt=word)
                count += not torch.equal(found, right[word])
                count += not torch.equal(negative, plain[word])
            loader.unload_catversion(pipe, word)
            found = pipe.text_encoder(ids[word]).last_hidden_state
            count += not torch.equal(found, plain[word])
        return count

    @torch.no_grad()
    def odd() -> int:
        start.wait()
        found = [pipe.text_encoder(ids["cat"]).last_hidden_state for _ in range(300)]
        return sum(
            not (torch.equal(x, plain["cat"]) or torch.equal(x, right["cat"])) for x in found
        )

    with (
        switching_every(1e-5),
        concurrent.futures.ThreadPoolExecutor(5) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        looking = pool.submit(odd)
        assert sum(pool.map(wrong, words)) == 0
        assert looking.result() == 0
    assert type(pipe) is kind
    assert not pipe.text_encoder._forward_pre_hooks
    assert pipe.text_encoder.config._attn_implementation == "sdpa"


def test_blocks_hold_for_their_thread_alone(tiny_sd_folder, pipe):
    full, plain = encode(pipe, "a cat"), encode(load_pipe(tiny_sd_folder), "a cat")
    loader.set_catversion(pipe, "tom", 0.3)
    weak = encode(pipe, "a cat")
    loader.set_catversion(pipe, ["tom", "rex"])
    inside, go_on = threading.Event(), threading.Event()

    def other() -> torch.Tensor:
        with loader.scaled(pipe, {"tom": 0.3}):
            inside.set()
            go_on.wait()
            return encode(pipe, "a cat")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        inside.wait()
        assert torch.equal(encode(pipe, "a cat"), full)
        with loader.plain(pipe):
            assert torch.equal(encode(pipe, "a cat"), plain)
            with loader.scaled(pipe, 0.3):
                assert torch.equal(encode(pipe, "a cat"), weak)
        go_on.set()
        assert torch.equal(result.result(), weak)
    assert torch.equal(encode(pipe, "a cat"), full)
    with pytest.raises(loader.CatVersionLoadError, match="'tim' is not active; active: tom, rex"):
        loader.scaled(pipe, {"tim": 1}).__enter__()
    for wrong in (-1, float("nan"), None, "1", {"tom": "half"}):
        with pytest.raises(loader.CatVersionLoadError, match=r"scale=.*must be a finite number"):
            loader.scaled(pipe, wrong).__enter__()


@pytest.mark.parametrize("block", ["scaled", "chosen"])
def test_blocks_of_generators_end_in_any_order(pipe, block):
    """They share their caller's context; the last one to begin counts, and nothing is left over."""
    full = encode(pipe, "a cat")

    def asked(scale: float) -> Iterator[torch.Tensor]:
        names = () if block == "scaled" else (["tom", "rex"],)
        with getattr(loader, block)(pipe, *names, *([scale] if not names else [[scale, 1.0]])):
            yield encode(pipe, "a cat")
            yield encode(pipe, "a cat")

    one, other = asked(0.5), asked(0.2)
    half, fifth = next(one), next(other)
    assert not torch.equal(half, fifth)
    one.close()
    assert torch.equal(next(other), fifth)
    other.close()
    assert torch.equal(encode(pipe, "a cat"), full)


def test_blocks_choose_concepts_for_their_thread_alone(tiny_sd_folder, pipe, files, tmp_path):
    """Eight threads, each with concepts and scales of its own, two of them of one base class,
    against pipelines that have only these.
    """
    other = write(tmp_path, "tim", "cat", make_residual(7, bias=1.0))
    loader.load_catversion(pipe, other)  # sets tom aside
    asked = [("tom", 1.0), ("tim", 1.0), (["rex", "tom"], [0.5, 2.0]), ((), 1.0)]
    prompt, right = "a cat and a dog", []
    by_name = {"tom": files["tom"], "rex": files["rex"], "tim": other}
    for name, scale in asked:
        alone = load_pipe(tiny_sd_folder)
        for one in [name] if isinstance(name, str) else name:
            loader.load_catversion(alone, by_name[one])
        if name:
            loader.set_catversion(alone, name, scale)
        right.append(encode(alone, prompt))
    before, ids = encode(pipe, prompt), token_ids(pipe, prompt)
    start = threading.Barrier(8)

    @torch.no_grad()
    def wrong(thread: int) -> int:
        name, scale = asked[thread % 4]
        start.wait()
        count = 0
        for _ in range(30):
            with loader.chosen(pipe, name, scale):
                found = pipe.text_encoder(ids).last_hidden_state
                count += not torch.equal(found, right[thread % 4])
        return count

    assert sum(in_eight_threads(wrong)) == 0
    assert torch.equal(encode(pipe, prompt), before)
    with loader.scaled(pipe, 0.3), loader.chosen(pipe, ["rex", "tom"]):
        with loader.scaled(pipe, {"tom": 2.0, "rex": 0.5}):
            assert torch.equal(encode(pipe, prompt), right[2])
        with pytest.raises(loader.CatVersionLoadError, match="'tim' is not active; active: tom"):
            loader.scaled(pipe, {"tim": 1}).__enter__()
        with loader.plain(pipe):
            assert torch.equal(encode(pipe, prompt), right[3])
    loader.disable_catversion(pipe)
    with loader.chosen(pipe, "tom"):
        assert torch.equal(encode(pipe, prompt), right[0])
    assert torch.equal(encode(pipe, prompt), right[3])
    with pytest.raises(loader.CatVersionLoadError, match="'tam' is not loaded; loaded: tom, rex"):
        loader.chosen(pipe, "tam").__enter__()
