"""The dataset: what is read is what was written, and what is learnt is not validated on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
import dataset
from dataset import PARTS, Manifest, OpenSong, Song
from hparams import GRID, HParams, InputError
from learning import sampling

HP = HParams(
    sample_rate=4000,
    n_fft=64,
    hop_length=16,
    stft_frames=5,
    chunk_slices=8,
    batch_size=4,
    width=4,
    instrumental=0,
)
GRID_OF_HP = {name: getattr(HP, name) for name in GRID}


def signal(n_frames: int, n_parts: int = 2, level_db: float = 0.0, seed: int = 0) -> np.ndarray:
    """Noise as a dataset stores it, whose frames have a known level: root of the summed squares."""
    shape = (n_frames, n_parts, HP.n_bins, 2)
    noise = np.random.default_rng(seed).standard_normal(shape)
    level = np.sqrt(np.square(noise).sum((2, 3)).mean(0))  # (n_parts,)
    return (noise / level[:, None, None] * 10 ** (level_db / 20)).astype(np.float16)


def song(
    name: str,
    n_frames: int = 50,
    parts: tuple[str, ...] = PARTS,
    level_db: float = 0.0,
    array: np.ndarray | None = None,
    **labels: str,
) -> OpenSong:
    """Make a song in memory; `labels` are split, singer and group."""
    seed = sum(name.encode())
    array = signal(n_frames, len(parts), level_db, seed) if array is None else array
    about = {"split": "train", "singer": name, "group": name, **labels}
    return OpenSong(
        Song(
            id=name,
            file=f"{name}.npy",
            parts=parts,
            n_frames=len(array),
            sample_rate=4000,
            seconds=len(array) * 0.004,
            sha256=f"hash of {name}",
            inputs=({"path": "a.wav", "size": 1, "sha256": f"source of {name}"},),
            **about,
        ),
        array,
        dataset._levels_db(array, parts),
    )


def save(folder: Path, *songs: OpenSong, **grid: int) -> Path:
    """Write songs to disk as build_dataset.py does."""
    folder.mkdir()
    for one in songs:
        np.save(folder / one.song.file, one.spectrogram)
    about = Manifest("by hand", GRID_OF_HP | grid, tuple(one.song for one in songs))
    dataset.save_manifest(folder, about)
    return folder


def names(songs: list[OpenSong]) -> list[str]:
    return [one.song.id for one in songs]


# --- Files --------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    songs = [
        song("Ünï", group="g", singer="s", split="test").song,
        song("b", parts=("vocals",)).song,
    ]
    about = Manifest("by hand", GRID_OF_HP, tuple(songs))
    dataset.save_manifest(tmp_path, about)
    assert dataset.load_manifest(tmp_path) == about


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        dataset.load_manifest(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no manifest.json; not a dataset, or its build did not"):
        dataset.load_manifest(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path):
    path = save(tmp_path / "data", song("a")) / dataset.MANIFEST
    whole = json.loads(path.read_text())
    first = whole["songs"][0]
    damaged = {
        "empty": "",
        "cut": path.read_text()[:300],
        "bytes": "\xff\xfe",
        "a list": "[]",
        "no songs": json.dumps({k: v for k, v in whole.items() if k != "songs"}),
        "songs are a number": json.dumps(whole | {"songs": 3}),
        "a song lacks its hash": json.dumps(
            whole | {"songs": [{k: v for k, v in first.items() if k != "sha256"}]}
        ),
        "a song of a later version": json.dumps(whole | {"songs": [first | {"tempo": 120}]}),
        "no settings": json.dumps(whole | {"hparams": None}),
        "settings of words": json.dumps(whole | {"hparams": {"n_fft": "64"}}),
    }
    for what, text in damaged.items():
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError) as error:
            dataset.load_manifest(path.parent)
        assert str(error.value) == f"{path}: damaged (build the dataset again)", what
    path.write_text(json.dumps(whole | {"format": 99}))
    with pytest.raises(InputError, match=r"manifest.json: a dataset of another version"):
        dataset.load_manifest(path.parent)


def test_an_array_that_is_not_whole_is_named(tmp_path):
    folder = save(tmp_path / "data", song("a"))
    path = folder / "a.npy"
    whole = path.read_bytes()
    for n_bytes in (0, 1, 7, 60, 128, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(InputError, match=r"a\.npy: missing or damaged"):
            dataset.open_songs([folder], HP)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.npy: missing or damaged"):
        dataset.open_songs([folder], HP)


def test_a_file_that_is_no_array_is_named(tmp_path):
    folder = save(tmp_path / "data", song("a"))
    path = folder / "a.npy"
    whole = path.read_bytes()
    np.savez(tmp_path / "zip.npz", signal(50))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    contents = [
        b"la la la" * 100,
        (tmp_path / "zip.npz").read_bytes(),
        (tmp_path / "objects.npy").read_bytes(),
        whole.replace(b"}", b"{", 1),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npy: missing or damaged"):
            dataset.open_songs([folder], HP)


def test_an_array_of_another_shape_or_type_is_named(tmp_path):
    folder = save(tmp_path / "data", song("a"))
    for array in (
        signal(49),
        signal(50, n_parts=1),
        signal(50).transpose(0, 2, 1, 3),
        signal(50).astype(np.float32),
        signal(50).astype(">f2"),
    ):
        np.save(folder / "a.npy", array)
        with pytest.raises(InputError, match=r"a\.npy: not the array the manifest promises"):
            dataset.open_songs([folder], HP)


def test_a_dataset_on_another_grid_is_refused_with_both_values(tmp_path):
    for name, other in {"sample_rate": 8000, "n_fft": 128, "hop_length": 8}.items():
        folder = save(tmp_path / name, song("a"), **{name: other})
        with pytest.raises(InputError) as error:
            dataset.open_songs([folder], HP)
        assert f"{folder}: built with {name}={other}, not {getattr(HP, name)}" in str(error.value)


def test_songs_of_several_datasets_come_in_order_and_read_only(tmp_path):
    folders = [
        save(tmp_path / "2", song("b"), song("a", level_db=-20)),
        save(tmp_path / "1", song("c")),
    ]
    songs = dataset.open_songs(folders, HP)
    assert names(songs) == ["b", "a", "c"]
    assert dataset.identity(songs) == ["b hash of b", "a hash of a", "c hash of c"]
    for one in songs:
        assert not one.spectrogram.flags.writeable
        np.testing.assert_array_equal(one.spectrogram, np.load(one.spectrogram.filename))
    assert songs[1].level_db == pytest.approx({"vocals": -20, "accompaniment": -20}, abs=0.01)


def test_the_level_of_a_song_is_estimated_from_all_of_it():
    loud_end = signal(6400)
    loud_end[:3200] = 0  # half the energy: 3 dB less
    assert dataset._levels_db(loud_end, PARTS)["vocals"] == pytest.approx(-3.01, abs=0.1)
    assert dataset._levels_db(np.zeros((1, 2, 33, 2), np.float16), PARTS)["vocals"] == -100


def test_what_build_dataset_wrote_is_the_song(toy_dataset, toy_tree):
    hp = HParams()
    songs = dataset.open_songs([toy_dataset], hp)
    assert Counter(one.song.split for one in songs) == {"train": 3, "test": 1}
    for one in songs:
        assert one.song.parts == PARTS
        assert one.spectrogram.shape == (1 + 4 * 22050 // 256, 2, 513, 2)
        both = sampling.mix(torch.from_numpy(np.array(one.spectrogram))[None], torch.ones(1, 2))
        mixture = next(toy_tree.glob(f"Mixtures/*/{one.song.id}/mixture.wav"))
        wav, _ = soundfile.read(mixture, always_2d=True)
        grid = audio.grid_at(22050, hp)
        expected = audio.stft(torch.from_numpy(wav.mean(1)).float(), grid)
        found = sum(both)[0]
        error_db = 20 * np.log10(float((found - expected).norm() / expected.norm()))
        assert error_db < -60  # float16


# --- Learning and validating --------------------------------------------------------------------


def divided(songs: list[OpenSong], **settings: float) -> tuple[list[str], list[str]]:
    learn, valid = dataset.hold_out(songs, replace(HP, **settings))
    return names(learn), names(valid)


def test_singers_are_kept_apart_where_there_are_three():
    songs = [
        song(f"{singer}{i}{clip}", singer=singer, group=f"{singer}{i}")
        for singer in "abcdefgh"
        for i in range(3)
        for clip in "xy"
    ]
    sides = set()
    for seed in range(12):
        learn, valid = divided(songs, seed=seed, valid_fraction=0.2)
        assert {name[0] for name in learn}.isdisjoint(name[0] for name in valid)
        assert sorted(learn + valid) == sorted(names(songs))
        assert len(valid) == 12  # two whole singers of eight reach a fifth
        sides.add(tuple(valid))
    assert len(sides) > 3, "the seed decides"


def test_singers_are_kept_apart_where_two_datasets_use_the_same_names():
    songs = [song(str(i), singer=singer) for singer in "abcdef" for i in range(4)]
    for seed in range(12):
        learn, valid = dataset.hold_out(songs, replace(HP, seed=seed))
        sides = [{one.song.singer for one in side} for side in (learn, valid)]
        assert sides[0].isdisjoint(sides[1])
        assert len(learn) + len(valid) == len(songs)


@pytest.mark.parametrize("singers", ["a", "ab"])
def test_all_clips_of_a_song_stay_together_where_there_are_two_singers(singers):
    songs = [
        song(f"{singer}{i}{clip}", singer=singer, group=f"{singer}{i}")
        for singer in singers
        for i in range(4)
        for clip in "xyz"
    ]
    for seed in range(12):
        learn, valid = divided(songs, seed=seed)
        assert {name[:2] for name in learn}.isdisjoint(name[:2] for name in valid)
        assert len(valid) == 3
        assert len(learn + valid) == len(songs)


def test_test_songs_are_on_neither_side():
    songs = [song(str(i), split="test" if i % 2 else "train") for i in range(8)]
    learn, valid = divided(songs, valid_fraction=0.5)
    assert sorted(learn + valid) == ["0", "2", "4", "6"]
    assert len(valid) == 2


def test_voices_are_learnt_from_but_not_validated_on_and_stay_with_their_singer():
    songs = [song(name, singer=name) for name in "abc"]
    songs += [song(f"{name} alone", parts=("vocals",), singer=name) for name in "abcd"]
    for seed in range(6):
        learn, valid = divided(songs, seed=seed)
        assert len(valid) == 1
        assert set(learn) == set(names(songs)) - {valid[0], f"{valid[0]} alone"}


def test_songs_at_another_speed_are_learnt_from_but_not_validated_on_and_stay_with_their_singer():
    songs = [song(name, singer=name) for name in "abc"]
    for one in list(songs):
        faster = replace(one.song, id=f"{one.song.id} x1.2", speed=1.2)
        songs.append(replace(one, song=faster))
    for seed in range(6):
        learn, valid = divided(songs, seed=seed)
        assert len(valid) == 1
        assert set(learn) == set(names(songs)) - {valid[0], f"{valid[0]} x1.2"}


def test_a_recording_is_known_at_whatever_speed_it_was_learnt():
    plain, slow = song("a").song, replace(song("a x0.84").song, speed=0.84)
    of = {one.id: f"{one.id} {one.sha256}" for one in (plain, slow)}
    for learnt, known in (
        ({}, [False, False]),
        ({of["a"]: "a"}, [True, True]),
        ({of["a x0.84"]: "a"}, [True, True]),
        ({"a x1.15 99": "a"}, [True, True]),
        ({"a 99": "a"}, [False, True]),  # "a" is another recording, or on another grid
        ({"b 99": "b", "b x0.84 99": "b"}, [False, False]),
    ):
        assert dataset.are_learnt([plain, slow], learnt) == known


@pytest.mark.parametrize("fraction", [0, 0.5, 0.9])
@pytest.mark.parametrize("n_songs", [2, 3, 5])
def test_both_sides_have_songs_whatever_the_fraction(n_songs, fraction):
    learn, valid = divided([song(str(i)) for i in range(n_songs)], valid_fraction=fraction)
    assert learn
    assert valid
    assert len(valid) >= min(fraction * n_songs, n_songs - 1)


def test_a_song_to_validate_on_may_be_the_only_whole_one():
    voice, backing = song("v", parts=("vocals",)), song("b", parts=("accompaniment",))
    assert divided([voice, song("a"), backing]) == (["v", "b"], ["a"])


def test_too_few_songs_are_refused():
    voice, backing = song("v", parts=("vocals",)), song("b", parts=("accompaniment",))
    hidden = song("t", split="test")
    for songs, what in (
        ([], "0 training songs"),
        ([song("a"), hidden], "1 training songs"),
        ([voice, backing, hidden], "2 training songs, 0 with vocals and accompaniment"),
        ([song("a"), backing], "none of 1 songs to learn from has vocals"),
        ([song("a"), voice], "none of 1 songs to learn from has accompaniment"),
    ):
        with pytest.raises(InputError, match=what):
            dataset.hold_out(songs, HP)


def test_a_song_learnt_at_another_speed_is_not_validated_on():
    songs, others = [song("a"), song("b")], [song("a"), song("c"), song("d")]
    faster = replace(songs[0].song, id="a x1.2", sha256="other", speed=1.2)
    songs[0] = replace(songs[0], song=faster)
    others[2] = replace(others[2], song=replace(others[2].song, speed=0.9))
    _, valid = dataset.validate_elsewhere(songs, others)
    assert names(valid) == ["c"]


def test_with_other_songs_to_validate_on_none_is_held_out():
    voice, backing = song("v", parts=("vocals",)), song("b", parts=("accompaniment",))
    hidden, other = song("t", split="test"), song("o")
    learn, valid = dataset.validate_elsewhere([voice, backing, hidden], [other, hidden, voice])
    assert (names(learn), names(valid)) == (["v", "b"], ["o", "t"])
    learn, valid = dataset.validate_elsewhere([other, hidden], [other, hidden])
    assert (names(learn), names(valid)) == (["o"], ["t"]), "no song is on both sides"
    with pytest.raises(InputError, match="none of 1 songs to validate on"):
        dataset.validate_elsewhere([other], [other])
    with pytest.raises(InputError, match="to learn from has accompaniment"):
        dataset.validate_elsewhere([voice], [other])
