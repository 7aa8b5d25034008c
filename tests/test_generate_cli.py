"""``catversion generate`` from files to files."""

import json

import numpy as np
import pytest
from PIL import Image

from catversion_jax.cli import main
from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.sampling.pages import Page, PageFolder
from catversion_jax.sampling.png import read_metadata
from catversion_jax.sampling.requests import ImageRequest


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """A run's output: two concepts for the tiny model (4 heads of 8)."""
    folder = tmp_path_factory.mktemp("run") / "concepts"
    for seed, word in enumerate(("dog", "cat")):
        key, value = np.random.default_rng(seed).normal(size=(2, 2, 1, 4, 8)).astype(np.float32)
        residual = KVResidual(key, value, (2, 3))
        save_concept(
            folder / f"my_{word}" / "catversion.safetensors",
            residual,
            base_class=word,
            name=f"my_{word}",
        )
    return folder


@pytest.fixture
def generate(one_block_sd_folder, tmp_path):
    """Run the command quickly; returns the exit code and the PNGs by name."""

    def call(*arguments, out="out"):
        code = main(
            [
                "generate",
                "--model",
                str(one_block_sd_folder),
                "--num_inference_steps",
                "2",
                "--output_dir",
                str(tmp_path / out),
                *map(str, arguments),
            ]
        )
        return code, {
            path.name: np.asarray(Image.open(path))
            for path in sorted((tmp_path / out).glob("*.png"))
        }

    return call


def test_images_grid_and_metadata(generate, concepts, tmp_path, one_block_sd_folder, capsys):
    dog = concepts / "my_dog"
    code, images = generate(
        "--prompt", "a dog", "--prompt", "a cat", "--concept", f"{dog}:1.5",
        "--num_images_per_prompt", "2", "--seed", "5", "--negative_prompt", "ugly",
        "--sampler", "euler", "--guidance_scale", "4",
    )  # fmt: skip
    assert code == 0
    assert list(images) == [
        "00000-a-dog-seed5.png",
        "00001-a-dog-seed6.png",
        "00002-a-cat-seed5.png",
        "00003-a-cat-seed6.png",
        "grid-00000.png",
    ]
    assert images["00000-a-dog-seed5.png"].shape == (16, 16, 3)
    grid = images["grid-00000.png"]
    assert min(grid.shape[:2]) >= 2 * 128
    metadata = read_metadata(tmp_path / "out" / "00003-a-cat-seed6.png")
    assert metadata["prompt"] == "a cat"
    assert metadata["negative_prompt"] == "ugly"
    assert metadata["seed"] == 6
    (use,) = metadata["concepts"]
    assert len(use.pop("sha256")) == 64
    assert use == {
        "name": "my_dog",
        "base_class": "dog",
        "scale": 1.5,
        "when": "class_word",
        "acts": False,
    }
    assert (metadata["sampler"], metadata["num_inference_steps"], metadata["guidance_scale"]) == (
        "euler",
        2,
        4.0,
    )
    assert metadata["model"] == str(one_block_sd_folder)
    assert read_metadata(tmp_path / "out" / "00000-a-dog-seed5.png")["concepts"][0]["acts"] is True
    assert "grid-00000.png" in capsys.readouterr().out

    # again: nothing is overwritten, and the bits are the same
    _, more = generate(
        "--prompt", "a cat", "--seed", "6", "--negative_prompt", "ugly", "--sampler", "euler",
        "--guidance_scale", "4",
    )  # fmt: skip
    assert len(more) == 7
    np.testing.assert_array_equal(more["00004-a-cat-seed6.png"], images["00003-a-cat-seed6.png"])


