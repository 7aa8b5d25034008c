"""PNG metadata survives, and grids are large enough to read."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from catversion_jax.errors import CatVersionError
from catversion_jax.sampling.grids import image_grid
from catversion_jax.sampling.png import read_metadata, save_png


def a_million(unit):
    return (unit * (1_000_000 // len(unit) + 1))[:1_000_000]


def image(value, height=64, width=64):
    """One colour per value; no shade of grey, as the labels are."""
    return np.full((height, width, 3), (value, 255, 0), np.uint8)


def cells(grid, value):
    return np.nonzero((np.asarray(grid) == (value, 255, 0)).all(axis=-1))


def test_metadata_comes_back_whatever_the_language(tmp_path):
    settings = {
        "prompt": 'ein "Bär" im Schnee 熊 🐻',
        "seed": 3,
        "concepts": [{"name": "x", "scale": 0.5}],
    }
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", pixels, settings)
    assert read_metadata(tmp_path / "a.png") == settings
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)
        assert json.loads(picture.text["parameters"]) == settings
    assert b"tEXtparameters\0" in (tmp_path / "a.png").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]  # no temporary file is left


def test_no_settings_and_no_folder(tmp_path):
    save_png(tmp_path / "plain.png", image(0))
    with pytest.raises(CatVersionError, match="carries no settings"):
        read_metadata(tmp_path / "plain.png")
    with pytest.raises(CatVersionError, match="cannot be written"):
        save_png(tmp_path / "missing" / "a.png", image(0))


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (100, 100), (512, 512), (1024, 512)])
def test_every_cell_is_readable_and_keeps_its_shape(size):
    rows = [[image(10, *size), image(50, *size)], [image(90, *size), None]]
    grid = image_grid(rows, row_labels=["plain", "learned"], column_labels=["a dog", "a cat"])
    for value in (10, 50, 90):
        ys, xs = cells(grid, value)
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        assert min(height, width) >= 128
        assert max(height, width) <= 512
        assert height * size[1] == pytest.approx(width * size[0], rel=0.01)


def test_rows_columns_and_references_are_where_they_belong():
    rows = [[image(1), image(2)], [image(3), image(4)]]
    grid = image_grid(
        rows,
        row_labels=["plain", "learned"],
        column_labels=["a very long prompt about a dog on the beach at sunset " * 3, "short"],
        references=[image(7, 200, 100), image(8), image(9)],
    )
    centre = {}
    for value in (1, 2, 3, 4, 7, 8):
        ys, xs = cells(grid, value)
        centre[value] = (ys.mean(), xs.mean())
    assert centre[1][0] == centre[2][0] < centre[3][0] == centre[4][0]
    assert centre[1][1] == centre[3][1] < centre[2][1] == centre[4][1]
    assert max(centre[7][1], centre[8][1]) < centre[1][1]
    assert cells(grid, 9)[0].size == 0  # two rows have room for two references
    # labels are drawn
    assert (32, 32, 32) in {tuple(pixel) for pixel in np.asarray(grid).reshape(-1, 3)}


def test_labels_and_images_must_match():
    with pytest.raises(CatVersionError, match="2 rows of 1"):
        image_grid([[image(1)]], row_labels=["a", "b"], column_labels=["c"])


@pytest.mark.parametrize(
    "label", [a_million("x"), a_million("word "), a_million("word " + "x" * 5000)]
)
def test_a_label_of_any_length_is_drawn_in_no_time(label):
    started = time.perf_counter()
    grid = image_grid([[image(9)]], row_labels=[label], column_labels=[""])
    assert time.perf_counter() - started < 5  # hours, where a letter at a time is taken off
    short = image_grid([[image(9)]], row_labels=["word " * 30], column_labels=[""])
    assert grid.size == short.size
