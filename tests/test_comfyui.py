"""The nodes of ``integrations/comfyui`` in the real ComfyUI, against the loader for diffusers.

    COMFYUI_PATH=folder pytest tests/test_comfyui.py

where the folder is a clone of ComfyUI whose requirements are installed. Weights are random, of the
published size for Stable Diffusion 1.5 and of real depth but few channels for 2.x and XL, rounded
to float16, in which ComfyUI keeps text encoders.
"""

import contextlib
import dataclasses
import logging
import warnings

import pytest
import torch
from comfyui_nodes import (
    SMALL,
    Both,
    comfy_clip,
    comfyui_here,
    encoded,
    learned,
    load_both,
    loaded,
    of_diffusers,
    tokenizer,
    write,
)
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch_reference import SDXL_TEXT_ENCODER_2, TEXT_ENCODERS, draw, randomise, relative_error
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from catversion_jax.integrations import diffusers as loader
from catversion_jax.methods.per_encoder import PerEncoder
from catversion_jax.methods.token_embeddings import TokenEmbeddings

TOLERANCE = 2e-6
PROMPTS = [
    "a teapot on a snowy mountain",
    "a stuffed animal beside two teapots, photo",
    "Stuffed Animals in the teapot",
    "a cat in the snow",
    "a teapotlike thing",
]


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    return comfyui_here(tmp_path_factory.mktemp("comfyui"))


def rounded(model):
    return randomise(model).half().float()


@pytest.fixture(scope="module")
def models():
    """Random text encoders by kind and ComfyUI's name."""
    first = TEXT_ENCODERS["SD 1.5"]
    second = SDXL_TEXT_ENCODER_2 | SMALL | {"projection_dim": 64, "num_hidden_layers": 32}
    third = TEXT_ENCODERS["SD 2.1"] | SMALL
    return {
        "SD 1.5": {"clip_l": rounded(CLIPTextModel(CLIPTextConfig(**first)))},
        "SD 2.x": {"clip_h": rounded(CLIPTextModel(CLIPTextConfig(**third)))},
        "SDXL": {
            "clip_l": rounded(CLIPTextModel(CLIPTextConfig(**(first | SMALL)))),
            "clip_g": rounded(CLIPTextModelWithProjection(CLIPTextConfig(**second))),
        },
    }


