"""From a map to a mask: the guided filter, the threshold and the clean-up against their
definitions.
"""

import numpy as np
import pytest

from catversion_jax.concepts.object_masks import (
    centred_disk,
    guided_filter,
    intersection_over_union,
    mask_from_map,
    otsu_threshold,
)


def slow_guided_filter(
    belonging: np.ndarray, guide: np.ndarray, radius: int, epsilon: float
) -> np.ndarray:
    """One least-squares problem per window: the ridge term is a row of its own per colour."""
    height, width = belonging.shape

    def windows(values: np.ndarray) -> list[np.ndarray]:
        pad = [(radius, radius)] * 2 + [(0, 0)] * (values.ndim - 2)
        padded = np.pad(values, pad, mode="symmetric")
        side = 2 * radius + 1
        return [
            padded[y : y + side, x : x + side].reshape(side**2, *values.shape[2:])
            for y in range(height)
            for x in range(width)
        ]

    fits = []
    for colours, targets in zip(windows(guide), windows(belonging), strict=True):
        ridge = np.sqrt(epsilon * len(targets)) * np.eye(3, 4)
        rows = np.concatenate([np.c_[colours, np.ones(len(targets))], ridge])
        fits.append(np.linalg.lstsq(rows, np.r_[targets, np.zeros(3)], rcond=None)[0])
    mean_fits = np.array(
        [window.mean(axis=0) for window in windows(np.array(fits).reshape(height, width, 4))]
    ).reshape(height, width, 4)
    return (mean_fits[..., :3] * guide).sum(-1) + mean_fits[..., 3]


def test_the_guided_filter_is_its_least_squares_problem() -> None:
    rng = np.random.default_rng(0)
    belonging, guide = rng.random((9, 12)), rng.random((9, 12, 3))
    ours = guided_filter(belonging, guide, window=5, epsilon=1e-3)
    np.testing.assert_allclose(ours, slow_guided_filter(belonging, guide, 2, 1e-3), atol=1e-9)
    # windows are odd: 4 means 5
    np.testing.assert_array_equal(ours, guided_filter(belonging, guide, window=4, epsilon=1e-3))


def test_otsu_has_the_largest_variance_between_the_sides() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0.2, 0.1, 700), rng.normal(0.8, 0.15, 300)]).reshape(20, 50)

    def between(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    candidates = np.linspace(values.min(), values.max(), 1000)[1:-1]
    best = max(map(between, candidates))
    assert between(otsu_threshold(values)) > 0.999 * best
    assert 0.4 < otsu_threshold(values) < 0.65


def test_edges_come_from_the_image() -> None:
    """A blurred and shifted guess of a red square becomes the square."""
    pixels = np.full((48, 48, 3), (60, 120, 60), np.uint8)
    pixels[12:36, 16:40] = (200, 40, 40)
    true = np.zeros((48, 48), np.uint8)
    true[12:36, 16:40] = 255
    rows, columns = np.mgrid[:48, :48]
    guess = np.exp(-((rows - 22) ** 2 + (columns - 26) ** 2) / 200.0)
    coarse = mask_from_map(guess, pixels, edge_window=0)
    assert intersection_over_union(coarse, true) < 0.85
    assert intersection_over_union(mask_from_map(guess, pixels, edge_window=0.4), true) > 0.99


def test_holes_are_filled_and_crumbs_go() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    belonging = np.zeros((20, 20))
    belonging[2:12, 2:12] = 1
    belonging[5:7, 5:7] = 0  # a hole
    belonging[17, 17] = 1  # a crumb
    belonging[14:19, 2:8] = 1  # a part of its own: 30 of 100 pixels
    mask = mask_from_map(belonging, pixels, edge_window=0)
    expected = np.zeros((20, 20), np.uint8)
    expected[2:12, 2:12] = expected[14:19, 2:8] = 255
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("edge_window", [0, 0.4])
def test_a_flat_map_has_no_object(edge_window: float) -> None:
    pixels = np.full((16, 16, 3), 128, np.uint8)
    assert not mask_from_map(np.full((16, 16), 0.3), pixels, edge_window=edge_window).any()


def test_overlap() -> None:
    one = np.zeros((10, 10), np.uint8)
    other = one.copy()
    assert intersection_over_union(one, other) == 1
    one[:, :6] = 255
    other[:, 4:] = 255
    assert intersection_over_union(one, other) == pytest.approx(0.2)
    disk = centred_disk((400, 200), 0.35)
    assert (disk > 0).mean() == pytest.approx(np.pi * 0.35**2, rel=0.01)
