"""A run knows what it was trained on by its content: photos, masks, networks, checkpoints."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from running import final_files, run_here
from safetensors import safe_open

from catversion_jax import load_concept
from catversion_jax.config import OPTION_DEFAULTS
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.training.run.checkpoint import concepts_from_checkpoint
from catversion_jax.training.run.records import ConceptRecord, refused_changes

OPTIONS = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "eval_steps": 2,
    "masked_training": "true",
    "random_flip": 0,
}


@pytest.fixture(scope="module")
def photos(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two concepts with masks."""
    folder = tmp_path_factory.mktemp("photos") / "concepts"
    for name in ("teal_cup", "purple_kite"):
        shutil.copytree(toys / name, folder / name)
        for photo in [*(folder / name).glob("*.png")]:
            mask = np.zeros((64, 64), np.uint8)
            mask[16:48, 16:48] = 255
            Image.fromarray(mask).save(photo.with_suffix(".mask.png"))
    return folder


@pytest.fixture(scope="module")
def model(one_block_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd"
    shutil.copytree(one_block_sd_folder, folder)
    return folder


@pytest.fixture(scope="module")
def trained(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    assert run_here(model, photos, output, **OPTIONS) == 0
    assert sorted(final_files(output)) == ["purple_kite", "teal_cup"]
    return output


@pytest.fixture
def copies(trained: Path, photos: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The photos and the run, to change."""
    shutil.copytree(photos, tmp_path / "concepts")
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "concepts", tmp_path / "out"


def stamps(output: Path) -> dict[str, int]:
    files = output.glob("concepts/*/catversion.safetensors")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


def test_a_changed_photo_is_refused_by_name_and_trained_again_when_asked(
    model: Path, copies: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    concepts, output = copies
    Image.new("RGB", (64, 64), "red").save(concepts / "teal_cup" / "2.png")
    before, stamped = final_files(output), stamps(output)
    assert run_here(model, concepts, output, **OPTIONS) == 2
    message = capsys.readouterr().err
    assert "teal_cup: 2.png has changed since it was trained" in message
    assert "purple_kite" not in message
    assert "another output_dir" in message
    assert "retrain=changed" in message
    assert final_files(output) == before

    assert run_here(model, concepts, output, **OPTIONS, retrain="changed") == 0
    assert stamps(output)["purple_kite"] == stamped["purple_kite"]
    assert final_files(output)["teal_cup"] != before["teal_cup"]
    again = stamps(output)
    assert run_here(model, concepts, output, **OPTIONS) == 0  # nothing has changed any more
    assert stamps(output) == again
    assert run_here(model, concepts, tmp_path / "fresh", **OPTIONS) == 0
    assert final_files(output) == final_files(tmp_path / "fresh")


def renamed(concepts: Path) -> None:
    for suffix in ("png", "mask.png"):
        (concepts / "teal_cup" / f"2.{suffix}").rename(concepts / "teal_cup" / f"2b.{suffix}")


def brighter_mask(concepts: Path) -> None:
    Image.new("L", (64, 64), 255).save(concepts / "teal_cup" / "3.mask.png")


def without_a_mask(concepts: Path) -> None:
    (concepts / "teal_cup" / "3.mask.png").unlink()


def black_is_the_object(concepts: Path) -> None:
    path = concepts / "teal_cup" / "concept.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_polarity": "black"}))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (renamed, 0, ""),
        (brighter_mask, 2, "teal_cup: the mask of 3.png has changed since it was trained"),
        (black_is_the_object, 2, "teal_cup: the mask of 1.png has changed since it was trained"),
        (without_a_mask, 2, "teal_cup: the mask of 3.png has changed since it was trained"),
    ],
)
def test_masks_count_and_names_do_not(
    model: Path, copies: tuple[Path, Path], change: Callable, code: int, words: str, capsys
) -> None:
    concepts, output = copies
    change(concepts)
    assert run_here(model, concepts, output, **OPTIONS) == code
    assert words in capsys.readouterr().err


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change tensors of a safetensors file and keep what its header says."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def one_number(tensors: dict[str, np.ndarray]) -> None:
    name = sorted(name for name in tensors if tensors[name].dtype.kind == "f")[-1]
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[0] += np.float32(1e-3)


@pytest.fixture
def restored(model: Path, tmp_path: Path) -> Iterator[Path]:
    """The model, which the test may change in place."""
    shutil.copytree(model, tmp_path / "kept")
    yield model
    shutil.rmtree(model)
    shutil.copytree(tmp_path / "kept", model)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "scheduler"])
def test_one_number_changes_the_digest_of_its_network_only(restored: Path, part: str) -> None:
    before = dict(load_backbone(restored).digests)
    change_model(restored, part)
    now = load_backbone(restored).digests
    assert {key for key in now if now[key] != before[key]} == {part}


def change_model(folder: Path, part: str) -> None:
    if part == "scheduler":
        path = folder / part / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))
    else:
        (path,) = (folder / part).glob("*.safetensors")
        rewrite(path, one_number)


def test_another_unet_under_the_same_name_is_refused(
    restored: Path, trained: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    change_model(restored, "unet")
    shutil.copytree(trained, tmp_path / "out")
    assert run_here(restored, photos, tmp_path / "out", **OPTIONS) == 2
    message = capsys.readouterr().err
    assert "the model's UNet has changed since the concepts of this run were trained" in message
    assert "retrain=changed" in message
    (tmp_path / "out" / "run.json").unlink()  # then the concepts themselves say it
    assert run_here(restored, photos, tmp_path / "out", **OPTIONS) == 2
    assert "teal_cup: the model's UNet has changed" in capsys.readouterr().err


def test_how_weights_are_stored_is_not_their_content(restored: Path) -> None:
    """Other order, other header, shards: the same numbers."""
    before = load_backbone(restored).digests
    (path,) = (restored / "unet").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(path)
    path.unlink()
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(tensors, reverse=True)
    for index, shard in enumerate(shards):
        part = {name: tensors[name] for name in names[index::2]}
        safetensors.numpy.save_file(part, path.with_name(shard), metadata={"by": "somebody"})
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    index_file = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    assert load_backbone(restored).digests == before


# ---- checkpoints


def altered(arrays: dict[str, np.ndarray]) -> None:
    name = next(name for name in arrays if name.startswith("opt_state") and arrays[name].size > 9)
    arrays[name].reshape(-1)[3] += np.float32(1e-6)


def not_a_number(arrays: dict[str, np.ndarray]) -> None:
    next(array for name, array in arrays.items() if name.startswith("opt_state.2"))[:] = np.nan


def in_arrays(change: Callable) -> Callable[[Path], None]:
    def damage(newest: Path) -> None:
        (path,) = newest.rglob("arrays.safetensors")
        arrays = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
        change(arrays)
        path.write_bytes(safetensors.numpy.save(arrays))

    return damage


def in_description(newest: Path) -> None:
    (path,) = (newest / "concepts").glob("metadata")
    text = path.read_text()
    described = json.loads(text)
    described["concepts"][0]["evaluations"][0][1] += 1
    path.write_text(json.dumps(described))


def newest_two(output: Path) -> list[Path]:
    folder = output / "checkpoints" / "process-0000"
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return [folder / str(step) for step in steps[-2:]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (in_arrays(altered), r"the numbers of opt_state\.\d were altered"),
        (in_arrays(not_a_number), r"opt_state\.2"),
        (in_description, "the description of its concepts was altered"),
    ],
    ids=["altered", "nan", "description"],
)
def test_a_checkpoint_with_an_altered_number_is_damaged(
    copies: tuple[Path, Path], damage: Callable, words: str
) -> None:
    before, newest = newest_two(copies[1])
    damage(newest)
    with pytest.raises(CatVersionError, match=words):
        concepts_from_checkpoint(newest)
    assert len(concepts_from_checkpoint(before)) == 2


def test_a_run_does_not_go_on_from_altered_numbers(
    model: Path, copies: tuple[Path, Path], trained: Path, caplog
) -> None:
    concepts, output = copies
    for path in output.glob("concepts/*/*"):
        path.unlink()
    before, newest = newest_two(output)
    in_arrays(altered)(newest)
    assert run_here(model, concepts, output, **OPTIONS) == 0
    assert f"resumed 2 concepts at step {before.name}" in caplog.text
    assert final_files(output) == final_files(trained)


# ---- runs of earlier versions


def test_a_run_without_digests_is_recognised_and_goes_on(
    model: Path, copies: tuple[Path, Path], trained: Path
) -> None:
    """What version 0.1 wrote: nothing is known of its photos, so nothing is refused."""
    concepts, output = copies
    manifest = json.loads((output / "run.json").read_text())
    del manifest["digests"], manifest["options"]["mask_polarity"]
    (output / "run.json").write_text(json.dumps(manifest))
    for name in final_files(output):
        concept = load_concept(output / "concepts" / name)
        del concept.train_config["digests"], concept.train_config["mask_polarity"]
        concept.save(output / "concepts" / name / "catversion.safetensors")
    before = stamps(output)
    assert run_here(model, concepts, output, **OPTIONS) == 0
    assert stamps(output) == before


def test_an_option_that_is_newer_than_the_run_is_no_change() -> None:
    now = {**OPTION_DEFAULTS}
    before = {key: value for key, value in now.items() if key != "crop"}
    assert refused_changes(before, now) == []
    assert refused_changes(before, {**now, "crop": "squash"}) == ["crop: None -> 'squash'"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"when": "always"}, "when: 'class_word' -> 'always'"), ({"base_class": "mug"}, "base_class")],
)
def test_a_choice_of_the_concept_is_not_hidden_by_the_run_s_option(
    changed: dict[str, str], words: str, tmp_path: Path
) -> None:
    """Both have the same name, and the run's was written over the concept's."""
    record = ConceptRecord(
        "rex", "cup", "class_word", "", "", ("1.png",), ("a cup",), 0.0, 1, dict(OPTION_DEFAULTS)
    )
    key, value = np.ones((2, 3, 1, 4, 8), np.float32)
    record.save(tmp_path / "rex.safetensors", KVResidual(key, value, (1, 2, 3)), 4)
    finished = load_concept(tmp_path / "rex.safetensors")
    assert record.differences(finished) == record.changes_since(record) == []
    other = dataclasses.replace(record, **changed)
    for found in (other.differences(finished), other.changes_since(record)):
        (line,) = found
        assert line.startswith(words)


def test_changed_prompts_are_not_put_down_to_the_tokenizer() -> None:
    one = ConceptRecord("rex", "dog", "class_word", "m", "0", ("1.png",), ("dog",), 0.0, 1, {})
    one = dataclasses.replace(one, digests={"tokens": "a"})
    other = dataclasses.replace(one, prompts=("a dog",), digests={"tokens": "b"})
    assert other.changes_since(one) == ["prompts: ['dog'] -> ['a dog']"]
    (tokens,) = dataclasses.replace(one, digests={"tokens": "b"}).changes_since(one)
    assert "the model's tokenizer reads its prompts otherwise" in tokens
