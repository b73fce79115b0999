"""Turn a folder of music into a dataset for train.py: one spectrogram per song, and a manifest.

The layout is recognised and printed: DSD100 (as distributed or flattened), MUSDB18(-HQ), MIR-1K,
a folder of stems per song, only voices or only backings. Songs are built in parallel, finished
ones are kept: an interrupted build goes on where it was. The manifest is written last; without
it there is no dataset.

    python build_dataset.py DSD100 datasets/dsd100
    python build_dataset.py acapellas datasets/voices --as voices
    torchrun --nproc-per-node 4 build_dataset.py DSD100 datasets/dsd100
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cli
from hparams import InputError
from learning import ranks
from learning.building import JOURNAL, SONGS, Task, build_song, damage, file_of, finished, grid_of
from sound import tracks, writing
from sound.tracks import Extent, Track

LOCK = ".lock"  # in the output
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Outcome:
    """What became of one song."""

    record: dict[str, Any] | None = None  # what the journal keeps; None: the song failed
    error: str = ""
    warning: str = ""
    disk_full: bool = False  # then no other song will fit either
    cpu_seconds: float = 0.0


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args, world = make_parser().parse_args(argv), ranks.world()
    task = Task(args.root, args.output, cli.settings_of(args), args.verify, args.check_pairs)
    found = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    if args.speed != 1:
        found = found._replace(
            tracks=[
                replace(track, name=f"{track.name} x{args.speed:g}", speed=args.speed)
                for track in found.tracks
            ]
        )
    n_train = sum(track.split == "train" for track in found.tracks)
    n_test = len(found.tracks) - n_train
    if not world.rank:
        print(
            f"{args.root}: {found.layout}: {n_train} songs to train, {n_test} to test", flush=True
        )
    extents, bad = {}, []
    for track in found.tracks:
        try:
            extents[track] = tracks.measure(track)
            for note in extents[track].notes if not world.rank else []:
                cli.warn(note)
        except InputError as error:
            bad.append(str(error))
    for message in sorted(found.bad + bad) if not world.rank else []:
        cli.complain(message)

    n_workers = args.workers or max(1, (os.cpu_count() or 1) // world.local_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.joined(world))
        if not world.rank:
            stack.enter_context(locked(args.output))
            check_output(task, found.tracks, args.overwrite)
        world.gather("ready")  # before that the other ranks write nothing
        own = dict(world.share(list(extents.items())))
        shares = world.gather(build_songs(task, own, n_workers, world.size))
        if world.rank:
            return 0
        records = [record for of_rank, _ in shares for record in of_rank.values()]
        n_bad = len(found.bad) + len(bad) + sum(n_failed for _, n_failed in shares)
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
        "3 dB too loud or soft, or of another song (default: on)",
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
def locked(output: Path) -> Iterator[None]:
    """Keep a second build out of the same output; the lock dies with the process."""
    try:
        if output.is_dir() and any(output.iterdir()) and not (output / JOURNAL).is_dir():
            raise InputError(f"{output}: holds other files (choose a new or empty folder)")
        for folder in (output / SONGS, output / JOURNAL):
            folder.mkdir(parents=True, exist_ok=True)
        lock = open(output / LOCK, "a+")  # noqa: SIM115 (closed below, after the build)
    except OSError as error:
        raise InputError(f"{output}: {error.strerror} (choose another folder)") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InputError(
                f"{output}: locked by pid {lock.read()}; wait until it is done"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            remove_unfinished(output)
            yield
        finally:
            remove_unfinished(output)


def remove_unfinished(output: Path) -> None:
    """Remove what killed processes left; nobody else writes here while we hold the lock."""
    for path in output.glob("*/.*.tmp-*"):
        path.unlink(missing_ok=True)


def check_output(task: Task, found: list[Track], overwrite: bool) -> None:
    """Refuse to turn one dataset into another by mistake, and note the grid of this one."""
    import dataset

    grid_file = task.output / JOURNAL / "grid.json"
    if not overwrite:
        stored = [json.loads(grid_file.read_text())] if grid_file.is_file() else []
        if (task.output / dataset.MANIFEST).is_file():
            manifest = dataset.load_manifest(task.output)
            stored.append(manifest.hparams)
            lost = sorted({song.id for song in manifest.songs} - {track.name for track in found})
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
    writing.replace_atomically(grid_file, lambda file: file.write(text.encode()))


def build_songs(
    task: Task, extents: dict[Track, Extent], n_workers: int, n_ranks: int = 1
) -> tuple[dict[Track, dict[str, Any]], int]:
    """Build what is not there yet; returns the records of all songs, and how many failed."""
    import dataset

    records = {track: record for track in extents if (record := finished(task, track))}
    changed = [t for t in extents if t not in records and (task.output / file_of(task, t)).exists()]
    if changed:  # their arrays will be replaced, so the old dataset ends here
        (task.output / dataset.MANIFEST).unlink(missing_ok=True)
    jobs = [track for track in extents if task.verify or track not in records]
    jobs.sort(key=lambda track: -extents[track].seconds)  # a long one at the end keeps all waiting
    check_space(task, {track: extents[track] for track in jobs if track not in records}, n_ranks)
    start, built_seconds, cpu_seconds, n_failed = time.perf_counter(), 0.0, 0.0, 0
    with (
        contextlib.closing(in_parallel(task, jobs, n_workers)) as outcomes,
        cli.progress(round(sum(extents[track].seconds for track in jobs)), "s") as bar,
    ):
        for n_done, (track, outcome) in enumerate(outcomes, 1):
            if outcome.disk_full:
                raise InputError(outcome.error)
            if outcome.warning:
                cli.warn(outcome.warning)
            if outcome.record is None:
                cli.complain(outcome.error)
                n_failed += 1
                records.pop(track, None)
            else:
                records[track] = outcome.record
            if outcome.cpu_seconds:
                built_seconds += extents[track].seconds
                cpu_seconds += outcome.cpu_seconds
            bar.set_postfix_str(f"song {n_done} of {len(jobs)}", refresh=False)
            bar.update(round(extents[track].seconds))
    if built_seconds:
        speed = built_seconds / (time.perf_counter() - start)
        print(
            f"built {built_seconds:.0f} s of music, {speed:.0f} s per second with "
            f"{min(n_workers, len(jobs))} workers ({built_seconds / cpu_seconds:.0f} s per core)"
        )
    return records, n_failed


def check_space(task: Task, extents: dict[Track, Extent], n_ranks: int) -> None:
    """Refuse a build that the disk cannot hold; every rank knows about its share only."""
    hp = task.hp
    frame_bytes = {track: 4 * hp.n_bins * len(track.signals) for track in extents}
    n_frames = {t: 1.01 * e.seconds * hp.sample_rate / hp.hop_length for t, e in extents.items()}
    need = n_ranks * sum(frame_bytes[track] * n_frames[track] + 8192 for track in extents)
    free = shutil.disk_usage(task.output).free
    if need > free:
        raise InputError(
            f"no space left on {task.output}: need {need / 1e6:.3g} MB, have {free / 1e6:.3g} MB"
        )


def in_parallel(task: Task, jobs: list[Track], n_workers: int) -> Iterator[tuple[Track, Outcome]]:
    """Build songs in worker processes; yields each outcome when it is there."""
    context = multiprocessing.get_context("spawn")
    waiting = iter(jobs)
    processes: list[multiprocessing.process.BaseProcess] = []
    busy: dict[Connection, Track] = {}
    try:
        for _ in range(min(n_workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, task), daemon=True)
            with without_interrupts():
                process.start()
            theirs.close()  # so that ours ends when the worker does
            processes.append(process)
            busy[ours] = next(waiting)
            ours.send(busy[ours])
        while busy:
            for connection in wait(list(busy)):
                track = busy.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise InputError(
                        f"{track.name}: the process building it died; was it out of memory? "
                        "(run again, with fewer --workers)"
                    ) from None
                if (job := next(waiting, None)) is not None:
                    busy[connection] = job
                    with contextlib.suppress(BrokenPipeError):  # told when it is waited for
                        connection.send(job)
                yield track, outcome
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Start processes that never see Ctrl-C: it reaches the whole group, and the parent decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(connection: Connection, task: Task) -> None:
    """Build the songs that come through `connection`, until it or the parent ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)  # the songs are what is parallel
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(outcome_of(task, connection.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def outcome_of(task: Task, track: Track) -> Outcome:
    """Build one song, or with --verify check a finished one first."""
    start, warning = time.process_time(), ""
    try:
        record = finished(task, track)
        if record is not None:
            warning = damage(task, record["song"])
            if not warning:
                return Outcome(record)
        record = build_song(task, track)
    except InputError as error:
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        return Outcome(error=str(error), disk_full=full)
    return Outcome(record, warning=warning, cpu_seconds=time.process_time() - start)


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


if __name__ == "__main__":
    ranks.leave(main())
