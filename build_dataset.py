"""Turn a folder of music into a dataset for train.py: one spectrogram per song, and a manifest.

The layout is recognised and printed. Songs are built in parallel; what is finished is kept, so an
interrupted build goes on where it was. The manifest is written last: without it, no dataset.

    python build_dataset.py DSD100 datasets/dsd100
    python build_dataset.py acapellas datasets/voices --as voices
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

import commandline
import dataset
import soundio
import tracks
from hparams import GRID, HParams, InputError

if TYPE_CHECKING:
    import torch

    from audio import Grid

BLOCK = 2**17  # samples decoded at once: the frames of one block just fit a core's cache
PEAK_FLOAT16 = 32000  # a spectrogram is at most twice the waveform's peak, float16 at most 65504
JOURNAL = ".build"  # what the next run needs to know, beside the manifest


@commandline.script
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    hp = commandline.settings_of(args)
    found = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    n_train = sum(track.split == "train" for track in found.tracks)
    n_all = len(found.tracks) + len(found.bad)
    print(
        f"{args.root}: {found.layout}; {n_all} songs, {n_train} train and "
        f"{len(found.tracks) - n_train} test",
        flush=True,
    )
    with locked(args.output):
        check_output(args.output, hp, found.tracks, args.overwrite)
        bad = list(found.bad)
        extents = {}
        for track in found.tracks:
            try:
                extents[track] = tracks.measure(track)
            except InputError as error:
                bad.append(str(error))
        for message in bad:
            commandline.complain(message)
        return build(args, hp, found.layout, extents, bad)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = commandline.make_parser(__doc__, "examples:\n" + __doc__.split("\n\n")[-1])
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--as", dest="kind", choices=tracks.KINDS)
    parser.add_argument("--voice-pattern", metavar="REGEX", default=tracks.VOICE_PATTERN)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--skip-bad", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(argv)


def build(args, hp, layout, extents, bad) -> int:
    """Build what is not there yet, then write the manifest."""
    folder, records, jobs = args.output, {}, []
    for track in extents:
        record = finished(folder, track, hp)
        if record is None or args.verify:
            jobs.append((track, args.verify))
        else:
            records[track] = record
    start = time.perf_counter()
    seconds = sum(extents[t].n_samples / extents[t].sample_rate for t, _ in jobs)
    jobs.sort(key=lambda job: -extents[job[0]].n_samples)
    busy = 0.0
    with commandline.progress(round(seconds), "s") as bar:
        for track, kind, result in in_parallel(jobs, hp, folder, args.workers):
            if kind == "error":
                bad.append(result)
                commandline.complain(result)
            else:
                records[track], cpu = result
                busy += cpu
            bar.update(round(extents[track].n_samples / extents[track].sample_rate))
    elapsed = time.perf_counter() - start
    if bad and not args.skip_bad:
        commandline.complain(f"{len(bad)} bad songs; repair them, or leave them out with --skip-bad")
        return 1
    songs = tuple(dataset.Song(**records[t]["song"]) for t in sorted(records, key=lambda t: t.name))
    if not songs:
        raise InputError(f"{args.root}: no song could be used")
    grid = {name: getattr(hp, name) for name in GRID}
    dataset.save_manifest(folder, dataset.Manifest(layout, grid, songs))
    slices = sum(math.ceil(s.n_frames / hp.stft_stride) for s in songs)
    n_bytes = sum((folder / s.file).stat().st_size for s in songs)
    hours = sum(s.seconds for s in songs) / 3600
    print(
        f"{folder}: {len(songs)} songs, {hours:.2f} hours, {slices} slices, {n_bytes/1e9:.3f} GB; "
        f"{seconds/elapsed:.0f} s of music per second, {seconds/max(busy, 1e-9):.0f} per core"
    )
    return 0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second build out of the same output; the lock dies with the process."""
    try:
        (folder / JOURNAL).mkdir(parents=True, exist_ok=True)
        (folder / "songs").mkdir(exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror} (choose another output)") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InputError(f"{folder}: locked by pid {lock.read().strip()}; wait for it") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def check_output(folder, hp, found, overwrite) -> None:
    pass


