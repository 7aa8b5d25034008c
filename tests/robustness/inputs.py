"""Every kind of file that the product reads: a good example of it, what may become of it, and the
command that reads it.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import mutations
import numpy as np
import single_files
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from running import arguments, final_files

from catversion_jax.cli import main
from catversion_jax.cli.generate import _read_latents
from catversion_jax.cli.prompt_files import read_prompts
from catversion_jax.concepts import read_concepts
from catversion_jax.concepts.images import load_image
from catversion_jax.config import load_config
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation import load_prompt_set
from catversion_jax.evaluation.image_folders import find_images, read_mask, read_pixels
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.models.weights.families import SD1
from catversion_jax.models.weights.single_file import SingleFile
from catversion_jax.training.run.packing import write_pack as write_concepts_of
from catversion_jax.training.run.reader import read_trained

ROOT = Path(__file__).resolve().parents[2]
SUCCEEDED, REFUSED = "result", "refused"
EXIT_CODES = {0: SUCCEEDED, 2: REFUSED, 3: REFUSED}


@dataclasses.dataclass(frozen=True)
class Input:
    """One kind of file.

    ``write`` makes a good world in an empty folder, or names fixtures: the first one's folder is
    copied there, the others are linked. ``file`` is what is changed in it, relative to that folder.
    ``read`` does what a user does with it and says how it ended. What lies in ``output`` may
    change, nothing else.
    """

    name: str
    file: str
    write: Callable[[Path], object] | tuple[str, ...]
    mutate: mutations.Mutation
    read: Callable[[Path], str]
    output: str = "out"


def command(*args: object) -> str:
    """Run a command here; whatever it prints is not looked at, but printing must not fail."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
            code = main(list(map(str, args)))
    except SystemExit as error:  # of argparse
        code = error.code
    assert code in EXIT_CODES, f"exit code {code}"
    return EXIT_CODES[code]


def library(read: Callable[[Path], object]) -> Callable[[Path], str]:
    """The reading function of a command that would need a model to go on."""

    @functools.wraps(read)
    def outcome(folder: Path) -> str:
        try:
            read(folder)
        except CatVersionError:
            return REFUSED
        return SUCCEEDED

    return outcome


# ---- concepts ------------------------------------------------------------------------------------


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, channels), np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode)


def write_concepts(folder: Path, *, count: int = 2) -> None:
    for name in ("pot", "cat")[:count]:
        concept = folder / "concepts" / name
        concept.mkdir(parents=True)
        said = {
            "base_class": name,
            "instance_prompt": ["a {}", "a photo of a {}"],
            "seed": 3,
            "when": "class_word",
            "class_forms": [f"{name}s"],
        }
        (concept / "concept.json").write_text(json.dumps(said))
        for index in range(2):
            picture(index).save(concept / f"{index}.png")
    disk = np.zeros((24, 24), np.uint8)
    disk[6:18, 6:18] = 255
    Image.fromarray(disk).save(folder / "concepts" / "pot" / "0.mask.png")


def write_manifest(folder: Path, name: str, text: str) -> None:
    write_concepts(folder)
    (folder / "concepts" / name).write_text(text)


MANIFEST_ROWS = [
    {"name": "pot", "base_class": "pot", "images": ["pot/0.png", "pot/1.png"]},
    {"name": "cat", "base_class": "cat", "images": ["cat/0.png"], "seed": 5, "prompts": ["a {}"]},
]


def read_all(source: Path) -> None:
    """What training does before it needs a model: find concepts, decode photos and masks."""
    found = read_concepts(str(source))
    for spec in found.concepts:
        for image in spec.images:
            with contextlib.suppress(CatVersionError):  # quarantines the concept
                loaded = load_image(image, resolution=16)
                assert np.isfinite(loaded.pixels).all()
                assert loaded.pixels.shape == (16, 16, 3)


def check(name: str = "") -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        outcome = command("check", folder / "concepts" / name)
        library(lambda found: read_all(found / "concepts" / name))(folder)
        return outcome

    return read


