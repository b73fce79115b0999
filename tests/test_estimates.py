"""Other systems' files: found, fitted to the song, told apart."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from hparams import InputError
from scoring import estimates
from sound import tracks

RATE = 8000
MIXTURE = np.random.default_rng(0).normal(0, 0.1, (2, RATE)).astype(np.float32)


def written(path, wav: np.ndarray, rate: int = RATE):
    soundfile.write(path, wav.T, rate, subtype="FLOAT")
    return path


def test_what_one_file_leaves_of_the_mixture_is_the_other(tmp_path):
    wav = 0.3 * MIXTURE
    for i, stem in enumerate(("vocals", "accompaniment")):
        files = {stem: written(tmp_path / f"{stem}.wav", wav)}
        found, notes = estimates.read("it", files, MIXTURE, RATE)
        np.testing.assert_array_equal(found[i], wav)
        np.testing.assert_allclose(found.sum(0), MIXTURE, atol=1e-7)
        assert notes == []
    both = {stem: tmp_path / f"{stem}.wav" for stem in ("accompaniment", "vocals")}
    np.testing.assert_array_equal(estimates.read("it", both, MIXTURE, RATE)[0], [wav, wav])


@pytest.mark.parametrize(
    ("wav", "n_channels", "expected", "notes"),
    [
        (MIXTURE[:, :-3], 2, np.pad(MIXTURE[:, :-3], ((0, 0), (0, 3))), ["padded with silence"]),
        (np.pad(MIXTURE, ((0, 0), (0, 3))), 2, MIXTURE, ["trimmed"]),
        (MIXTURE[:1], 2, MIXTURE[[0, 0]], ["1 channels copied to 2"]),
        (MIXTURE, 1, MIXTURE.mean(0)[None], ["2 channels averaged to 1"]),
        (MIXTURE[:1, :-1], 2, np.pad(MIXTURE[[0, 0], :-1], ((0, 0), (0, 1))), ["padded", "copied"]),
    ],
)
def test_files_that_nearly_fit_are_fitted_and_that_is_said(
    tmp_path, wav, n_channels, expected, notes
):
    files = {"vocals": written(tmp_path / "vocals.wav", wav)}
    found, said = estimates.read("it", files, MIXTURE[:n_channels], RATE)
    np.testing.assert_allclose(found[0], expected, atol=1e-7)
    assert len(said) == len(notes)
    for line, note in zip(said, notes, strict=True):
        assert line.startswith("vocals of it: ")
        assert note in line


@pytest.mark.parametrize(
    ("wav", "rate", "told"),
    [
        (MIXTURE, 16000, "16000 Hz, the song has 8000 Hz"),
        (MIXTURE[:, :-500], RATE, "7500 samples, the song has 8000"),
        (MIXTURE[[0, 1, 0]], RATE, "3 channels, the song has 2"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, wav, rate, told):
    files = {"vocals": written(tmp_path / "theirs.wav", wav, rate)}
    with pytest.raises(InputError, match=f"theirs.wav: {told}"):
        estimates.read("it", files, MIXTURE, RATE)


def test_songs_without_an_estimate_are_told_and_large_songs_come_first(toy_tree, tmp_path):
    songs = tracks.find_tracks(toy_tree).tracks
    for song in songs[1:]:
        written(tmp_path / f"{song.name}_vocals.wav", MIXTURE)
    jobs, bad = estimates.pair(songs, {"it": tmp_path})
    assert sorted(job.track.name for job in jobs) == [song.name for song in songs[1:]]
    assert len(bad) == 1
    assert f"{songs[0].name}: no estimate in {tmp_path}" in bad[0]
    sizes = [sum(path.stat().st_size for path in job.track.paths) for job in jobs]
    assert sizes == sorted(sizes, reverse=True)
    before = estimates.sources(jobs[0], toy_tree)
    assert {len(file["sha256"]) for file in before["files"]} == {64}
    written(jobs[0].estimates["it"]["vocals"], -MIXTURE)  # of the same size
    after = estimates.sources(jobs[0], toy_tree)
    assert after["files"] == before["files"]
    assert after["estimates"] != before["estimates"]


def test_every_and_subset_spread_over_the_songs():
    songs = list(range(10))
    assert estimates.thin(songs, 1, None) == songs
    assert estimates.thin(songs, 4, None) == [0, 4, 8]
    assert estimates.thin(songs, 1, 3) == [0, 3, 6]
    assert estimates.thin(songs, 2, 2) == [0, 4]
    assert estimates.thin(songs, 5, 99) == [0, 5]
