"""Prompts as users of other programs write them: one warning that says what is meant here."""

from pathlib import Path

import pytest

from catversion_jax.concepts.foreign_syntax import foreign_syntax
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.sampling.requests import ImageRequest, prompt_warnings


@pytest.mark.parametrize(
    ("prompt", "found", "remedy"),
    [
        ("a (cat:1.3) in snow", "(cat:1.3)", "PATH:SCALE"),
        ("a (red cat: .8), snow", "(red cat: .8)", "PATH:SCALE"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]", "PATH:SCALE"),
        ("a ((cat)) in snow", "((cat))", "PATH:SCALE"),
        ("a cat++ in snow", "cat++", "PATH:SCALE"),
        ("a (red cat)1.3 in snow", "(red cat)1.3", "PATH:SCALE"),
        ("a cat --seed 5", "--seed 5", "outside the prompt"),
        ("a cat --ar 16:9 --v 5", "--ar 16:9", "outside the prompt"),
        ("a cat BREAK a dog", "BREAK", "one text"),
        ("a cat <lora:rex_v2:0.8>", "<lora:rex_v2:0.8>", "--concept PATH:SCALE"),
        ("embedding:rex in snow", "embedding:rex", "--concept PATH:SCALE"),
    ],
)
def test_one_warning_says_what_is_meant(prompt: str, found: str, remedy: str) -> None:
    warning = foreign_syntax([prompt])
    assert warning is not None
    assert repr(found) in warning
    assert remedy in warning
    assert "plain words" in warning


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (with a hat) in the snow",
        "a clock that says 10:30",
        "well-known -- or not -- a break-dance",
        "a [red] cat, ratio 16:9",
        "a mug's photo - close up",
        "a < b > c",
        "",
    ],
)
def test_plain_words_are_no_syntax(prompt: str) -> None:
    assert foreign_syntax([prompt]) is None


def test_a_thousand_prompts_are_one_line() -> None:
    warning = foreign_syntax(f"a (cat:{i}) --seed {i} BREAK <lora:x{i}:1>" for i in range(1000))
    assert warning is not None
    assert warning.startswith("1000 prompts use syntax of other programs")
    assert len(warning) < 1000
    assert len(warning.splitlines()) == 1


def test_it_is_a_warning_of_the_call(embedded_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(embedded_model / "tokenizer")
    requests = [ImageRequest("a (cup:1.3)", seed=seed) for seed in range(3)]
    (warning,) = prompt_warnings([tokenizer], requests)
    assert "(cup:1.3)" in warning
    (warning,) = prompt_warnings([tokenizer], [ImageRequest("a cup", negative_prompt="ugly BREAK")])
    assert "BREAK" in warning
