"""The tokenizer that ships with the package against published facts of CLIP's."""

import gzip
import hashlib

import pytest

from catversion_jax.assets import CLIP_MERGES
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.vocabulary import clip_tokenizer

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
