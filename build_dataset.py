"""Turn a folder of music into a dataset for train.py: one spectrogram per song, and a manifest.

The layout is recognised and printed: DSD100, MUSDB18(-HQ), MIR-1K, a folder of stems per song, only
voices or only backings. Songs are built in parallel, finished ones are kept: an interrupted build
goes on where it was. The manifest is written last; without it there is no dataset.

    python build_dataset.py DSD100 datasets/dsd100
    python build_dataset.py acapellas datasets/voices --as voices
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import cli
from hparams import GRID, HParams, InputError
from sound import reading, tracks
from sound.tracks import Extent, Track

SONGS, JOURNAL = "songs", ".build"  # in the output, beside the manifest
BLOCK = 2**17  # samples decoded at once
SILENT = 1e-4  # vocals that never pass -80 dBFS are counted as silent


@dataclass(frozen=True)
class Task:
    """What all songs of one build share."""

    root: Path
    output: Path
    hp: HParams
    verify: bool = False
    check_pairs: bool = True
    taught: bool = False


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = make_parser().parse_args(argv)
    hp = cli.settings_of(args)
    task = Task(args.root, args.output, hp, args.verify, args.check_pairs, args.taught)
    found = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    songs = found.tracks
    if args.speed != 1:
        songs = [replace(t, name=f"{t.name} x{args.speed:g}", speed=args.speed) for t in songs]
    n_train = sum(track.split == "train" for track in songs)
    print(
        f"{args.root}: {found.layout}: {n_train} songs to train, {len(songs) - n_train} to test",
        flush=True,
    )
    extents, bad = {}, []
    for track in songs:
        try:
            extents[track] = tracks.measure(track)
            for note in extents[track].notes:
                cli.warn(note)
        except InputError as error:
            bad.append(str(error))
    for message in sorted(found.bad + bad):
        cli.complain(message)
    with the_only_build_in(args.output):
        check_output(task, songs, args.overwrite)
        records, n_failed = build_songs(task, extents, args.workers)
        n_bad = len(found.bad) + len(bad) + n_failed
        if n_bad and not args.skip_bad:
            raise InputError(
                f"{n_bad} of {n_bad + len(records)} songs are bad, each named above; repair them "
                "and run again (the others are kept), or leave them out with --skip-bad"
            )
        if not records:
            raise InputError(f"{args.root}: no song can be used")
        save(task, found.layout, records, n_bad)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__, "examples:\n" + __doc__.split("\n\n")[-1])
    add = parser.add_argument
    add("root", type=Path, help="folder of music; its layout is recognised and printed")
    add("output", type=Path, help="folder of the dataset; 1.3 GB an hour (4.1 kB a frame)")
    add(
        "--as",
        dest="kind",
        choices=tracks.KINDS,
        help="what a folder without a data set's layout holds: songs (a folder of stems each), "
        "voices only, or backings only; by default its own name and its files' names decide",
    )
    add(
        "--voice-pattern",
        metavar="REGEX",
        default=tracks.VOICE_PATTERN,
        help="which stems of a song are its vocals: those in whose name, in lower case and with "
        "one space for everything but letters and digits, this is found; all other stems are the "
        "accompaniment, all stems together the mixture, unless a file is called mixture. By "
        "default names that contain vocal, vox, voice, choir, singer or a cappella, or the word "
        "voc, bv or bgv, but not after no, non, without or minus: %(default)s",
    )
    add(
        "--speed",
        type=a_speed,
        default=1.0,
        metavar="X",
        help="play everything X times as fast, and higher, as tape does (0.5 to 2): a dataset to "
        "learn from beside the one as recorded",
    )
    add(
        "--taught",
        action="store_true",
        help="the vocals are what another separator found in these songs: train.py learns from "
        "them, and never scores itself on them",
    )
    add(
        "--workers",
        type=cli.positive_count,
        metavar="N",
        help="processes, each building one song at a time (default: one a core)",
    )
    add(
        "--verify",
        action="store_true",
        help="hash finished songs and their sources instead of trusting sizes and dates; "
        "what does not match is named and built again",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out songs that cannot be used; by default they are named, the others are "
        "built, and no manifest is written",
    )
    add(
        "--check-pairs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse songs whose vocals are not in the mixture as they are: shifted, inverted, "
        "much too loud or soft, or of another song (default: on)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace a dataset of other settings or songs; it stays whole until this one is",
    )
    return parser


def a_speed(text: str) -> float:
    """Read a speed for argparse."""
    if not 0.5 <= float(text) <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.5 and 2")
    return float(text)


@contextlib.contextmanager
def the_only_build_in(output: Path) -> Iterator[None]:
    """Make the output folder and keep a second build out of it."""
    try:
        if output.is_dir() and any(output.iterdir()) and not (output / JOURNAL).is_dir():
            raise InputError(f"{output}: holds other files (choose a new or empty folder)")
        for folder in (output / SONGS, output / JOURNAL):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: {error.strerror} (choose another folder)") from error
    with cli.locked(output):
        remove_unfinished(output)
        try:
            yield
        finally:
            remove_unfinished(output)


def remove_unfinished(output: Path) -> None:
    """Remove what killed processes left; nobody else writes here while we hold the lock."""
    for path in output.glob("*/.*.tmp-*"):
        path.unlink(missing_ok=True)


def check_output(task: Task, songs: list[Track], overwrite: bool) -> None:
    """Refuse to turn one dataset into another by mistake, and note the grid of this one."""
    import dataset

    grid_file = task.output / JOURNAL / "grid.json"
    if not overwrite:
        stored = [json.loads(grid_file.read_text())] if grid_file.is_file() else []
        if (task.output / dataset.MANIFEST).is_file():
            manifest = dataset.load_manifest(task.output)
            stored.append(manifest.hparams)
            lost = sorted({song.id for song in manifest.songs} - {track.name for track in songs})
            if lost:
                raise InputError(
                    f"{task.output}: holds {len(lost)} songs that {task.root} does not, such as "
                    f"{lost[0]} (choose another output, or --overwrite to drop them)"
                )
        for grid in stored:
            if grid != grid_of(task.hp):
                raise InputError(
                    f"{task.output}: built with {grid}, asked for {grid_of(task.hp)} "
                    "(choose another output, or --overwrite)"
                )
    text = json.dumps(grid_of(task.hp))
    cli.replace_atomically(grid_file, lambda file: file.write(text.encode()))


def build_songs(
    task: Task, extents: dict[Track, Extent], n_workers: int | None
) -> tuple[list[dict[str, Any]], int]:
    """Build what is not there yet; returns the records of all songs, and how many failed."""
    import dataset

    records = {track: record for track in extents if (record := finished(task, track))}
    missing = [track for track in extents if track not in records]
    if any((task.output / file_of(task, track)).exists() for track in missing):
        # Their arrays will be replaced, so the old dataset ends here.
        (task.output / dataset.MANIFEST).unlink(missing_ok=True)
    check_space(task, [(track, extents[track]) for track in missing])
    jobs = list(extents) if task.verify else missing
    jobs.sort(key=lambda track: -extents[track].seconds)  # a long one at the end keeps all waiting
    start, n_failed = time.perf_counter(), 0
    results = cli.in_processes(functools.partial(build_song, task), jobs, n_workers)
    total = round(sum(extents[track].seconds for track in jobs))
    with contextlib.closing(results), cli.progress(total, "s") as bar:
        for track, result in results:
            bar.update(round(extents[track].seconds))
            if isinstance(result, InputError):
                cli.complain(result)
                n_failed += 1
                records.pop(track, None)
                continue
            records[track], warning = result
            if warning:
                cli.warn(warning)
    if jobs:
        seconds = time.perf_counter() - start
        print(f"built {total} s of music, {total / seconds:.0f} s per second")
    return list(records.values()), n_failed


def check_space(task: Task, songs: list[tuple[Track, Extent]]) -> None:
    """Refuse a build that the disk cannot hold."""
    frames_a_second = 1.01 * task.hp.sample_rate / task.hp.hop_length
    need = sum(
        4 * task.hp.n_bins * len(track.signals) * frames_a_second * extent.seconds + 8192
        for track, extent in songs
    )
    free = shutil.disk_usage(task.output).free
    if need > free:
        raise InputError(
            f"no space left on {task.output}: need {need / 1e6:.3g} MB, have {free / 1e6:.3g} MB"
        )


def save(task: Task, layout: str, records: list[dict[str, Any]], n_bad: int) -> None:
    """Write the manifest, remove what is not in it, and print the sum."""
    from dataset import Manifest, Song, save_manifest

    songs = [
        Song(**{**record["song"], "parts": tuple(record["song"]["parts"])}) for record in records
    ]
    songs.sort(key=lambda song: song.id)
    splits_of: dict[str, dict[str, str]] = {}
    for song in songs:
        for source in song.inputs:
            splits_of.setdefault(source["sha256"], {})[song.split] = song.id
    for places in splits_of.values():
        if len(places) > 1:
            cli.warn(
                f"{places['train']} (train) and {places['test']} (test) share a file; scores on "
                "songs that were trained on are too good"
            )
    save_manifest(task.output, Manifest(layout, grid_of(task.hp), tuple(songs)))
    keep = {Path(song.file).stem for song in songs}
    for path in [*(task.output / SONGS).glob("*.npy"), *(task.output / JOURNAL).glob("*-*.json")]:
        if path.stem not in keep:
            path.unlink()
    n_slices = sum(math.ceil(song.n_frames / task.hp.stft_stride) for song in songs)
    n_bytes = sum((task.output / song.file).stat().st_size for song in songs)
    n_silent = sum(record["silent"] for record in records)
    notes = [f"{n_silent} with silent vocals"] * bool(n_silent)
    notes += [f"{n_bad} bad ones left out"] * bool(n_bad)
    print(
        f"{task.output}: {', '.join([f'{len(songs)} songs', *notes])}, "
        f"{sum(song.seconds for song in songs) / 3600:.2f} hours, {n_slices:,} slices at "
        f"stft_stride {task.hp.stft_stride}, {n_bytes:,} bytes"
    )


# --- One song ------------------------------------------------------------------------------------


def build_song(task: Task, track: Track) -> tuple[dict[str, Any], str]:
    """Write one song's spectrogram and its record; with --verify only if something is wrong.

    The array appears under its name only when it is whole and its pair has been checked; the
    record follows. Returns the record, and what was found damaged, or "".

    Raises
    ------
    InputError
        If a source cannot be read or changes meanwhile, if the pair does not fit, if the sound is
        too loud for float16, or if the disk is full.
    """
    import audio
    import dataset

    damaged = ""
    if task.verify and (record := finished(task, track)):
        damaged = damage(task, record["song"])
        if not damaged:
            return record, ""
    hp, file = task.hp, file_of(task, track)
    sources = sources_of(task, track)
    extent = tracks.measure(track)
    grid = audio.grid_at(extent.sample_rate, hp)
    shape = (grid.n_frames(extent.n_samples), len(track.signals), hp.n_bins, 2)
    digest, pair, peaks = hashlib.sha256(), PairCheck(), np.zeros(len(track.signals))

    def blocks() -> Iterator[np.ndarray]:
        for block in tracks.read_blocks(track, BLOCK):
            np.maximum(peaks, np.abs(block).max(1), out=peaks)
            if task.check_pairs and len(block) == 2:
                pair.add(*block)
            yield block

    def write(out: BinaryIO) -> None:
        arrays = dataset.spectrogram_blocks(blocks(), grid, hp)
        for data in itertools.chain([dataset.npy_header(shape)], arrays):
            digest.update(data)
            out.write(data)
        problem = pair.problem(has_mixture=bool(track.mixture))
        if problem:
            raise InputError(f"{track.vocals[0].path}: {problem} (--no-check-pairs: use as it is)")

    try:
        cli.replace_atomically(task.output / file, write)
    except OverflowError as error:
        raise InputError(
            f"{track.paths[0]}: too loud: peak {peaks.max():.3g}, where 1 is full scale (lower it)"
        ) from error
    inputs = [
        {"path": _within(task, path), "size": path.stat().st_size, "sha256": reading.sha256(path)}
        for path in track.paths
    ]
    if sources_of(task, track) != sources:
        raise InputError(f"{track.paths[0]}: a source changed while it was read (run again)")
    song = dataset.Song(
        id=track.name,
        file=file,
        split=track.split,
        singer=track.singer,
        group=track.group,
        parts=track.signals,
        n_frames=shape[0],
        sample_rate=extent.sample_rate,
        seconds=extent.seconds,
        sha256=digest.hexdigest(),
        inputs=tuple(inputs),
        speed=track.speed,
        taught=task.taught,
    )
    record = {
        "sources": sources,
        "song": asdict(song),
        "n_bytes": (task.output / file).stat().st_size,
        "pair_checked": task.check_pairs,
        "silent": bool(track.vocals and peaks[0] < SILENT),
    }
    text = json.dumps(record)
    cli.replace_atomically(journal_of(task, file), lambda out: out.write(text.encode()))
    return record, damaged


class PairCheck:
    """Find the gain at which vocals are in their mixture: 1, if both belong together.

    Vocals that are shifted by more than a few samples, inverted, or of another song have a gain
    near or below 0. It is the correlation of both at lag 0, in short segments, whose spread tells
    how much of it may be chance.
    """

    # Of 1000 clips of MIR-1K and 7 songs at 44.1 kHz the gains are 0.90 to 1.12, but 1.41 for one
    # whose mixture is a sum by definition; there only an accompaniment that is the mixture is to
    # be found: 2.
    GAINS, GAINS_OF_SUM = (0.6, 1.5), (0.3, 1.7)
    SEGMENT = 4096  # samples
    LEAST_SEGMENTS = 20  # with voice; what is shorter passes
    CERTAIN = 5  # standard deviations

    def __init__(self) -> None:
        self._segments: list[np.ndarray] = []

    def add(self, vocals: np.ndarray, accompaniment: np.ndarray) -> None:
        """Take in the next block of both, mono."""
        whole = len(vocals) - len(vocals) % self.SEGMENT
        voice, mixture = (
            x[:whole].reshape(-1, self.SEGMENT) for x in (vocals, vocals + accompaniment)
        )
        sums = np.stack([np.einsum("ij,ij->i", voice, x) for x in (voice, mixture)])
        self._segments.append(sums[:, sums[0] > 1e-7 * self.SEGMENT])

    def problem(self, has_mixture: bool) -> str | None:
        """Say in numbers what is wrong with the pair and what to do; None if nothing is.

        Parameters
        ----------
        has_mixture : bool
            False if the mixture is not a file but the sum of vocals and accompaniment.
        """
        energy, product = np.concatenate([np.zeros((2, 0)), *self._segments], 1)
        if len(energy) < self.LEAST_SEGMENTS:
            return None
        gain = product.sum() / energy.sum()
        deviation = np.sqrt(np.square(product - gain * energy).sum()) / energy.sum()
        low, high = self.GAINS if has_mixture else self.GAINS_OF_SUM
        if low <= gain <= high or abs(gain - 1) < self.CERTAIN * deviation:
            return None
        if not has_mixture:
            return (
                f"the accompaniment holds the vocals, too (gain {gain - 1:.2f}); "
                "if it is the mixture, name it mixture"
            )
        reason = "inverted" if gain < -0.5 else "shifted, or of another song"
        if gain > 0.4:
            reason = f"at another level ({20 * np.log10(gain):+.1f} dB)"
        return f"the mixture holds these vocals at gain {gain:.2f} instead of 1: {reason}?"


def finished(task: Task, track: Track) -> dict[str, Any] | None:
    """Return the record of a song that is built, if its sources are as they were then."""
    file = file_of(task, track)
    try:
        record = json.loads(journal_of(task, file).read_text())
        is_whole = (
            (task.output / file).stat().st_size == record["n_bytes"]
            and record["sources"] == sources_of(task, track)
            and (record["pair_checked"] or not task.check_pairs)
        )
        record["song"]["taught"] = task.taught
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if is_whole else None


def damage(task: Task, song: dict[str, Any]) -> str:
    """Hash a finished song and its sources; returns what differs from the record, or ""."""
    if reading.sha256(task.output / song["file"]) != song["sha256"]:
        return f"{task.output / song['file']}: damaged; built again"
    for source in song["inputs"]:
        path = task.root / source["path"]
        if reading.sha256(path) != source["sha256"]:
            return f"{path}: other content under the same size and date; built again"
    return ""


def sources_of(task: Task, track: Track) -> dict[str, Any]:
    """Describe all that a finished song depends on, as the journal keeps it."""
    parts = {
        name: [(_within(task, part.path), part.channel, part.stream) for part in parts]
        for name, parts in track.parts.items()
    }
    stamps = []
    for path in track.paths:
        try:
            stamps.append((path.stat().st_size, path.stat().st_mtime_ns))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
    labels = (track.split, track.singer, track.group)
    return json.loads(json.dumps({"labels": labels, "parts": parts, "stamps": stamps}))


def _within(task: Task, path: Path) -> str:
    return path.relative_to(task.root).as_posix()


def grid_of(hp: HParams) -> dict[str, int]:
    """Return the settings that a dataset binds."""
    return {name: getattr(hp, name) for name in GRID}


def file_of(task: Task, track: Track) -> str:
    """Name a song's array within the dataset: the same again for the same song and grid."""
    from dataset import FORMAT

    # Two grids have two names, so that --overwrite can build beside the old dataset.
    about = repr((track.name, grid_of(task.hp), FORMAT)).encode(errors="surrogatepass")
    readable = re.sub(r"[^A-Za-z0-9]+", "_", track.name)[:64]
    return f"{SONGS}/{readable}-{hashlib.sha256(about).hexdigest()[:12]}.npy"


def journal_of(task: Task, file: str) -> Path:
    """Name the record that belongs to a song's array."""
    return task.output / JOURNAL / Path(file).with_suffix(".json").name


if __name__ == "__main__":
    raise SystemExit(main())
