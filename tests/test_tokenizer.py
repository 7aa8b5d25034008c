"""Prompts to ids, against transformers, and what a concept asks of a prompt."""

import concurrent.futures
import json
import subprocess
import sys

import numpy as np
import pytest
import transformers

from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tiny_sd_folder):
    return tiny_sd_folder / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder):
    """Byte-level: one token a letter, 24 positions, so that 22 letters fit."""
    return Tokenizer.from_folder(folder)


def test_ids_are_those_of_the_diffusers_pipeline(tokenizer, folder):
    prompts = [
        "a teapot",
        "",
        "A  Teapot, ünïcode!",
        "a very long prompt about a teapot on a table",
    ]
    expected = transformers.CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", max_length=24, truncation=True, return_tensors="np"
    ).input_ids
    ours = tokenizer(prompts)
    assert (ours.dtype, ours.shape, tokenizer.model_max_length) == (np.int32, (4, 24), 24)
    np.testing.assert_array_equal(ours, expected)


def test_threads_do_not_disturb_each_other(tokenizer):
    """Rows of the whole context, and words alone, asked for at the same time."""
    prompts = ["a", "a teapot", "a very long prompt about a teapot on a table"]
    expected = [(tokenizer([one])[0].tolist(), tokenizer.word_ids(one)) for one in prompts]
    assert len({len(words) for _, words in expected}) == 3

    def ask(number):
        prompt = prompts[number % 3]
        if number % 2:
            return tokenizer([prompt])[0].tolist() == expected[number % 3][0]
        return tokenizer.word_ids(prompt) == expected[number % 3][1]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(2000)))


def test_word_ids_have_no_start_and_end(tokenizer):
    start, *middle = tokenizer(["teapot"])[0].tolist()
    assert tokenizer.word_ids("teapot") == tuple(middle[:6])
    assert start not in tokenizer.word_ids("teapot")
    assert tokenizer.word_ids("") == ()


@pytest.mark.parametrize(
    ("prompt", "base_class", "expected"),
    [
        ("a teapot on ice", "teapot", True),
        ("A TEAPOT.", "teapot", True),
        ("teapots", "teapot", False),  # another word
        ("a tea pot", "teapot", False),
        ("a teddy bear sits", "teddy bear", True),
        ("a teddy brown bear", "teddy bear", False),
        ("bear teddy", "teddy bear", False),
        ("", "cat", False),
    ],
)
def test_class_word_in_a_prompt(tokenizer, prompt, base_class, expected):
    assert tokenizer.contains(prompt, base_class) is expected


def test_class_word_that_is_cut_off_does_not_count(tokenizer):
    """22 letters fit, spaces are no tokens."""
    assert tokenizer.contains("abcdefghij abcdefghi cat", "cat")
    assert not tokenizer.contains("abcdefghij abcdefghij cat", "cat")
    assert tokenizer.contains("abcdefghij abcdefghij ca", "ca")


@pytest.mark.parametrize("base_class", ["", "  "])
def test_empty_class_word(tokenizer, base_class):
    with pytest.raises(CatVersionError, match="must be at least one word"):
        tokenizer.contains("a cat", base_class)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ""),
        ("abcdefghij abcdefghij kl", ""),
        ("abcdefghij abcdefghij klm", "m"),
        ("abcdefghij abcdefghij kl  Then more", "Then more"),
    ],
)
def test_what_was_cut_off(tokenizer, prompt, expected):
    assert tokenizer.cut_off(prompt) == expected


def test_folder_without_a_length_takes_the_encoders(folder, tmp_path):
    unsaid = transformers.tokenization_utils_base.VERY_LARGE_INTEGER
    saved = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=unsaid)
    saved.save_pretrained(tmp_path)
    assert Tokenizer.from_folder(tmp_path, context=77)(["a cat"]).shape == (1, 77)
    with pytest.raises(CatVersionError, match="gives no model_max_length"):
        Tokenizer.from_folder(tmp_path)


def test_files_of_published_checkpoints(folder, tmp_path):
    """SD 1.x folders hold vocab.json and merges.txt, no tokenizer.json."""
    words = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 24,
                "pad_token": "<|endoftext|>",
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
            }
        )
    )
    old, new = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(folder)
    prompts = ["a teapot", "Two Cats, on a mat"]
    np.testing.assert_array_equal(old(prompts), new(prompts))
    assert old.cut_off("abcdefghij abcdefghij kl mn") == "mn"


def test_not_a_tokenizer_folder(tmp_path):
    with pytest.raises(CatVersionError, match=r"expected tokenizer.json.*found no folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CatVersionError, match=r"found \['vocab.json'\]"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CatVersionError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_works_without_torch(folder):
    """The base install has none."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from catversion_jax.models.clip.tokenizer import Tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        f"print(Tokenizer.from_folder({str(folder)!r})(['a cat']).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(1, 24)", done.stderr


def test_of_the_real_model(embedded_model):
    tokenizer = Tokenizer.from_folder(embedded_model / "tokenizer")
    expected = transformers.CLIPTokenizer.from_pretrained(embedded_model / "tokenizer")(
        ["a red ball on the beach"], padding="max_length", max_length=32, truncation=True
    ).input_ids
    np.testing.assert_array_equal(tokenizer(["a red ball on the beach"]), expected)
    assert tokenizer.contains("A red ball, at night", "ball")


def test_a_tokenizer_of_another_model(embedded_model, embedded_vocabulary):
    """One with more tokens than the text encoder knows; with as many it is read."""
    folder = embedded_model / "tokenizer"
    size = embedded_vocabulary
    Tokenizer.from_folder(folder, context=32, vocab_size=size)
    beyond = f"token {size - 1} is beyond the text encoder's vocab_size"
    with pytest.raises(CatVersionError, match=beyond):
        Tokenizer.from_folder(folder, context=32, vocab_size=size - 1)
