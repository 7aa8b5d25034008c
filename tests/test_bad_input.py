"""What users get wrong, through the real command: exit code, and value, rule and remedy said.

Broken images inside a training run and losses that are not finite are in ``test_train_cli.py``.
"""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import COMPILATION_CACHE, arguments, start, start_command

from catversion_jax import KVResidual, load_concept, save_concept
from catversion_jax.cli import main
from catversion_jax.runtime.atomic_files import write_atomically


def photos(folder: Path, count: int = 3, **fields: object) -> Path:
    """A concept folder of small distinct pictures."""
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "concept.json").write_text(json.dumps({"base_class": "cup", **fields}))
    return folder


def huge_png(path: Path) -> None:
    """A few bytes that claim to be 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        content = kind + data
        return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command; check its exit code and that it says every one of the words."""
    monkeypatch.chdir(tmp_path)

    def call(expected_code: int, *arguments: object, words: list[str]) -> str:
        assert main([str(argument) for argument in arguments]) == expected_code
        captured = capsys.readouterr()
        text = captured.out + captured.err
        for word in words:
            assert word in text
        assert "Traceback" not in text
        if expected_code == 2:
            assert captured.err.startswith("error: ")
        return text

    return call


def train(model: Path | str, concepts: Path | str, output: Path | str, *more: str) -> list[str]:
    return [
        "train",
        f"pretrained_model_name_or_path={model}",
        f"concepts={concepts}",
        f"output_dir={output}",
        f"compilation_cache_dir={COMPILATION_CACHE}",
        *more,
    ]


# ---- Images and concepts -------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "train"])
def test_an_empty_folder(said, tmp_path: Path, command: str) -> None:
    empty = tmp_path / "nothing"
    empty.mkdir()
    arguments = train("nowhere", empty, "out") if command == "train" else ["check", empty]
    words = [f"{empty}: no image and no folder of images in it", "Put 3 to 10 photos", "sub-folder"]
    said(2, *arguments, words=words)
    (empty / "notes.txt").write_text("x")
    said(2, *arguments, words=["(only notes.txt)"])
    (empty / "concept.json").write_text('{"base_class": "cup"}')
    said(2, *arguments, words=["no image in it (only notes.txt)", "Put 3 to 10 photos"])
    assert not (tmp_path / "out").exists()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, ["cannot be decoded", "truncated, damaged or not", "Replace or remove"]),
        (lambda path: path.write_bytes(b""), ["is not an image", "is empty", "Replace or remove"]),
        (lambda path: path.write_bytes(b"no picture"), ["is not an image", "Replace or remove"]),
        (huge_png, ["too large", "2500000000 pixels", "Scale it down"]),
    ],
    ids=["truncated", "empty", "text", "bomb"],
)
def test_an_image_that_cannot_be_read(said, tmp_path, tiny_sd_folder, damage, words) -> None:
    """``check`` says what training would: the only concept is quarantined before anything runs."""
    folder = photos(tmp_path / "my_cup")
    damage(folder / "1.png")
    text = said(3, "check", folder, words=[str(folder / "1.png"), *words])
    assert text.splitlines()[-1] == "1 concept, 0 ready to train"
    said(3, *train(tiny_sd_folder, folder, "out"), words=["1 quarantined", "my_cup", *words[:1]])
    reason = (tmp_path / "out" / "concepts" / "my_cup" / "FAILED.txt").read_text()
    for word in [str(folder / "1.png"), *words, "run the same command again"]:
        assert word in reason
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.mark.parametrize("name", ["a/b", "../up", "a\\b", ".."])
def test_a_concept_name_with_path_separators(said, tmp_path: Path, name: str) -> None:
    photos(tmp_path / "cup")
    (tmp_path / "list.json").write_text(json.dumps([{"name": name, "path": "cup"}]))
    words = [f"concept name {name!r}", "must not contain path separators", "Rename it"]
    said(2, "check", "list.json", words=words)
    said(2, *train("nowhere", "list.json", "out"), words=words)
    arguments = ["import", "x.bin", "--base_class", "cup", "--name", name]
    said(2, *arguments, words=[repr(name), "path separators"])
    photos(tmp_path / "many" / "one", name=name)
    said(2, "check", "many", words=words)


