"""The world of tiny-sd: what is added to it leaves the first world, its words and what is held out
as they were, and the foreign concepts come from elsewhere.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from catversion_jax.assets import embedded_folder

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "tiny_sd"
FOLDER = embedded_folder("tiny-sd")


@pytest.fixture(scope="module")
def tools():
    """The scripts' modules, imported as they import each other."""
    sys.path.insert(0, str(TOOLS))
    try:
        import compose
        import forms
        import pool
        import sprites
        import stages_of
        import tokens
        import train_clip
        import world
    finally:
        sys.path.pop(0)
    return SimpleNamespace(
        compose=compose,
        forms=forms,
        pool=pool,
        sprites=sprites,
        stages_of=stages_of,
        tokens=tokens,
        train_clip=train_clip,
        world=world,
    )


@pytest.fixture(scope="module")
def drawings(tools):
    entries = json.loads((TOOLS / "sprites.json").read_text())
    return [tools.sprites.read_drawing(entry) for entry in entries]


def captions_of(tools, drawings, wide, count=600):
    """Captions of pictures that a pool would hold, none of which is drawn."""
    named = tools.world.named_instances(drawings)
    rows = [tools.pool.draw_labels(drawings, named, i, 0, wide)[0] for i in range(count)]
    names = tuple(instance.name for instance in named)
    pool = tools.pool.Pool(tools.sprites.Sprites(drawings, None, None), None, np.stack(rows), names)
    return pool.captions(np.arange(count), random.Random(0))


def test_what_is_added_leaves_the_first_worlds_names(tools, drawings):
    first = tools.pool.of_world(drawings, wide=False)
    assert (len(first), len(drawings)) == (172, 364)
    before = tools.world.named_instances(first)
    after = tools.world.named_instances(drawings)
    assert len(before) == 247
    assert after[:247] == before
    # what the model card says
    assert len({instance.name for instance in after}) == len(after) == 431


def test_no_hand_that_is_held_out_draws_another_form(tools, drawings):
    """A whole cat by the family whose cat is held out would give the concept away, and so would
    the glossy twin of a flat drawing.
    """
    world = tools.world
    for instance in world.named_instances(drawings):
        assert world.hand(instance.drawing) not in world.held_out_drawings()
    for concept in world.held_out().values():
        if concept.colouring.kind != "natural":
            twin = concept.drawing.replace("fluent-emoji-flat", "fluent-emoji") + "/whole"
            assert world.is_held_out(twin, concept.colouring)


def test_the_shipped_tokenizer_is_that_of_the_wide_world(tools, drawings):
    shipped = tools.tokens.Tokens.load(FOLDER / "tokenizer")
    assert shipped.ids == tools.tokens.Tokens.build(drawings).ids


def test_the_first_worlds_captions_hold_only_words_of_its_own_tokenizer(tools, drawings):
    first = tools.pool.of_world(drawings, wide=False)
    own = tools.tokens.Tokens.build(first)
    own(captions_of(tools, first, wide=False))  # a KeyError names an unknown word


def test_wide_captions_say_form_size_rendering_and_scene_in_known_words(tools, drawings):
    texts = captions_of(tools, drawings, wide=True)
    tools.tokens.Tokens.build(drawings)(texts)
    said = " ".join(texts)
    for phrase in ("whole cat", "from the front", "panda bear", "tiny", "outlined", "a poster of"):
        assert phrase in said
    assert max(len(text.split()) for text in texts) <= 22  # of 32 positions


@pytest.mark.parametrize("size", ["usual", "tiny", "small", "large"])
@pytest.mark.parametrize("style", ["photo", "poster", "cartoon"])
def test_an_object_fills_what_its_size_says(tools, size, style):
    """The longer side of the mask, within the pixel that resizing rounds and the margin that
    turning a square by 5 degrees cuts off a disc.
    """
    rows, columns = np.mgrid[:96, :96] - 47.5
    disc = rows**2 + columns**2 < 44**2
    rgba = np.dstack([*(np.full((96, 96), v, np.uint8) for v in (200, 40, 40)), 255 * disc])
    sprites = tools.sprites.Sprites([], rgba[None].astype(np.uint8), disc[None].astype(np.uint8))
    low, high = tools.forms.SIZES[size]
    for seed in range(3):
        rng = random.Random(seed)
        rendering = tools.forms.RENDERINGS[seed]
        colouring = tools.world.Colouring("solid", "teal")
        image, mask = tools.compose.picture(
            sprites, 0, colouring, "beach", style, rng, size=size, rendering=rendering
        )
        assert image.shape == (64, 64, 3)
        side = max(np.ptp(np.nonzero(mask > 128)[axis]) + 1 for axis in (0, 1)) / 64
        assert low - 0.05 <= side <= high + 0.03


def test_foreign_concepts_share_no_family_with_any_world(tools):
    concepts = json.loads((TOOLS / "foreign.json").read_text())["concepts"]
    assert len(concepts) == len({concept["name"] for concept in concepts}) == 29
    assert {concept["class"] for concept in concepts} <= set(tools.world.CLASSES)
    assert not {concept["family"] for concept in concepts} & set(tools.world.FAMILY_WORDS)
    assert all(concept["family"] in tools.sprites.VERSIONS for concept in concepts)


def test_a_grown_vocabulary_reads_old_captions_as_before(tools, drawings):
    """Token ids move, states do not; a new word starts as the mean of its old pieces."""
    import torch

    old = tools.tokens.Tokens.build(tools.pool.of_world(drawings, wide=False))
    new = tools.tokens.Tokens.build(drawings)
    assert len(new.ids) > len(old.ids)
    clip = tools.train_clip.make_clip(old).eval()
    texts = ["a red cat on the beach", "a photo of bozo the dog in the snow"]
    with torch.inference_mode():
        before = clip.text_model(torch.from_numpy(old(texts)))
        tools.stages_of.grow_vocabulary(clip, old, new)
        after = clip.text_model(torch.from_numpy(new(texts)))
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(after.pooler_output, before.pooler_output, rtol=0, atol=0)
    row = clip.text_model.embeddings.token_embedding.weight[new.ids["poodle</w>"]]
    assert torch.isfinite(row).all()
    assert row.abs().sum() > 0
