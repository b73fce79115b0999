"""Sampling: an epoch is what it promises to be, and a batch is what lies on the disk."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dataset import HP as ALL_LEVELS
from test_dataset import save, signal, song

import audio
import dataset
import model
from dataset import PARTS, OpenSong
from hparams import HParams
from learning import sampling
from learning.augmentation import N_DRAWS
from learning.ranks import World
from learning.sampling import Chunks, Feed

HP = replace(ALL_LEVELS, level_db=0)

CPU = torch.device("cpu")
VOICE, BAND = 0, 1  # columns of a plan


def epochs(songs: list[OpenSong], hp: HParams, n_epochs: int = 1) -> Chunks:
    """The chunks of some epochs, in one."""
    plans = [sampling.plan_epoch(songs, hp, epoch) for epoch in range(n_epochs)]
    return Chunks(*(np.concatenate([getattr(p, name) for p in plans]) for name in asdict(plans[0])))


def batches_of(plan: Chunks, hp: HParams) -> list[Chunks]:
    return [plan[i : i + hp.batch_size] for i in range(0, len(plan), hp.batch_size)]


def places(plan: Chunks, part: int) -> list[tuple[int, int]]:
    """Song and first centre of one part of every chunk."""
    return list(zip(plan.songs[:, part].tolist(), plan.starts[:, part].tolist(), strict=True))


def gains_db(plan: Chunks) -> np.ndarray:
    return 20 * np.log10(np.abs(plan.gains.astype(float)))


def are_same(ours: Chunks, theirs: Chunks) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(*map(columns, (ours, theirs)), strict=True))


def columns(plan: Chunks) -> tuple[np.ndarray, ...]:
    return plan.songs, plan.starts, plan.gains, plan.effects


def one_chunk(songs: tuple[int, int], starts: tuple[int, int]) -> Chunks:
    return Chunks(
        np.array([songs]),
        np.array([starts]),
        np.ones((1, 2), np.float32),
        np.zeros((1, 0), np.float32),
    )


# --- The plan of an epoch -----------------------------------------------------------------------


def test_the_plan_is_a_function_of_seed_and_epoch_only():
    songs = [song("a", 70), song("b", 31), song("c", 5)]
    plan = sampling.plan_epoch(songs, HP, 3)
    np.random.default_rng(0).random(100)
    torch.rand(3)
    sampling.plan_epoch(songs, HP, 4)
    assert are_same(sampling.plan_epoch(songs, HP, 3), plan)
    other = replace(HP, learning_rate=1, epochs=99, steps=7, ema_decay=0)
    assert are_same(sampling.plan_epoch(songs, other, 3), plan)
    assert not are_same(sampling.plan_epoch(songs, HP, 4), plan)
    assert not are_same(sampling.plan_epoch(songs, replace(HP, seed=1), 3), plan)


def test_a_plan_has_a_row_for_each_chunk_and_a_column_for_each_part():
    plan = sampling.plan_epoch([song("a", 70), song("b", 31)], replace(HP, reverb=1), 0)
    kinds = (np.int64, np.int64, np.float32, np.float32)
    for column, kind in zip(columns(plan), kinds, strict=True):
        assert column.shape == (len(plan), 2 if column is not plan.effects else N_DRAWS)
        assert column.dtype == kind
    some = plan[1:6:2]
    assert len(some) == 3
    for column, rows in zip(columns(some), columns(plan), strict=True):
        np.testing.assert_array_equal(column, rows[[1, 3, 5]])


@pytest.mark.parametrize(
    ("alone", "kept", "remix"),
    [("vocals", VOICE, 0), ("vocals", VOICE, 1), ("accompaniment", BAND, 0)],
)
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("chunk_slices", [1, 2, 8, 100])
def test_every_slice_position_is_a_centre_once_an_epoch(
    chunk_slices, batch_size, alone, kept, remix
):
    hp = replace(HP, chunk_slices=chunk_slices, batch_size=batch_size, remix=remix)
    songs = [song("a", 70), song("b", 31), song("c", 1), song("alone", 20, (alone,))]
    for epoch in range(3):
        plan = sampling.plan_epoch(songs, hp, epoch)
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


@pytest.mark.parametrize("batch_size", [2, 7, 16, 50])
def test_the_last_batch_is_filled_up_with_places_that_come_a_second_time(batch_size):
    hp = replace(HP, batch_size=batch_size, remix=0)
    for epoch in range(5):
        plan = sampling.plan_epoch([song("a", 70), song("b", 31)], hp, epoch)
        times = Counter(places(plan, VOICE)).values()
        n_again = len(plan) - len(times)
        assert len(plan) % batch_size == 0
        assert 0 <= n_again < batch_size
        assert max(times) - min(times) <= 1, "as evenly as can be"
        assert {len(batch) for batch in batches_of(plan, hp)} == {batch_size}
        again = places(plan[len(times) :], VOICE)
        assert set(again) <= set(places(plan[: len(times)], VOICE))


def test_with_stride_3_every_slice_position_is_a_centre_in_one_of_three_epochs():
    hp = replace(HP, stft_stride=3, chunk_slices=4, remix=0, batch_size=1)
    n_epochs, n_frames = 1500, 20
    starts = epochs([song("a", n_frames)], hp, n_epochs).starts[:, VOICE]
    visits = Counter((starts[:, None] + 3 * np.arange(4)).ravel().tolist())
    found = [visits[t] for t in range(n_frames)]
    # A binomial count of 500 spreads by 18; 5 of those would be one failure in 10⁵ seeds.
    np.testing.assert_allclose(found, n_epochs / 3, atol=5 * 18)


def test_chunks_start_at_another_offset_every_epoch_and_are_shuffled():
    songs = [song("a", 400)]
    hps = [replace(HP, remix=0, batch_size=1, seed=seed) for seed in range(20)]
    for plans in (
        [sampling.plan_epoch(songs, hp, 0) for hp in hps],
        [sampling.plan_epoch(songs, hps[0], epoch) for epoch in range(20)],
    ):
        starts = [plan.starts[:, VOICE].tolist() for plan in plans]
        assert len({min(one) for one in starts}) > 4
        assert all(-HP.chunk_slices < min(one) <= 0 for one in starts)
        assert all(one != sorted(one) for one in starts)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("chunk_slices", [1, 8, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batches_are_counted_without_planning_them(stride, chunk_slices, batch_size):
    songs = [song("a", 70), song("b", 31), song("c", 1), song("d", 8)]
    hp = replace(HP, stft_stride=stride, chunk_slices=chunk_slices, batch_size=batch_size)
    for epoch in range(10):
        n_batches, rest = divmod(len(sampling.plan_epoch(songs, hp, epoch)), batch_size)
        assert rest == 0
        assert sampling.count_batches(songs, hp, epoch) == n_batches


def test_gains_are_spread_over_their_range_with_either_polarity():
    hp = replace(HP, gain_db=6, remix=0)
    plan = sampling.plan_epoch([song("a", 8000)], hp, 0)  # 1000 chunks
    level_db = gains_db(plan)
    assert np.abs(level_db).max() <= 6 + 1e-5
    np.testing.assert_allclose(level_db.min(0), -6, atol=0.1)
    np.testing.assert_allclose(level_db.max(0), 6, atol=0.1)
    np.testing.assert_allclose((plan.gains < 0).mean(0), 0.5, atol=0.08)
    assert abs(np.corrcoef(plan.gains.T)[0, 1]) < 0.15, "voice and backing are moved apart"
    assert abs(np.corrcoef(level_db.T)[0, 1]) < 0.15
    plan = sampling.plan_epoch([song("a", 800)], replace(hp, gain_db=0), 0)
    assert set(np.abs(plan.gains).flat) == {1.0}


def test_both_parts_are_moved_together_to_every_loudness():
    hp = replace(HP, gain_db=0, level_db=12, remix=0)
    level_db = gains_db(sampling.plan_epoch([song("a", 8000)], hp, 0))
    np.testing.assert_allclose(level_db[:, 0], level_db[:, 1], atol=1e-5)
    np.testing.assert_allclose([level_db.min(), level_db.max()], [-12, 12], atol=0.2)
    np.testing.assert_allclose(level_db.mean(), 0, atol=0.7)


def test_the_stated_share_is_remixed_and_pairs_different_songs():
    songs = [song("a", 4000), song("b", 2000), song("c", 2000)]
    for remix, low, high in ((0, 0, 0), (0.3, 0.25, 0.35), (1, 1, 1)):
        plan = sampling.plan_epoch(songs, replace(HP, remix=remix), 0)
        differ = plan.songs[:, VOICE] != plan.songs[:, BAND]
        same_start = plan.starts[:, VOICE] == plan.starts[:, BAND]
        assert low <= differ.mean() <= high
        assert same_start[~differ].all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_stated_share_of_chunks_is_left_without_its_voice_and_nothing_else_changes(share):
    songs = [song("a", 4000), song("b", 4000)]
    plan = sampling.plan_epoch(songs, replace(HP, instrumental=share), 0)
    whole = sampling.plan_epoch(songs, HP, 0)
    silent = plan.gains[:, VOICE] == 0
    assert silent.mean() == pytest.approx(share, abs=0.05)
    np.testing.assert_array_equal(plan.gains[~silent], whole.gains[~silent])
    np.testing.assert_array_equal(plan.gains[:, BAND], whole.gains[:, BAND])


@pytest.mark.parametrize("part", [VOICE, BAND])
def test_the_stated_share_of_chunks_gets_a_second_part_and_the_first_ones_stay(part):
    songs = [song("a", 4000), song("b", 3000, level_db=-30), song("c", 1000)]
    share = {"second_voice" if part == VOICE else "second_backing": 0.3}
    hp = replace(HP, instrumental=0.1, level_db=12)
    plan, alone = (epochs(songs, replace(hp, **some), 4) for some in (share, {}))
    for column, first in zip(columns(plan)[:2], columns(alone)[:2], strict=True):
        assert column.shape == (len(plan), 4)
        np.testing.assert_array_equal(column[:, :2], first)
    np.testing.assert_array_equal(plan.gains[:, :2] == 0, alone.gains == 0)
    assert not plan.gains[:, 3 - part].any(), "only the part that was asked for"

    heard, own, mates = plan.gains[:, 2 + part] != 0, plan.songs[:, part], plan.songs[:, 2 + part]
    assert heard[plan.gains[:, part] != 0].mean() == pytest.approx(0.3, abs=0.03)
    assert not heard[plan.gains[:, part] == 0].any(), "nobody sings along where nobody sings"
    assert (mates != own)[heard].all()
    np.testing.assert_array_equal(mates[~heard], own[~heard])
    assert_drawn_by([0, 3000, 1000], mates[heard & (own == 0)])
    starts = plan.starts[heard & (mates == 1), 2 + part]
    np.testing.assert_allclose(np.quantile(starts, [0, 0.5, 1]), [0, 1500, 3000], atol=300)

    stored_db = np.array([[one.level_db[name] for name in PARTS] for one in songs])[:, part]
    with np.errstate(divide="ignore"):
        level_db = gains_db(plan) + stored_db[plan.songs]
    below_db = level_db[heard, part] - level_db[heard, 2 + part]
    np.testing.assert_allclose(np.quantile(below_db, [0, 0.5, 1]), [0, 6, 12], atol=1)


def test_a_second_voice_is_none_of_silence():
    songs = [song("a", 400), song("silent", array=signal(400, level_db=-93))]
    plan = sampling.plan_epoch(songs, replace(HP, remix=0, second_voice=1), 0)
    assert len(plan) > 50
    assert not plan.gains[:, 2].any()


def test_songs_to_remix_with_are_drawn_by_their_length():
    songs = [song("a", 800), song("none", 900, ("vocals",)), song("b", 3000), song("c", 1000)]
    plan = epochs(songs, replace(HP, remix=1), 6)
    voices, mates = plan.songs.T
    found = Counter(mates[voices == 0].tolist())
    assert set(found) == {2, 3}
    assert found[2] / found.total() == pytest.approx(0.75, abs=0.06)
    starts = plan.starts[(mates == 2) & (voices != 2), BAND]
    np.testing.assert_allclose(np.quantile(starts, [0, 0.5, 1]), [0, 1500, 3000], atol=150)
    assert starts.min() >= 0
    assert starts.max() < 3000


def assert_drawn_by(weights: list[int], drawn: np.ndarray) -> None:
    """Song i is drawn as often as its weight says, up to 5 standard deviations, and never for 0."""
    expected = np.array(weights) / sum(weights)
    found = np.bincount(drawn, minlength=len(weights)) / len(drawn)
    spread = np.sqrt(expected * (1 - expected) / len(drawn))
    np.testing.assert_array_less(np.abs(found - expected), 5 * spread + 1e-12)


def test_a_backing_is_never_the_own_where_there_is_another_and_comes_by_its_length():
    lengths = [300, 1, 800, 500, 400, 100]
    songs = [song(str(i), n) for i, n in enumerate(lengths)]
    songs[3] = song("voice", 500, ("vocals",))
    plan = epochs(songs, replace(HP, remix=1, chunk_slices=1, batch_size=1), 20)
    for own in range(6):
        weights = [0 if i in (own, 3) else n for i, n in enumerate(lengths)]
        assert_drawn_by(weights, plan.songs[plan.songs[:, VOICE] == own, BAND])


def test_a_voice_for_a_backing_alone_comes_by_its_length():
    lengths = [300, 1, 800, 500, 400]
    songs = [song(str(i), n) for i, n in enumerate(lengths)]
    songs[0] = song("backing", 300, ("accompaniment",))
    songs[3] = song("another", 500, ("accompaniment",))
    plan = epochs(songs, replace(HP, remix=0, chunk_slices=1, batch_size=1), 20)
    for own in (0, 3):
        rows = plan.songs[:, BAND] == own
        assert_drawn_by([0, 1, 800, 0, 400], plan.songs[rows, VOICE])
        starts = plan.starts[rows & (plan.songs[:, VOICE] == 2), VOICE]
        np.testing.assert_allclose(np.quantile(starts, [0, 0.5, 1]), [0, 400, 800], atol=40)


def test_a_song_alone_is_remixed_with_itself():
    plan = sampling.plan_epoch([song("a", 200)], replace(HP, remix=1), 0)
    assert set(plan.songs.flat) == {0}
    assert (plan.starts[:, VOICE] != plan.starts[:, BAND]).any(), "but from another place"


def test_a_remixed_backing_takes_the_long_term_level_of_the_one_it_replaces():
    songs = [song("loud", 600), song("soft", 600, level_db=-40)]
    levels_db = np.array([[one.level_db[part] for part in PARTS] for one in songs])
    plan = sampling.plan_epoch(songs, replace(HP, remix=1, gain_db=0), 0)
    stored_db = np.take_along_axis(levels_db, plan.songs, 0)  # (n, 2)
    assert set(stored_db[:, VOICE].round()) == {0, -40}
    np.testing.assert_allclose(gains_db(plan)[:, VOICE], 0, atol=1e-6)
    expected = stored_db[:, VOICE] - stored_db[:, BAND]
    np.testing.assert_allclose(gains_db(plan)[:, BAND], expected, atol=1e-6)
    plan = sampling.plan_epoch(songs, replace(HP, remix=1, gain_db=6), 0)
    found_db = np.take_along_axis(levels_db, plan.songs, 0) + gains_db(plan)
    assert np.abs(np.diff(found_db)).max() <= 12 + 1e-5


def test_a_voice_over_a_backing_alone_takes_the_level_of_that_backing():
    songs = [song("backing", 600, ("accompaniment",), -30), song("whole", 200, level_db=-10)]
    plan = sampling.plan_epoch(songs, replace(HP, remix=0, gain_db=0), 0)
    rows = plan.songs[:, BAND] == 0
    difference = songs[0].level_db["accompaniment"] - songs[1].level_db["vocals"]
    np.testing.assert_allclose(gains_db(plan)[rows], [[difference, 0]] * rows.sum(), atol=1e-6)
    np.testing.assert_allclose(gains_db(plan)[~rows], 0, atol=1e-6)
    assert 0 < rows.sum() < len(rows)


def test_the_dither_of_a_silent_part_is_never_raised_to_a_voice():
    dither = signal(200, level_db=-93)
    dither[:, 1] = signal(200)[:, 1]  # an instrumental: silent vocals, loud accompaniment
    songs = [song("instrumental", array=dither), song("backing", 200, ("accompaniment",))]
    for remix in (0, 1):
        plan = sampling.plan_epoch(songs, replace(HP, remix=remix, gain_db=6), 0)
        assert gains_db(plan).max() <= 6 + 1e-5
        assert gains_db(plan).min() >= -6 - 1e-5, "nor is a voice lowered to silence"


def test_voices_and_backings_alone_become_mixtures():
    songs = [song("v1", 100, ("vocals",), -10), song("b", 300, ("accompaniment",), -30)]
    songs.append(song("v2", 100, ("vocals",)))
    hp = replace(HP, gain_db=0, remix=0)
    plan = sampling.plan_epoch(songs, hp, 0)
    assert set(plan.songs[:, VOICE]) == {0, 2}
    assert set(plan.songs[:, BAND]) == {1}
    for batch in batches_of(plan, hp):
        found = sampling.read_batch(songs, batch, hp)
        np.testing.assert_array_equal(found, frame_by_frame(songs, batch, hp))
        assert found[:, :, BAND].flatten(1).any(1).all()


def test_a_dataset_on_disk_gives_the_epoch_that_songs_in_memory_give(tmp_path):
    songs = [song("a", 70), song("b", 31)]
    mapped = dataset.open_songs([save(tmp_path / "data", *songs)], HP)
    assert [asdict(one.song) for one in mapped] == [asdict(one.song) for one in songs]
    plan = sampling.plan_epoch(songs, HP, 0)
    assert are_same(sampling.plan_epoch(mapped, HP, 0), plan)
    assert torch.equal(sampling.read_batch(mapped, plan, HP), sampling.read_batch(songs, plan, HP))


# --- Reading ------------------------------------------------------------------------------------


def silence_around(frames: np.ndarray, first: int, n_frames: int) -> np.ndarray:
    """Frames `first` and following, one by one: the slow and obvious way."""
    zero = np.zeros_like(frames[0])
    return np.stack(
        [frames[t] if 0 <= t < len(frames) else zero for t in range(first, first + n_frames)]
    )


def frame_by_frame(songs: list[OpenSong], batch: Chunks, hp: HParams) -> np.ndarray:
    """What a batch is, from the definition: shape (n, n_frames, 2 or 4, n_bins, 2)."""
    n_frames = hp.lookahead + (hp.chunk_slices - 1) * hp.stft_stride + 1 + hp.lookahead
    chunks = []
    columns_of = [places(batch, column) for column in range(batch.songs.shape[1])]
    for chunk in zip(*columns_of, strict=True):
        parts = []
        for name, (index, start) in zip(PARTS * (len(chunk) // 2), chunk, strict=True):
            frames = songs[index].spectrogram[:, songs[index].song.parts.index(name)]
            parts.append(silence_around(frames, start - hp.lookahead, n_frames))
        chunks.append(np.stack(parts, 1))
    return np.stack(chunks)


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
        song("b", 9),
    ]


@pytest.mark.parametrize("chunk_slices", [1, 8, 40])
@pytest.mark.parametrize("stride", [1, 3])
def test_a_batch_is_what_reading_frame_by_frame_gives(all_kinds, chunk_slices, stride):
    hp = replace(HP, chunk_slices=chunk_slices, stft_stride=stride, remix=0.5)
    plan = sampling.plan_epoch(all_kinds, hp, 0)
    for batch in batches_of(plan, hp):
        found = sampling.read_batch(all_kinds, batch, hp)
        assert found.shape == (len(batch), sampling.chunk_frames(hp), 2, hp.n_bins, 2)
        assert found.dtype == torch.float16
        np.testing.assert_array_equal(found, frame_by_frame(all_kinds, batch, hp))


def test_outside_the_song_there_is_silence():
    ones = song("a", array=np.ones((3, 2, HP.n_bins, 2), np.float16))
    chunk = one_chunk((0, 0), (-2, -2))  # 8 slices and 2 frames on either side: frames -4 to 7
    batch = sampling.read_batch([ones], chunk, HP)
    np.testing.assert_array_equal(batch[0, :, 0, 0, 0], [0] * 4 + [1] * 3 + [0] * 5)
    for starts in ((500, -500), (-11, -12), (5, 6)):
        assert not sampling.read_batch([ones], one_chunk((0, 0), starts), HP).any()


def test_chunks_of_one_slice_are_the_slices_of_the_song():
    hp = replace(HP, chunk_slices=1, batch_size=40, remix=0, gain_db=0)
    one = song("a", 40)
    spectrogram = torch.from_numpy(one.spectrogram)[None]
    curve_db = audio.weighting_curve_db(hp)
    whole = audio.features(
        sum(sampling.mix(spectrogram, torch.ones(1, 2)))[0], curve_db, hp.mixture_power, hp
    )
    expected = audio.slices(whole, hp)  # (n_slices, 1, n_bins, stft_frames)
    plan = sampling.plan_epoch([one], hp, 0)
    assert len(plan) == 40
    vocals, accompaniment = sampling.mix(
        sampling.read_batch([one], plan, hp), torch.ones(len(plan), 2)
    )
    found = audio.features(vocals + accompaniment, curve_db, hp.mixture_power, hp)
    order = np.argsort(plan.starts[:, VOICE])
    np.testing.assert_allclose(found[order], expected[:, 0], atol=1e-6)


def test_an_excerpt_is_the_middle_of_a_song():
    hp = replace(HP, valid_seconds=1)  # 250 frames
    long = song("a", 1001)
    found = sampling.excerpt(long, hp)
    np.testing.assert_array_equal(found[0], long.spectrogram[375:625])
    short = song("b", 10)
    np.testing.assert_array_equal(sampling.excerpt(short, hp)[0], short.spectrogram)


# --- The feed -----------------------------------------------------------------------------------


both_feeds = pytest.mark.parametrize("resident", [True, False])


def assert_feeds(songs: list[OpenSong], batches: list[Chunks], hp: HParams, resident: bool) -> None:
    """A feed gives every batch, in order, bit by bit as reading frame by frame does."""
    fed = list(Feed(songs, hp, CPU, resident).batches(batches))
    assert len(fed) == len(batches)
    for (spectrograms, gains, effects), batch in zip(fed, batches, strict=True):
        assert spectrograms.dtype == torch.float16
        assert gains.dtype == torch.float32
        np.testing.assert_array_equal(spectrograms, frame_by_frame(songs, batch, hp))
        np.testing.assert_array_equal(gains, batch.gains)
        np.testing.assert_array_equal(effects, batch.effects)


@both_feeds
@pytest.mark.parametrize("chunk_slices", [1, 8, 40])
@pytest.mark.parametrize("stride", [1, 3])
def test_a_feed_gives_the_frames_of_the_songs(all_kinds, chunk_slices, stride, resident):
    hp = replace(HP, chunk_slices=chunk_slices, stft_stride=stride, remix=0.5, equalizer_db=3)
    batches = batches_of(sampling.plan_epoch(all_kinds, hp, 0), hp)
    assert_feeds(all_kinds, batches, hp, resident)


@both_feeds
def test_a_feed_gives_second_voices_and_backings(all_kinds, resident):
    hp = replace(HP, second_voice=0.7, second_backing=0.7)
    plan = sampling.plan_epoch(all_kinds, hp, 0)
    assert plan.songs.shape[1] == 4
    assert_feeds(all_kinds, batches_of(plan, hp), hp, resident)


@both_feeds
def test_a_feed_gives_the_frames_of_files(all_kinds, tmp_path, resident):
    mapped = dataset.open_songs([save(tmp_path / "data", *all_kinds)], HP)
    batches = batches_of(sampling.plan_epoch(all_kinds, HP, 0), HP)
    assert_feeds(mapped, batches, HP, resident)


@both_feeds
def test_a_feed_gives_silence_outside_the_songs(all_kinds, resident):
    last = len(all_kinds) - 1
    for starts in (
        (-10_000, 10_000),
        (10_000, -10_000),
        (-10, 1),
        (0, -9),
        (-9, 8),
        (-10, 11),
        (-11, -13),
    ):
        for songs in ((0, 0), (last, last), (1, 3), (3 - 1, 4)):
            assert_feeds(all_kinds, [one_chunk(songs, starts)], HP, resident)
    far = one_chunk((0, last), (10**12, -(10**12)))
    ((spectrograms, *_),) = Feed(all_kinds, HP, CPU, resident).batches([far])
    assert not spectrograms.any()


@both_feeds
def test_a_mixture_has_the_band_of_its_narrower_recording(resident):
    ones = np.ones((40, 2, HP.n_bins, 2), np.float16)
    narrow, wide = song("a", array=ones), song("b", array=ones)
    narrow = replace(narrow, song=replace(narrow.song, sample_rate=2000))
    wide = replace(wide, song=replace(wide.song, sample_rate=44100))
    expected = {(1, 1): HP.n_bins, (0, 1): 17, (1, 0): 17, (0, 0): 17}  # 62.5 Hz each, to 1000 Hz
    batches = [one_chunk(songs, (10, 10)) for songs in expected]
    found = Feed([narrow, wide], HP, CPU, resident).batches(batches)
    for (spectrograms, *_), n_bins in zip(found, expected.values(), strict=True):
        assert spectrograms[..., :n_bins, :].all()
        assert not spectrograms[..., n_bins:, :].any()


@both_feeds
@pytest.mark.parametrize("instrumental", [0, 1])
def test_a_second_voice_narrows_the_band_only_where_it_is_heard(resident, instrumental):
    narrow, wide = song("a", 100), song("b", 100)
    narrow = replace(narrow, song=replace(narrow.song, sample_rate=2000))
    hp = replace(HP, remix=0, instrumental=instrumental, second_voice=1, batch_size=1)
    batches = batches_of(sampling.plan_epoch([narrow, wide], hp, 0), hp)
    for batch, (found, *_) in zip(
        batches, Feed([narrow, wide], hp, CPU, resident).batches(batches), strict=True
    ):
        is_wide = instrumental and batch.songs[0, VOICE] == 1
        assert found[..., 17:, :].any() == bool(is_wide)
        assert found[:, :, 2].any() == (not instrumental)


@both_feeds
@pytest.mark.parametrize("n_batches", [0, 1, 2, 3, 4, 5, 9])
def test_a_feed_gives_any_number_of_batches(all_kinds, n_batches, resident):
    hp = replace(HP, batch_size=1)
    batches = batches_of(sampling.plan_epoch(all_kinds, hp, 0), hp)[:n_batches]
    assert len(batches) == n_batches
    assert_feeds(all_kinds, batches, hp, resident)


@both_feeds
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_the_shares_of_the_ranks_make_up_the_batch(all_kinds, n_ranks, resident):
    batch = sampling.plan_epoch(all_kinds, replace(HP, reverb=0.5), 0)[: HP.batch_size]
    ours = [batch[rank::n_ranks] for rank in range(n_ranks)]
    assert {len(share) for share in ours} == {HP.batch_size // n_ranks}
    whole, *fed = Feed(all_kinds, HP, CPU, resident).batches([batch, *ours])
    for found, expected in enumerate(whole):
        together = torch.stack([share[found] for share in fed], 1).flatten(0, 1)
        assert torch.equal(together, expected)


def test_no_more_than_some_batches_are_read_ahead(all_kinds, monkeypatch):
    hp, n_read = replace(HP, batch_size=1), threading.Semaphore(0)
    reads = []

    def read(songs: list[OpenSong], batch: Chunks, hp: HParams) -> torch.Tensor:
        reads.append(batch)
        n_read.release()
        return torch.zeros(1)

    monkeypatch.setattr(sampling, "read_batch", read)
    batches = batches_of(sampling.plan_epoch(all_kinds, hp, 0), hp)[:12]
    fed = Feed(all_kinds, hp, CPU, resident=False).batches(batches)
    for n_given in range(1, 13):
        next(fed)
        n_due = min(n_given + sampling.N_AHEAD, 12)
        while len(reads) < n_due:
            assert n_read.acquire(timeout=20), "it reads while the device works"
        assert len(reads) == n_due
    assert sampling.N_AHEAD >= 1
    assert all(found is batch for found, batch in zip(reads, batches, strict=True))


def test_a_feed_left_early_leaves_no_thread(all_kinds):
    batches = batches_of(sampling.plan_epoch(all_kinds, HP, 0), HP)
    before = threading.active_count()
    fed = Feed(all_kinds, HP, CPU, resident=False).batches(batches)
    next(fed)
    assert threading.active_count() == before + 1
    fed.close()
    assert threading.active_count() == before


def test_a_failing_disk_is_heard_of(all_kinds, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("bad sector")

    monkeypatch.setattr(sampling, "read_batch", fail)
    batches = batches_of(sampling.plan_epoch(all_kinds, HP, 0), HP)
    with pytest.raises(OSError, match="bad sector"):
        next(Feed(all_kinds, HP, CPU, resident=False).batches(batches))


# --- Mixing -------------------------------------------------------------------------------------


def test_a_mixture_is_the_sum_of_its_scaled_parts():
    spectrograms = torch.from_numpy(np.stack([signal(7, seed=s) for s in (1, 2)]))
    before = spectrograms.clone()
    gains = torch.tensor([[2.0, -0.5], [-1.0, 1.0]])
    vocals, accompaniment = sampling.mix(spectrograms, gains)
    assert vocals.shape == (2, HP.n_bins, 7)
    assert vocals.dtype == torch.complex64
    stored = before.numpy().astype(np.float64)
    for i in range(2):
        for found, j in ((vocals, 0), (accompaniment, 1)):
            expected = float(gains[i, j]) * (stored[i, :, j, :, 0] + 1j * stored[i, :, j, :, 1]).T
            np.testing.assert_allclose(found[i], expected, rtol=1e-6)
    assert torch.equal(spectrograms, before), "the input is not modified"


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
    features = torch.rand(2, 1, hp.n_bins, sampling.chunk_frames(hp), dtype=torch.double)
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


def test_second_voices_and_backings_are_added_to_the_first_ones():
    generator = torch.Generator().manual_seed(0)
    spectrograms = torch.randn(3, 5, 4, HP.n_bins, 2, generator=generator).half()
    gains = torch.randn(3, 4, generator=generator)
    pairs = [
        sampling.mix(spectrograms[:, :, columns], gains[:, columns]) for columns in ([0, 1], [2, 3])
    ]
    found = sampling.mix(spectrograms, gains)
    for part in (VOICE, BAND):
        np.testing.assert_allclose(found[part], pairs[0][part] + pairs[1][part], atol=1e-6)


# --- Targets ------------------------------------------------------------------------------------

# Magnitudes of voice and backing at five bins; their phases must not matter (but to "phase", which
# is the ideal mask that test_audio.py works out).
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
    found = sampling.mask_target(vocals, backing, torch.zeros(5), hp)
    np.testing.assert_allclose(found[:, 0], EXPECTED[kind], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", [*EXPECTED, "phase"])
def test_the_phase_target_and_only_it_knows_phases(kind):
    vocals = torch.full((1, 3), 1 + 0j)
    backing = torch.tensor([[0.5, 0.5j, -0.5]])
    found = sampling.mask_target(vocals, backing, torch.zeros(1), replace(HP, mask_target=kind))
    by_phase = [2 / 3, 0.8, 1] if kind == "phase" else [float(found[0, 0])] * 3
    np.testing.assert_allclose(found[0], by_phase, rtol=1e-6)


def test_the_activity_target_is_weighted_like_the_ear():
    hp = replace(HP, mask_target="activity", mask_threshold=0.65)
    vocals = torch.full((3, 1), 0.1 + 0j)  # cubed: -30 dB, 0.7 of the scale
    found = sampling.mask_target(vocals, 0 * vocals, torch.tensor([0.0, -10.0, -4.0]), hp)
    np.testing.assert_array_equal(found[:, 0], [1, 0, 1])


# --- The loss -----------------------------------------------------------------------------------


def losses_of(
    shares: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], hp: HParams, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over the shares of ranks, and the mean of its gradients."""
    found = []
    for logits, target, mixture in shares:
        logits = logits.clone().requires_grad_()
        loss = sampling.mask_loss(logits, target, mixture, torch.zeros(6), hp, world)
        (gradient,) = torch.autograd.grad(loss, logits)
        found.append((loss.detach(), gradient))
    losses, gradients = zip(*found, strict=True)
    return torch.stack(losses).mean(), torch.stack(gradients, 1).flatten(0, 1) / len(shares)


