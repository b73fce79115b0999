"""What a training step is made of: which places of which songs, read, mixed, and with its target.

    songs ──plan_epoch──▶ chunks ──Feed──▶ spectrograms ──mix──▶ vocals, accompaniment ──▶ target

An epoch's chunks are planned at once, as arrays. Their frames are gathered on the device where the
dataset fits its memory, and read ahead from the memory-mapped files by a thread where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import audio
from dataset import PARTS, OpenSong
from hparams import HParams
from learning import augmentation
from learning.ranks import World

SILENT_DB = -80.0  # a part below this level is silence, whose dither no gain may make a voice
SECOND_DB = 12.0  # by which a second voice or backing is softer at most
LEAST_ENERGY = 1e-7  # of a chunk: what is below is silence, whatever its mask
N_AHEAD = 3  # batches being read while the device works on one
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # spectrograms, gains, effects


@dataclass(frozen=True)
class Chunks:
    """Training examples: where the two signals of each come from, and how loud they become.

    Every array has a row for each chunk; but for the last, a column each for vocals and
    accompaniment, and once more for the second voice and backing where there are any.
    """

    songs: np.ndarray  # int64, index of the song
    starts: np.ndarray  # int64, frame of the first slice's centre; may lie before the song
    gains: np.ndarray  # float32, linear; the sign is the polarity
    effects: np.ndarray  # float32, as `augmentation.draw` gives them

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self.songs)

    def __getitem__(self, rows: slice) -> Chunks:
        """Select some of the chunks."""
        return Chunks(self.songs[rows], self.starts[rows], self.gains[rows], self.effects[rows])


def plan_epoch(songs: list[OpenSong], hp: HParams, epoch: int) -> Chunks:
    """Plan the chunks of one epoch, a function of the seed and the epoch alone.

    Chunks tile every song from a random offset on, so that each slice position is the centre of
    exactly one slice per epoch (of one in ``stft_stride`` epochs on average)::

        song            ├───────────────────────────────┤
        chunks    ┊  0    ┊  1    ┊  2    ┊  3    ┊  4    ┊    new offset every epoch

    A chunk is the song's own mixture, or, with probability ``remix`` and where a part is missing,
    its vocals over the accompaniment of a random place in another song, scaled to their level.
    Some are left without their voice, as songs have their instrumental stretches. Voice and backing
    are moved by up to ``gain_db`` each, and their mixture, whatever its effects, by ``level_db``.
    A second voice, or backing, from anywhere else joins a share of them, up to `SECOND_DB` softer.

    Returns
    -------
    Chunks
        In random order; a whole number of batches, the last of which is filled up with places
        that come a second time.
    """
    rng = np.random.default_rng([hp.seed, 2, epoch])
    index, start = _places(songs, hp, rng)
    order = rng.permutation(len(index))
    order = np.resize(order, -(-len(order) // hp.batch_size) * hp.batch_size)
    index, start = index[order], start[order]
    n_frames = np.array([song.song.n_frames for song in songs])
    song_db = np.array([[song.level_db.get(part, np.nan) for part in PARTS] for song in songs])
    has = ~np.isnan(song_db)  # (n_songs, 2)

    which, where = np.stack([index, index], 1), np.stack([start, start], 1)
    gains = 10 ** (rng.uniform(-hp.gain_db, hp.gain_db, (len(order), 2)) / 20)
    gains *= rng.choice([-1, 1], gains.shape)
    from_elsewhere = (rng.random(len(order)) < hp.remix) | ~has[index].all(1)
    for part in (0, 1):  # vocals are looked for only where there are none
        rows = np.flatnonzero(from_elsewhere & (has[index, 0] == (part == 1)))
        own = index[rows]
        mates = _draw_mates(n_frames * has[:, part], own, rng)
        which[rows, part] = mates
        where[rows, part] = rng.integers(n_frames[mates])
        kept_db, mates_db = song_db[own, 1 - part], song_db[mates, part]
        audible = np.minimum(kept_db, mates_db) > SILENT_DB
        gains[rows, part] *= 10 ** (np.where(audible, kept_db - mates_db, 0) / 20)
    gains[rng.random(len(order)) < hp.instrumental, 0] = 0
    effects = augmentation.draw(rng, len(order), hp)
    if hp.second_voice or hp.second_backing:
        seconds = _draw_seconds(rng, which, gains, n_frames, song_db, hp)
        which, where, gains = (
            np.hstack(pair) for pair in zip((which, where, gains), seconds, strict=True)
        )
    gains *= 10 ** (rng.uniform(-hp.level_db, hp.level_db, (len(order), 1)) / 20)
    return Chunks(which, where, gains.astype(np.float32), effects)


def batches_of(plan: Chunks, hp: HParams) -> list[Chunks]:
    """Cut a plan into its batches."""
    return [plan[i : i + hp.batch_size] for i in range(0, len(plan), hp.batch_size)]


def count_batches(songs: list[OpenSong], hp: HParams, epoch: int) -> int:
    """Return how many batches `plan_epoch` gives, without planning them."""
    offsets, span = _offsets(songs, hp, np.random.default_rng([hp.seed, 2, epoch]))
    n_frames = np.array([song.song.n_frames for song in songs])
    n_chunks = int((-((offsets - n_frames) // span)).sum())
    return -(-n_chunks // hp.batch_size)


def chunk_frames(hp: HParams) -> int:
    """Frames of a chunk: its slices' centres, and what the network sees on both sides."""
    return (hp.chunk_slices - 1) * hp.stft_stride + hp.stft_frames


