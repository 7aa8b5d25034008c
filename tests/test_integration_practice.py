"""The PyTorch loader beside what people put around a text encoder: threads, peft, torch.compile,
checkpointing, offloading, other processes, other pipelines.
"""

import concurrent.futures
import contextlib
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loader is a PyTorch one: pip install '.[torch]'")
pytest.importorskip("diffusers", reason="the loader is for diffusers: pip install '.[torch]'")

from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline  # noqa: E402
from tiny_pipelines import load_pipe, make_residual, write  # noqa: E402

from catversion_jax.integrations import diffusers as loader  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


def token_ids(pipe, *prompts: str) -> torch.Tensor:
    length = pipe.tokenizer.model_max_length
    return pipe.tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def encode(pipe, *prompts: str) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe.text_encoder(token_ids(pipe, *prompts)).last_hidden_state


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """A cat and a dog."""
    words = {"tom": "cat", "rex": "dog"}
    return {
        name: write(tmp_path, name, word, make_residual(i, bias=1.0))
        for i, (name, word) in enumerate(words.items())
    }


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


def lora_config():
    peft = pytest.importorskip("peft", reason="LoRAs are peft's: pip install '.[test]'")
    return peft, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize("way", ["inject_adapter_in_model", "get_peft_model"])
@pytest.mark.parametrize("first", ["lora", "concept"])
def test_a_lora_on_the_text_encoder(tiny_sd_folder, tmp_path, way, first):
    """The concept acts in the layers that the LoRA has changed: against their merged weights."""
    peft, config = lora_config()
    pipe = load_pipe(tiny_sd_folder)
    sha = loader.text_encoder_sha256(pipe.text_encoder)
    file = write(tmp_path, "tom", "cat", make_residual(3), text_encoder_sha256=sha)

    def put() -> None:
        torch.manual_seed(0)
        if way == "inject_adapter_in_model":  # what transformers' add_adapter calls
            peft.inject_adapter_in_model(config, pipe.text_encoder)
        else:
            pipe.text_encoder = peft.get_peft_model(pipe.text_encoder, config)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*text encoder")
        if first == "lora":
            put()
            loader.load_catversion(pipe, file)
        else:
            loader.load_catversion(pipe, file)
            put()
    assert loader.text_encoder_sha256(pipe.text_encoder) == sha
    merged = load_pipe(tiny_sd_folder)
    torch.manual_seed(0)
    merged.text_encoder = peft.get_peft_model(merged.text_encoder, config).merge_and_unload()
    plain = encode(merged, "a cat", "a house")
    loader.load_catversion(merged, file, force=True)
    expected = encode(merged, "a cat", "a house")
    assert not torch.allclose(expected[0], plain[0], atol=1e-3)
    torch.testing.assert_close(encode(pipe, "a cat", "a house"), expected, atol=1e-5, rtol=1e-5)
    loader.unload_catversion(pipe)
    torch.testing.assert_close(encode(pipe, "a cat", "a house"), plain, atol=1e-5, rtol=1e-5)


def compiled(pipe):
    torch.compiler.reset()
    pipe.text_encoder = torch.compile(pipe.text_encoder, fullgraph=True, backend="eager")
    return pipe


def of_two_layers(folder: Path):
    """They are traced in half the time of four."""
    pipe = load_pipe(folder)
    del getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder.layers[2:]
    pipe.text_encoder.config.num_hidden_layers = 2
    return pipe