def save_as(name: str, **options: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_concepts(folder)
        picture(9).save(folder / "concepts" / "pot" / name, **options)

    return write


CONCEPTS = [
    Input(
        "concept.json", "concepts/pot/concept.json", write_concepts, mutations.json_text, check()
    ),
    Input("photo.png", "concepts/pot/0.png", write_concepts, mutations.png, check()),
    Input("mask.png", "concepts/pot/0.mask.png", write_concepts, mutations.png, check()),
    *(
        Input(name, f"concepts/pot/{name}", save_as(name, **options), mutations.damaged, check())
        for name, options in (
            ("photo.jpg", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}),
            ("photo.webp", {"lossless": True}),
            ("photo.gif", {"save_all": True, "append_images": [picture(1)]}),
            ("photo.tiff", {}),
            ("photo.bmp", {}),
        )
    ),
    Input(
        "manifest.jsonl",
        "concepts/list.jsonl",
        lambda folder: write_manifest(
            folder, "list.jsonl", "\n".join(json.dumps(row) for row in MANIFEST_ROWS)
        ),
        mutations.lines_of_json,
        check("list.jsonl"),
    ),
    Input(
        "manifest.yaml",
        "concepts/list.yaml",
        lambda folder: write_manifest(folder, "list.yaml", json.dumps(MANIFEST_ROWS)),
        mutations.yaml_text,
        check("list.yaml"),
    ),
    Input(
        "manifest.csv",
        "concepts/list.csv",
        lambda folder: write_manifest(
            folder, "list.csv", "name,base_class,path\npot,pot,pot\ncat,cat,cat\n"
        ),
        mutations.table,
        check("list.csv"),
    ),
    Input(
        "metadata.jsonl",
        "concepts/pot/metadata.jsonl",
        lambda folder: write_manifest(
            folder,
            "pot/metadata.jsonl",
            '{"file_name": "0.png", "text": "a pot"}\n{"file_name": "1.png", "text": "a pot"}',
        ),
        mutations.lines_of_json,
        check(),
    ),
]

# ---- what was learned ----------------------------------------------------------------------------


def residual(seed: int = 0) -> KVResidual:
    key, value = np.random.default_rng(seed).normal(size=(2, 3, 1, 4, 8)).astype(np.float32)
    return KVResidual(key, value, (1, 2, 3))


def write_residual(folder: Path) -> None:
    save_concept(folder / "pot.safetensors", residual(), base_class="pot", name="pot", step=5)