def test_each_prompt_of_a_file_uses_its_own_concepts(generate, concepts, tmp_path):
    rows = [
        {"prompt": "a dog", "concepts": ["my_dog"], "seed": 3},
        {"prompt": "a dog", "concepts": [], "seed": 3},
        {"prompt": "a dog", "concepts": ["my_dog:0"], "seed": 3},
        {
            "prompt": "a dog, a cat",
            "concepts": ["my_dog", str(concepts / "my_cat") + ":0.5"],
            "seed": 4,
        },
        {"prompt": "a dog", "seed": 3, "negative_prompt": "cat"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, images = generate("--prompts", tmp_path / "rows.jsonl", "--concept", concepts / "my_dog")
    assert code == 0
    learned, plain, zero, _, negative = list(images.values())[:5]
    np.testing.assert_array_equal(plain, zero)
    assert (learned != plain).any()
    assert (learned != negative).any()
    acting = read_metadata(next((tmp_path / "out").glob("00003-*.png")))["concepts"]
    assert [(c["name"], c["scale"], c["acts"]) for c in acting] == [
        ("my_dog", 1.0, True),
        ("my_cat", 0.5, True),
    ]

    (tmp_path / "rows.yaml").write_text(
        "- prompt: a dog\n"
        "  concepts: [my_dog]\n"
        "  seed: 3\n"
        "- {prompt: a dog, concepts: [], seed: 3}\n"
    )
    _, from_yaml = generate(
        "--prompts", tmp_path / "rows.yaml", "--concept", concepts / "my_dog", out="yaml"
    )
    for actual, expected in zip(list(from_yaml.values())[:2], (learned, plain), strict=True):
        np.testing.assert_array_equal(actual, expected)
    (tmp_path / "rows.txt").write_text("a dog\n\na cat\n")
    _, from_text = generate("--prompts", tmp_path / "rows.txt", out="text")
    assert [name[6:11] for name in list(from_text)[:2]] == ["a-dog", "a-cat"]


def test_latents_repeat_a_run_of_another_framework(generate, tmp_path, one_block_sd_folder):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.set_num_threads(1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(one_block_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    expected = pipe(["a dog", "a cat"], latents=latents, num_inference_steps=2).images
    np.save(tmp_path / "x.npy", latents.numpy())
    _, images = generate("--prompt", "a dog", "--prompt", "a cat", "--latents", tmp_path / "x.npy")
    for actual, wanted in zip(list(images.values())[:2], expected, strict=True):
        difference = np.abs(actual.astype(int) - np.asarray(wanted).astype(int))
        assert difference.max() <= 1  # a pixel may lie on the edge between two bytes
        assert (difference == 0).mean() > 0.99


def test_karras_spacing_is_that_of_diffusers(generate, tmp_path, one_block_sd_folder):
    """The whole command against the pipeline of diffusers, with the spacing and without."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.set_num_threads(1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(one_block_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    np.save(tmp_path / "x.npy", latents.numpy())
    common = ["--prompt", "a dog", "--latents", tmp_path / "x.npy", "--sampler", "euler"]
    common += ["--num_inference_steps", "4"]
    drawn = {}
    for given in ("--karras", "--no-karras"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
            pipe.scheduler.config, use_karras_sigmas=given == "--karras"
        )
        (expected,) = pipe("a dog", latents=latents, num_inference_steps=4).images
        _, images = generate(*common, given, out=given)
        drawn[given] = next(iter(images.values())).astype(int)
        difference = np.abs(drawn[given] - np.asarray(expected).astype(int))
        assert difference.max() <= 1  # a pixel may lie on the edge between two bytes
        assert (difference == 0).mean() > 0.99
    assert np.abs(drawn["--karras"] - drawn["--no-karras"]).max() > 1


def test_scale_zero_is_the_plain_model_and_when_always(generate, concepts, caplog):
    _, images = generate("--prompt", "a house", "--concept", concepts / "my_dog")
    assert "never names concept 'my_dog'" in caplog.text
    caplog.clear()
    _, always = generate(
        "--prompt", "a house", "--concept", concepts / "my_dog", "--when", "always", out="always"
    )
    assert "never names" not in caplog.text
    _, zero = generate(
        "--prompt",
        "a house",
        "--concept",
        concepts / "my_dog",
        "--when",
        "always",
        "--scale",
        "0",
        out="zero",
    )
    name = "00000-a-house-seed0.png"
    np.testing.assert_array_equal(images[name], zero[name])
    assert (images[name] != always[name]).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concept", "{tmp}/none"], ["none", "cannot be read", "concept file"]),
        (["--concept", "{concepts}"], ["several concepts", "my_cat", "my_dog"]),
        (
            ["--concept", "{concepts}/my_dog", "--concept", "{concepts}/my_dog:2"],
            ["my_dog", "each once"],
        ),
        (["--concept", "{concepts}/my_dog:-1"], ["scale=-1.0", ">= 0"]),
        (
            ["--concept", "{tmp}/official"],
            ["adapter of the authors' code", "catversion import {tmp}/official "],
        ),
        (["--concept", "{tmp}"], ["several concepts", "other", "sd1"]),
        (["--concept", "{tmp}/other"], ["--force", "hash"]),
        (["--concept", "{tmp}/sd1", "--force"], ["12 heads x 64", "4 heads x 8", "another model"]),
        (["--sampler", "dpmsolver"], ["'dpmsolver'", "Did you mean 'dpmsolver++'"]),
        (["--latents", "{tmp}/wrong.npy"], ["(1, 4, 4, 4)", "(1, 4, 8, 8)"]),
        (["--latents", "{tmp}/none.npy"], ["none.npy", "np.save"]),
        (["--latents", "{tmp}/rows.jsonl"], ["rows.jsonl", "np.save"]),
        (["--height", "33"], ["height=33", "multiple of 2"]),
        (["--num_images_per_prompt", "0"], ["num_images_per_prompt 0"]),
        (["--num_inference_steps", "0"], ["num_inference_steps=0"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--output_dir", "{tmp}/rows.jsonl/x"], ["cannot be written"]),
    ],
)
def test_mistakes_are_explained(one_block_sd_folder, concepts, tmp_path, capsys, arguments, words):
    ones = np.ones((3, 1, 12, 64), np.float32)
    save_concept(
        tmp_path / "sd1/catversion.safetensors",
        KVResidual(ones, ones, (9, 10, 11)),
        base_class="dog",
    )
    small = ones[:1, :, :4, :8]
    save_concept(
        tmp_path / "other/catversion.safetensors", KVResidual(small, small, (3,)), base_class="dog",
        text_encoder_sha256="0" * 64,
    )  # fmt: skip
    (tmp_path / "official").mkdir()
    (tmp_path / "official/pytorch_adapter.bin").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "wrong.npy", np.zeros((1, 4, 4, 4), np.float32))
    (tmp_path / "rows.jsonl").write_text("{}")
    filled = [text.format(tmp=tmp_path, concepts=concepts) for text in arguments]
    defaults = [
        "--model",
        str(one_block_sd_folder),
        "--prompt",
        "a dog",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["generate", *defaults, *filled]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word.format(tmp=tmp_path) in message
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "y"}', ["row 2", "no 'prompt'"]),
        ("a.jsonl", '{"prompt": "x", "sed": 1}', ["row 1", "'sed'", "Did you mean 'seed'"]),
        ("a.jsonl", '{"prompt": "x", "seed": "1"}', ["seed='1'", "int"]),
        ("a.jsonl", "{prompt", ["line 1", "is not valid JSON"]),
        ("a.yaml", "prompt: x", ["must be a list"]),
        ("a.yaml", "- {prompt: x, concepts: [1]}", ["concepts=[1]"]),
        ("a.txt", "\n \n", ["holds no prompt"]),
        ("a.jsonl", '{"prompt": "x", "concepts": ["my_bear"]}', ["'my_bear'", "none"]),
    ],
)
def test_mistakes_in_a_prompt_file(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_text(content)
    assert main(["generate", "--model", "nowhere", "--prompts", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_the_module_is_light_to_import():
    import subprocess
    import sys

    program = (
        "import sys, catversion_jax.cli.generate; "
        "assert not {'jax', 'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_two_commands_in_one_folder_overwrite_nothing(tmp_path):
    one, other = (PageFolder(tmp_path, 1, lambda request: {}) for _ in range(2))
    pixels, requests = np.zeros((1, 8, 8, 3), np.uint8), [ImageRequest("a cup", (), 0)]
    written = []
    for folder, start in ((one, 0), (other, 0), (one, 1), (other, 1)):
        files, grid = folder.write(Page(start, requests, pixels, ()))
        written += [*files, grid]
    assert len(set(written)) == 8
    assert sorted(path.name for path in tmp_path.glob("0*")) == [
        f"0000{number}-a-cup-seed0.png" for number in range(4)
    ]
