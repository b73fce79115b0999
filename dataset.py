"""What build_dataset.py wrote, and how training reads it: songs, chunks, batches on the device.

On disk a song is one ``.npy``, float16, shape (n_frames, n_parts, n_bins, 2): time first, so that
a stretch of frames is one contiguous read; the parts are vocals and accompaniment, or only one of
them for material that is there to be remixed; the last axis is real and imaginary. The mixture is
*defined* as vocals + accompaniment. ``manifest.json``, written last, says what is there.

    songs ──plan_epoch──▶ chunks ──Feed──▶ batches
"""

from __future__ import annotations

import itertools
import json
import os
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import cli
from hparams import GRID, HParams, InputError, differences, from_dict

if TYPE_CHECKING:  # the manifest is read before torch is loaded
    import torch

    from audio import Grid

MANIFEST = "manifest.json"
FORMAT = 1
PARTS = ("vocals", "accompaniment")
LEVEL_FRAMES = 128  # frames, evenly spread, from which a song's level is estimated
SILENT_DB = -80.0  # a part below this level is silence, whose dither no gain may make a voice
SECOND_DB = 12.0  # by which a second voice or backing is softer at most
EQ_HZ = (62.5, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0)  # an octave equalizer's bands


@dataclass(frozen=True)
class Song:
    """One song of a dataset, as the manifest lists it."""

    id: str  # unique within the dataset
    file: str  # relative to the dataset's folder
    split: str  # "train" or "test"
    singer: str  # where the layout tells; else the same as `group`
    group: str  # the song: its clips are never divided between training and validation
    parts: tuple[str, ...]  # order of the array's second axis
    n_frames: int
    sample_rate: int  # of the recording, times its speed [Hz]
    seconds: float
    sha256: str  # of `file`
    inputs: tuple[dict[str, Any], ...]  # source files: path, size [bytes], sha256
    speed: float = 1.0  # how much faster, and higher, than recorded
    taught: bool = False  # its vocals are what another separator found: it scores nothing


@dataclass(frozen=True)
class Manifest:
    """Everything a dataset says about itself."""

    layout: str  # which layout build_dataset.py recognised
    hparams: dict[str, Any]  # the grid, which binds
    songs: tuple[Song, ...]


