"""``keep_apart``: concepts of one prompt that are each seen up to the next one's word only."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import load_pipe, make_residual, write
from torch_reference import relative_error

from catversion_jax.integrations import diffusers as loader
from catversion_jax.integrations.word_places import seeing_positions
from catversion_jax.methods.residual import SCOPES
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.sampling.encoding import encode_prompt
from catversion_jax.sampling.requests import ConceptUse

PROMPT = "a cat and a dog near a cat"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder: Path) -> Backbone:
    return load_backbone(one_block_sd_folder)


def uses(scope: str, keep_apart: bool) -> tuple[ConceptUse, ...]:
    tom, rex = (dataclasses.replace(make_residual(seed), scope=scope) for seed in (0, 1))
    return (
        ConceptUse("tom", "cat", tom, keep_apart=keep_apart),
        ConceptUse("rex", "dog", rex, 0.7, keep_apart=keep_apart),
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_ours_is_what_the_loader_gives(backbone, one_block_sd_folder, tmp_path, scope):
    pipe = load_pipe(one_block_sd_folder)
    for use in uses(scope, True):
        loader.load_catversion(pipe, write(tmp_path, use.name, use.base_class, use.learned))
    together = encode_prompt(backbone, PROMPT, uses(scope, False))
    for keep_apart, expected in (
        (True, encode_prompt(backbone, PROMPT, uses(scope, True))),
        (False, together),
    ):
        loader.set_catversion(pipe, ["tom", "rex"], [1.0, 0.7], keep_apart=keep_apart)
        with torch.no_grad():
            theirs, _ = pipe.encode_prompt([PROMPT], "cpu", 1, False)
        assert relative_error(expected, theirs[0]) < 1e-4
        # one concept alone is as ever: there is nothing to keep it apart from
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone, _ = pipe.encode_prompt(["a cat on a hill"], "cpu", 1, False)
        plain = encode_prompt(backbone, "a cat on a hill", uses(scope, False))
        assert relative_error(plain, alone[0]) < 1e-4
    apart = encode_prompt(backbone, PROMPT, uses(scope, True))
    assert (np.abs(apart - together).max() > 1e-3) == (scope != "class_word")


def test_the_first_words_know_nothing_of_the_dog(backbone):
    """In front of its word the context is that of the other concept alone, seen from its word."""
    dog = backbone.tokenizer.place(PROMPT, ["dog"], [None]).word_places[0].argmax() - 2
    for scope in ("all", "from_class_word"):
        apart = encode_prompt(backbone, PROMPT, uses(scope, True))
        alone = encode_prompt(backbone, PROMPT, uses("from_class_word", False)[:1])
        np.testing.assert_allclose(apart[:dog], alone[:dog], atol=1e-5)
        assert np.abs(apart[dog] - alone[dog]).max() > 1e-3


def test_who_sees_what():
    """Of: begin, a, cat, and, a, dog, near, a, cat, end, end."""
    cat, dog = (2, 8), (5,)

    def seen(scope: str, own: tuple[int, ...], others: tuple[int, ...]) -> list[int]:
        return list(seeing_positions(scope, own, others, 11))

    assert seen("from_class_word", cat, dog) == [2, 3, 4, 8, 9, 10]
    assert seen("all", cat, dog) == [2, 3, 4, 8, 9, 10]
    assert seen("all", dog, cat) == [5, 6, 7]
    assert seen("class_word", cat, dog) == [2, 8]
    assert seen("from_class_word", cat, ()) == list(range(2, 11))
    assert seen("all", cat, ()) == seen("all", (), dog) == list(range(11))
