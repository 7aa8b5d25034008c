"""Concepts of Stable Diffusion XL: one part for each text encoder, in files and in prompts."""

import dataclasses
import functools
import hashlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_xl import WIDTHS, load_xl, residuals
from torch_reference import concatenated_attention, relative_error

from catversion_jax.cli import main
from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.layer_choice import layers_by_encoder, resolve_layers
from catversion_jax.methods.per_encoder import PerEncoder
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.sampling.encoding import encode_text
from catversion_jax.sampling.requests import ConceptUse, check_concept
from catversion_jax.training.start_values import abstract_learned

DESCRIPTION = {
    "base_class": "toy car",
    "name": "räuber",
    "when": "class_word",
    "base_model": "some/model",
    "text_encoder_sha256": "ab" * 32,
    "step": 250,
    "config": {"resolution": 512},
    "images": ("b.jpg",),
    "metrics": {"loss": 0.25},
}


@pytest.fixture(scope="module")
def backbone(tiny_xl_folder) -> Backbone:
    return load_backbone(tiny_xl_folder)


def embeddings(seed: int = 0) -> PerEncoder:
    rng = np.random.default_rng(seed)
    return PerEncoder(
        tuple(TokenEmbeddings(rng.normal(size=(2, width)).astype("f4")) for width in WIDTHS)
    )


def save(path, learned, **changes):
    return save_concept(
        path, learned, **DESCRIPTION | {"text_encoder_2_sha256": "cd" * 32} | changes
    )


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "version", "sha256"),
    [
        ("residual", (0.5,), 1, "8c08045e0428b4e81b54cacb32c73570e91c80e9d518ea5ba7148b2cdec4e26a"),
        (
            "residual",
            (0.0, "class_word"),
            2,
            "23823c0712bb687994f25161066749daf8b4ab651fc2164bc33e8310d0fd9977",
        ),
        ("vectors", (), 2, "dcde6929ba27edcf3af091010e4d61725fd2e9c84b51e9c3963a4161cab30300"),
    ],
)
def test_files_for_one_encoder_are_those_of_earlier_versions(
    tmp_path, kind, settings, version, sha256
):
    """The hashes are of files that the program wrote before it knew of a second encoder."""
    array = np.arange(192, dtype=np.float32).reshape(2, 3, 4, 8) / 7
    learned = (
        KVResidual(array, -array, (3, 11), *settings)
        if kind == "residual"
        else TokenEmbeddings(array[0].reshape(3, 32))
    )
    path = save_concept(tmp_path / "x.safetensors", learned, **DESCRIPTION)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert load_concept(path).metadata["catversion.format_version"] == str(version)


def test_a_file_holds_both_parts_and_both_fingerprints(tmp_path):
    path = save(tmp_path / "x.safetensors", residuals(logit_bias=0.5, scope="from_class_word"))
    with safe_open(path, "np") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == {
        *(f"text_encoder.layers.{i}.{part}" for i in (1, 2) for part in ("key", "value")),
        *(f"text_encoder_2.layers.{i}.{part}" for i in (3, 4) for part in ("key", "value")),
    }
    assert metadata["catversion.format_version"] == "3"
    assert metadata["catversion.text_encoder_sha256"] == "ab" * 32
    assert metadata["catversion.text_encoder_2_sha256"] == "cd" * 32
    assert metadata["catversion.text_encoder.layers"] == "[1,2]"
    assert metadata["catversion.text_encoder_2.head_dim"] == "12"
    concept = load_concept(path)
    for ours, read in zip(residuals().parts, concept.learned.parts, strict=True):
        np.testing.assert_array_equal(read.key, ours.key)
        np.testing.assert_array_equal(read.value, ours.value)
        assert (read.layers, read.logit_bias, read.scope) == (ours.layers, 0.5, "from_class_word")
    again = concept.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_diffusers_reads_a_prompt_with_the_embeddings_of_both_encoders(
    tmp_path, tiny_xl_folder, backbone
):
    path = save(tmp_path / "x.safetensors", embeddings())
    assert sorted(load_file(path)) == ["clip_g", "clip_l"]
    pipe = load_xl(tiny_xl_folder)
    state = {name: torch.from_numpy(array) for name, array in load_file(path).items()}
    for name, encoder, tokenizer, learned in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer, embeddings().parts[0]),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2, embeddings().parts[1]),
    ):
        pipe.load_textual_inversion(
            state[name], token="<car>", text_encoder=encoder, tokenizer=tokenizer
        )
        ids = tokenizer.convert_tokens_to_ids(["<car>", "<car>_1"])
        loaded = encoder.get_input_embeddings().weight[ids].detach().numpy()
        np.testing.assert_array_equal(loaded, learned.vectors)
    # The configuration says 2, which means the token of the highest id: the added one.
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    with torch.no_grad():
        prompt = "a <car> in snow"
        context, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    concept = load_concept(path)
    found = encode_text(backbone, "a toy car in snow", [ConceptUse.of(concept)])
    assert relative_error(found.context, context[0]) < 1e-4
    assert relative_error(found.pooled, pooled[0]) < 1e-4
    np.testing.assert_array_equal(concept.learned.parts[1].vectors, embeddings().parts[1].vectors)
    assert concept.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("lost", ["text_encoder_2.layers.4.value", "text_encoder.layers.1.key"])
def test_a_file_that_lacks_a_tensor_of_one_part_is_damaged(tmp_path, lost):
    path = save(tmp_path / "x.safetensors", residuals())
    tensors = {name: array for name, array in load_file(path).items() if name != lost}
    metadata = load_concept(path).metadata
    del metadata["modelspec.hash_sha256"]
    save_file(tensors, path, metadata)
    with pytest.raises(CatVersionError, match=rf"damaged \(missing '?{lost}"):
        load_concept(path)