class Feed:
    """Gives the spectrograms of chunks on the device, from its own memory or from the disk.

    Parameters
    ----------
    songs : list of OpenSong
    hp : HParams
        Reads ``chunk_slices``, ``stft_stride`` and ``stft_frames``.
    device : torch.device
    resident : bool
        Load all frames to the device once, and gather there; otherwise a thread reads each batch
        from the memory-mapped files while the device works on those before.
    """

    def __init__(
        self, songs: list[OpenSong], hp: HParams, device: torch.device, resident: bool
    ) -> None:
        self.songs, self.hp, self.device, self.resident = songs, hp, device, resident
        if not resident:
            return
        n_rows = 1 + sum(len(s.spectrogram) * len(s.song.parts) for s in songs)
        self._frames = torch.empty(n_rows, hp.n_bins, 2, dtype=torch.float16, device=device)
        self._frames[0] = 0  # what lies outside the songs
        n = 1
        for song in songs:
            rows = torch.tensor(song.spectrogram).flatten(0, 1)
            self._frames[n : n + len(rows)] = rows
            n += len(rows)
        # The row of a part's frame t is its first row plus t times the song's number of parts.
        n_parts = np.array([len(song.song.parts) for song in songs])
        n_frames = np.array([song.song.n_frames for song in songs])
        before = 1 + np.cumsum(n_parts * n_frames) - n_parts * n_frames
        place = [[p in s.song.parts and s.song.parts.index(p) for p in PARTS] for s in songs]
        self._first_rows = torch.from_numpy(before[:, None] + np.array(place, int)).to(device)
        self._parts = torch.arange(4, device=device) % 2  # of the columns of `Chunks`
        self._n_parts = torch.from_numpy(n_parts).to(device)
        self._n_frames = torch.from_numpy(n_frames).to(device)
        self._offsets = torch.arange(chunk_frames(hp), device=device)[:, None] - hp.lookback
        n_bins = np.array([recorded_bins(song, hp) for song in songs])
        self._all_whole = bool((n_bins == hp.n_bins).all())
        self._n_bins = torch.from_numpy(n_bins).to(device)
        self._bins = torch.arange(hp.n_bins, device=device)

    def batches(self, batches: list[Chunks]) -> Iterator[Batch]:
        """Give one batch after the other.

        Yields
        ------
        spectrograms : torch.Tensor, shape=(n, n_frames, 2 or 4, n_bins, 2), float16
            Vocals and accompaniment on the device, as in `Chunks`; ``n_frames`` is
            ``chunk_frames(hp)``. Zero outside the songs, and above the band that all recordings
            have: a voice recorded at 16 kHz over a backing of 44.1 kHz would teach that voices
            end at 8 kHz.
        gains : torch.Tensor, shape=(n, 2 or 4)
        effects : torch.Tensor, shape=(n, n_draws)
        """
        return self._gather(batches) if self.resident else self._read_ahead(batches)

    def _gather(self, batches: list[Chunks]) -> Iterator[Batch]:
        """Gather on the device; the numbers of songs and frames travel there once for all."""
        if not batches:
            return
        columns = zip(*(vars(batch).values() for batch in batches), strict=True)
        sent = (torch.from_numpy(np.concatenate(column)).to(self.device) for column in columns)
        sizes = [len(batch) for batch in batches]
        for songs, starts, *rest in zip(*(column.split(sizes) for column in sent), strict=True):
            frame = starts[:, None] + self._offsets  # (n, n_frames, 2 or 4)
            first = self._first_rows[songs, self._parts[: songs.shape[1]]]
            row = first[:, None] + frame * self._n_parts[songs][:, None]
            outside = (frame < 0) | (frame >= self._n_frames[songs][:, None])
            row.masked_fill_(outside, 0)
            frames = self._frames.index_select(0, row.flatten())
            frames = frames.view(*row.shape, *frames.shape[1:])
            if not self._all_whole:
                lost = self._bins >= self._n_bins[songs].amin(1)[:, None]  # (n, n_bins)
                frames.masked_fill_(lost[:, None, None, :, None], 0)
            yield frames, *rest

    def _read_ahead(self, batches: list[Chunks]) -> Iterator[Batch]:
        """Read from the disk, some batches ahead of the one that is given."""
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self._read, batch) for batch in batches[:N_AHEAD]]
            for i in range(len(batches)):
                if i + N_AHEAD < len(batches):
                    ahead.append(reader.submit(self._read, batches[i + N_AHEAD]))
                spectrograms, gains, effects = ahead.pop(0).result()
                yield self._send(spectrograms), self._send(gains), self._send(effects)

    def _read(self, batch: Chunks) -> Batch:
        """Read a batch; to pinned memory where a GPU will fetch it without our waiting."""
        spectrograms = read_batch(self.songs, batch, self.hp)
        gains, effects = torch.from_numpy(batch.gains), torch.from_numpy(batch.effects)
        if self.device.type == "cuda":
            return spectrograms.pin_memory(), gains.pin_memory(), effects.pin_memory()
        return spectrograms, gains, effects

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, non_blocking=True)


