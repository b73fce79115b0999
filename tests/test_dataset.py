"""The dataset: what is read is what was written, and what is learnt is not validated on."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
from dataset import PARTS, Chunks, Feed, Manifest, OpenSong, Song
from hparams import GRID, HParams, InputError

SMALL = HParams(sample_rate=4000, n_fft=64, hop_length=16, stft_frames=5, width=4, batch_size=4)
HP = replace(SMALL, chunk_slices=8, instrumental=0, level_db=0)
CPU = torch.device("cpu")
VOICE, BAND = 0, 1  # columns of a plan
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
        dataset.levels_db(array, parts),
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


def changed(one: OpenSong, **labels: object) -> OpenSong:
    return replace(one, song=replace(one.song, **labels))


def test_what_is_read_is_what_was_written(tmp_path):
    songs = [song("Ünï", group="g", singer="s", split="test"), song("b", level_db=-20)]
    folders = [save(tmp_path / "2", *songs), save(tmp_path / "1", song("c", parts=("vocals",)))]
    about = Manifest("by hand", GRID_OF_HP, tuple(one.song for one in songs))
    assert dataset.load_manifest(folders[0]) == about
    opened = dataset.open_songs(folders, HP)
    assert names(opened) == ["Ünï", "b", "c"]
    assert opened[1].level_db == pytest.approx({"vocals": -20, "accompaniment": -20}, abs=0.01)


def test_a_damaged_manifest_is_named(tmp_path):
    path = save(tmp_path / "data", song("a")) / dataset.MANIFEST
    whole = json.loads(path.read_text())
    with_more = [whole["songs"][0] | {"tempo": 120}]
    for text, what in (
        (path.read_text()[:300], "damaged, or not readable"),
        ("[]", "damaged, or not readable"),
        (json.dumps(whole | {"songs": with_more}), "damaged, or not readable"),
        (json.dumps(whole | {"hparams": {"n_fft": "64"}}), "damaged, or not readable"),
        (json.dumps(whole | {"format": 99}), "a dataset of another version"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"^{path}: {what}"):
            dataset.load_manifest(path.parent)


def test_an_array_that_is_not_what_was_promised_is_named(tmp_path):
    folder = save(tmp_path / "data", song("a"))
    path = folder / "a.npy"
    whole = path.read_bytes()
    for n_bytes in (0, 7, 60, 128, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(InputError, match=r"a\.npy: missing or damaged"):
            dataset.open_songs([folder], HP)
    for array in (signal(49), signal(50, n_parts=1), signal(50).astype(">f2")):
        np.save(path, array)
        with pytest.raises(InputError, match=r"a\.npy: not the array the manifest promises"):
            dataset.open_songs([folder], HP)
    other = save(tmp_path / "other", song("a"), hop_length=8)
    with pytest.raises(InputError, match=f"{other}: built with hop_length=8, not 16"):
        dataset.open_songs([other], HP)


def divided(songs: list[OpenSong], **settings: float) -> tuple[list[str], list[str]]:
    learn, valid = dataset.hold_out(songs, replace(HP, **settings))
    return names(learn), names(valid)


def test_singers_are_kept_apart_or_with_two_of_them_all_clips_of_a_song():
    for singers, n_alike, n_valid, fraction in (("abcdefgh", 1, 12, 0.2), ("ab", 2, 2, 0.1)):
        songs = [
            song(f"{singer}{i}{clip}", singer=singer, group=f"{singer}{i}")
            for singer in singers
            for i in range(3)
            for clip in "xy"
        ]
        sides = set()
        for seed in range(8):
            learn, valid = divided(songs, seed=seed, valid_fraction=fraction)
            assert {name[:n_alike] for name in learn}.isdisjoint(name[:n_alike] for name in valid)
            assert sorted(learn + valid) == sorted(names(songs))
            assert len(valid) == n_valid
            sides.add(tuple(valid))
        assert len(sides) > 1, "the seed decides"
    for n_songs, fraction, n_valid in ((2, 0, 1), (2, 0.9, 1), (5, 0, 1), (5, 0.5, 3), (5, 0.9, 4)):
        learn, valid = divided([song(str(i)) for i in range(n_songs)], valid_fraction=fraction)
        assert (len(learn), len(valid)) == (n_songs - n_valid, n_valid)


def test_what_is_no_true_voice_with_its_backing_is_learnt_from_and_never_validated_on():
    songs = [song(name, singer=name) for name in "abc"]
    songs += [song(f"{name} alone", parts=("vocals",), singer=name) for name in "abcd"]
    songs += [changed(song("e"), taught=True), changed(song("f"), speed=0.9)]
    for seed in range(6):
        learn, valid = divided(songs, seed=seed)
        assert len(valid) == 1
        assert set(learn) == set(names(songs)) - {valid[0], f"{valid[0]} alone"}
    assert Feed(songs, HP, CPU, resident=False).are_taught.tolist() == [False] * 7 + [True, False]
    hidden, other = song("t", split="test"), song("o")
    learn, valid = dataset.hold_out([songs[0], hidden], HP, [other, hidden, *songs])
    assert (names(learn), names(valid)) == (["a"], ["o", "t", "b", "c"])
    faster = changed(other, id="o x1.2", sha256="other", speed=1.2)
    learn, valid = dataset.hold_out([faster, hidden], HP, [other, hidden])
    assert (names(learn), names(valid)) == (["o x1.2"], ["t"]), "no recording is on both sides"


def test_songs_that_do_not_suffice_are_refused():
    voice, backing = song("v", parts=("vocals",)), song("b", parts=("accompaniment",))
    hidden, whole = song("t", split="test"), song("a")
    for songs, others, what in (
        ([voice, backing, hidden], None, "none of 2 songs can be validated on"),
        ([whole, hidden], None, "none of 0 songs to learn from has vocals"),
        ([whole, voice], None, "none of 1 songs to learn from has accompaniment"),
        ([whole], [whole], "none of 1 songs can be validated on"),
    ):
        with pytest.raises(InputError, match=what):
            dataset.hold_out(songs, HP, others)


def epochs(songs: list[OpenSong], hp: HParams, n_epochs: int = 1) -> Chunks:
    """The chunks of some epochs, in one."""
    plans = [dataset.plan_epoch(songs, hp, epoch) for epoch in range(n_epochs)]
    return Chunks(*(np.concatenate([getattr(p, name) for p in plans]) for name in asdict(plans[0])))


def places(plan: Chunks, part: int) -> list[tuple[int, int]]:
    """Song and first centre of one part of every chunk."""
    return list(zip(plan.songs[:, part].tolist(), plan.starts[:, part].tolist(), strict=True))


def gains_db(plan: Chunks) -> np.ndarray:
    return 20 * np.log10(np.abs(plan.gains.astype(float)))


def one_chunk(songs: tuple[int, int], starts: tuple[int, int]) -> Chunks:
    return Chunks(
        np.array([songs]),
        np.array([starts]),
        np.ones((1, 2), np.float32),
        np.zeros((1, 0), np.float32),
    )


def test_every_slice_position_is_a_centre_once_an_epoch():
    for chunk_slices, batch_size, alone, kept, remix in (
        (1, 4, "vocals", VOICE, 0),
        (2, 1, "vocals", VOICE, 1),
        (8, 1000, "accompaniment", BAND, 0),
        (100, 4, "vocals", VOICE, 1),
    ):
        hp = replace(HP, chunk_slices=chunk_slices, batch_size=batch_size, remix=remix)
        songs = [song("a", 70), song("b", 31), song("c", 1), song("alone", 20, (alone,))]
        for epoch in range(3):
            plan = dataset.plan_epoch(songs, hp, epoch)
            assert dataset.count_batches(songs, hp, epoch) == len(plan) / batch_size
            tiles = places(plan, kept)
            if not remix:
                whole = plan.songs[:, kept] < 3
                for column in (plan.songs, plan.starts):  # the voice and the backing of one place
                    np.testing.assert_array_equal(column[whole, VOICE], column[whole, BAND])
            n = len(set(tiles))
            assert len(set(tiles[:n])) == n, "none comes again before the last batch is filled up"
            assert len(plan) == -(-n // batch_size) * batch_size
            visits = Counter(
                (index, start + i) for index, start in tiles[:n] for i in range(chunk_slices)
            )
            inside = {(i, t): k for (i, t), k in visits.items() if 0 <= t < songs[i].song.n_frames}
            assert inside == {(i, t): 1 for i in range(4) for t in range(songs[i].song.n_frames)}


def test_the_stated_shares_are_remixed_and_left_without_their_voice_at_any_gain():
    songs = [song("a", 4000), song("b", 2000), song("c", 2000)]
    for share in (0, 0.3, 1):
        plan = dataset.plan_epoch(songs, replace(HP, remix=share, instrumental=share), 0)
        differ = plan.songs[:, VOICE] != plan.songs[:, BAND]
        assert differ.mean() == pytest.approx(share, abs=0.05)
        assert (plan.starts[:, VOICE] == plan.starts[:, BAND])[~differ].all()
        assert (plan.gains[:, VOICE] == 0).mean() == pytest.approx(share, abs=0.05)
        assert (plan.gains[:, BAND] != 0).all()
    plan = dataset.plan_epoch(songs, replace(HP, gain_db=6, remix=0), 0)  # 1000 chunks
    np.testing.assert_allclose(
        np.quantile(gains_db(plan), [0, 1], axis=0).T, [[-6, 6]] * 2, atol=0.1
    )
    np.testing.assert_allclose((plan.gains < 0).mean(0), 0.5, atol=0.08)
    assert abs(np.corrcoef(plan.gains.T)[0, 1]) < 0.15, "voice and backing are moved apart"


def test_the_stated_share_of_chunks_gets_a_second_part_and_the_first_ones_stay():
    songs = [song("a", 4000), song("b", 3000, level_db=-30), song("c", 1000)]
    for part, name in enumerate(("second_voice", "second_backing")):
        hp = replace(HP, instrumental=0.1, level_db=12)
        plan, alone = (epochs(songs, replace(hp, **some), 4) for some in ({name: 0.3}, {}))
        np.testing.assert_array_equal(plan.songs[:, :2], alone.songs)
        np.testing.assert_array_equal(plan.starts[:, :2], alone.starts)
        assert not plan.gains[:, 3 - part].any(), "only the part that was asked for"
        first, second = plan.gains[:, part], plan.gains[:, 2 + part]
        own, mates = plan.songs[:, part], plan.songs[:, 2 + part]
        assert (second != 0)[first != 0].mean() == pytest.approx(0.3, abs=0.03)
        assert not second[first == 0].any(), "nobody sings along where nobody sings"
        np.testing.assert_array_equal(mates == own, second == 0)
        stored_db = np.array([[one.level_db[name] for name in PARTS] for one in songs])[:, part]
        both = second != 0
        softer_db = 20 * np.log10(first[both] / second[both].astype(float))
        softer_db += stored_db[own[both]] - stored_db[mates[both]]
        np.testing.assert_allclose(np.quantile(softer_db, [0, 0.5, 1]), [0, 6, 12], atol=1)


def test_a_dataset_gets_its_share_of_the_chunks_whatever_its_length():
    songs = [song("a", 5000), song("b", 200), song("c", 300)]
    songs = [songs[0], *(replace(one, dataset=1) for one in songs[1:])]
    hp = replace(HP, remix=1, batch_size=1)
    plan = dataset.plan_epoch(songs, hp, 0, (1, 3))
    assert len(plan) == dataset.count_batches(songs, hp, 0)
    voices, backings = plan.songs.T
    assert (voices > 0).mean() == pytest.approx(0.75, abs=0.002)
    visits = Counter(places(plan, VOICE)[i] for i in np.flatnonzero(voices > 0))
    assert max(visits.values()) - min(visits.values()) <= 1, "as evenly as can be"
    assert (backings[voices == 1] == 0).mean() == pytest.approx(0.25 / (0.25 + 0.45), abs=0.08)
    again = dataset.plan_epoch(songs, hp, 0, (2.0, 6.0))  # only ratios count
    assert places(again, VOICE) == places(plan, VOICE)


def test_a_remixed_backing_takes_the_level_of_the_one_it_replaces_and_dither_none():
    songs = [song("loud", 600), song("soft", 600, level_db=-40)]
    levels_db = np.array([[one.level_db[part] for part in PARTS] for one in songs])
    plan = dataset.plan_epoch(songs, replace(HP, remix=1, gain_db=0), 0)
    stored_db = np.take_along_axis(levels_db, plan.songs, 0)  # (n, 2)
    assert set(stored_db[:, VOICE].round()) == {0, -40}
    np.testing.assert_allclose(gains_db(plan)[:, VOICE], 0, atol=1e-6)
    expected = stored_db[:, VOICE] - stored_db[:, BAND]
    np.testing.assert_allclose(gains_db(plan)[:, BAND], expected, atol=1e-6)
    dither = signal(200, level_db=-93)
    dither[:, 1] = signal(200)[:, 1]  # an instrumental: silent vocals, loud accompaniment
    songs = [song("instrumental", array=dither), song("backing", 200, ("accompaniment",))]
    plan = dataset.plan_epoch(songs, replace(HP, remix=1, gain_db=6), 0)
    assert np.abs(gains_db(plan)).max() <= 6 + 1e-5, "neither raised to a voice nor lowered to it"


def frame_by_frame(songs: list[OpenSong], batch: Chunks, hp: HParams) -> np.ndarray:
    """What a batch is, from the definition, one frame after the other."""
    n_frames = hp.lookback + (hp.chunk_slices - 1) * hp.stft_stride + 1 + hp.lookahead
    shape = (len(batch), n_frames, batch.songs.shape[1], hp.n_bins, 2)
    frames = np.zeros(shape, np.float16)
    for i, t, column in np.ndindex(shape[:3]):
        one, place = songs[batch.songs[i, column]], batch.starts[i, column] - hp.lookback + t
        if 0 <= place < one.song.n_frames:
            part = one.song.parts.index(PARTS[column % 2])
            frames[i, t, column] = one.spectrogram[place, part]
    for chunk, row in zip(frames, batch.songs, strict=True):  # the band of the narrowest recording
        nyquist = min(songs[index].song.sample_rate for index in row) / 2
        chunk[..., np.arange(hp.n_bins) * hp.sample_rate / hp.n_fft > nyquist, :] = 0
    return frames


@pytest.fixture(scope="module")
def all_kinds() -> list[OpenSong]:
    """Songs of every kind, one of them with its parts the other way round."""
    return [
        song("a", 70),
        song("v", 30, ("vocals",)),
        song("one", 1),
        song("i", 21, ("accompaniment",)),
        song("round", 25, PARTS[::-1]),
        song("one voice", 1, ("vocals",)),
        changed(song("narrow", 9), sample_rate=2000),
        changed(song("wide", 30), sample_rate=44100),
    ]


def test_a_feed_gives_the_frames_of_the_files_and_silence_outside(all_kinds, tmp_path):
    for i, settings in enumerate(
        (
            {"chunk_slices": 1, "equalizer_db": 3},
            {"chunk_slices": 40, "stft_stride": 3, "second_voice": 0.7, "second_backing": 0.7},
            {"stft_frames": 9, "stft_lookahead": 2},
        )
    ):
        hp = replace(HP, remix=0.5, **settings)
        mapped = dataset.open_songs([save(tmp_path / str(i), *all_kinds)], hp)
        batches = dataset.batches_of(dataset.plan_epoch(mapped, hp, 0), hp)
        batches.append(batches[0][1::2])  # a rank's share
        for some in (batches, []):
            for resident in (True, False):
                assert_feeds(mapped, some, hp, resident)
    last = len(all_kinds) - 1
    edges = ((-10_000, 10_000), (-10, 1), (0, -9), (-9, 8), (-11, -13))
    batches = [one_chunk(s, t) for s in ((0, 0), (last, last), (1, 3), (2, 4)) for t in edges]
    for resident in (True, False):
        assert_feeds(all_kinds, batches, HP, resident)


def assert_feeds(songs: list[OpenSong], batches: list[Chunks], hp: HParams, resident: bool) -> None:
    """A feed gives every batch, in order, bit by bit as reading frame by frame does."""
    feed = Feed(songs, hp, CPU, resident)
    fed = list(feed.batches(batches))
    assert len(fed) == len(batches)
    for found, batch in zip(fed, batches, strict=True):
        spectrograms = feed.spectrograms(found)
        assert spectrograms.dtype == torch.float16
        np.testing.assert_array_equal(spectrograms, frame_by_frame(songs, batch, hp))
        for name, values in vars(batch).items():
            np.testing.assert_array_equal(getattr(found, name), values)
