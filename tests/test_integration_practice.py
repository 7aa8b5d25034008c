"""The PyTorch loader beside what people put around a text encoder: peft, torch.compile,
checkpointing, offloading, other processes, other pipelines.
"""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loader is a PyTorch one: pip install '.[torch]'")
pytest.importorskip("diffusers", reason="the loader is for diffusers: pip install '.[torch]'")

from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline  # noqa: E402
from tiny_pipelines import (  # noqa: E402
    encode,
    load_pipe,
    make_residual,
    token_ids,
    write,
    write_cat_and_dog,
)

from catversion_jax.integrations import diffusers as loader  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
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