@pytest.mark.parametrize("kind", ["sdr", "cross-entropy"])
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_the_loss_of_all_ranks_is_that_of_the_whole_batch(n_ranks, kind):
    hp = replace(HP, loss=kind)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=rng)
    target = torch.rand(4, 6, 5, generator=rng)
    loudness = torch.tensor([1.0, 0.5, 0.8, 0.3])[:, None, None]  # ranks hear unlike songs
    mixture = loudness * torch.rand(4, 6, 5, generator=rng) + 0j
    shares = [tuple(x[r::n_ranks] for x in (logits, target, mixture)) for r in range(n_ranks)]

    class Listening(World):
        def mean(self, value: torch.Tensor) -> torch.Tensor:
            means.append(value)
            return value

    class Sharing(World):
        def mean(self, value: torch.Tensor) -> torch.Tensor:
            assert any(torch.equal(value, one) for one in means)
            return torch.stack(means).mean()

    means: list[torch.Tensor] = []
    apart, _ = losses_of(shares, hp, Listening())
    together, gradient = losses_of(shares, hp, Sharing())
    expected, expected_gradient = losses_of([(logits, target, mixture)], hp, World())
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    if kind == "cross-entropy":
        assert (abs(apart - expected) > 1e-3) == (n_ranks > 1), "each by itself is something else"
    found = sampling.mask_loss(logits, target, mixture, torch.zeros(6), hp)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("level_db", [20.0, 0.0, -40.0])