@dataclass(frozen=True)
class OpenSong:
    """A song whose spectrogram is mapped into memory."""

    song: Song
    spectrogram: np.ndarray  # (n_frames, n_parts, n_bins, 2), float16
    level_db: dict[str, float]  # of each part, over the song [dB re full-scale sine]
    dataset: int = 0  # which of the run's datasets it belongs to


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically; a folder without one is an unfinished build."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=True)
    cli.replace_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def load_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest; InputError if it is not finished, or of another format."""
    path = folder / MANIFEST
    if not os.path.isfile(path):  # false, too, where the name is too long
        raise InputError(f"{folder}: no {MANIFEST}; not a dataset, or its build did not finish")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.pop("format") != FORMAT:
            raise InputError(f"{path}: a dataset of another version (build it again)")
        songs = tuple(map(song_of, stored.pop("songs")))
        from_dict(stored["hparams"])
        return Manifest(**stored, songs=songs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged, or not readable (build the dataset again)") from error


def song_of(stored: dict[str, Any]) -> Song:
    """Return a song as JSON holds it: lists become tuples again."""
    return Song(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})


def open_spectrogram(folder: Path, song: Song, n_bins: int) -> np.ndarray:
    """Map a song's array into memory, read-only: (n_frames, n_parts, n_bins, 2), float16.

    InputError if the file is missing, cut short or not what the manifest promises.
    """
    path = folder / song.file
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, tokenize.TokenError) as error:
        raise InputError(f"{path}: missing or damaged (remove it, build again)") from error
    if array.shape != (song.n_frames, len(song.parts), n_bins, 2) or array.dtype != np.float16:
        raise InputError(f"{path}: not the array the manifest promises (remove it, build again)")
    return array


def open_songs(folders: list[Path], hp: HParams) -> list[OpenSong]:
    """Open every song of some datasets; InputError if one is not whole, or on another grid."""
    songs = []
    for index, folder in enumerate(folders):
        manifest = load_manifest(folder)
        if differing := differences(hp, from_dict(manifest.hparams), GRID):
            built = [f"{name}={stored}" for name, (_, stored) in differing.items()]
            asked = ", ".join(str(value) for value, _ in differing.values())
            raise InputError(
                f"{folder}: built with {', '.join(built)}, not {asked} (build it again; a new "
                f"network can learn from it with --set {' --set '.join(built)})"
            )
        for song in manifest.songs:
            array = open_spectrogram(folder, song, hp.n_bins)
            songs.append(OpenSong(song, array, levels_db(array, song.parts), index))
    return songs


def levels_db(spectrogram: np.ndarray, parts: tuple[str, ...]) -> dict[str, float]:
    """Estimate each part's level from some frames: root of the summed squares over bins [dB]."""
    step = max(1, len(spectrogram) // LEVEL_FRAMES)
    energy = np.square(spectrogram[::step], dtype=np.float32).sum((2, 3)).mean(0)
    return {part: float(10 * np.log10(max(energy[i], 1e-10))) for i, part in enumerate(parts)}


def spectrogram_blocks(
    blocks: Iterable[np.ndarray], grid: Grid, hp: HParams
) -> Iterator[np.ndarray]:
    """Take the STFT of a waveform in blocks, (n_parts, any) each, as songs are stored.

    Yields float16 (n_frames, n_parts, n_bins, 2); in all, the frames of `audio.stft` of the whole.
    OverflowError if float16 cannot hold a value.
    """
    import torch

    import audio

    silence = torch.zeros(1, grid.n_fft // 2)  # centred frames look into it at both ends
    carried = silence
    for block in itertools.chain(map(torch.from_numpy, blocks), [silence]):
        n_parts = max(len(carried), len(block))
        wav = torch.cat([x.expand(n_parts, -1) for x in (carried, block)], -1)
        n_frames = max(0, (wav.shape[-1] - grid.n_fft) // grid.hop_length + 1)
        if n_frames:
            spec = audio.to_network_bins(audio.frames_to_spec(wav, grid), hp)
            pairs = torch.view_as_real(spec.permute(2, 0, 1))  # (n_frames, n_parts, n_bins, 2)
            stored = torch.empty(pairs.shape, dtype=torch.float16)
            stored.copy_(pairs)  # turns and converts in one pass
            if not stored.isfinite().all():
                raise OverflowError("float16 reaches 65504")
            yield stored.numpy()
        carried = wav[..., n_frames * grid.hop_length :]


def identity(songs: list[OpenSong]) -> list[str]:
    """Name exactly the data of a run: id and hash of every song."""
    return [f"{song.song.id} {song.song.sha256}" for song in songs]


def hold_out(
    songs: list[OpenSong], hp: HParams, others: list[OpenSong] | None = None
) -> tuple[list[OpenSong], list[OpenSong]]:
    """Divide songs into those to learn from and those to validate on.

    Whole singers are held out (where the layout does not tell, a song is its own singer), by the
    seed, until they hold ``valid_fraction`` of the frames; with one or two singers, as in MIR-1K,
    whole songs with all their clips. Given `others`, those of them that share no file with `songs`
    are validated on. Songs at another speed than recorded, or labelled by a teacher, never are,
    and are not learnt from if their singer is. InputError if no song is left on a side, or those to
    learn from lack vocals or accompaniment.
    """
    songs = [song for song in songs if song.song.split == "train"]
    sources = {source["sha256"] for song in songs for source in song.song.inputs}
    candidates = songs if others is None else others
    valid = [
        song
        for song in candidates
        if set(song.song.parts) == set(PARTS)  # a true voice and its backing, as recorded
        and song.song.speed == 1
        and not song.song.taught
        and (others is None or not sources & {s["sha256"] for s in song.song.inputs})
    ]
    if not valid:
        raise InputError(
            f"none of {len(candidates)} songs can be validated on: it takes vocals and "
            "accompaniment as recorded, not learnt from (give more datasets, or --validate-on)"
        )
    learn = songs
    if others is None:
        key = "singer" if len({song.song.singer for song in valid}) > 2 else "group"
        held_out = _groups_to_hold_out(valid, key, hp)
        learn = [song for song in songs if getattr(song.song, key) not in held_out]
        valid = [song for song in valid if getattr(song.song, key) in held_out]
    for part in PARTS:
        if not any(part in song.song.parts for song in learn):
            few = f"none of {len(learn)} songs to learn from"
            raise InputError(f"{few} has {part}; training needs both (give more datasets)")
    return learn, valid


def _groups_to_hold_out(songs: list[OpenSong], key: str, hp: HParams) -> set[str]:
    """Draw singers, or songs with all their clips, that hold ``valid_fraction`` of the frames."""
    n_frames: Counter[str] = Counter()
    for song in songs:
        n_frames[getattr(song.song, key)] += song.song.n_frames
    groups = np.random.default_rng([hp.seed, 1]).permutation(sorted(n_frames))
    n_so_far = np.cumsum([n_frames[group] for group in groups])
    n_groups = 1 + int(np.searchsorted(n_so_far, hp.valid_fraction * n_so_far[-1]))
    return set(groups[: min(n_groups, max(1, len(groups) - 1))])  # one is left to learn from


@dataclass(frozen=True)
class Chunks:
    """Training examples: where the two signals of each come from, and how loud they become.

    Every array has a row for each chunk; but for the last, a column each for vocals and
    accompaniment, and once more for the second voice and backing where there are any.
    """

    songs: np.ndarray  # int64, index of the song
    starts: np.ndarray  # int64, frame of the first slice's centre; may lie before the song
    gains: np.ndarray  # float32, linear; the sign is the polarity
    eq_db: np.ndarray  # float32, the equalizers' bands, of vocals and of accompaniment; or none

    def __len__(self) -> int:
        return len(self.songs)

    def __getitem__(self, rows: slice) -> Chunks:
        return Chunks(*(values[rows] for values in vars(self).values()))


def plan_epoch(
    songs: list[OpenSong], hp: HParams, epoch: int, shares: tuple[float, ...] = ()
) -> Chunks:
    """Plan the chunks of one epoch, a function of the seed and the epoch alone.

    Chunks tile every song from a random offset on, so that each slice position is the centre of
    one slice per epoch (in ``stft_stride`` epochs)::

        song            ├───────────────────────────────┤
        chunks    ┊  0    ┊  1    ┊  2    ┊  3    ┊  4    ┊    new offset every epoch

    With `shares`, one for each dataset, an epoch has as many, but each dataset's come as often as
    its share says. A chunk is the song's own mixture, or, with probability ``remix`` and where a
    part is missing, its vocals over a random place of another song's accompaniment, scaled to
    their level. Some lose their voice, others get a second voice or backing. The last batch is
    filled up with places that come a second time.
    """
    rng = np.random.default_rng([hp.seed, 2, epoch])
    index, start = _places(songs, hp, rng)
    order = _draw_order(np.array([songs[i].dataset for i in index]), shares, rng)
    order = np.resize(order, -(-len(order) // hp.batch_size) * hp.batch_size)
    index, start = index[order], start[order]
    n_frames = np.array([song.song.n_frames for song in songs])
    weights = _mate_weights(songs, n_frames, shares)
    song_db = np.array([[song.level_db.get(part, np.nan) for part in PARTS] for song in songs])
    has = ~np.isnan(song_db)  # (n_songs, 2)

    which, where = np.stack([index, index], 1), np.stack([start, start], 1)
    gains = 10 ** (rng.uniform(-hp.gain_db, hp.gain_db, (len(order), 2)) / 20)
    gains *= rng.choice([-1, 1], gains.shape)
    from_elsewhere = (rng.random(len(order)) < hp.remix) | ~has[index].all(1)
    for part in (0, 1):  # vocals are looked for only where there are none
        rows = np.flatnonzero(from_elsewhere & (has[index, 0] == (part == 1)))
        own = index[rows]
        mates = _draw_mates(weights * has[:, part], own, rng)
        which[rows, part] = mates
        where[rows, part] = rng.integers(n_frames[mates])
        kept_db, mates_db = song_db[own, 1 - part], song_db[mates, part]
        audible = np.minimum(kept_db, mates_db) > SILENT_DB
        gains[rows, part] *= 10 ** (np.where(audible, kept_db - mates_db, 0) / 20)
    gains[rng.random(len(order)) < hp.instrumental, 0] = 0
    n_bands = 2 * len(EQ_HZ) if hp.equalizer_db else 0
    eq_db = hp.equalizer_db * rng.standard_normal((len(order), n_bands))
    if hp.second_voice or hp.second_backing:
        second = _draw_seconds(rng, which, gains, n_frames, weights, song_db, hp)
        first = which, where, gains
        which, where, gains = (np.hstack(pair) for pair in zip(first, second, strict=True))
    gains *= 10 ** (rng.uniform(-hp.level_db, hp.level_db, (len(order), 1)) / 20)
    return Chunks(which, where, gains.astype(np.float32), eq_db.astype(np.float32))


def batches_of(plan: Chunks, hp: HParams) -> list[Chunks]:
    """Cut a plan into its batches."""
    return [plan[i : i + hp.batch_size] for i in range(0, len(plan), hp.batch_size)]


def count_batches(songs: list[OpenSong], hp: HParams, epoch: int) -> int:
    """Return how many batches `plan_epoch` gives, without planning them."""
    index, _ = _places(songs, hp, np.random.default_rng([hp.seed, 2, epoch]))
    return -(-len(index) // hp.batch_size)


def chunk_frames(hp: HParams) -> int:
    """Frames of a chunk: its slices' centres, and what the network sees on both sides."""
    return (hp.chunk_slices - 1) * hp.stft_stride + hp.stft_frames


def _places(
    songs: list[OpenSong], hp: HParams, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Tile every song with chunks from a random offset on: song and first frame of each."""
    span = hp.chunk_slices * hp.stft_stride
    offsets = rng.integers(1 - span, 1, size=len(songs)).tolist()
    starts = [
        np.arange(first, song.song.n_frames, span)
        for song, first in zip(songs, offsets, strict=True)
    ]
    return np.repeat(np.arange(len(songs)), [len(some) for some in starts]), np.concatenate(starts)


def _draw_order(
    datasets: np.ndarray, shares: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Order the places, of which the datasets are given, at random and by the shares."""
    if not shares:
        return rng.permutation(len(datasets))
    ends = np.round(np.cumsum(shares) / sum(shares) * len(datasets)).astype(int)
    counts = np.diff(ends, prepend=0)
    places = [
        np.resize(rng.permutation(np.flatnonzero(datasets == i)), count)
        for i, count in enumerate(counts)
    ]
    return rng.permutation(np.concatenate(places))


def _mate_weights(
    songs: list[OpenSong], n_frames: np.ndarray, shares: tuple[float, ...]
) -> np.ndarray:
    """Return the chance of every song to be remixed with: its length, and its dataset's share."""
    if not shares:
        return n_frames
    datasets = np.array([song.dataset for song in songs])
    per_frame = np.array(shares) / np.bincount(datasets, n_frames, len(shares))
    weights = per_frame[datasets] * n_frames
    return np.maximum(1, np.round(1e9 * weights / weights.sum())).astype(np.int64)


def _draw_seconds(
    rng: np.random.Generator,
    which: np.ndarray,
    gains: np.ndarray,
    n_frames: np.ndarray,
    weights: np.ndarray,
    song_db: np.ndarray,
    hp: HParams,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw songs, frames and gains of second voices and backings, (n, 2) each; most have gain 0."""
    # What is silent is from the first one's song, so that the band is not narrowed, but from
    # behind its end, so that nothing is read.
    second, gain = which.copy(), np.zeros_like(gains)
    start = np.full_like(which, n_frames.max() + hp.stft_frames)
    for part, share in enumerate((hp.second_voice, hp.second_backing)):
        rows = np.flatnonzero((rng.random(len(which)) < share) & (gains[:, part] != 0))
        first = which[rows, part]
        mates = _draw_mates(weights * ~np.isnan(song_db[:, part]), first, rng)
        level_db = song_db[first, part] - song_db[mates, part] - SECOND_DB * rng.random(len(rows))
        audible = np.minimum(song_db[first, part], song_db[mates, part]) > SILENT_DB
        from_frame, gain_of = rng.integers(n_frames[mates]), 10 ** (level_db / 20)
        rows_with, mates = rows[audible], mates[audible]
        gain[rows_with, part] = gains[rows_with, part] * gain_of[audible]
        second[rows_with, part], start[rows_with, part] = mates, from_frame[audible]
    return second, start, gain


def _draw_mates(weights: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw another song than each of `own` by its weight; that one where there is no other."""
    # The songs lie end to end; the draw steps over the own one.
    ends = np.cumsum(weights)
    before, others = ends[own] - weights[own], ends[-1] - weights[own]
    place = rng.integers(np.maximum(others, 1))
    place += weights[own] * (place >= before)
    return np.where(others > 0, np.searchsorted(ends, place, side="right"), own)


class Batch(NamedTuple):
    """A batch of `Chunks` on the device."""

    songs: torch.Tensor
    starts: torch.Tensor
    gains: torch.Tensor
    eq_db: torch.Tensor
    spectrograms: torch.Tensor | None = None  # None: `Feed.spectrograms` gathers them


class Feed:
    """Gives the spectrograms of chunks on the device, from its own memory or from the disk.

    A `resident` one loads all frames to the device once, and gathers there; otherwise a thread
    reads each batch from the memory-mapped files while the device works on those before.
    """

    def __init__(
        self, songs: list[OpenSong], hp: HParams, device: torch.device, resident: bool
    ) -> None:
        import torch

        self.songs, self.hp, self.device, self.resident = songs, hp, device, resident
        self.are_taught = torch.tensor([song.song.taught for song in songs], device=device)
        if not resident:
            return
        n_parts = np.array([len(song.song.parts) for song in songs])
        n_frames = np.array([song.song.n_frames for song in songs])
        ends = 1 + np.cumsum(n_parts * n_frames)
        self._frames = torch.empty(ends[-1], hp.n_bins, 2, dtype=torch.float16, device=device)
        self._frames[0] = 0  # what lies outside the songs
        for song, end in zip(songs, ends, strict=True):
            rows = torch.tensor(song.spectrogram).flatten(0, 1)
            self._frames[end - len(rows) : end] = rows
        # The row of a part's frame t is its first row plus t times the song's number of parts.
        before = ends - n_parts * n_frames
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
        """Give one batch after the other."""
        sent = map(self._send, batches)
        return sent if self.resident else cli.ahead(sent)

    def spectrograms(self, batch: Batch) -> torch.Tensor:
        """Return the frames of a batch on the device: (n, n_frames, 2 or 4, n_bins, 2), float16.

        The third axis is that of `Chunks`. Zero outside the songs, and above the band that all
        recordings have: a voice recorded at 16 kHz over a backing of 44.1 kHz would teach that
        voices end at 8 kHz.
        """
        if batch.spectrograms is not None:
            return batch.spectrograms
        songs = batch.songs
        frame = batch.starts[:, None] + self._offsets  # (n, n_frames, 2 or 4)
        first = self._first_rows[songs, self._parts[: songs.shape[1]]]
        row = first[:, None] + frame * self._n_parts[songs][:, None]
        outside = (frame < 0) | (frame >= self._n_frames[songs][:, None])
        row.masked_fill_(outside, 0)
        frames = self._frames.index_select(0, row.flatten())
        frames = frames.view(*row.shape, *frames.shape[1:])
        if not self._all_whole:
            lost = self._bins >= self._n_bins[songs].amin(1)[:, None]  # (n, n_bins)
            frames.masked_fill_(lost[:, None, None, :, None], 0)
        return frames

    def _send(self, batch: Chunks) -> Batch:
        """Send a batch without waiting: a GPU fetches it from pinned memory by itself."""
        import torch

        read = [] if self.resident else [read_batch(self.songs, batch, self.hp)]
        tensors = map(torch.from_numpy, [*vars(batch).values(), *read])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has its own
            tensors = map(torch.Tensor.pin_memory, tensors)
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in tensors))


def read_batch(songs: list[OpenSong], batch: Chunks, hp: HParams) -> np.ndarray:
    """Read the frames of a batch from disk, as `Feed.spectrograms` gives them."""
    n_frames = chunk_frames(hp)
    out = np.zeros((len(batch), n_frames, batch.songs.shape[1], hp.n_bins, 2), dtype=np.float16)
    for i, j in np.ndindex(*batch.songs.shape):
        song = songs[batch.songs[i, j]]
        part = song.song.parts.index(PARTS[j % 2])
        first = int(batch.starts[i, j]) - hp.lookback  # the first slice begins there
        low, high = max(0, first), min(song.song.n_frames, first + n_frames)
        if low < high:
            out[i, low - first : high - first, j] = song.spectrogram[low:high, part]
    for chunk, row in zip(out, batch.songs, strict=True):
        chunk[..., min(recorded_bins(songs[k], hp) for k in row) :, :] = 0
    return out


def recorded_bins(song: OpenSong, hp: HParams) -> int:
    """Return how many of the network's bins a song's recording has: those up to half its rate."""
    return min(hp.n_bins, 1 + song.song.sample_rate * hp.n_fft // (2 * hp.sample_rate))