def test_duplicate_names(said, tmp_path: Path) -> None:
    photos(tmp_path / "a" / "cup")
    photos(tmp_path / "b" / "cup")
    photos(tmp_path / "c" / "CUP")
    rows = [{"path": f"{path}", "base_class": "cup"} for path in ("a/cup", "b/cup", "c/CUP")]
    (tmp_path / "list.yaml").write_text(json.dumps(rows))
    words = [
        "entry 2 (cup), b/cup/concept.json: concept name 'cup': appears twice. Rename one",
        "entry 3 (CUP), c/CUP/concept.json: concept name 'CUP': appears twice (as 'cup', one "
        "folder on some systems)",
    ]
    said(2, "check", "list.yaml", words=words)
    said(2, *train("nowhere", "list.yaml", "out"), words=words)


# ---- Options -------------------------------------------------------------------------------------


def test_an_unknown_key(said, tmp_path: Path) -> None:
    words = ["'learnin_rate': no such option", "Did you mean 'learning_rate'?", "train --help"]
    said(2, "train", "learnin_rate=0.1", words=words)
    (tmp_path / "run.yaml").write_text("learnin_rate: 0.1\nmax_train_step: 5\n")
    said(2, "train", "--config", "run.yaml", words=[*words, "Did you mean 'max_train_steps'?"])
    said(2, "train", "preset=oficial", words=["preset='oficial'", "must be one of", "official"])
    photos(tmp_path / "cup", base_clas="cup")
    said(2, "check", "cup", words=["unknown key 'base_clas'", "Did you mean 'base_class'?"])
    said(2, "trian", words=["'trian': no such command", "Did you mean 'train'?"])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("learning_rate=.nan", ["learning_rate=nan", "at least 0.0 and finite"]),
        ("learning_rate=fast", ["learning_rate='fast'", "must be float"]),
        ("train_batch_size=0", ["train_batch_size=0", "at least 1"]),
        ("random_flip=2", ["random_flip=2.0", "within 0..1"]),
        ("crop=centre", ["crop='centre'", "one of center, squash", "Did you mean 'center'"]),
        ("max_train_steps", ["'max_train_steps'", "key=value"]),
    ],
)
def test_a_value_that_cannot_be(said, option: str, words: list[str]) -> None:
    said(2, "train", "concepts=x", option, words=words)


def test_no_concepts(said) -> None:
    said(2, "train", words=["concepts", "is required", "for example concepts=photos/teapot"])


def test_a_config_that_cannot_be_read(said, tmp_path: Path) -> None:
    said(2, "train", "--config", "no.yaml", words=["no.yaml", "No such file", "Give the path"])
    (tmp_path / "bad.yaml").write_text("a: [1")
    said(2, "train", "--config", "bad.yaml", words=["bad.yaml: is not valid YAML"])
    (tmp_path / "list.yaml").write_text("- 1")
    said(2, "train", "--config", "list.yaml", words=["must hold `key: value` lines", "configs/"])


# ---- Models --------------------------------------------------------------------------------------


