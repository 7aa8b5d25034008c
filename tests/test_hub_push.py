"""``catversion push``, the model card and what finds concepts again, with the real client of the
hub and a small server that speaks its endpoints.
"""

import io
import shutil

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from running import arguments
from small_hub import TOKEN, SmallHub
from torch_reference import draw

from catversion_jax.cli import main
from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.integrations.concept_source import read_concept
from catversion_jax.integrations.loaded_concept import CatVersionLoadError
from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.sampling.concept_shelf import ConceptShelf
from catversion_jax.sampling.grids import cut_from_grid, image_grid
from catversion_jax.sampling.png import save_png
from catversion_jax.training.run.hub_push import plan_push
from catversion_jax.training.run.model_card import MARK, write_card
from catversion_jax.training.run.summary import write_summary

SIDE = 24
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def residual(seed: int) -> KVResidual:
    return KVResidual(draw(1, 1, 12, 64, seed=seed), draw(1, 1, 12, 64, seed=seed + 9), (9,))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with SmallHub().listening() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def run(tmp_path):
    """Two concepts as training leaves them, with photos on the page of samples."""
    root = tmp_path / "run"
    drawn = pictures(7)
    for i, (name, word) in enumerate({"rex": "dog", "tom|<b>": "cat"}.items()):
        file = save_concept(
            root / "concepts" / name / "catversion.safetensors", residual(i), base_class=word,
            name=name, base_model=BASE, step=200, images=("1.png", "2.png"),
            config={"resolution": SIDE, "learning_rate": 0.005},
        )  # fmt: skip
        write_summary(file.parent, {"eval_loss": 0.11, "plain_eval_loss": 0.25})
        prompts = [f"a {word}", f"a {word} on the beach"]
        page = image_grid(
            [list(drawn[:2]), list(drawn[2:4])],
            row_labels=["plain model", name],
            column_labels=prompts,
            references=list(drawn[4:]),
        )
        (file.parent / "samples").mkdir()
        columns = {"columns": [[prompt, 0] for prompt in prompts]}
        save_png(file.parent / "samples" / "000200.png", page, columns)
    write_card(root)
    return root


def test_a_picture_is_cut_from_a_page_as_it_was_drawn():
    drawn = pictures(6)
    for side, cell in ((SIDE, 144), (700, 512)):
        images = [np.asarray(Image.fromarray(x).resize((side, side), 0)) for x in drawn]
        page = image_grid(
            [images[:3], images[3:]], row_labels=["a", "b"], column_labels=["x", "y", "z" * 90],
            references=images[:1],
        )  # fmt: skip
        cut = cut_from_grid(page, 1, 2, rows=2, columns=3, size=(side, side))
        assert cut.size == (cell, cell)
        if side == SIDE:
            assert np.array_equal(np.asarray(cut), np.kron(images[5], np.ones((6, 6, 1), np.uint8)))
    with pytest.raises(CatVersionError, match="has no 9 rows of 3 images of 512x512"):
        cut_from_grid(page, 1, 2, rows=9, columns=3, size=(side, side))


def test_the_card_of_a_run(run):
    """diffusers' form, read by the hub's own class; strange names stay text."""
    card = ModelCard.load(run / "README.md")
    assert card.data.license == "creativeml-openrail-m"
    assert (card.data.base_model, card.data.base_model_relation) == (BASE, "adapter")
    assert {"text-to-image", "stable-diffusion", "diffusers", "catversion"} <= set(card.data.tags)
    assert card.data.instance_prompt == "a dog"
    urls = [entry["output"]["url"] for entry in card.data.widget]
    assert urls == ["rex/1.png", "rex/2.png", "tom_b/1.png", "tom_b/2.png"]
    assert card.data.widget[1]["text"] == "a dog on the beach"
    where = "https://huggingface.co/USER/NAME/tree/main/tom_b"
    assert rf"[tom\|&lt;b&gt;]({where}) | cat | 200 | 2 | 0.2500, 0.1100" in card.text
    assert 'load_catversion(pipe, "USER/NAME/rex")' in card.text
    assert "--concept hf://USER/NAME/rex" in card.text
    assert "| learning_rate | 0.005 |" in card.text
    before = (run / "README.md").read_bytes()
    write_card(run)
    assert (run / "README.md").read_bytes() == before
    (run / "README.md").write_text("my own words on USER/NAME")
    write_card(run)
    assert plan_push(run, "ada/pets").files["README.md"] == b"my own words on ada/pets"