@pytest.mark.parametrize("first", ["compile", "concept"])
def test_torch_compile_in_one_graph(tiny_sd_folder, tmp_path, first):
    """Against the encoder that is not compiled, through twelve concepts: torch compiles a function
    again at most eight times.
    """
    eager, pipe = of_two_layers(tiny_sd_folder), of_two_layers(tiny_sd_folder)
    prompts = ("a cat", "a house", "a cat, a dog")
    plain = encode(eager, *prompts)
    facts = {"text_encoder_sha256": loader.text_encoder_sha256(pipe.text_encoder)}
    residuals = [make_residual(i, layers=(0, 1), bias=0.1 * i) for i in range(13)]
    rex = write(tmp_path, "rex", "dog", residuals.pop(), **facts)
    cats = [write(tmp_path, f"cat-{i}", "cat", one, **facts) for i, one in enumerate(residuals)]
    if first == "compile":
        torch.testing.assert_close(encode(compiled(pipe), *prompts), plain)
    for file in cats:
        loader.load_catversion(pipe, file)
        loader.load_catversion(eager, file)
    if first == "concept":
        compiled(pipe)
    for number in range(12):
        for one in (pipe, eager):
            loader.set_catversion(one, f"cat-{number}", 0.1 * (number + 1))
        torch.testing.assert_close(encode(pipe, *prompts), encode(eager, *prompts))
    assert not torch.allclose(encode(pipe, *prompts)[0], plain[0], atol=1e-2)
    with loader.plain(pipe):
        torch.testing.assert_close(encode(pipe, *prompts), plain)
    for one in (pipe, eager):
        loader.load_catversion(one, rex)
    torch.testing.assert_close(encode(pipe, *prompts), encode(eager, *prompts))
    with loader.chosen(pipe, "rex", 0.7), loader.chosen(eager, "rex", 0.7):
        torch.testing.assert_close(encode(pipe, *prompts), encode(eager, *prompts))
    with pytest.raises(loader.CatVersionLoadError, match="cat-2: not active, and the text encoder"):
        loader.chosen(pipe, ["rex", "cat-2"]).__enter__()
    loader.disable_catversion(pipe)
    torch.testing.assert_close(encode(pipe, *prompts), plain)
    loader.unload_catversion(pipe)
    torch.testing.assert_close(encode(pipe, *prompts), plain)
    for one in (pipe, eager):
        loader.load_catversion(one, cats[3], "again")
        loader.set_catversion(one, "again")
    torch.testing.assert_close(encode(pipe, *prompts), encode(eager, *prompts))


def test_a_compiled_pipeline_spares_its_negative_prompt(tiny_sd_folder, pipe):
    expected = pipe.encode_prompt("a cat", "cpu", 1, True, negative_prompt="an ugly cat")
    ugly = encode(load_pipe(tiny_sd_folder), "an ugly cat")
    got = compiled(pipe).encode_prompt("a cat", "cpu", 1, True, negative_prompt="an ugly cat")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(got[1], ugly)


