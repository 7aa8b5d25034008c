"""When a prompt contains a class word: one rule in the prompt checks, the tokenizer, the places of
its tokens, the PyTorch loader and an exported pipeline.
"""

import copy
import dataclasses
import importlib.util
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.concepts.class_words import contains_words, plural_forms
from catversion_jax.concepts.reading import read_concepts
from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.sampling.requests import ConceptUse, ImageRequest, prompt_warnings
from catversion_jax.training.run.records import ConceptRecord

CASES = [  # class word, its further forms, prompt, whether the prompt contains it
    ("cat", (), "a cat on ice", True),
    ("cat", (), "a housecat", False),
    ("dog", (), "a sheepdog", False),
    ("pot", (), "a flowerpot", False),
    ("car", (), "a sidecar", False),
    ("can", (), "a trashcan", False),
    ("fish", (), "a swordfish", False),
    ("teddy bear", (), "a teddy bear!", True),
    ("teddy bear", (), "my teddy bearskin", False),
    ("cat", (), "CAT's hat", True),
    ("cat", (), "cat2", True),
    ("cat", (), "a dog-cat", True),
    ("cat", (), "a bobcat, a cat", True),
    ("teapot", (), "two teapots", False),
    ("teapot", ("teapots",), "two teapots", True),
    ("teapot", ("teapots",), "a teapot", True),
    ("teapot", ("tea pot",), "a tea pot", True),
    ("cat", ("cats",), "bobcats", False),
    ("猫", (), "一只猫", False),
    ("猫", (), "一只 猫 。", True),
    ("猫", ("一只猫",), "一只猫", True),
    ("ΣΑΣ", (), "a ΣΑΣ", True),
]


@pytest.fixture(scope="module")
def tokenizer(embedded_model):
    """Byte pairs that merge whole words, as in CLIP's vocabulary."""
    tokenizer = Tokenizer.from_folder(embedded_model / "tokenizer")
    cat, house = tokenizer.word_ids("cat"), tokenizer.word_ids("housecat")
    assert house[-len(cat) :] == cat  # what a rule on tokens alone would take for a cat
    return tokenizer


@pytest.mark.parametrize(("word", "forms", "prompt", "expected"), CASES)
def test_prompt_checks_and_tokenizer(tokenizer, word, forms, prompt, expected):
    words = (word, *forms)
    assert contains_words(prompt, words) is expected
    assert tokenizer.contains(prompt, words) is expected
    placed = tokenizer.place(prompt, [words], [None])
    assert bool((placed.word_places >= 0).any()) is expected
    assert bool(tokenizer.word_positions(tokenizer([prompt])[0], words)) is expected


def test_text_and_tokens_agree_on_any_text(tokenizer):
    """Letters, marks, digits and signs of many scripts around a word; transformers tokenizes."""
    rng = random.Random(0)
    pieces = [
        "cat",
        "cats",
        "Cat",
        "CAT",
        " ",
        " ",
        "'s",
        "'",
        "-",
        "_",
        "2",
        "²",
        "½",
        "é",
        "e\u0301",
    ]
    pieces += [
        "猫",
        "ก",
        "ั",
        "\u200b",
        "\u00a0",
        "Σ",
        "İ",
        "\u017f",
        "一",
        "!",
        ".",
        "a",
        "ß",
        "\u0345",
        "Ⅷ",
    ]
    disagreeing = []
    for _ in range(4000):
        prompt = "".join(rng.choices(pieces, k=rng.randint(1, 5)))
        word = rng.choice(["cat", "cats", "猫", "cat's", "e\u0301", "Σ", "²"])
        if contains_words(prompt, word) != tokenizer.contains(prompt, word):
            disagreeing.append((prompt, word))
    assert not disagreeing


def test_words_after_other_vectors_are_found(tokenizer):
    """Room for more vectors than the word has tokens may not hide the word that follows."""
    word = len(tokenizer.word_ids("pot"))
    assert word > 1
    placed = tokenizer.place("a pot cat", ["pot", "cat"], [word + 1, None])
    assert list(placed.word_places[0][2 : 3 + word]) == list(range(word + 1))
    assert placed.word_places[1][3 + word] == 0


