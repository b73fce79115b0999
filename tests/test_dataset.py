"""The dataset: what is read is what was written, and an epoch is what it promises to be."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import audio
import dataset
import model
from dataset import PARTS, Chunk, Manifest, OpenSong, Song
from hparams import GRID, HParams, InputError

HP = HParams(
    sample_rate=4000, n_fft=64, hop_length=16, stft_frames=5, chunk_slices=8, batch_size=4, width=4
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
            inputs=({"path": "a.wav", "size": 1, "sha256": "00"},),
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


def chunks(songs: list[OpenSong], hp: HParams, n_epochs: int = 1) -> list[Chunk]:
    plans = [dataset.plan_epoch(songs, hp, epoch) for epoch in range(n_epochs)]
    return [chunk for plan in plans for batch in plan for chunk in batch]


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
        both = dataset.mix(torch.from_numpy(np.array(one.spectrogram))[None], torch.ones(1, 2))
        mixture = next(toy_tree.glob(f"Mixtures/*/{one.song.id}/mixture.wav"))
        wav, _ = soundfile.read(mixture, always_2d=True)
        grid = audio.grid_at(22050, hp)
        expected = audio.stft(torch.from_numpy(wav.mean(1)).float(), grid)
        found = sum(both)[0]
        error_db = 20 * np.log10(float((found - expected).norm() / expected.norm()))
        assert error_db < -60  # float16


# --- The plan of an epoch -----------------------------------------------------------------------


def test_the_plan_is_a_function_of_seed_and_epoch_only():
    songs = [song("a", 70), song("b", 31), song("c", 5)]
    plan = dataset.plan_epoch(songs, HP, 3)
    np.random.default_rng(0).random(100)
    torch.rand(3)
    dataset.plan_epoch(songs, HP, 4)
    assert dataset.plan_epoch(songs, HP, 3) == plan
    assert dataset.plan_epoch(songs, replace(HP, learning_rate=1, epochs=99), 3) == plan
    assert dataset.plan_epoch(songs, HP, 4) != plan
    assert dataset.plan_epoch(songs, replace(HP, seed=1), 3) != plan


@pytest.mark.parametrize("chunk_slices", [1, 2, 8, 100])
def test_every_slice_position_is_a_centre_once_an_epoch(chunk_slices):
    hp = replace(HP, chunk_slices=chunk_slices, remix=0)
    songs = [song("a", 70), song("b", 31), song("c", 1)]
    for epoch in range(3):
        visits: Counter[tuple[int, int]] = Counter()
        for batch in dataset.plan_epoch(songs, hp, epoch):
            for chunk in batch:
                places = {chunk[0:2], chunk[2:4]}
                assert len(places) == 1, "the voice and the backing of one place"
                index, start = places.pop()
                visits.update((index, start + i) for i in range(chunk_slices))
        inside = {(i, t): n for (i, t), n in visits.items() if 0 <= t < songs[i].song.n_frames}
        assert inside == {(i, t): 1 for i in range(3) for t in range(songs[i].song.n_frames)}


def test_with_stride_3_every_slice_position_is_a_centre_in_one_of_three_epochs():
    hp = replace(HP, stft_stride=3, chunk_slices=4, remix=0)
    n_epochs, n_frames = 1500, 20
    visits: Counter[int] = Counter()
    for chunk in chunks([song("a", n_frames)], hp, n_epochs):
        visits.update(chunk.vocals_start + 3 * i for i in range(4))
    found = [visits[t] for t in range(n_frames)]
    # A binomial count of 500 spreads by 18; 5 of those would be one failure in 10⁵ seeds.
    np.testing.assert_allclose(found, n_epochs / 3, atol=5 * 18)


def test_chunks_start_at_another_offset_every_epoch_and_are_shuffled():
    hp = replace(HP, remix=0)
    songs = [song("a", 400)]
    starts = [[c.vocals_start for c in chunks(songs, replace(hp, seed=s))] for s in range(20)]
    assert len({min(one) for one in starts}) > 4
    assert all(-HP.chunk_slices < min(one) <= 0 for one in starts)
    assert all(one != sorted(one) for one in starts)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("chunk_slices", [1, 8, 100])
def test_batches_are_counted_without_planning_them(stride, chunk_slices):
    songs = [song("a", 70), song("b", 31), song("c", 1), song("d", 8)]
    for epoch in range(10):
        hp = replace(HP, stft_stride=stride, chunk_slices=chunk_slices, batch_size=3)
        plan = dataset.plan_epoch(songs, hp, epoch)
        assert dataset.count_batches(songs, hp, epoch) == len(plan)
        assert {len(batch) for batch in plan[:-1]} <= {3}
        assert 1 <= len(plan[-1]) <= 3


def test_gains_are_spread_over_their_range_with_either_polarity():
    hp = replace(HP, gain_db=6, remix=0)
    gains = np.array([c[4:] for c in chunks([song("a", 8000)], hp)])  # (1000, 2)
    level_db = 20 * np.log10(np.abs(gains))
    assert np.abs(level_db).max() <= 6
    np.testing.assert_allclose(level_db.min(0), -6, atol=0.1)
    np.testing.assert_allclose(level_db.max(0), 6, atol=0.1)
    np.testing.assert_allclose((gains < 0).mean(0), 0.5, atol=0.08)
    assert abs(np.corrcoef(gains.T)[0, 1]) < 0.15, "voice and backing are moved apart"
    hp = replace(hp, gain_db=0)
    assert {abs(g) for c in chunks([song("a", 800)], hp) for g in c[4:]} == {1.0}


def test_the_stated_share_is_remixed_and_pairs_different_songs():
    songs = [song("a", 4000), song("b", 2000), song("c", 2000)]
    for remix, low, high in ((0, 0, 0), (0.3, 0.25, 0.35), (1, 1, 1)):
        plan = chunks(songs, replace(HP, remix=remix))
        differ = np.mean([c.vocals_song != c.accompaniment_song for c in plan])
        same_place = np.mean([c[0:2] == c[2:4] for c in plan])
        assert low <= differ <= high
        assert same_place == pytest.approx(1 - differ)


def test_songs_to_remix_with_are_drawn_by_their_length():
    songs = [song("a", 800), song("none", 900, ("vocals",)), song("b", 3000), song("c", 1000)]
    plan = chunks(songs, replace(HP, remix=1), 6)
    mates = Counter(c.accompaniment_song for c in plan if c.vocals_song == 0)
    assert set(mates) == {2, 3}
    assert mates[2] / mates.total() == pytest.approx(0.75, abs=0.06)
    starts = [c.accompaniment_start for c in plan if c.accompaniment_song == 2 != c.vocals_song]
    np.testing.assert_allclose(np.quantile(starts, [0, 0.5, 1]), [0, 1500, 3000], atol=150)


def test_a_song_alone_is_remixed_with_itself():
    assert {c.accompaniment_song for c in chunks([song("a", 200)], replace(HP, remix=1))} == {0}


def test_a_remixed_backing_takes_the_long_term_level_of_the_one_it_replaces():
    songs = [song("loud", 600), song("soft", 600, level_db=-40)]
    for chunk in chunks(songs, replace(HP, remix=1, gain_db=0)):
        voice = songs[chunk.vocals_song].level_db["vocals"]
        backing = songs[chunk.accompaniment_song].level_db["accompaniment"]
        found = [20 * np.log10(abs(gain)) for gain in chunk[4:]]
        np.testing.assert_allclose(found, [0, voice - backing], atol=1e-6)
    for chunk in chunks(songs, replace(HP, remix=1, gain_db=6)):
        levels = [
            songs[chunk.vocals_song].level_db["vocals"] + 20 * np.log10(abs(chunk.vocals_gain)),
            songs[chunk.accompaniment_song].level_db["accompaniment"]
            + 20 * np.log10(abs(chunk.accompaniment_gain)),
        ]
        assert abs(levels[1] - levels[0]) <= 12 + 1e-6


def test_the_dither_of_a_silent_part_is_never_raised_to_a_voice():
    dither = signal(200, level_db=-93)
    dither[:, 1] = signal(200)[:, 1]  # an instrumental: silent vocals, loud accompaniment
    songs = [song("instrumental", array=dither), song("backing", 200, ("accompaniment",))]
    for chunk in chunks(songs, replace(HP, remix=1, gain_db=6)):
        assert 20 * np.log10(np.abs(chunk[4:])).max() <= 6


def test_voices_and_backings_alone_become_mixtures():
    songs = [song("v1", 100, ("vocals",), -10), song("b", 300, ("accompaniment",), -30)]
    songs.append(song("v2", 100, ("vocals",)))
    plan = chunks(songs, replace(HP, gain_db=0, remix=0))
    assert {c.vocals_song for c in plan} == {0, 2}
    assert {c.accompaniment_song for c in plan} == {1}
    for batch in dataset.plan_epoch(songs, replace(HP, gain_db=0, remix=0), 0):
        for pair, chunk in zip(dataset.read_batch(songs, batch, HP), batch, strict=True):
            kept = songs[chunk.vocals_song].spectrogram
            first = chunk.vocals_start - HP.context
            np.testing.assert_array_equal(pair[:, 0], silence_around(kept[:, 0], first, len(pair)))


# --- Reading and mixing -------------------------------------------------------------------------


def silence_around(frames: np.ndarray, first: int, n_frames: int) -> np.ndarray:
    """Frames `first` and following, one by one: the slow and obvious way."""
    zero = np.zeros_like(frames[0])
    return np.stack(
        [frames[t] if 0 <= t < len(frames) else zero for t in range(first, first + n_frames)]
    )


@pytest.mark.parametrize("chunk_slices", [1, 8, 40])
@pytest.mark.parametrize("stride", [1, 3])
def test_a_batch_is_what_reading_frame_by_frame_gives(chunk_slices, stride):
    hp = replace(HP, chunk_slices=chunk_slices, stft_stride=stride, remix=0.5)
    songs = [song("a", 70), song("b", 9), song("v", 30, ("vocals",)), song("one", 1)]
    for batch in dataset.plan_epoch(songs, hp, 0):
        found = dataset.read_batch(songs, batch, hp)
        assert found.shape == (len(batch), dataset.chunk_frames(hp), 2, hp.n_bins, 2)
        assert found.dtype == torch.float16
        for pair, chunk in zip(found, batch, strict=True):
            for j, (index, start) in enumerate((chunk[0:2], chunk[2:4])):
                part = songs[index].song.parts.index(PARTS[j])
                frames = songs[index].spectrogram[:, part]
                expected = silence_around(frames, start - hp.context, len(pair))
                np.testing.assert_array_equal(pair[:, j], expected)


def test_outside_the_song_there_is_silence():
    ones = song("a", array=np.ones((3, 2, HP.n_bins, 2), np.float16))
    chunk = Chunk(0, -2, 0, -2, 1.0, 1.0)  # 8 slices and 2 frames on either side: frames -4 to 7
    batch = dataset.read_batch([ones], [chunk], HP)
    np.testing.assert_array_equal(batch[0, :, 0, 0, 0], [0] * 4 + [1] * 3 + [0] * 5)
    far = Chunk(0, 500, 0, -500, 1.0, 1.0)
    assert not dataset.read_batch([ones], [far], HP).any()


def test_chunks_of_one_slice_are_the_slices_of_the_song():
    hp = replace(HP, chunk_slices=1, batch_size=1000, remix=0, gain_db=0)
    one = song("a", 40)
    spectrogram = torch.from_numpy(one.spectrogram)[None]
    curve_db = audio.weighting_curve_db(hp)
    whole = audio.features(
        sum(dataset.mix(spectrogram, torch.ones(1, 2)))[0], curve_db, hp.mixture_power, hp
    )
    expected = audio.slices(whole, hp)  # (n_slices, 1, n_bins, stft_frames)
    (batch,) = dataset.plan_epoch([one], hp, 0)
    vocals, accompaniment = dataset.mix(
        dataset.read_batch([one], batch, hp), torch.ones(len(batch), 2)
    )
    found = audio.features(vocals + accompaniment, curve_db, hp.mixture_power, hp)
    order = np.argsort([chunk.vocals_start for chunk in batch])
    np.testing.assert_allclose(found[order], expected[:, 0], atol=1e-6)


@pytest.mark.parametrize("model_type", sorted(model.MODELS))
@pytest.mark.parametrize("stride", [1, 3])
def test_a_chunk_teaches_what_its_slices_teach_one_by_one(model_type, stride):
    hp = replace(HP, model_type=model_type, chunk_slices=6, stft_stride=stride, stft_frames=9)
    torch.manual_seed(0)
    network = model.build_model(hp).double()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # stored statistics that are not 0 and 1
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    network.eval()
    features = torch.rand(2, 1, hp.n_bins, dataset.chunk_frames(hp), dtype=torch.double)
    target = torch.rand(2, hp.n_bins, hp.chunk_slices, dtype=torch.double)

    def gradient(logits: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
        network.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in network.parameters()])

    loss, dense = gradient(network(features)[..., ::stride], target)
    slices = features.unfold(-1, hp.stft_frames, stride).permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert slices.shape == (12, 1, hp.n_bins, hp.stft_frames)
    one_by_one = target.transpose(1, 2).flatten(0, 1)[..., None]
    loss_of_slices, sliced = gradient(network(slices), one_by_one)
    assert loss == pytest.approx(loss_of_slices, rel=1e-5)
    assert float((dense - sliced).norm() / sliced.norm()) < 1e-5
    assert float(dense.norm()) > 1e-3


def test_a_mixture_is_the_sum_of_its_scaled_parts():
    spectrograms = torch.from_numpy(np.stack([signal(7, seed=s) for s in (1, 2)]))
    before = spectrograms.clone()
    gains = torch.tensor([[2.0, -0.5], [-1.0, 1.0]])
    vocals, accompaniment = dataset.mix(spectrograms, gains)
    assert vocals.shape == (2, HP.n_bins, 7)
    assert vocals.dtype == torch.complex64
    stored = before.numpy().astype(np.float64)
    for i in range(2):
        for found, j in ((vocals, 0), (accompaniment, 1)):
            expected = float(gains[i, j]) * (stored[i, :, j, :, 0] + 1j * stored[i, :, j, :, 1]).T
            np.testing.assert_allclose(found[i], expected, rtol=1e-6)
    assert torch.equal(spectrograms, before), "the input is not modified"


def test_an_excerpt_is_the_middle_of_a_song():
    hp = replace(HP, valid_seconds=1)  # 250 frames
    long = song("a", 1001)
    found = dataset.excerpt(long, hp)
    np.testing.assert_array_equal(found[0], long.spectrogram[375:625])
    short = song("b", 10)
    np.testing.assert_array_equal(dataset.excerpt(short, hp)[0], short.spectrogram)


# --- Targets ------------------------------------------------------------------------------------

# Magnitudes of voice and backing at five bins; their phases must not matter.
VOCALS = [0.0, 1.0, 1.0, 0.1, 1e-5]
BACKING = [0.0, 0.0, 2.0, 0.1, 1.0]
EXPECTED = {
    "dominance": [0, 1, 0, 0, 0],
    "ratio": [0, 1, 1 / 5, 1 / 2, 1e-10],
    # 1 - 30 log10 |vocals| / -100 is 0, 1, 1, 0.7 and 0, against 0.65.
    "activity": [0, 1, 1, 1, 0],
}


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_a_target_is_what_its_definition_says(kind):
    hp = replace(HP, mask_target=kind, mask_threshold=0.65)
    phases = torch.exp(1j * torch.arange(10.0).reshape(2, 5))
    vocals = (torch.tensor(VOCALS) * phases[0])[:, None]
    backing = (torch.tensor(BACKING) * phases[1])[:, None]
    found = dataset.mask_target(vocals, backing, torch.zeros(5), hp)
    np.testing.assert_allclose(found[:, 0], EXPECTED[kind], rtol=1e-5, atol=1e-12)


def test_the_activity_target_is_weighted_like_the_ear():
    hp = replace(HP, mask_target="activity", mask_threshold=0.65)
    vocals = torch.full((3, 1), 0.1 + 0j)  # cubed: -30 dB, 0.7 of the scale
    found = dataset.mask_target(vocals, 0 * vocals, torch.tensor([0.0, -10.0, -4.0]), hp)
    np.testing.assert_array_equal(found[:, 0], [1, 0, 1])


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


def test_a_dataset_on_disk_gives_the_epoch_that_songs_in_memory_give(tmp_path):
    songs = [song("a", 70), song("b", 31)]
    mapped = dataset.open_songs([save(tmp_path / "data", *songs)], HP)
    assert [asdict(one.song) for one in mapped] == [asdict(one.song) for one in songs]
    plan = dataset.plan_epoch(songs, HP, 0)
    assert dataset.plan_epoch(mapped, HP, 0) == plan
    for batch in plan:
        assert torch.equal(
            dataset.read_batch(mapped, batch, HP), dataset.read_batch(songs, batch, HP)
        )
