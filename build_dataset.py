"""Turn a folder of music into a dataset for train.py: one spectrogram per song, and a manifest.

The layout is recognised and printed: DSD100, MUSDB18(-HQ), MIR-1K, else a folder of stems per song
(or, with --as, only voices or only backings). Songs are built in parallel, finished ones are kept:
an interrupted build goes on where it was. The manifest is written last; without it there is no
dataset.

    python build_dataset.py DSD100 datasets/dsd100
    python build_dataset.py acapellas datasets/voices --as voices
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

import cli
import dataset
from dataset import Song
from hparams import GRID, HParams, InputError
from sound import pairs, reading, tracks
from sound.tracks import Track

if TYPE_CHECKING:
    from audio import Grid

SONGS = "songs"  # folder in the output, beside the manifest: of every song its array and a note


@dataclass(frozen=True)
class Task:
    """What all songs of one build share."""

    root: Path
    output: Path
    hp: HParams
    check_pairs: bool = True
    taught: bool = False


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = make_parser().parse_args(argv)
    hp = cli.settings_of(args)
    task = Task(args.root, args.output, hp, args.check_pairs, args.taught)
    music = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    songs = music.tracks
    if args.speed != 1:
        songs = [replace(t, name=f"{t.name} x{args.speed:g}", speed=args.speed) for t in songs]
    n_train = sum(track.split == "train" for track in songs)
    print(
        f"{args.root}: {music.layout}: {n_train} songs to train, {len(songs) - n_train} to test",
        flush=True,
    )
    for text in filter(None, (music.roles, music.left_out)):
        print(cli.printable(f"{args.root}: {text}"))
    for message in music.bad:
        cli.complain(message)
    with the_only_build_in(args.output):
        if not args.overwrite:
            refuse_another_dataset(task, songs)
        built = build_songs(task, songs, args.workers)
        n_bad = len(songs) + len(music.bad) - len(built)
        if n_bad and not args.skip_bad:
            raise InputError(
                f"{n_bad} of {n_bad + len(built)} songs are bad, each named above; repair them "
                "and run again (the others are kept), or leave them out with --skip-bad"
            )
        if not built:
            raise InputError(f"{args.root}: no song can be used")
        finish(task, music.layout, built, n_bad)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("root", type=Path, help="folder of music; its layout is recognised and printed")
    add("output", type=Path, help="folder of the dataset; 1.3 GB an hour (4.1 kB a frame)")
    text = "what a folder without a data set's layout holds (default: songs)"
    add("--as", dest="kind", choices=tracks.KINDS, help=text)
    text = (
        "what is found in the names (lower case, spaces between words) of a song's vocal stems. By "
        "default vocal, vox, voice, choir, singer, a cappella, bv …, but not NoVox, karaoke …"
    )
    add("--voice-pattern", metavar="REGEX", default=tracks.VOICE_PATTERN, help=text)
    text = "play everything X times as fast, and higher, as tape does"
    add("--speed", type=cli.positive_number, default=1.0, metavar="X", help=text)
    add("--taught", action="store_true", help="another separator made the vocals: never scored on")
    add("--workers", type=cli.positive_count, metavar="N", help="songs at a time (default: cores)")
    add("--skip-bad", action="store_true", help="leave out songs that cannot be used")
    text = "refuse songs whose vocals are not in the mixture as they are, or are all of it (on)"
    add("--check-pairs", action=argparse.BooleanOptionalAction, default=True, help=text)
    add("--overwrite", action="store_true", help="replace a dataset of other settings or songs")
    return parser


@contextlib.contextmanager
def the_only_build_in(output: Path) -> Iterator[None]:
    """Make the output folder and keep a second build out of it."""
    cli.check_writable(output / dataset.MANIFEST)
    if {path.name for path in output.glob("[!.]*")} - {SONGS, dataset.MANIFEST}:
        raise InputError(f"{output}: holds other files (choose a new or empty folder)")
    with cli.locked(output):
        try:
            yield
        finally:
            for path in output.rglob(".*.tmp-*"):  # what killed processes left
                path.unlink(missing_ok=True)


def refuse_another_dataset(task: Task, songs: list[Track]) -> None:
    """Keep one dataset from being turned into another by mistake."""
    if not (task.output / dataset.MANIFEST).is_file():
        return
    manifest, grid = dataset.load_manifest(task.output), grid_of(task.hp)
    lost = sorted({song.id for song in manifest.songs} - {track.name for track in songs})
    what = ""
    if manifest.hparams != grid:
        what = f"built with {manifest.hparams}, asked for {grid}"
    elif lost:
        what = f"holds {len(lost)} songs that {task.root} does not, such as {lost[0]}"
    if what:
        raise InputError(f"{task.output}: {what} (choose another output, or --overwrite)")


def build_songs(task: Task, listed: list[Track], n_workers: int | None) -> list[Song]:
    """Build what is not there yet; returns all songs."""
    songs = {track: song for track in listed if (song := finished(task, track))}
    jobs = [track for track in listed if track not in songs]
    if any((task.output / file_of(task, track)).exists() for track in jobs):
        # Their arrays will be replaced, so the old dataset ends here.
        (task.output / dataset.MANIFEST).unlink(missing_ok=True)
    jobs.sort(key=tracks.n_bytes, reverse=True)  # a long one at the end keeps all waiting
    built = dict(cli.in_processes(functools.partial(build_song, task), jobs, n_workers))
    return sorted((songs | built).values(), key=lambda song: song.id)


def finish(task: Task, layout: str, songs: list[Song], n_bad: int) -> None:
    """Write the manifest, remove what is not in it, and print the sum."""
    dataset.save_manifest(task.output, dataset.Manifest(layout, grid_of(task.hp), tuple(songs)))
    keep = {Path(song.file).stem for song in songs}
    for path in (task.output / SONGS).iterdir():
        if path.stem not in keep:
            path.unlink()
    hours, left_out = sum(song.seconds for song in songs) / 3600, f", {n_bad} bad ones left out"
    print(f"{task.output}: {len(songs)} songs{left_out * bool(n_bad)}, {hours:.2f} hours")


def build_song(task: Task, track: Track) -> Song:
    """Write one song's spectrogram and then its note.

    InputError if a source cannot be read or changes meanwhile, if the pair does not fit, if the
    sound is too loud for float16, or if the disk is full.
    """
    import audio  # here, so that bad paths are told before torch is loaded

    hp, path = task.hp, task.output / file_of(task, track)
    sources, extent = sources_of(task, track), tracks.measure(track)
    for note in extent.notes:
        cli.warn(note)
    grid = audio.grid_at(extent.sample_rate, hp)
    shape = (grid.n_frames(extent.n_samples), len(track.signals), hp.n_bins, 2)
    write = functools.partial(write_spectrogram, task=task, track=track, grid=grid, shape=shape)
    try:
        cli.replace_atomically(path, write)
    except OverflowError as error:
        raise InputError(f"{track.paths[0]}: too loud for float16 (lower it)") from error
    inputs = [
        {"path": _within(task, path), "size": path.stat().st_size, "sha256": reading.sha256(path)}
        for path in track.paths
    ]
    if sources_of(task, track) != sources:
        raise InputError(f"{track.paths[0]}: a source changed while it was read (run again)")
    song = Song(
        **{name: getattr(track, name) for name in ("split", "singer", "group", "speed")},
        id=track.name,
        file=file_of(task, track),
        parts=track.signals,
        n_frames=shape[0],
        sample_rate=extent.sample_rate,
        seconds=extent.n_samples / extent.sample_rate,
        sha256=reading.sha256(path),
        inputs=tuple(inputs),
        taught=task.taught,
    )
    note = json.dumps({"sources": sources, "song": asdict(song)})
    cli.replace_atomically(path.with_suffix(".json"), lambda out: out.write(note.encode()))
    return song


def write_spectrogram(
    out: BinaryIO, task: Task, track: Track, grid: Grid, shape: tuple, channel: int | None = None
) -> None:
    """Write the spectrogram of the mean of a song's channels; where they cancel out, of one."""
    pair, energies = pairs.Pair(), []

    def blocks() -> Iterator[np.ndarray]:
        for block in tracks.read_blocks(track, pairs.BLOCK):  # (n_signals, n_channels, n_samples)
            mono = block.mean(1) if channel is None else block[:, channel]
            energies.append(np.stack([np.vecdot(mono, mono), *np.vecdot(block, block).T], 1))
            if len(mono) == 2:
                pair.add(*mono)
            yield mono

    out.seek(0)
    about = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, about)
    for data in dataset.spectrogram_blocks(blocks(), grid, task.hp):
        out.write(data)
    lost, loudest = pairs.cancellation(np.array(energies, np.float64))
    if channel is None and lost > pairs.MAX_LOST:
        cli.warn(
            f"{track.paths[0]}: in {lost:.0%} of its sound the channels cancel out in their "
            f"mean; channel {loudest + 1} is taken instead"
        )
        return write_spectrogram(out, task, track, grid, shape, loudest)
    if task.check_pairs and len(track.signals) == 2:
        path, (problem, oddity) = track.vocals[0].path, pair.findings()
        if problem:
            raise InputError(f"{path}: {problem} (--no-check-pairs: use as it is)")
        if oddity:
            cli.warn(f"{path}: {oddity}")