@pytest.mark.parametrize(
    ("word", "plural"),
    [
        ("teapot", ("teapots",)),
        ("fox", ("foxes",)),
        ("pony", ("ponies",)),
        ("toy", ("toys",)),
        ("bench", ("benches",)),
        ("photo", ("photos", "photoes")),
        ("stuffed animal", ("stuffed animals",)),
        ("猫", ()),
        ("R2", ()),
    ],
)
def test_regular_plural(word, plural):
    assert plural_forms(word) == plural


def make_concept_folder(folder, examples, **fields):
    folder.mkdir()
    image = next(iter(sorted((examples / "dotted_teapot").glob("*.png"))))
    (folder / "1.png").write_bytes(image.read_bytes())
    (folder / "concept.json").write_text(json.dumps(fields))
    return folder


EXAMPLES = Path(__file__).resolve().parents[1] / "catversion_jax" / "assets" / "tiny-sd-examples"


@pytest.mark.parametrize(
    ("fields", "forms"),
    [
        ({}, ("teapots",)),
        ({"class_forms": []}, ()),
        ({"class_forms": ["tea pot", "teapot", "pots"]}, ("tea pot", "pots")),
        ({"class_forms": "teapots | tea pot"}, ("teapots", "tea pot")),
    ],
)
def test_forms_in_concept_json(tmp_path, fields, forms):
    folder = make_concept_folder(tmp_path / "pot", EXAMPLES, base_class="teapot", **fields)
    (spec,) = read_concepts(folder).concepts
    assert spec.class_forms == forms


@pytest.mark.parametrize(
    "value",
    [
        *({"a": 1}, 5, [5], [""], ["..."], [["teapots"]], True, "|"),
        *(["x" * 300], [f"pot{i}" for i in range(200)], ["a{}b"], ["a\0b"]),
    ],
)
def test_forms_that_are_no_words_are_refused(tmp_path, value):
    folder = make_concept_folder(tmp_path / "pot", EXAMPLES, base_class="teapot", class_forms=value)
    with pytest.raises(CatVersionError, match=r"class_forms=.*must be a list of words"):
        read_concepts(folder)


def test_a_form_serves_in_a_training_prompt(tmp_path):
    given = {"base_class": "teapot", "prompts": ["two teapots"]}
    read_concepts(make_concept_folder(tmp_path / "pot", EXAMPLES, **given))
    with pytest.raises(CatVersionError, match="not a separate word: add spaces or list the form"):
        read_concepts(make_concept_folder(tmp_path / "off", EXAMPLES, class_forms=[], **given))


def test_forms_in_a_manifest(tmp_path):
    make_concept_folder(tmp_path / "pot", EXAMPLES)
    (tmp_path / "list.csv").write_text(
        "name,path,base_class,class_forms\na,pot,teapot,teapots|tea pot\nb,pot,goose,\n"
    )
    forms = [spec.class_forms for spec in read_concepts(tmp_path / "list.csv").concepts]
    assert forms == [("teapots", "tea pot"), ("gooses",)]


@pytest.mark.parametrize(
    ("stored", "given", "changes"),
    [
        (("teapots",), ("teapots",), []),
        ((), ("teapots",), []),  # a run of version 0.2 goes on
        ((), ("tea pot",), ["class_forms: () -> ('tea pot',)"]),
        (("teapots",), (), ["class_forms: ('teapots',) -> ()"]),
    ],
)
def test_changed_forms_of_a_trained_concept_are_named(tmp_path, residual, stored, given, changes):
    of_both = {"base_class": "teapot", "base_model": "", "text_encoder_sha256": ""}
    file = save_concept(
        tmp_path / "x.safetensors",
        residual,
        class_forms=stored,
        images=("1.png",),
        config={"seed": 0, "prompts": ["teapot"], "random_flip": 0.5},
        **of_both,
    )
    record = ConceptRecord(
        name="x",
        when="class_word",
        images=("1.png",),
        prompts=("teapot",),
        random_flip=0.5,
        seed=0,
        config={},
        class_forms=given,
        **of_both,
    )
    assert record.differences(load_concept(file)) == changes
    earlier = dataclasses.asdict(dataclasses.replace(record, class_forms=stored))
    if not stored:
        del earlier["class_forms"]  # as version 0.2 wrote it
    assert record.changes_since(ConceptRecord.from_json(earlier)) == changes