def read_batch(songs: list[OpenSong], batch: Chunks, hp: HParams) -> torch.Tensor:
    """Read the frames of a batch from disk.

    Returns
    -------
    torch.Tensor, shape=(n, n_frames, 2 or 4, n_bins, 2), float16
        As `Feed` gives them, on the CPU.
    """
    n_frames = chunk_frames(hp)
    out = np.zeros((len(batch), n_frames, batch.songs.shape[1], hp.n_bins, 2), dtype=np.float16)
    for i, j in np.ndindex(*batch.songs.shape):
        song = songs[batch.songs[i, j]]
        part = song.song.parts.index(PARTS[j % 2])
        first = int(batch.starts[i, j]) - hp.lookback  # the first slice begins there
        low, high = max(0, first), min(song.song.n_frames, first + n_frames)
        if low < high:
            out[i, low - first : high - first, j] = song.spectrogram[low:high, part]
    for chunk, ours in zip(out, batch.songs, strict=True):
        chunk[..., min(recorded_bins(songs[k], hp) for k in ours) :, :] = 0
    return torch.from_numpy(out)


def recorded_bins(song: OpenSong, hp: HParams) -> int:
    """Return how many of the network's bins a song's recording has: those up to half its rate."""
    return min(hp.n_bins, 1 + song.song.sample_rate * hp.n_fft // (2 * hp.sample_rate))


def excerpt(song: OpenSong, hp: HParams) -> torch.Tensor:
    """Read the middle ``valid_seconds`` of a song, as one batch for `mix`.

    Returns
    -------
    torch.Tensor, shape=(1, n_frames, 2, n_bins, 2), float16
    """
    n_frames = min(song.song.n_frames, round(hp.valid_seconds * hp.sample_rate / hp.hop_length))
    start = (song.song.n_frames - n_frames) // 2
    return torch.from_numpy(song.spectrogram[start : start + n_frames].copy())[None]


def mix(spectrograms: torch.Tensor, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale vocals and accompaniment; their sum is a mixture with exactly known vocals.

    Parameters
    ----------
    spectrograms : torch.Tensor, shape=(n, n_frames, 2 or 4, n_bins, 2), float16
    gains : torch.Tensor, shape=(n, 2 or 4)
        Of vocals and accompaniment, and of the second ones, which are added to them.

    Returns
    -------
    vocals, accompaniment : torch.Tensor, shape=(n, n_bins, n_frames), complex64
    """
    scaled = spectrograms.float() * gains[:, None, :, None, None]
    if scaled.shape[2] > 2:
        scaled = scaled.unflatten(2, (-1, 2)).sum(2)
    both = torch.view_as_complex(scaled)  # (n, n_frames, 2, n_bins)
    return both[:, :, 0].mT, both[:, :, 1].mT


def mask_target(
    vocals: torch.Tensor, accompaniment: torch.Tensor, curve_db: torch.Tensor, hp: HParams
) -> torch.Tensor:
    """Return the mask that the network is to learn, as ``mask_target`` defines it.

    Parameters
    ----------
    vocals, accompaniment : torch.Tensor, shape=(..., n_bins, n_frames), complex64
    curve_db : torch.Tensor, shape=(n_bins,)

    Returns
    -------
    torch.Tensor, shape=(..., n_bins, n_frames), float32
        "activity": 1 where the weighted, cubed, scaled vocals are above ``mask_threshold``;
        "dominance": 1 where they are louder than the accompaniment; "ratio": their share of the
        two energies; "phase": how much of the mixture points their way, cut to 0 to 1.
    """
    if hp.mask_target == "activity":
        level = audio.features(vocals, curve_db, hp.vocals_power, hp)
        return (level > hp.mask_threshold).float()
    if hp.mask_target == "dominance":
        return audio.ideal_binary_mask(vocals, accompaniment)
    if hp.mask_target == "phase":
        return audio.ideal_phase_mask(vocals, accompaniment)
    return audio.ideal_ratio_mask(vocals, accompaniment)


def mask_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    mixture: torch.Tensor,
    curve_db: torch.Tensor,
    hp: HParams,
    world: World | None = None,
) -> torch.Tensor:
    """Return how wrong a mask is, as ``loss`` defines it.

    Parameters
    ----------
    logits, target : torch.Tensor, shape=(n, n_bins, n_columns)
    mixture : torch.Tensor, shape=(n, n_bins, n_columns), complex64
        What the mask is laid over.
    curve_db : torch.Tensor, shape=(n_bins,)
    hp : HParams
    world : World, optional
        The mean of the cross entropy's weights is taken over the shares of all ranks.

    Returns
    -------
    torch.Tensor, scalar
        "sdr": the mean over chunks of ``log10(sum((mask - target)² |X|²) / sum((target |X|)²))``,
        both sums plus a hundredth of the mixture's energy: minus a tenth of the
        signal-to-distortion ratio of the masked spectrogram [dB], its phase being what it is. What
        is 20 dB below the mixture is good enough, so that chunks without a voice do not outweigh
        the others. "cross-entropy": binary, a bin's weight being its amplitude, as the ear weights
        it, to the power ``loss_weight``; the weights are then scaled to a mean of 1.
    """
    if hp.loss == "sdr":
        energy = mixture.real.square() + mixture.imag.square()
        wrong, true = (
            (share.square() * energy).sum((1, 2)) for share in (logits.sigmoid() - target, target)
        )
        least = energy.sum((1, 2)) / 100 + LEAST_ENERGY
        return ((wrong + least) / (true + least)).log10().mean()
    level_db = (1 - audio.features(mixture, curve_db, hp.mixture_power, hp)) * hp.min_level_db
    weights = 10 ** (level_db * hp.loss_weight / (10 * hp.mixture_power))
    mean = (world or World()).mean(weights.mean())
    return F.binary_cross_entropy_with_logits(logits, target, weights / mean)


def _offsets(
    songs: list[OpenSong], hp: HParams, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw where the first chunk of every song starts, and return how far apart chunks are."""
    span = hp.chunk_slices * hp.stft_stride
    return rng.integers(1 - span, 1, size=len(songs)), span


def _places(
    songs: list[OpenSong], hp: HParams, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Tile every song with chunks from a random offset on: song and first frame of each."""
    offsets, span = _offsets(songs, hp, rng)
    starts = [
        np.arange(first, song.song.n_frames, span)
        for song, first in zip(songs, offsets.tolist(), strict=True)
    ]
    return np.repeat(np.arange(len(songs)), [len(some) for some in starts]), np.concatenate(starts)


def _draw_seconds(
    rng: np.random.Generator,
    which: np.ndarray,
    gains: np.ndarray,
    n_frames: np.ndarray,
    song_db: np.ndarray,
    hp: HParams,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw songs, frames and gains of second voices and backings, (n, 2) each; most have gain 0.

    What is not to be heard comes from the song that is, so that its band is not narrowed, and from
    behind its end, so that nothing is read.
    """
    second, gain = which.copy(), np.zeros_like(gains)
    start = np.full_like(which, n_frames.max() + hp.lookback)
    for part, share in enumerate((hp.second_voice, hp.second_backing)):
        rows = np.flatnonzero((rng.random(len(which)) < share) & (gains[:, part] != 0))
        first = which[rows, part]
        mates = _draw_mates(n_frames * ~np.isnan(song_db[:, part]), first, rng)
        level_db = song_db[first, part] - song_db[mates, part] - SECOND_DB * rng.random(len(rows))
        audible = np.minimum(song_db[first, part], song_db[mates, part]) > SILENT_DB
        from_frame, gain_of = rng.integers(n_frames[mates]), 10 ** (level_db / 20)
        heard, mates = rows[audible], mates[audible]
        gain[heard, part] = gains[heard, part] * gain_of[audible]
        second[heard, part], start[heard, part] = mates, from_frame[audible]
    return second, start, gain


def _draw_mates(lengths: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw another song than each of `own` by its length; that one where there is no other.

    The songs lie end to end; the draw steps over the own one.
    """
    ends = np.cumsum(lengths)
    before, others = ends[own] - lengths[own], ends[-1] - lengths[own]
    frame = rng.integers(np.maximum(others, 1))
    frame += lengths[own] * (frame >= before)
    return np.where(others > 0, np.searchsorted(ends, frame, side="right"), own)