def in_parallel(jobs, hp, folder, n_workers):
    """Run jobs in worker processes; yields (track, "song" or "error", result) as they finish."""
    context = multiprocessing.get_context("spawn")
    busy: dict[Connection, Any] = {}
    processes = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(min(n_workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, hp, folder), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            busy[ours] = None
        signal.signal(signal.SIGINT, before)
        queue = iter(jobs)
        for connection in list(busy):
            busy[connection] = next(queue)
            connection.send(busy[connection])
        while busy:
            for connection in wait(list(busy)):
                track, _ = busy.pop(connection)
                try:
                    kind, result = connection.recv()
                except EOFError:
                    raise InputError(f"{track.name}: the process building it died (out of memory?)") from None
                job = next(queue, None)
                if job is not None:
                    busy[connection] = job
                    connection.send(job)
                yield track, kind, result
    finally:
        signal.signal(signal.SIGINT, before)
        for process in processes:
            process.terminate()
            process.join()


def work(connection, hp, folder) -> None:
    """Be a worker process: build what is asked for until the parent is gone."""
    while True:
        try:
            track, verify = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("song", build_song(track, hp, folder)))
        except InputError as error:
            connection.send(("error", str(error)))


def build_song(track: tracks.Track, hp: HParams, folder: Path):
    import torch

    import audio

    torch.set_num_threads(1)
    start = time.process_time()
    before = stamps(track)
    extent = tracks.measure(track)
    grid = audio.grid_at(extent.sample_rate, hp)
    shape = (grid.n_frames(extent.n_samples), len(track.signals), hp.n_bins, 2)
    file = file_name(track, hp)
    sha = hashlib.sha256()

    def write(out: BinaryIO) -> None:
        header = np.lib.format.header_data_from_array_1_0(np.empty((0,), np.float16))
        header["shape"] = shape
        np.lib.format.write_array_header_1_0(out, header)
        size = out.tell() + 2 * math.prod(shape)
        os.posix_fallocate(out.fileno(), 0, size)
        out.flush()
        out.seek(0)
        sha.update(out.read())if False else None
        out.seek(size - 2 * math.prod(shape))
        for spec in spectrogram(tracks.read_blocks(track, BLOCK), grid, hp):
            data = spec.numpy()
            sha.update(data)
            out.write(data)
        assert out.tell() == size

    soundio.replace_atomically(folder / file, write)
    song = dataset.Song(
        id=track.name, file=file, split=track.split, group=track.group, parts=track.signals,
        n_frames=shape[0], sample_rate=extent.sample_rate,
        seconds=extent.n_samples / extent.sample_rate, sha256=soundio.sha256(folder / file),
        inputs=tuple({"path": str(p), "size": p.stat().st_size, "sha256": soundio.sha256(p)} for p in track.paths),
    )
    record = {"track": repr(track), "stamps": before, "song": asdict(song)}
    soundio.replace_atomically(journal_path(folder, file), lambda f: f.write(json.dumps(record).encode()))
    return record, time.process_time() - start


def spectrogram(blocks, grid, hp) -> Iterator[torch.Tensor]:
    """Take the STFT of blocks as `audio.stft` does of the whole, in the dataset's form."""
    import torch

    import audio

    half = grid.n_fft // 2
    carried = None
    for block in blocks:
        wav = torch.from_numpy(block)
        if carried is None:
            carried = wav.new_zeros(len(wav), half)
        wav = torch.cat([carried, wav], 1)
        n_frames = max(0, 1 + (wav.shape[1] - grid.n_fft) // grid.hop_length)
        carried = wav[:, n_frames * grid.hop_length :]
        if n_frames:
            yield stored_form(wav, grid, hp)
    wav = torch.cat([carried, carried.new_zeros(len(carried), half)], 1)
    if wav.shape[1] >= grid.n_fft:
        yield stored_form(wav, grid, hp)


def stored_form(wav, grid, hp):
    import torch

    import audio

    spec = audio.to_network_bins(audio.frames_to_spec(wav, grid), hp)  # (n_parts, n_bins, n_frames)
    spec = torch.view_as_real(spec.permute(2, 0, 1))  # (n_frames, n_parts, n_bins, 2)
    stored = torch.empty(spec.shape, dtype=torch.float16)
    return stored.copy_(spec)


def stamps(track):
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in track.paths]


def file_name(track, hp) -> str:
    grid = [getattr(hp, name) for name in GRID]
    mark = hashlib.sha256(repr((track.name, grid, dataset.FORMAT)).encode(errors="surrogatepass")).hexdigest()[:8]
    return f"songs/{re.sub(r'[^A-Za-z0-9]+', '_', track.name)[:64]}-{mark}.npy"


def journal_path(folder, file):
    return folder / JOURNAL / (Path(file).stem + ".json")


def finished(folder, track, hp):
    file = file_name(track, hp)
    try:
        record = json.loads(journal_path(folder, file).read_text())
    except (OSError, ValueError):
        return None
    if record["track"] != repr(track) or record["stamps"] != stamps(track) or not (folder / file).is_file():
        return None
    return record


if __name__ == "__main__":
    sys.exit(main())
