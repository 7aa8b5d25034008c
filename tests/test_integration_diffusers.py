"""The PyTorch loader against attention written by hand, the plain pipeline and our own encoder."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loader is a PyTorch one: pip install '.[torch]'")
pytest.importorskip("diffusers", reason="the loader is for diffusers: pip install '.[torch]'")

from tiny_pipelines import (  # noqa: E402
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    encode,
    load_pipe,
    make_residual,
    token_ids,
    write,
)

from catversion_jax.integrations import diffusers as loader  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(params=["eager", "sdpa"])
def implementation(request) -> str:
    return request.param


@torch.no_grad()
def encode_by_hand(
    pipe, prompt, residuals, attention_mask=None, num_layers=NUM_LAYERS
) -> torch.Tensor:
    """CLIP's text encoder from its state dict alone, float64, with keys and values concatenated
    (equation 1).
    """
    weights = {
        k.removeprefix("text_model."): v.double() for k, v in pipe.text_encoder.state_dict().items()
    }
    ids = token_ids(pipe, prompt)[0]
    num_tokens = len(ids)

    def norm(x, name):
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
        )

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = (
        weights["embeddings.token_embedding.weight"][ids]
        + weights["embeddings.position_embedding.weight"][:num_tokens]
    )
    mask = torch.full((num_tokens, num_tokens), -math.inf, dtype=torch.float64).triu(1)
    if attention_mask is not None:
        mask = mask.masked_fill(attention_mask[None, :] == 0, -math.inf)
    for layer in range(num_layers):
        name = f"encoder.layers.{layer}"
        h = norm(x, f"{name}.layer_norm1")
        q, k, v = (
            linear(h, f"{name}.self_attn.{p}_proj").view(num_tokens, NUM_HEADS, HEAD_DIM)
            for p in "qkv"
        )
        heads = []
        for head in range(NUM_HEADS):
            keys, values, added = [k[:, head]], [v[:, head]], [mask]
            for residual in residuals:
                if layer in residual.layers and residual.logit_bias > -math.inf:
                    at = residual.layers.index(layer)
                    keys.insert(0, torch.tensor(residual.key[at][:, head]).double())
                    values.insert(0, torch.tensor(residual.value[at][:, head]).double())
                    added.insert(
                        0,
                        torch.full(
                            (num_tokens, residual.num_positions), float(residual.logit_bias)
                        ).double(),
                    )
            logits = q[:, head] @ torch.cat(keys).T / math.sqrt(HEAD_DIM) + torch.cat(added, dim=1)
            heads.append(logits.softmax(-1) @ torch.cat(values))
        x = x + linear(torch.stack(heads, 1).reshape(num_tokens, -1), f"{name}.self_attn.out_proj")
        h = linear(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{name}.mlp.fc2")
    return norm(x, "final_layer_norm") if num_layers == NUM_LAYERS else x


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize(("positions", "layers", "bias"), [(1, (1, 2, 3), 0.0), (3, (0, 2), 1.0)])
def test_equals_attention_written_by_hand(
    tiny_sd_folder, tmp_path, implementation, positions, layers, bias
):
    residual = make_residual(0, positions, layers, bias)
    pipe = load_pipe(tiny_sd_folder, implementation)
    # the oracle itself
    assert relative(encode(pipe, "a cat")[0], encode_by_hand(pipe, "a cat", [])) < 1e-5
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    expected = encode_by_hand(pipe, "a cat", [residual])
    assert relative(expected, encode_by_hand(pipe, "a cat", [])) > 0.01  # the concept matters
    assert relative(encode(pipe, "a cat")[0], expected) < 1e-5


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_scale_multiplies_the_odds(tiny_sd_folder, tmp_path, implementation, scale):
    residual = make_residual(1, bias=1.0)
    pipe = load_pipe(tiny_sd_folder, implementation)
    name = loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    loader.set_catversion(pipe, name, scale)
    assert (
        relative(encode(pipe, "a cat")[0], encode_by_hand(pipe, "a cat", [residual.scaled(scale)]))
        < 1e-5
    )


def test_rows_act_alone_and_others_are_bit_identical(tiny_sd_folder, tmp_path, implementation):
    cat, dog = make_residual(2), make_residual(3, positions=2, layers=(2, 3), bias=1.0)
    pipe = load_pipe(tiny_sd_folder, implementation)
    prompts = ["a cat", "", "a red cab", "my dog", "dog and cat", "category"]
    plain = encode(pipe, *prompts)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", cat))
    loader.load_catversion(pipe, write(tmp_path, "rex", "dog", dog))
    got = encode(pipe, *prompts)
    for row in (1, 2, 5):
        assert torch.equal(got[row], plain[row]), prompts[row]
    for row, residuals in ((0, [cat]), (3, [dog]), (4, [cat, dog])):
        assert relative(got[row], encode_by_hand(pipe, prompts[row], residuals)) < 1e-5, prompts[
            row
        ]


def test_nothing_active_and_unloaded_are_bit_identical(tiny_sd_folder, tmp_path, implementation):
    pipe = load_pipe(tiny_sd_folder, implementation)
    plain = encode(pipe, "a cat", "a dog")
    file = write(tmp_path, "tom", "cat", make_residual(4))
    name = loader.load_catversion(pipe, file)
    active = encode(pipe, "a cat", "a dog")
    assert not torch.equal(active[0], plain[0])
    loader.disable_catversion(pipe)
    assert torch.equal(encode(pipe, "a cat", "a dog"), plain)
    loader.enable_catversion(pipe)
    assert torch.equal(encode(pipe, "a cat", "a dog"), active)
    loader.set_catversion(pipe, name, 0.0)
    assert torch.equal(encode(pipe, "a cat", "a dog"), plain)
    loader.unload_catversion(pipe, name)
    assert torch.equal(encode(pipe, "a cat", "a dog"), plain)
    assert pipe.text_encoder.config._attn_implementation == implementation
    assert not pipe.text_encoder._forward_pre_hooks
    assert not pipe.text_encoder._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert not any(hasattr(module, "_catversion") for module in pipe.text_encoder.modules())
    assert loader.list_catversion(pipe) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_sd_folder, tmp_path, implementation, dtype):
    residual = make_residual(5)
    pipe = load_pipe(tiny_sd_folder, implementation, dtype)
    prompts = ("a cat", "a dog")
    plain = encode(pipe, *prompts)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    got = encode(pipe, *prompts)
    assert got.dtype == dtype
    assert torch.equal(got[1], plain[1])
    # As far from the exact result as the plain encoder in this precision is from its own, within a
    # factor.
    rounding = relative(plain[0], encode_by_hand(pipe, "a cat", []))
    assert relative(got[0], encode_by_hand(pipe, "a cat", [residual])) < 3 * max(
        rounding, torch.finfo(dtype).eps
    )


def test_attention_mask_is_honoured(tiny_sd_folder, tmp_path, implementation):
    residual = make_residual(6)
    pipe = load_pipe(tiny_sd_folder, implementation)
    prompt = "a cat sits"
    mask = torch.ones(1, pipe.tokenizer.model_max_length, dtype=torch.long)
    mask[0, 2:5] = 0
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    got = encode(pipe, prompt, attention_mask=mask)[0]
    assert relative(got, encode_by_hand(pipe, prompt, [residual], mask[0])) < 1e-5


@torch.no_grad()
def test_clip_skip(tiny_sd_folder, tmp_path, implementation):
    pipe = load_pipe(tiny_sd_folder, implementation)
    residual = make_residual(7, layers=(1, 2))
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    hidden = pipe.text_encoder(token_ids(pipe, "a cat"), output_hidden_states=True).hidden_states[
        -2
    ][0]
    expected = encode_by_hand(pipe, "a cat", [residual], num_layers=NUM_LAYERS - 1)
    assert relative(hidden, expected) < 1e-5
    if hasattr(pipe.text_encoder, "text_model"):
        # else diffusers 0.42's own clip_skip fails on the plain pipeline
        prompt, _ = pipe.encode_prompt("a cat", "cpu", 1, False, clip_skip=1)
        assert torch.equal(prompt[0], pipe.text_encoder.text_model.final_layer_norm(hidden))


def test_always_spares_the_empty_and_the_named_plain_prompts(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    prompts = ("a dog", "", "blurry")
    plain = encode(pipe, *prompts)
    residual = make_residual(8)
    name = loader.load_catversion(pipe, write(tmp_path, "style", "cat", residual, when="always"))
    got = encode(pipe, *prompts)
    assert relative(got[0], encode_by_hand(pipe, "a dog", [residual])) < 1e-5
    assert torch.equal(got[1], plain[1])
    assert not torch.equal(got[2], plain[2])
    loader.set_catversion(pipe, name, plain_prompts=["blurry"])
    assert torch.equal(encode(pipe, *prompts)[2], plain[2])
    loader.set_catversion(pipe, name, 0.5)  # keeps them
    assert torch.equal(encode(pipe, *prompts)[2], plain[2])
    assert not torch.equal(encode(pipe, *prompts)[0], plain[0])
    loader.set_catversion(pipe, name, plain_prompts=())
    assert not torch.equal(encode(pipe, *prompts)[2], plain[2])


def test_base_class_of_several_words(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    prompts = ("my toy car", "toy red car", "car toy", "TOY  CAR")
    plain = encode(pipe, *prompts)
    loader.load_catversion(pipe, write(tmp_path, "x", "toy car", make_residual(9)))
    got = encode(pipe, *prompts)
    assert [torch.equal(a, b) for a, b in zip(got, plain, strict=True)] == [
        False,
        True,
        True,
        False,
    ]


def test_same_class_hot_swap_and_choice(tiny_sd_folder, tmp_path):
    first, second = make_residual(10), make_residual(11, positions=2)
    pipe = load_pipe(tiny_sd_folder)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", first))
    loader.load_catversion(pipe, write(tmp_path, "kit", "cat", second))
    assert [(c["name"], c["active"]) for c in loader.list_catversion(pipe)] == [
        ("tom", False),
        ("kit", True),
    ]
    assert relative(encode(pipe, "a cat")[0], encode_by_hand(pipe, "a cat", [second])) < 1e-5
    loader.set_catversion(pipe, ["tom", "kit"], [1.0, 0.5])
    assert (
        relative(
            encode(pipe, "a cat")[0], encode_by_hand(pipe, "a cat", [first, second.scaled(0.5)])
        )
        < 1e-5
    )
    loader.unload_catversion(pipe, "kit")
    assert relative(encode(pipe, "a cat")[0], encode_by_hand(pipe, "a cat", [first])) < 1e-5
    loader.load_catversion(pipe, write(tmp_path, "again", "cat", second), adapter_name="tom")
    assert relative(encode(pipe, "a cat")[0], encode_by_hand(pipe, "a cat", [second])) < 1e-5


def test_deep_copy_is_independent(tiny_sd_folder, tmp_path):
    residual = make_residual(12)
    pipe = load_pipe(tiny_sd_folder)
    plain = encode(pipe, "a cat")
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    active = encode(pipe, "a cat")
    twin = copy.copy(pipe)
    twin.text_encoder = copy.deepcopy(pipe.text_encoder)
    assert torch.equal(encode(twin, "a cat"), active)
    loader.unload_catversion(twin)
    assert torch.equal(encode(twin, "a cat"), plain)
    assert torch.equal(encode(pipe, "a cat"), active)


def test_user_changes_the_attention_implementation_afterwards(tiny_sd_folder, tmp_path):
    residual = make_residual(13)
    pipe = load_pipe(tiny_sd_folder, "sdpa")
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    pipe.text_encoder.set_attn_implementation("eager")
    assert relative(encode(pipe, "a cat")[0], encode_by_hand(pipe, "a cat", [residual])) < 1e-5
    loader.unload_catversion(pipe)
    assert pipe.text_encoder.config._attn_implementation == "eager"


def test_saved_pipeline_is_the_plain_one(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    plain = encode(pipe, "a cat")
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", make_residual(14)))
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(encode(load_pipe(tmp_path / "saved"), "a cat"), plain)


def test_equals_our_own_encoder(tiny_sd_folder, tmp_path, implementation):
    import jax.numpy as jnp

    from catversion_jax.models.lone_text_encoder import load_text_encoder

    residual = make_residual(21, positions=2, bias=1.0)
    pipe = load_pipe(tiny_sd_folder, implementation)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual))
    encoder = load_text_encoder(tiny_sd_folder / "text_encoder")
    ours = encoder(jnp.asarray(token_ids(pipe, "a cat").numpy()), residual)
    assert relative(encode(pipe, "a cat"), torch.tensor(np.asarray(ours))) < 1e-4


def test_list_tells_what_is_loaded(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", make_residual(22)).parent)
    (entry,) = loader.list_catversion(pipe)
    assert entry == {
        "name": "tom",
        "active": True,
        "scale": 1.0,
        "base_class": "cat",
        "when": "class_word",
        "layers": (1, 2, 3),
        "base_model": "",
    }