def test_gradient_checkpointing(pipe):
    encoder, ids = pipe.text_encoder, token_ids(pipe, "a cat", "a house", "a dog")
    encoder.train()

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        encoder(ids).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    expected = gradients()
    encoder.gradient_checkpointing_enable()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_pickling_into_a_new_process(tmp_path, pipe):
    (tmp_path / "pipe.pickle").write_bytes(pickle.dumps((pipe.text_encoder, pipe)))
    torch.save(token_ids(pipe, "a cat", "a house"), tmp_path / "ids")
    program = """
import pickle, sys, torch, warnings
encoder, pipe = pickle.load(open(sys.argv[1] + "/pipe.pickle", "rb"))
ids = torch.load(sys.argv[1] + "/ids")
with torch.no_grad():
    torch.save((encoder(ids).last_hidden_state,
                pipe.encode_prompt("a cat", "cpu", 1, True, negative_prompt="an ugly cat")),
               sys.argv[1] + "/encoded")
from catversion_jax.integrations.diffusers import unload_catversion
unload_catversion(pipe)
with torch.no_grad():
    torch.save(encoder(ids).last_hidden_state, sys.argv[1] + "/plain")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    encoded, prompts = torch.load(tmp_path / "encoded")
    torch.testing.assert_close(encoded, encode(pipe, "a cat", "a house"))
    with torch.no_grad():
        expected = pipe.encode_prompt("a cat", "cpu", 1, True, negative_prompt="an ugly cat")
    torch.testing.assert_close(prompts, expected)
    loader.unload_catversion(pipe)
    torch.testing.assert_close(torch.load(tmp_path / "plain"), encode(pipe, "a cat", "a house"))


def test_sequential_offload(tiny_sd_folder, files, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    eager, pipe = load_pipe(tiny_sd_folder), load_pipe(tiny_sd_folder)
    sha = loader.text_encoder_sha256(pipe.text_encoder)
    file = write(tmp_path / "x", "tom", "cat", make_residual(0), text_encoder_sha256=sha)
    accelerate.cpu_offload(pipe.text_encoder, execution_device="cpu")
    assert next(pipe.text_encoder.parameters()).is_meta
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be checked")
        loader.load_catversion(pipe, file)
    loader.load_catversion(eager, file)
    assert torch.equal(encode(pipe, "a cat", "a house"), encode(eager, "a cat", "a house"))
    assert next(pipe.text_encoder.parameters()).is_meta


def draw(pipe, prompt, **kwargs) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, 16, 16)
    return pipe(
        prompt, image, 0.9, num_inference_steps=2, generator=generator, output_type="np", **kwargs
    ).images


def test_two_pipelines_share_their_components(tiny_sd_folder, pipe):
    """Against the plain pipeline that is handed the embeddings of the two encoders."""
    stock = StableDiffusionImg2ImgPipeline(
        **load_pipe(tiny_sd_folder).components, requires_safety_checker=False
    )
    shared = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    from_pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    with pytest.warns(UserWarning, match=r"hand another pipeline.*enable_catversion"):
        draw(shared, "a cat", negative_prompt="an ugly cat")
    wanted, ugly = encode(pipe, "a cat"), encode(stock, "an ugly cat")
    expected = draw(stock, None, prompt_embeds=wanted, negative_prompt_embeds=ugly)
    for one in (shared, from_pipe):
        loader.enable_catversion(one)
        assert isinstance(one, StableDiffusionImg2ImgPipeline)
        assert np.array_equal(draw(one, "a cat", negative_prompt="an ugly cat"), expected)
    loader.unload_catversion(pipe)
    plain = draw(stock, "a cat", negative_prompt="an ugly cat")
    assert np.array_equal(draw(shared, "a cat", negative_prompt="an ugly cat"), plain)
    loader.unload_catversion(shared)
    assert type(shared) is StableDiffusionImg2ImgPipeline


def test_code_that_calls_the_text_encoder_itself(tiny_sd_folder, pipe):
    """As Compel and SD.Next do: no pipeline says what the prompt is for."""
    plain = encode(load_pipe(tiny_sd_folder), "an ugly cat")
    ids = token_ids(pipe, "an ugly cat")
    with pytest.warns(UserWarning, match=r"with plain\(pipe\)"), torch.no_grad():
        wanted = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # said once
        again = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
        with loader.plain(pipe):
            negative = pipe.text_encoder(ids).last_hidden_state
    assert torch.equal(wanted, again)
    assert torch.equal(negative, plain)
    assert not torch.allclose(encode(pipe, "an ugly cat"), plain)
    with loader.plain(load_pipe(tiny_sd_folder)):
        pass  # a pipeline without a concept


def test_a_replaced_text_encoder(tiny_sd_folder, pipe):
    other = load_pipe(tiny_sd_folder).text_encoder
    plain, old = encode(load_pipe(tiny_sd_folder), "a cat"), pipe.text_encoder
    pipe.text_encoder = other
    with pytest.warns(UserWarning, match="was replaced"), torch.no_grad():
        got, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    assert torch.equal(got, plain)
    pipe.text_encoder = old
    loader.enable_catversion(pipe)
    pipe.text_encoder = other
    with pytest.raises(loader.CatVersionLoadError, match="was replaced"):
        loader.unload_catversion(pipe, "tom")
    loader.unload_catversion(pipe)
    assert torch.equal(encode(pipe, "a cat"), plain)


def test_saving_says_that_concepts_are_not_saved(tmp_path, pipe):
    with pytest.warns(UserWarning, match=r"\(tom, rex\) are not in it.*export SOURCE --format"):
        pipe.save_pretrained(tmp_path / "saved")
    loader.unload_catversion(pipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="save_pretrained")
        pipe.save_pretrained(tmp_path / "again")


def test_a_state_dict(tiny_sd_folder, files):
    from safetensors import safe_open
    from safetensors.torch import load_file

    pipe, by_file = load_pipe(tiny_sd_folder), load_pipe(tiny_sd_folder)
    tensors = load_file(files["tom"])
    with pytest.raises(loader.CatVersionLoadError, match=r"metadata=safe_open"):
        loader.load_catversion(pipe, tensors)
    with safe_open(files["tom"], "pt") as file:
        assert loader.load_catversion(pipe, tensors, metadata=file.metadata()) == "tom"
    loader.load_catversion(by_file, files["tom"])
    assert torch.equal(encode(pipe, "a cat"), encode(by_file, "a cat"))


def test_folders_and_names_of_files(tiny_sd_folder, files, tmp_path):
    pipe, folder = load_pipe(tiny_sd_folder), tmp_path / "exported"
    folder.mkdir()
    (folder / "tom.safetensors").write_bytes(files["tom"].read_bytes())
    assert loader.load_catversion(pipe, folder) == "tom"
    (folder / "rex.safetensors").write_bytes(files["rex"].read_bytes())
    with pytest.raises(
        loader.CatVersionLoadError, match=r"rex.safetensors, tom.safetensors: choose with weight_na"
    ):
        loader.load_catversion(pipe, folder)
    assert loader.load_catversion(pipe, folder, weight_name="rex.safetensors") == "rex"
    assert loader.load_catversion(
        pipe, tmp_path, "x", subfolder="exported", weight_name="tom.safetensors"
    )