def test_a_wrong_model_folder(said, tmp_path: Path) -> None:
    folder = photos(tmp_path / "cup")
    words = [f"{folder}: is not a diffusers folder", "expected model_index.json", "Give the folder"]
    said(2, *train(folder, folder, "out"), words=words)
    said(2, "generate", "--model", folder, "--prompt", "a cup", words=words)
    absent = tmp_path / "no" / "such" / "model"
    said(2, *train(absent, folder, "out"), words=[str(absent), "does not exist", "Check the path"])
    (tmp_path / "model.safetensors").write_bytes(b"")
    words = ["model.safetensors: not a safetensors file", "Download it again"]
    said(2, *train("model.safetensors", folder, "out"), words=words)
    said(2, *train("other/model.safetensors", folder, "out"), words=["the file does not exist"])
    address = "https://model.site/models/1?type=model"
    said(2, *train(address, folder, "out"), words=[address, "Download", "give that file"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("vae", ["missing component vae", "expected model_index.json", "Download the model again"]),
        ("tokenizer", ["missing component tokenizer", "Download the model again"]),
        ("scheduler/scheduler_config.json", ["scheduler_config.json: not found", "download"]),
        ("unet/config.json", ["unet/config.json: not found", "download"]),
        ("unet/diffusion_pytorch_model.safetensors", ["no safetensors weights", "download"]),
        ("model_index.json", ["is not a diffusers folder", "model_index.json"]),
    ],
)
def test_a_missing_component(said, tmp_path, tiny_sd_folder, lost, words) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, model, copy_function=os.link)
    shutil.rmtree(model / lost) if (model / lost).is_dir() else (model / lost).unlink()
    said(2, *train(model, photos(tmp_path / "cup"), "out"), words=[str(model), *words])
    assert not (tmp_path / "out").exists()


# ---- Using a concept -----------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A concept of the tiny model's shape, trained with another text encoder."""
    key, value = np.random.default_rng(0).normal(size=(2, 1, 1, 4, 8)).astype(np.float32)
    path = tmp_path / "foreign" / "catversion.safetensors"
    residual = KVResidual(key, value, (3,))
    save_concept(path, residual, base_class="cup", text_encoder_sha256="ab" * 32, base_model="x/y")
    return path.parent


def test_a_text_encoder_that_does_not_match(said, tmp_path, tiny_sd_folder, foreign) -> None:
    words = ["'cup'", "abababababab", str(tiny_sd_folder), "--model", "--force"]
    model = ["--model", tiny_sd_folder]
    said(2, "generate", *model, "--prompt", "a cup", "--concept", foreign, words=words)
    baked = ["--format", "prompt_embeds", "--prompt", "a cup"]
    said(2, "export", foreign, *model, *baked, words=words)
    said(2, "export", foreign, *model, "--format", "pipeline", words=words)
    assert not (tmp_path / "catversion-export").exists()
    # Another shape cannot be forced.
    ones = np.ones((3, 1, 12, 64), np.float32)
    large = tmp_path / "large" / "catversion.safetensors"
    save_concept(large, KVResidual(ones, ones, (9, 10, 11)), base_class="cup")
    words = ["12 heads x 64", "4 heads x 8", "trained for another model", "--model"]
    arguments = ["--prompt", "a cup", "--concept", large, "--force"]
    said(2, "generate", *model, *arguments, words=words)
    said(2, "export", large, *model, *baked, "--force", words=words)