@pytest.fixture(scope="module")
def both(comfy, models, tmp_path_factory):
    """Both programs with one kind of model; concepts are loaded anew by each test."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizers = {
        pad: tokenizer(folder / str(i), pad) for i, pad in enumerate(("<|endoftext|>", "!"))
    }
    end, mark = tokenizers.values()

    def made(kind: str) -> Both:
        own = models[kind]
        if kind == "SDXL":
            pipe = StableDiffusionXLPipeline(
                None, own["clip_l"], own["clip_g"], end, mark, None, None
            )
        else:
            (encoder,) = own.values()
            pipe = StableDiffusionPipeline(
                None, encoder, end if kind == "SD 1.5" else mark, None, None, None, None,
                requires_safety_checker=False,
            )  # fmt: skip
        with contextlib.suppress(loader.CatVersionLoadError):
            loader.unload_catversion(pipe)
        return Both(pipe, comfy_clip(comfy, kind, own))

    cache: dict[str, Both] = {}
    return lambda kind: cache.setdefault(kind, made(kind))


@pytest.mark.parametrize("scope", ["all", "from_class_word", "class_word"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_stable_diffusion_1_with_two_concepts(comfy, both, scope, scale):
    pair = both("SD 1.5")
    pot = learned("SD 1.5", 0, scope=scope, logit_bias=0.7, positions=2)
    files = {
        write(comfy, "pot", "teapot", pot): scale,
        write(comfy, "bear", "stuffed animal", learned("SD 1.5", 7, scope=scope)): 1.25,
    }
    plain = [encoded(pair.clip, prompt) for prompt in PROMPTS]
    clip = load_both(comfy, pair, files)
    for prompt, (before, pooled_before) in zip(PROMPTS, plain, strict=True):
        ours, pooled = encoded(clip, prompt)
        theirs, _ = of_diffusers(pair.pipe, prompt)
        assert relative_error(ours, theirs) < TOLERANCE, prompt
        called = "teapot " in prompt or "nimal" in prompt
        assert torch.equal(ours, before) != called
        assert torch.equal(pooled, pooled_before) != called or scope == "class_word"
    for prompt, (before, pooled_before) in zip(PROMPTS, plain, strict=True):
        after, pooled = encoded(pair.clip, prompt)
        assert torch.equal(after, before)
        assert torch.equal(pooled, pooled_before)


@pytest.mark.parametrize("kind", ["SD 2.x", "SDXL"])
@pytest.mark.parametrize("scope", ["all", "from_class_word"])
def test_stable_diffusion_2_and_xl(comfy, both, kind, scope):
    pair = both(kind)
    files = {
        write(comfy, "pot", "teapot", learned(kind, 0, scope=scope)): 0.7,
        write(comfy, "bear", "stuffed animal", learned(kind, 20)): 1.0,
    }
    plain = [encoded(pair.clip, prompt) for prompt in PROMPTS]
    clip = load_both(comfy, pair, files)
    for prompt in PROMPTS:
        ours, pooled = encoded(clip, prompt)
        theirs, pooled_theirs = of_diffusers(pair.pipe, prompt)
        assert relative_error(ours, theirs) < TOLERANCE, prompt
        if pooled_theirs is not None:
            assert relative_error(pooled, pooled_theirs) < TOLERANCE, prompt
    for prompt, before in zip(PROMPTS, plain, strict=True):
        assert all(map(torch.equal, encoded(pair.clip, prompt), before))


@pytest.mark.parametrize("kind", ["SD 1.5", "SDXL"])
def test_states_behind_the_encoder(comfy, both, kind):
    """Files of version 4, at a scale, beside a concept without states."""
    pair = both(kind)
    what = learned(kind, 0)
    if kind == "SDXL":
        parts = enumerate(what.by_encoder)
        states = [dataclasses.replace(one, states=draw(3, 64, seed=3 + i)) for i, one in parts]
        what = PerEncoder(tuple(states))
    else:
        what = dataclasses.replace(what, states=draw(3, 768, seed=3))
    files = {
        write(comfy, "pot", "teapot", what): 0.6,
        write(comfy, "bear", "stuffed animal", learned(kind, 20)): 1.0,
    }
    clip = load_both(comfy, pair, files)
    for prompt, added in zip(PROMPTS, (3, 3, 3, 0, 0), strict=True):
        ours, _ = encoded(clip, prompt)
        theirs, _ = of_diffusers(pair.pipe, prompt)
        assert ours.shape[1] == 77 + added
        assert relative_error(ours, theirs) < TOLERANCE, prompt
        assert encoded(pair.clip, prompt)[0].shape[1] == 77


def test_one_softmax_however_they_are_chained(comfy, both):
    """Two nodes, one stack, and a node around another program's wrapper give the same."""
    pair = both("SD 1.5")
    pot = write(comfy, "pot", "teapot", learned("SD 1.5", 0, logit_bias=1.0))
    bear = write(comfy, "bear", "stuffed animal", learned("SD 1.5", 7, logit_bias=1.0))
    prompt = PROMPTS[1]
    clip = load_both(comfy, pair, {pot: 0.8, bear: 1.3})
    chained, _ = encoded(clip, prompt)
    assert relative_error(chained, of_diffusers(pair.pipe, prompt)[0]) < TOLERANCE
    stack = comfy.nodes["LoadCatVersionStack"]()
    slots = {"concept_1": pot, "scale_1": 0.8, "concept_2": bear, "scale_2": 1.3}
    slots |= {"concept_3": "none", "scale_3": 1.0, "concept_4": "none", "scale_4": 1.0}
    assert set(stack.INPUT_TYPES()["required"]) == {"clip", *slots}
    assert torch.equal(encoded(stack.load(pair.clip, **slots)[0], prompt)[0], chained)
    first = loaded(comfy, pair.clip, pot, 0.8)
    for path in (
        "clip_l.forward",
        "clip_l.transformer.text_model.encoder.layers.10.self_attn.forward",
    ):
        inner = first.patcher.get_model_object(path)
        around = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)  # noqa: E731
        first.patcher.add_object_patch(path, around)
    assert torch.equal(encoded(loaded(comfy, first, bear, 1.3), prompt)[0], chained)
    assert loaded(comfy, pair.clip, pot, 0.0) is pair.clip
    apart = loaded(comfy, loaded(comfy, pair.clip, pot, 0.8), bear, 1.3, keep_apart=True)
    loader.set_catversion(pair.pipe, ["pot", "bear"], [0.8, 1.3], keep_apart=True)
    ours, _ = encoded(apart, prompt)
    assert relative_error(ours, of_diffusers(pair.pipe, prompt)[0]) < TOLERANCE
    assert not torch.equal(ours, chained)


def lora_of(model, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    made = {}
    for layer in range(6, 12):
        for name in ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "mlp_fc1"):
            key = f"lora_te_text_model_encoder_layers_{layer}_{name}"
            outputs, inputs = (3072, 768) if name == "mlp_fc1" else (768, 768)
            made[f"{key}.lora_up.weight"] = torch.randn(outputs, 4) * 0.02
            made[f"{key}.lora_down.weight"] = torch.randn(4, inputs) * 0.02
            made[f"{key}.alpha"] = torch.tensor(4.0)
    return made


