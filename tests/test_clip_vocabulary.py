"""The tokenizer that ships with the package against published facts of CLIP's."""

import gzip
import hashlib
import json

import pytest

from catversion_jax.assets import CLIP_MERGES
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.vocabulary import (
    clip_tokenizer,
    trained_pad_token,
    write_clip_tokenizer,
)
from catversion_jax.models.weights.families import FAMILIES
from catversion_jax.models.weights.model_files import ModelFolder

# The git blob of merges.txt in openai/clip-vit-large-patch14 and in every Stable Diffusion.
PUBLISHED_BLOB = "76e821f1b6f0a9709293c3b6b51ed90980b3166b"


def test_the_merges_are_the_published_file():
    content = gzip.decompress(CLIP_MERGES.read_bytes())
    assert hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == PUBLISHED_BLOB


@pytest.mark.parametrize(("pad_token", "pad_id"), [("<|endoftext|>", 49407), ("!", 0)])
def test_the_ids_of_a_prompt_are_the_published_ones(pad_token, pad_id):
    tokenizer = clip_tokenizer(pad_token=pad_token, vocab_size=49408)
    # as in the documentation of transformers' CLIPTokenizer and OpenAI's notebook
    expected = {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "hello world": [3306, 1002],
    }
    rows = tokenizer(list(expected))
    for row, ids in zip(rows, expected.values(), strict=True):
        whole = [49406, *ids, 49407]
        assert row.tolist() == whole + [pad_id] * (77 - len(whole))


def test_an_encoder_with_fewer_embeddings_is_refused():
    with pytest.raises(CatVersionError, match="vocab_size = 49407"):
        clip_tokenizer(vocab_size=49407)


# What the tokenizer of Stable Diffusion 2.1 says in its two files.
PUBLISHED_CONFIG = {"pad_token": "<|endoftext|>", "model_max_length": 77}
PUBLISHED_MAP = {"pad_token": "!"}
TOKEN = {"__type": "AddedToken", "content": "!", "lstrip": False, "rstrip": False}
TOKEN |= {"normalized": True, "single_word": False}


@pytest.mark.parametrize(
    ("activation", "config", "special_tokens_map", "pad_id"),
    [
        ("gelu", PUBLISHED_CONFIG, PUBLISHED_MAP, 0),
        ("gelu", PUBLISHED_CONFIG, None, 0),
        ("gelu", {**PUBLISHED_CONFIG, "added_tokens_decoder": {}}, None, 49407),
        ("quick_gelu", PUBLISHED_CONFIG, None, 49407),
        ("quick_gelu", {"pad_token": TOKEN}, None, 0),
    ],
)
def test_a_lost_special_tokens_map_changes_no_prompt(
    tmp_path, activation, config, special_tokens_map, pad_id
):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_clip_tokenizer(folder, "!", 77)
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special_tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    (tmp_path / "text_encoder").mkdir()
    text = {"hidden_act": activation, "pad_token_id": 1}
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(text))
    row = ModelFolder(tmp_path).tokenizer(context=77)(["a cat"])[0]
    assert row[:4].tolist() == [49406, 320, 2368, 49407]
    assert set(row[4:].tolist()) == {pad_id}


def test_the_configurations_of_the_families_tell_their_pad_tokens():
    for family in FAMILIES:
        for component, place in family.text_encoders.items():
            assert trained_pad_token(family.configs[component]) == place.pad_token