def test_numbers_that_are_not_finite(said, tmp_path, tiny_sd_folder) -> None:
    latents = np.zeros((1, 4, 8, 8), np.float32)
    latents[0, 0, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", latents)
    arguments = ["--model", tiny_sd_folder, "--prompt", "a cup", "--latents", "x.npy"]
    said(2, "generate", *arguments, words=["latents", "must be finite"])


def test_a_prompt_longer_than_the_context(said, tmp_path, tiny_sd_folder, caplog) -> None:
    """The tiny model's tokenizer knows letters only; 22 of them fit into its context of 24."""
    arguments = ["--model", tiny_sd_folder, "--num_inference_steps", "2", "--seed", "1"]
    prompt = "a cup standing on a very long table"
    said(0, "generate", *arguments, "--prompt", prompt, words=[])
    assert f"prompt {prompt!r}: longer than the model's 24 tokens" in caplog.text
    assert "cut off: 'g table'" in caplog.text
    concept = photos(tmp_path / "cup", prompts=["a {} standing on a very long table"])
    text = said(0, "check", concept, "--model", tiny_sd_folder, words=["cut off: 'g table'"])
    assert "longer than the model reads" in text
    caplog.clear()  # training says it too, here of a concept that it then leaves out
    cut_short(concept / "1.png")
    said(3, *train(tiny_sd_folder, concept, "out"), words=["1 quarantined"])
    assert "cut off: 'g table'" in caplog.text


# ---- Outputs -------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written(said, tmp_path, tiny_sd_folder, foreign) -> None:
    """Under a regular file: what no one can write, root included."""
    (tmp_path / "file").write_text("precious")
    words = ["file/out", "cannot be written (Not a directory)", "free some space or give a"]
    said(2, *train(tiny_sd_folder, photos(tmp_path / "cup"), "file/out"), words=words)
    output = ["--output_dir", "file/out"]
    said(2, "generate", "--model", tiny_sd_folder, "--prompt", "a cup", *output, words=words)
    said(2, "export", foreign, *output, words=words)
    pipeline = ["--model", tiny_sd_folder, "--force", "--format", "pipeline"]
    said(2, "export", foreign, *pipeline, *output, words=words)
    cache = "compilation_cache_dir=file/out"
    said(2, *train(tiny_sd_folder, tmp_path / "cup", "out"), cache, words=words)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_inside_the_photos(said, tmp_path: Path) -> None:
    """Its sample grids would be the next run's photos."""
    concepts = photos(tmp_path / "many" / "cup").parent
    (tmp_path / "link").symlink_to(concepts)
    for output in (concepts, concepts / "out", concepts / "cup" / "out", "link/out", "x/../many"):
        words = [f"output_dir={output}: lies inside concepts={concepts}", "a folder outside"]
        said(2, *train("nowhere", concepts, output), words=words)
    assert not (concepts / "out").exists()


def fill_disk(process: subprocess.Popen) -> None:
    """From now on no file of the process can grow beyond 100 bytes: what a full disk does to it."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's prlimit")
def test_a_full_disk_keeps_the_older_file(tmp_path: Path, foreign: Path) -> None:
    output = tmp_path / "exported"
    assert main(["export", str(foreign), "--output_dir", str(output)]) == 0
    before = (output / "cup.safetensors").read_bytes()
    process = start_command("export", foreign, "--output_dir", output)
    fill_disk(process)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 2, text
    assert "cup.safetensors: cannot be written (File too large)" in text
    assert "What was there before is intact; free some space" in text
    assert (output / "cup.safetensors").read_bytes() == before
    assert [path.name for path in output.iterdir()] == ["cup.safetensors"]  # no debris


def test_ctrl_c_leaves_no_half_written_file(tmp_path: Path, monkeypatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    write_atomically(tmp_path / "a.png", b"before")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.png", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoint steps of the first pack, oldest first."""
    marks = output.glob("checkpoints/process-0000/*/_CHECKPOINT_METADATA")
    folders = [mark.parent for mark in marks if mark.parent.name.isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name))


@pytest.fixture(scope="module")
def full_disk(one_block_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory):
    """Training whose disk fills up after the second checkpoint: output folder, exit code, text."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs Linux's prlimit")
    output = tmp_path_factory.mktemp("full") / "out"
    process = start(arguments(one_block_sd_folder, toys, output, max_train_steps=200))
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(checkpoints(output)) >= 2:
            fill_disk(process)
            break
        time.sleep(0.01)
    try:
        text, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        text = process.communicate()[0] + "\n(hung after its disk was full)"
    return output, process.returncode, text


def test_a_disk_that_fills_up_in_the_middle_of_training(full_disk, tmp_path: Path) -> None:
    output, code, text = full_disk
    assert code == 2, text
    assert "Traceback" not in text
    assert "cannot be written" in text
    assert "free some space" in text
    assert not list(output.glob("concepts/*/catversion.safetensors"))
    kept = list(output.glob("concepts/*/catversion-*.safetensors"))
    assert kept
    for path in kept:
        assert np.isfinite(load_concept(path).learned.key).all()
    assert (
        main(["export", str(checkpoints(output)[0]), "--output_dir", str(tmp_path / "rescued")])
        == 0
    )
    assert len(list((tmp_path / "rescued").iterdir())) == 2