@torch.no_grad()
def test_a_lora_before_or_after(comfy, models):
    """The same numbers in either order, and those of the merged weights; the fingerprint is that of
    the weights below the LoRA, and offloaded weights (lowvram) give the same.
    """
    model = models["SD 1.5"]["clip_l"]
    clip = comfy_clip(comfy, "SD 1.5", {"clip_l": model}, dtype=torch.float32)
    digest = loader.text_encoder_sha256(model)
    pot = write(comfy, "pot", "teapot", learned("SD 1.5", 0), text_encoder_sha256=digest)
    lora = lora_of(model, 3)
    with_lora = lambda clip: comfy.comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 0.9)[1]  # noqa: E731
    after = with_lora(loaded(comfy, clip, pot))
    found, _ = encoded(after, PROMPTS[0])  # the LoRA is in the weights now
    before = loaded(comfy, with_lora(clip), pot)
    assert torch.equal(encoded(before, PROMPTS[0])[0], found)

    merged = CLIPTextModel(model.config)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for key, up in lora.items():
        if key.endswith("lora_up.weight"):
            name = key.removeprefix("lora_te_text_model_").removesuffix(".lora_up.weight")
            name = name.replace("encoder_layers_", "encoder.layers.")
            for part in ("self_attn", "mlp"):
                name = name.replace(f"_{part}_", f".{part}.")
            (target,) = [k for k in state if k.endswith(f"{name}.weight")]
            state[target] += 0.9 * up @ lora[key.replace("lora_up", "lora_down")]
    merged.load_state_dict(state)
    folder = comfy.folder / "tokenizer"
    pipe = StableDiffusionPipeline(
        None, merged.eval(), tokenizer(folder, "<|endoftext|>"), None, None, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    loader.load_catversion(pipe, comfy.folder / "catversion" / pot, force=True)
    assert relative_error(found, of_diffusers(pipe, PROMPTS[0])[0]) < TOLERANCE

    before.patcher.detach()
    before.patcher.patch_model(torch.device("cpu"), lowvram_model_memory=2**20)
    assert before.patcher.lowvram_patch_counter()
    tokens = before.tokenize(PROMPTS[0])
    offloaded, _ = before.cond_stage_model.encode_token_weights(tokens)
    assert relative_error(offloaded, found) < 1e-6
    before.patcher.detach()


def test_clip_skip_weights_and_long_prompts(comfy, both):
    pair = both("SD 1.5")
    pot = write(comfy, "pot", "teapot", learned("SD 1.5", 0, scope="from_class_word"))
    clip = load_both(comfy, pair, {pot: 1.0})
    skipped = clip.clone()
    skipped.clip_layer(-2)  # what CLIP Set Last Layer does
    ids = [[one[0] for one in row] for row in clip.tokenize(PROMPTS[0])["l"]]
    encoder = pair.pipe.text_encoder
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden = encoder(torch.tensor(ids), output_hidden_states=True).hidden_states[-2]
        theirs = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
    assert relative_error(encoded(skipped, PROMPTS[0])[0], theirs) < TOLERANCE

    weighted, _ = encoded(clip, "a (teapot:1.3) on a table")
    normal, _ = of_diffusers(pair.pipe, "a teapot on a table")
    empty, _ = of_diffusers(pair.pipe, "")
    weights = torch.ones(77, 1)
    weights[2] = 1.3
    assert relative_error(weighted, (normal - empty) * weights + empty) < TOLERANCE

    long = "a red teapot " + "in the deep white snow " * 20 + "and a teapot"
    rows = clip.tokenize(long)["l"]
    assert len(rows) == 2
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunks = [pair.pipe.text_encoder(torch.tensor([[x[0] for x in row]]))[0] for row in rows]
    assert relative_error(encoded(clip, long)[0], torch.cat(chunks, dim=1)) < TOLERANCE


def test_a_learned_embedding_in_the_prompt(comfy, both):
    """One that says "red" twice, against the words themselves."""
    pair = both("SD 1.5")
    pot = write(comfy, "pot", "teapot", learned("SD 1.5", 0, scope="from_class_word"))
    clip = load_both(comfy, pair, {pot: 1.0})
    (red,) = pair.pipe.tokenizer("red", add_special_tokens=False).input_ids
    table = pair.pipe.text_encoder.get_input_embeddings().weight
    (comfy.folder / "embeddings").mkdir(exist_ok=True)
    save_file(
        {"emb_params": table[[red, red]].clone()}, comfy.folder / "embeddings" / "reds.safetensors"
    )
    ours, _ = encoded(clip, "a embedding:reds teapot")
    theirs, _ = of_diffusers(pair.pipe, "a red red teapot")
    assert relative_error(ours, theirs) < TOLERANCE


def test_when(comfy, both):
    pair = both("SD 1.5")
    pot = write(comfy, "pot", "teapot", learned("SD 1.5", 0))
    always = write(comfy, "always", "teapot", learned("SD 1.5", 0), when="always")
    for prompt in ("a cat in the snow", PROMPTS[0]):
        expected, _ = encoded(loaded(comfy, pair.clip, always), prompt)
        assert torch.equal(
            encoded(loaded(comfy, pair.clip, pot, when="always"), prompt)[0], expected
        )
    assert torch.equal(encoded(loaded(comfy, pair.clip, always), "")[0], encoded(pair.clip, "")[0])
    one = loaded(comfy, pair.clip, always, when="class_word")
    assert torch.equal(encoded(one, "a cat")[0], encoded(pair.clip, "a cat")[0])


def test_what_does_not_fit_is_refused_with_the_reason(comfy, both, tmp_path):
    sd1, sd2, xl = (both(kind).clip for kind in ("SD 1.5", "SD 2.x", "SDXL"))
    pot = write(comfy, "pot", "teapot", learned("SD 1.5", 0), base_model="sd15")
    pair = write(comfy, "xl", "teapot", learned("SDXL", 0))
    ti = write(comfy, "ti", "teapot", TokenEmbeddings(draw(2, 768)))
    other = write(
        comfy, "other", "teapot", learned("SD 1.5", 0), text_encoder_sha256="ab" * 32,
        base_model="stable-diffusion-v1-5",
    )  # fmt: skip
    lora = comfy.folder / "catversion" / "lora.safetensors"
    save_file({"lora_te_x.lora_up.weight": torch.zeros(2, 2)}, lora)
    (comfy.folder / "catversion" / "half.safetensors").write_bytes(lora.read_bytes()[:60])
    for clip, file, message in (
        (sd2, pot, "12 heads of 64 and at least 12 layers; clip_h .* 4 heads of 16 and 23 layers"),
        (xl, pot, r"1 text encoder.* and this CLIP \(SDXLClipModel\) has clip_l, clip_g.*: sd15\."),
        (sd1, pair, r"2 text encoder\(s\) of Stable Diffusion XL, and this CLIP"),
        (sd1, ti, "Move it to models/embeddings and write embedding:catversion"),
        (sd1, other, "text encoder abababababab of stable-diffusion-v1-5; clip_l .*set force"),
        (sd1, "lora.safetensors", "not a concept file. A LoRA goes to models/loras"),
        (sd1, "half.safetensors", "not a complete safetensors file"),
        (sd1, "gone.safetensors", "no such file in models/catversion"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(comfy, clip, file)
    forced, _ = encoded(loaded(comfy, sd1, other, force=True), PROMPTS[0])
    assert torch.equal(forced, encoded(loaded(comfy, sd1, pot), PROMPTS[0])[0])


@pytest.mark.parametrize("kind", ["SD 1.5", "SD 2.x", "SDXL"])
def test_the_fingerprint_is_that_of_the_package(comfy, both, models, kind):
    encoders = ("text_encoder", "text_encoder_2")
    digests = {
        f"{name}_sha256": loader.text_encoder_sha256(model)
        for name, model in zip(encoders, models[kind].values(), strict=False)
    }
    file = write(comfy, "same", "teapot", learned(kind, 0), **digests)
    loaded(comfy, both(kind).clip, file)


def test_our_file_in_another_folder(comfy, both, models, caplog):
    """What the docs say of a concept in ``embeddings`` or ``loras``."""
    pair = both("SD 1.5")
    what = dataclasses.replace(learned("SD 1.5", 0), states=draw(3, 768))
    file = comfy.folder / "catversion" / write(comfy, "pot", "teapot", what)
    (comfy.folder / "embeddings").mkdir(exist_ok=True)
    (comfy.folder / "embeddings" / "pot.safetensors").write_bytes(file.read_bytes())
    # ComfyUI means to leave it out, but miscounts embeddings of several rows of another width.
    sizes = r"The size of tensor a \(88\) must match the size of tensor b \(77\)"
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=sizes):
        encoded(pair.clip, "embedding:pot on a table")
    assert "embedding will be ignored 64 != 768" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        _, clip = comfy.comfy.sd.load_lora_for_models(None, pair.clip, load_file(file), 1.0, 1.0)
    assert "lora key not loaded: layers.9.key" in caplog.text
    assert torch.equal(encoded(clip, PROMPTS[0])[0], encoded(pair.clip, PROMPTS[0])[0])
