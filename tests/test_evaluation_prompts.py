"""Prompt sets: what is shipped, edit texts, files of the user."""

import pytest

from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.evaluation import load_prompt_set
from catversion_jax.evaluation.prompts import edit_text, shipped_prompt_sets


def test_shipped_sets():
    assert shipped_prompt_sets() == ["catversion", "dreambench", "tiny"]
    bench = load_prompt_set("dreambench")
    # google/dreambooth: 25 + 25, of which 15 are the same; 4 images of each
    assert bench.num_images_per_prompt == 4
    assert len(set(bench.of("teapot"))) == len(set(bench.of("dog"))) == 25
    assert len(set(bench.of("teapot")) & set(bench.of("dog"))) == 15
    texts = [prompt.filled("stuffed animal") for prompt in bench.of("stuffed animal")]
    assert texts[0] == "a stuffed animal in the jungle"
    assert texts[-1] == "a cube shaped stuffed animal"
    assert [p.edit for p in bench.of("cat")][-5:] == [
        "red",
        "purple",
        "shiny",
        "wet",
        "cube shaped",
    ]
    assert all(prompt.edit for prompt in bench.prompts + bench.live_prompts)
    tiny = load_prompt_set("tiny")
    assert len(tiny.of("owl")) == 12
    assert tiny.of("owl")[0].filled("owl") == "an owl on the beach"
    assert {p.edit for p in load_prompt_set("catversion").prompts} >= {"running in time square"}


@pytest.mark.parametrize(
    ("template", "edit"),
    [
        ("a {} in the snow", "in the snow"),
        ("a {} with the Eiffel Tower in the background", "with the Eiffel Tower in the background"),
        ("a shiny {}", "shiny"),
        ("an old wooden {} on a table", "old wooden on a table"),
        ("a sketch of a {}", "a sketch"),
        ("a black and white photo of a {}", "a black and white photo"),
        ("a painting of the {} in the style of Monet", "a painting of in the style of Monet"),
        ("{} on the beach", "on the beach"),
        ("two cats and a {}", "two cats"),
        ("a {}", ""),
        ("{}", ""),
    ],
)
def test_edit_text(template, edit):
    assert edit_text(template) == edit


def test_files_of_the_user(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("a {} on mars\n\n  a wet {}\n")
    assert [p.template for p in load_prompt_set(str(text)).of("dog")] == [
        "a {} on mars",
        "a wet {}",
    ]
    rows = tmp_path / "mine.yaml"
    rows.write_text("prompts: [{prompt: 'a {} as a knight', edit: a knight}]\n")
    assert load_prompt_set(str(rows)).prompts[0].edit == "a knight"
    rows.write_text("- a {} on mars\n")
    assert load_prompt_set(str(rows)).num_images_per_prompt == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"must be a list of prompts"),
        ("prompts: []", r"holds no prompt. Write one per line"),
        ("prompt: [a]", r"unknown key 'prompt'.*prompts"),
        ("- a dog", r"prompt 1: 'a dog' must hold \{\} once"),
        ("- [a]", r"prompt 1: \['a'\] must be a text"),
        ("prompts: ['{}']\nnum_images_per_prompt: 0", r"num_images_per_prompt=0.*>= 1"),
        ("prompts: ['{}']\nlive_classes: [dog]", r"live_classes without live_prompts"),
        ("a: [", r"is not valid YAML"),
    ],
)
def test_wrong_files_say_so(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(CatVersionError, match=message):
        load_prompt_set(str(path))


def test_no_such_set():
    with pytest.raises(CatVersionError, match=r"dreamstand: is no shipped set \(catversion, dream"):
        load_prompt_set("dreamstand")


def test_a_brace_too_many(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("a {} with {hat}")
    with pytest.raises(ConceptError, match="only placeholders"):
        load_prompt_set(str(path)).prompts[0].filled("dog")