def make_residual(config):
    heads = config["num_attention_heads"]
    shape = (1, 1, heads, config["hidden_size"] // heads)
    rng = np.random.default_rng(0)
    pair = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    return KVResidual(*pair, (0,), 3.0)


@pytest.fixture(scope="module")
def residual(embedded_model):
    return make_residual(json.loads((embedded_model / "text_encoder/config.json").read_text()))


def test_the_sampler_says_what_to_do_in_languages_without_spaces(tokenizer, residual):
    use = ConceptUse("neko", "猫", residual)
    (message,) = prompt_warnings([tokenizer], [ImageRequest("一只猫", (use,))])
    assert "not a separate word" in message
    assert "add spaces or list the form in class_forms" in message
    listed = ConceptUse("neko", "猫", residual, class_forms=("一只猫",))
    assert not prompt_warnings([tokenizer], [ImageRequest("一只猫", (listed,))])


def test_file_keeps_the_forms_and_older_files_have_none(tmp_path, residual):
    path = save_concept(tmp_path / "new.safetensors", residual, base_class="teapot")
    concept = load_concept(path)
    assert concept.class_forms == ("teapots",)
    assert concept.metadata["catversion.class_forms"] == '["teapots"]'
    assert concept.metadata["catversion.format_version"] == "1"
    old = save_concept(tmp_path / "old.safetensors", residual, base_class="teapot", class_forms=())
    assert "catversion.class_forms" not in load_concept(old).metadata
    assert load_concept(old).class_forms == ()
    again = load_concept(old).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == old.read_bytes()
    with pytest.raises(ConceptError, match="class_forms"):
        save_concept(tmp_path / "no.safetensors", residual, base_class="cat", class_forms=["!"])


def load_module(path: Path, monkeypatch):
    spec = importlib.util.spec_from_file_location("exported_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("door", ["loader", "exported"])
def test_pytorch_loader_and_exported_pipeline(
    tmp_path, embedded_model, residual, door, monkeypatch
):
    """A prompt's states differ from the plain encoder's where it contains the word, only there."""
    torch = pytest.importorskip("torch", reason="the loader is a PyTorch one")
    pytest.importorskip("diffusers", reason="the loader is for diffusers")
    from tiny_pipelines import loaded_once

    from catversion_jax.integrations.diffusers import load_catversion, unload_catversion
    from catversion_jax.integrations.pipeline_folder import pipeline_source

    pipe = copy.copy(loaded_once(embedded_model, torch.float32))
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)

    def encode(pipe, prompts):
        length = pipe.tokenizer.model_max_length
        padding = {"padding": "max_length", "max_length": length, "truncation": True}
        ids = pipe.tokenizer(prompts, return_tensors="pt", **padding).input_ids
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipe.text_encoder(ids).last_hidden_state

    groups = {}
    for word, forms, prompt, expected in CASES:
        groups.setdefault((word, forms), []).append((prompt, expected))
    got, wanted = {}, {}
    for number, ((word, forms), prompts) in enumerate(groups.items()):
        texts = [prompt for prompt, _ in prompts]
        plain = encode(pipe, texts)
        file = save_concept(
            tmp_path / "x.safetensors", residual, base_class=word, class_forms=forms
        )
        if door == "loader":
            acting = pipe
            load_catversion(acting, file)
        else:
            # a name of its own: bytecode is kept by second and size, which two files may share
            source = tmp_path / f"pipeline_{number}.py"
            source.write_text(pipeline_source({"x": file.read_bytes()}), encoding="utf-8")
            acting = load_module(source, monkeypatch).CatVersionPipeline(
                **pipe.components, requires_safety_checker=False
            )
        states = encode(acting, texts)
        unload_catversion(acting)
        for row, (prompt, expected) in enumerate(prompts):
            got[word, forms, prompt] = not torch.equal(states[row], plain[row])
            wanted[word, forms, prompt] = expected
    assert got == wanted
