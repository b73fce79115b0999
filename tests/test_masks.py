"""Saved masks: what was written comes back, and what is no mask is told in one line."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hparams import InputError
from sound.masks import MaskWriter, SavedMask

ABOUT = {"n_masks": 2, "n_bins": 7, "n_samples": 1234}


def levels(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 7, n), np.uint8)


def save(path: Path, sizes: list[int], about: dict = ABOUT) -> np.ndarray:
    """Write a mask in stretches; returns all of it."""
    whole, start = levels(sum(sizes)), 0
    with open(path, "w+b") as file:
        writer = MaskWriter(file, dict(about))
        for size in sizes:
            writer.write(whole[..., start : start + size])
            start += size
        writer.close()
    return whole


@pytest.mark.parametrize("sizes", [[50], [1, 0, 30, 19], [0, 50, 0]])
@pytest.mark.parametrize("asked", [[50, 0], [0, 1, 49, 0, 0], [20, 20, 10]])
def test_a_mask_comes_back_in_stretches_of_any_size(tmp_path, sizes, asked):
    whole = save(tmp_path / "m.npz", sizes)
    with SavedMask(tmp_path / "m.npz") as saved:
        assert saved.about == {"format": "vocal-mask mask 1", **ABOUT, "n_columns": 50}
        parts = [saved.read(n) for n in asked]
        assert [part.shape for part in parts] == [(2, 7, n) for n in asked]
        np.testing.assert_array_equal(np.concatenate(parts, -1), whole)
        with pytest.raises(InputError, match=r"m\.npz: ends before the song does"):
            saved.read(1)


def test_the_same_mask_is_the_same_bytes_and_numpy_opens_it(tmp_path):
    whole = save(tmp_path / "a.npz", [20, 30])
    save(tmp_path / "b.npz", [20, 30])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as opened:
        names = sorted(name for name in opened if name.startswith("columns"))
        columns = np.concatenate([opened[name] for name in names])
    np.testing.assert_array_equal(columns.transpose(1, 2, 0), whole)


def test_a_mask_of_another_song_is_named_with_both_values(tmp_path):
    save(tmp_path / "m.npz", [5])
    with SavedMask(tmp_path / "m.npz") as saved:
        saved.check({"n_bins": 7})
        with pytest.raises(InputError, match="another song: n_bins is 7 there, 513 here"):
            saved.check({"n_bins": 513})


def test_a_damaged_mask_is_told_in_one_line(tmp_path):
    """Every cut and every flipped bit is a whole mask still, or an InputError."""
    path, rng = tmp_path / "m.npz", np.random.default_rng(0)
    whole = save(path, [20, 30])
    good, n_refused = path.read_bytes(), 0
    damaged = [good[: len(good) * i // 10] for i in range(10)]
    for _ in range(400):
        flipped = bytearray(good)
        flipped[rng.integers(len(good))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        try:
            with SavedMask(path) as saved:
                np.testing.assert_array_equal(saved.read(50), whole)
        except InputError:
            n_refused += 1
    assert n_refused > 300


@pytest.mark.parametrize(
    "about",
    [
        [],
        {},
        {"format": "other"},
        {"format": "vocal-mask mask 1"},
        {"format": "vocal-mask mask 1", "n_masks": "x", "n_bins": 7, "n_samples": 1},
    ],
)
def test_another_zip_is_no_mask(tmp_path, about):
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as file:
        file.writestr("about.json", json.dumps(about))
    with pytest.raises(InputError, match=r"m\.npz: "):
        SavedMask(tmp_path / "m.npz")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    save(tmp_path / "m.npz", [1])
    with zipfile.ZipFile(tmp_path / "m.npz", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("columns_000000001.npy", bytes(2**28 + 1))
    with SavedMask(tmp_path / "m.npz") as saved, pytest.raises(InputError, match="damaged at"):
        saved.read(2)


def test_an_abandoned_mask_writes_nothing_more(tmp_path):
    with open(tmp_path / "m.npz", "w+b") as file:
        writer = MaskWriter(file, {})
        writer.write(levels(3))
        writer.abandon()
    del writer  # a zip that was not closed would now write into a closed file