def finished(task: Task, track: Track) -> Song | None:
    """Return a song whose array and note are there, if its sources are as they were then."""
    path = task.output / file_of(task, track)
    with contextlib.suppress(InputError, OSError, ValueError, KeyError, TypeError):
        note = json.loads(path.with_suffix(".json").read_text())
        song = dataset.song_of(note["song"])
        if path.is_file() and note["sources"] == sources_of(task, track):
            return replace(song, taught=task.taught)
    return None


def sources_of(task: Task, track: Track) -> list[Any]:
    """Describe all that a finished song depends on, as its note keeps it."""
    parts = {
        name: [(_within(task, part.path), part.channel, part.stream) for part in parts]
        for name, parts in track.parts.items()
    }
    try:
        stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in track.paths]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    labels = (track.split, track.singer, track.group)
    return json.loads(json.dumps([labels, parts, stamps]))


def _within(task: Task, path: Path) -> str:
    return path.relative_to(task.root).as_posix()


def grid_of(hp: HParams) -> dict[str, int]:
    """Return the settings that a dataset binds."""
    return {name: getattr(hp, name) for name in GRID}


def file_of(task: Task, track: Track) -> str:
    """Name a song's array within the dataset: the same again for the same song and grid."""
    # Two grids have two names, so that --overwrite can build beside the old dataset.
    about = repr((track.name, grid_of(task.hp), dataset.FORMAT)).encode(errors="surrogatepass")
    readable = re.sub(r"[^A-Za-z0-9]+", "_", track.name)[:64]
    return f"{SONGS}/{readable}-{hashlib.sha256(about).hexdigest()[:12]}.npy"


if __name__ == "__main__":
    raise SystemExit(main())