def test_inspect_says_what_each_encoder_has(tmp_path, capsys):
    path = save(tmp_path / "x.safetensors", residuals())
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "text encoder 2 sha256" in printed
    assert "cd" * 32 in printed
    assert "num parameters       320" in printed  # 2 layers x key and value x (32 + 48)
    assert "layers=[3, 4]" in printed


# ---- prompts ---------------------------------------------------------------------------------


def test_both_encoders_states_equal_torch_with_concatenated_keys(tiny_xl_folder, backbone):
    pipe, learned = load_xl(tiny_xl_folder), residuals()
    for encoder, part in zip((pipe.text_encoder, pipe.text_encoder_2), learned.parts, strict=True):
        text = getattr(encoder, "text_model", encoder)
        for row, layer in enumerate(part.layers):
            module = text.encoder.layers[layer].self_attn
            pair = (torch.from_numpy(array[row]) for array in (part.key, part.value))
            module.forward = functools.partial(concatenated_attention, module, *pair)
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt("a toy car!", do_classifier_free_guidance=False)
    use = ConceptUse("tom", "toy car", learned)
    found = encode_text(backbone, "a toy car!", [use])
    assert relative_error(found.context, context[0]) < 1e-4
    assert relative_error(found.pooled, pooled[0]) < 1e-4
    plain, uncalled, off = (
        encode_text(backbone, prompt, uses)
        for prompt, uses in (
            ("a toy car!", ()),
            ("a boat", [use]),
            ("a toy car!", [ConceptUse("tom", "toy car", learned, scale=0.0)]),
        )
    )
    np.testing.assert_array_equal(off.context, plain.context)
    np.testing.assert_array_equal(off.pooled, plain.pooled)
    boat = encode_text(backbone, "a boat", ())
    np.testing.assert_array_equal(uncalled.context, boat.context)
    assert np.abs(found.context - plain.context).max(axis=0).min() > 0  # both halves change


def test_the_vectors_of_a_token_make_the_prompt_with_that_token(backbone):
    """In both encoders, where the second one pads with another token."""
    ids = [tokenizer.word_ids("dog") for tokenizer in backbone.tokenizers]
    vectors = [
        np.asarray(encoder.call("token_embeddings", np.array(of_word)))
        for encoder, of_word in zip(backbone.text_encoders, ids, strict=True)
    ]
    learned = PerEncoder(tuple(map(TokenEmbeddings, vectors)))
    found = encode_text(backbone, "a cat in snow", [ConceptUse("tom", "cat", learned)])
    expected = encode_text(backbone, "a dog in snow", ())
    np.testing.assert_array_equal(found.context, expected.context)
    np.testing.assert_array_equal(found.pooled, expected.pooled)


def test_concepts_of_another_kind_of_model_are_refused(backbone, tiny_sd_folder, tmp_path):
    one = ConceptUse("tom", "cat", residuals().parts[0])
    message = r"'tom': was trained for a model with 1 text encoder\(s\), but .* has 2"
    with pytest.raises(CatVersionError, match=message):
        check_concept(backbone, one, {})
    with pytest.raises(CatVersionError, match=message):
        encode_text(backbone, "a cat", [one])
    both = ConceptUse("tom", "cat", residuals())
    with pytest.raises(CatVersionError, match=r"with 2 text encoder\(s\), but .* has 1"):
        check_concept(load_backbone(tiny_sd_folder), both, {})


def test_each_part_must_fit_its_encoder(backbone):
    check_concept(backbone, ConceptUse("tom", "cat", residuals()), backbone.fingerprints)
    swapped = ConceptUse("tom", "cat", PerEncoder(residuals().parts[::-1]))
    with pytest.raises(CatVersionError, match=r"has 4 heads x 12 .* has 4 heads x 8"):
        check_concept(backbone, swapped, {})
    others = backbone.fingerprints | {"text_encoder_2_sha256": "0" * 64}
    use = ConceptUse("tom", "cat", residuals())
    with pytest.raises(CatVersionError, match="of hash 000000000000"):
        check_concept(backbone, use, others)
    check_concept(backbone, use, others, force=True)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last3", ((8, 9, 10), (28, 29, 30))),
        ("last2/28,31", ((9, 10), (28, 31))),
        ("0,10/all", ((0, 10), tuple(range(31)))),
    ],
)
def test_layers_of_both_encoders(layers, expected):
    """Encoders of 12 and 32 layers: the last one of the first is never read, that of the second
    makes the pooled state.
    """
    choices = layers_by_encoder(layers, 2)
    sizes = ((11, 11), (31, 32))
    found = tuple(resolve_layers(one, *size) for one, size in zip(choices, sizes, strict=True))
    assert found == expected


def test_layers_that_cannot_be(backbone):
    facts = [(one.num_context_layers, one.num_reaching_layers) for one in backbone.text_facts]
    assert facts == [(3, 3), (4, 5)]
    with pytest.raises(CatVersionError, match=r"within 0\.\.10"):
        resolve_layers("11", 11, 11)
    with pytest.raises(CatVersionError, match="3 choices for 2 text encoders"):
        layers_by_encoder("last3/last3/last3", 2)
    options = make_config({"concepts": "unused", "layers": "last3/3,5"}).method_options
    with pytest.raises(CatVersionError, match=r"'3,5'.*0\.\.4\. That is of text_encoder_2"):
        abstract_learned(options, backbone)
    learned = abstract_learned(dataclasses.replace(options, layers="last2/4"), backbone)
    assert [part.layers for part in learned.parts] == [(1, 2), (4,)]