def test_the_sdr_loss_is_the_sdr_of_the_masked_spectrogram(level_db):
    hp, rng = HParams(loss="sdr"), torch.Generator().manual_seed(1)
    mixture = torch.randn(3, 513, 5, dtype=torch.complex64, generator=rng)
    mixture *= 10 ** ((level_db - 60 * torch.rand(3, 513, 5, generator=rng)) / 20)
    mixture[..., :20, :] = 0  # no rumble; the ear's curve would have it count for much
    logits = 3 * torch.randn(3, 513, 5, generator=rng)
    target = torch.rand(3, 513, 5, generator=rng)
    found = sampling.mask_loss(logits, target, mixture, audio.weighting_curve_db(hp), hp)
    voice, estimate = target * mixture, logits.sigmoid() * mixture
    energies = [
        x.abs().square().sum((1, 2)) + mixture.abs().square().sum((1, 2)) / 100
        for x in (voice - estimate, voice)
    ]
    assert float(found) == pytest.approx(
        float((energies[0] / energies[1]).log10().mean()), abs=0.01
    )


@pytest.mark.parametrize("loudness", [1.0, 0.01])
def test_without_a_voice_the_sdr_loss_wants_silence(loudness):
    mixture = loudness * torch.ones(1, 4, 6) + 0j
    target, curve_db = torch.zeros(1, 4, 6), torch.zeros(4)
    hp = replace(HP, loss="sdr")
    losses = [
        float(sampling.mask_loss(torch.full((1, 4, 6), logit), target, mixture, curve_db, hp))
        for logit in (-20.0, -2.0, 0.0, 5.0)
    ]
    assert losses == sorted(losses)
    assert losses[0] == pytest.approx(0, abs=1e-3)
    assert losses[-1] == pytest.approx(2, abs=0.05), "from 0 dB to 20 dB below the mixture"


def test_digital_silence_costs_nothing():
    nothing, loud = torch.zeros(1, 513, 6), torch.full((1, 513, 6), 5.0)
    curve_db = audio.weighting_curve_db(HParams())
    found = sampling.mask_loss(loud, nothing, nothing + 0j, curve_db, HParams(loss="sdr"))
    assert float(found) == 0