def write_embeddings(folder: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    save_concept(
        folder / "pot.safetensors", TokenEmbeddings(vectors), base_class="pot", name="pot", step=5
    )


def read_concept(folder: Path) -> str:
    outcome = command("inspect", folder / "pot.safetensors")
    if outcome == SUCCEEDED:
        concept = load_concept(folder / "pot.safetensors")
        assert concept.base_class.strip()
        for numbers in vars(concept.learned).values():
            if isinstance(numbers, np.ndarray):
                assert np.isfinite(numbers).all()
    return outcome


def write_pack(folder: Path) -> None:
    for name in ("cat", "pot"):
        file = folder / "packed" / "concepts" / name / "catversion.safetensors"
        save_concept(file, residual(), base_class="pot", name=name, step=5)
    write_concepts_of(folder / "packed", folder / "concepts.arrow")


def write_adapter(folder: Path) -> None:
    shutil.copytree(ROOT / "tests/data/official_adapters/teddybear", folder / "adapter")


def read_adapter(folder: Path) -> str:
    target = ("--output_dir", folder / "out", "--name", "bear")
    outcome = command("import", folder / "adapter", "--base_class", "bear", *target)
    if outcome == SUCCEEDED:
        load_concept(folder / "out" / "bear")
    return outcome


LEARNED = [
    Input(
        "residual.safetensors",
        "pot.safetensors",
        write_residual,
        mutations.safetensors,
        read_concept,
    ),
    Input(
        "embedding.safetensors",
        "pot.safetensors",
        write_embeddings,
        mutations.safetensors,
        read_concept,
    ),
    Input(
        "pack.arrow",
        "concepts.arrow",
        write_pack,
        mutations.damaged,
        lambda folder: command("inspect", f"{folder}/concepts.arrow#pot"),
    ),
    Input(
        "adapter.bin",
        "adapter/pytorch_adapter.bin",
        write_adapter,
        mutations.damaged,
        read_adapter,
    ),
    Input(
        "adapter_config.json",
        "adapter/adapter_config.json",
        write_adapter,
        mutations.json_text,
        read_adapter,
    ),
]

# ---- a run ---------------------------------------------------------------------------------------

RUN, MODEL = "finished", "one_block_sd_folder"  # fixtures of tests/conftest.py


def read_run(folder: Path) -> str:
    """What looks at a run: status, inspect, and what draws with its concepts."""
    outcomes = {command("status", folder / RUN), command("inspect", folder / RUN)}
    outcomes.add(command("status", folder / RUN, "--json"))
    outcomes.add(library(lambda found: read_trained(found / RUN))(folder))
    return REFUSED if REFUSED in outcomes else SUCCEEDED


BOOKKEEPING = (
    ("index.csv", mutations.table),
    ("timeline.csv", mutations.table),
    ("metrics.jsonl", mutations.lines_of_json),
    ("run.json", mutations.json_text),
    ("config.resolved.yaml", mutations.yaml_text),
    ("concepts/teal_cup/metrics.csv", mutations.table),
    ("concepts/teal_cup/metrics.json", mutations.json_text),
)


def train_again(folder: Path, *, may_refuse: bool = False) -> str:
    """The command of a finished run once more: whatever its books say, nothing learned is lost."""
    run = folder / RUN
    before = final_files(run)
    args = arguments((folder / MODEL).resolve(), (folder / "toys").resolve(), run)
    outcome = command("train", *args)
    assert outcome == SUCCEEDED or may_refuse, "a damaged bookkeeping file has stopped a run"
    assert final_files(run) == before
    return outcome


RUNS = [
    *(
        Input(f"run/{file}", f"{RUN}/{file}", (RUN,), mutate, read_run)
        for file, mutate in BOOKKEEPING
    ),
    *(
        Input(
            f"again/{file}",
            f"{RUN}/{file}",
            (RUN, MODEL, "toys"),
            mutate,
            # where run.json is whole and says other options, the run was made with others
            functools.partial(train_again, may_refuse=file == "run.json"),
            RUN,
        )
        for file, mutate in BOOKKEEPING
        if file in ("index.csv", "run.json", "concepts/teal_cup/metrics.json")
    ),
]

# ---- a model -------------------------------------------------------------------------------------


def read_model(folder: Path) -> None:
    backbone = load_backbone(folder / MODEL)
    backbone.tokenizer.place("a photo of a cat", ["cat"], [1])
    assert math.isfinite(backbone.latent_scale)


MODELS = [
    Input(f"model/{file}", f"{MODEL}/{file}", (MODEL,), mutate, library(read_model))
    for file, mutate in (
        ("model_index.json", mutations.json_text),
        ("text_encoder/config.json", mutations.json_text),
        ("unet/config.json", mutations.json_text),
        ("vae/config.json", mutations.json_text),
        ("scheduler/scheduler_config.json", mutations.json_text),
        ("tokenizer/vocab.json", mutations.json_text),
        ("tokenizer/merges.txt", mutations.plain_text),
        ("tokenizer/tokenizer_config.json", mutations.json_text),
        ("unet/diffusion_pytorch_model.safetensors", mutations.safetensors),
        ("vae/diffusion_pytorch_model.safetensors", mutations.safetensors),
        ("text_encoder/model.safetensors", mutations.safetensors),
    )
]

SMALL = single_files.small(SD1)


def write_single_file(folder: Path) -> None:
    pipe = single_files.random_pipeline(SMALL, folder / "folder")
    shutil.rmtree(folder / "folder")
    single_files.single_file(
        pipe, SMALL, folder / "x.safetensors", metadata={"modelspec.prediction_type": "epsilon"}
    )


def read_single_file(folder: Path) -> None:
    SingleFile(folder / "x.safetensors")  # recognises what it is
    backbone = load_backbone(SingleFile(folder / "x.safetensors", family=SMALL))
    backbone.tokenizer.place("a photo of a cat", ["cat"], [1])


MODELS.append(
    Input(
        "model/single-file",
        "x.safetensors",
        write_single_file,
        mutations.safetensors,
        library(read_single_file),
    )
)

# ---- what is asked for ---------------------------------------------------------------------------


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return write


CONFIG = {
    "concepts": "concepts",
    "output_dir": "out",
    "learning_rate": 0.01,
    "max_train_steps": 100,
    "layers": "last3",
    "instance_prompt": "a {}",
    "random_flip": 0.5,
    "seed": 3,
}
PROMPT_ROWS = [{"prompt": "a cat", "seed": 3}, {"prompt": "a dog", "concepts": ["dog"]}]


def _array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((1, 4, 8, 8), np.float32))
    return file.getvalue()