def test_push_a_run_and_find_its_concepts_again(hub, run, capsys):
    assert main(["push", str(run), "--repo_id", "ada/pets", "--private", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert not hub.repositories
    assert main(["push", str(run), "--repo_id", "ada/pets", "--private"]) == 0
    assert f"{hub.address}/ada/pets" in capsys.readouterr().out
    pushed = hub.repositories["ada/pets"]
    assert pushed.private
    expected = {f"{name}/{file}" for name in ("rex", "tom_b") for file in (
        "catversion.safetensors", "metrics.json", "1.png", "2.png")}  # fmt: skip
    assert set(pushed.files) == expected | {"README.md"}
    for path, content in pushed.files.items():
        assert f"{len(content):>9,}  {path}\n" in shown
    page = Image.open(run / "concepts" / "rex" / "samples" / "000200.png")
    assert all(b"000200" not in path.encode() for path in pushed.files)
    assert page.width > 144
    card = pushed.files["README.md"].decode()
    assert "USER/NAME" not in card
    assert yaml.safe_load(card.split("---")[1])["widget"]

    original = (run / "concepts" / "rex" / "catversion.safetensors").read_bytes()
    shelf = ConceptShelf(["hf://ada/pets/rex:0.5"])
    (use,) = shelf._all
    assert (use.name, use.scale) == ("rex", 0.5)
    parts, source = read_concept("ada/pets/rex")
    assert parts[0].name == "rex"
    assert source.endswith("rex/catversion.safetensors")
    with open(source, "rb") as file:
        assert file.read() == original
    with pytest.raises(
        CatVersionError, match=r"holds 2 concepts\. Give one of hf://ada/pets/rex, "
    ):
        ConceptShelf(["hf://ada/pets"])
    with pytest.raises(CatVersionLoadError, match=r"holds 2 concepts\. Give one of ada/pets/rex, "):
        read_concept("ada/pets")
    with pytest.raises(CatVersionError, match=r"no dog/catversion\.safetensors on the hub"):
        ConceptShelf(["hf://ada/pets/dog"])
    with pytest.raises(CatVersionError, match="must be like hf://USER/NAME"):
        ConceptShelf(["hf://ada"])


def test_push_one_concept(hub, run, capsys):
    """Its repository's id is enough to load it; a second push replaces it."""
    folder = run / "concepts" / "rex"
    for scale in (1, 2):
        save_concept(
            folder / "catversion.safetensors", residual(scale), base_class="dog", name="rex"
        )
        argument = ["push", str(folder), "--repo_id", "ada/rex", "--license", "cc0-1.0"]
        assert main(argument) == 0
    assert not hub.repositories["ada/rex"].private
    assert "license: cc0-1.0" in hub.repositories["ada/rex"].files["README.md"].decode()
    (use,) = ConceptShelf(["hf://ada/rex"])._all
    parts, _ = read_concept("ada/rex")
    assert use.base_class == parts[0].base_class == "dog"
    assert np.array_equal(parts[0].key.numpy()[0], residual(2).key[0])


def test_what_the_hub_refuses_and_what_cannot_be_pushed(hub, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert main(["push", str(run), "--repo_id", "ada/pets"]) == 2
    assert "ada/pets: cannot be pushed" in (said := capsys.readouterr().err)
    assert "hf auth login" in said
    assert main(["push", str(run), "--repo_id", "pets"]) == 2
    assert "'pets': must be USER/NAME" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["push", str(tmp_path / "empty"), "--repo_id", "a/b"]) == 2
    assert "no finished concept in it" in capsys.readouterr().err
    (run / "concepts" / "tom|<b>" / "catversion.safetensors").write_bytes(b"half")
    assert main(["push", str(run), "--repo_id", "a/b", "--dry_run"]) == 3
    assert "tom|<b>: left out" in capsys.readouterr().err
    with pytest.raises(CatVersionError, match="push_to_hub=true: does not say where"):
        make_config({"concepts": "x", "push_to_hub": True})


@pytest.mark.parametrize(
    "repo_id", ["a/-b", "a/b..c", "a/b.git", "é/b", f"a/{'b' * 100}", "pets", "a/b/c", "a/b-"]
)
def test_ids_that_the_hub_never_takes(run, repo_id):
    with pytest.raises(CatVersionError, match="must be USER/NAME, as the hub calls a repository"):
        plan_push(run, repo_id)


def test_what_would_be_pushed_wrongly_is_refused(run, tmp_path):
    rex = run / "concepts" / "rex"
    assert main(["pack", str(run), "--out", str(tmp_path / "p.arrow")]) == 0
    for source in (f"{tmp_path}/p.arrow", f"{tmp_path}/p.arrow#rex"):
        with pytest.raises(CatVersionError, match=r"is a pack.*export .*p\.arrow --concept NAME"):
            plan_push(source, "ada/pets")
    shutil.copytree(rex, run / "concepts" / "README.md")
    with pytest.raises(CatVersionError, match=r"would take the model card's place"):
        plan_push(run, "ada/pets")
    shutil.rmtree(run / "concepts" / "README.md")
    (run / "README.md").write_text("---\nlicense: mit\n---\n\nmy own card\n")
    assert b"my own card" in plan_push(run, "ada/pets").files["README.md"]
    with pytest.raises(CatVersionError, match=r"README\.md is your own.*`license: cc0-1\.0`"):
        plan_push(run, "ada/pets", "cc0-1.0")
    save_concept(
        rex / "catversion.safetensors", residual(0), base_class="dog", name="rex",
        base_model="stabilityai/stable-diffusion-2-1",
    )  # fmt: skip
    with pytest.raises(CatVersionError, match="were trained on 2 models"):
        plan_push(run, "ada/pets")


def test_the_card_of_a_textual_inversion(tmp_path):
    """diffusers' own loader takes it; of a model in a folder no address is made up."""
    what = TokenEmbeddings(np.ones((1, 768), np.float32))
    file = save_concept(
        tmp_path / "rex" / "catversion.safetensors", what, base_class="dog", name="rex",
        base_model="/home/ada/models/mine",
    )  # fmt: skip
    assert MARK in (text := plan_push(file, "ada/rex").files["README.md"].decode())
    assert 'pipe.load_textual_inversion("ada/rex", subfolder="rex"' in text
    assert 'pipe("a <rex> on the beach")' in text
    assert "--prompt 'a dog on the beach'" in text
    assert "| dog; &lt;rex&gt; |" in text
    assert "/home/ada" not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_training_pushes_when_it_ends(hub, finished, one_block_sd_folder, toys, tmp_path, capsys):
    """A run that is done is sent when its command is given again; its own page gives pictures."""
    shutil.copytree(finished, tmp_path / "run")
    shown = {"validation_steps": 12, "validation_inference_steps": 2, "num_validation_images": 1}
    there = {"push_to_hub": "true", "hub_model_id": "ada/toys", "hub_private_repo": "true"}
    options = arguments(one_block_sd_folder, toys, tmp_path / "run", **shown, **there)
    assert main(["train", *options]) == 0
    pushed = hub.repositories["ada/toys"]
    assert pushed.private
    assert {"teal_cup/catversion.safetensors", "teal_cup/2.png", "README.md"} <= set(pushed.files)
    assert "a photo of a cup on the beach" in pushed.files["README.md"].decode()
    with Image.open(io.BytesIO(pushed.files["teal_cup/1.png"])) as picture:
        assert picture.size == (128, 128)
    assert main(["train", *options, "hub_model_id=nobody"]) == 2
    assert "must be USER/NAME" in capsys.readouterr().err