def write_images(folder: Path) -> None:
    said = PngInfo()
    said.add_text("parameters", json.dumps({"prompt": "a pot in the snow", "seed": 0}))
    (folder / "images").mkdir()
    picture(0).save(folder / "images" / "some.png", pnginfo=said)
    picture(1).save(folder / "images" / "a-pot-in-the-snow_1.png")
    picture(2, "L").save(folder / "images" / "a-pot-in-the-snow_1.mask.png")
    (folder / "set.yaml").write_text('prompts: ["a {} in the snow"]')


def read_images(folder: Path) -> None:
    prompts = load_prompt_set(str(folder / "set.yaml")).of("pot")
    for image in find_images(folder / "images", prompts, "pot")[0]:
        read_pixels(image.path)
        read_mask(image.path)


ASKED = [
    Input(
        "config.yaml",
        "config.yaml",
        written("config.yaml", json.dumps(CONFIG)),
        mutations.yaml_text,
        library(lambda folder: load_config(folder / "config.yaml")),
    ),
    Input(
        "options",
        "options.txt",
        written("options.txt", "concepts=concepts\nlearning_rate=0.1"),
        mutations.assignments,
        library(
            lambda folder: load_config(
                overrides=(folder / "options.txt").read_text("utf-8", "surrogateescape").split("\n")
            )
        ),
    ),
    Input(
        "prompts.txt",
        "prompts.txt",
        written("prompts.txt", "a cat\na dog\n"),
        mutations.plain_text,
        library(lambda folder: read_prompts(folder / "prompts.txt")),
    ),
    Input(
        "prompts.jsonl",
        "prompts.jsonl",
        written("prompts.jsonl", "\n".join(json.dumps(row) for row in PROMPT_ROWS)),
        mutations.lines_of_json,
        library(lambda folder: read_prompts(folder / "prompts.jsonl")),
    ),
    Input(
        "prompts.yaml",
        "prompts.yaml",
        written("prompts.yaml", json.dumps(PROMPT_ROWS)),
        mutations.yaml_text,
        library(lambda folder: read_prompts(folder / "prompts.yaml")),
    ),
    Input(
        "prompt_set.yaml",
        "set.yaml",
        written("set.yaml", json.dumps({"prompts": ["a {} in snow"], "num_images_per_prompt": 2})),
        mutations.yaml_text,
        library(lambda folder: load_prompt_set(str(folder / "set.yaml"))),
    ),
    Input(
        "latents.npy",
        "latents.npy",
        written("latents.npy", _array()),
        mutations.npy,
        library(lambda folder: _read_latents(folder / "latents.npy")),
    ),
    Input("generated.png", "images/some.png", write_images, mutations.png, library(read_images)),
    Input(
        "generated.mask.png",
        "images/a-pot-in-the-snow_1.mask.png",
        write_images,
        mutations.png,
        library(read_images),
    ),
]

INPUTS = [*CONCEPTS, *LEARNED, *RUNS, *MODELS, *ASKED]
