"""Measure what the project costs on this machine, each figure beside what it is compared with.

Machines are noisy: the two sides of a comparison run in alternation, the best of several rounds
counts, and only their ratio means something elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import commandline
from hparams import UNTUNED_MASK, HParams

if TYPE_CHECKING:
    import torch

EPILOG = """examples:
  python benchmark.py network                     # dense pass, separate slices, original network
  python benchmark.py generate --set width=16     # a whole song beside the network alone"""
HERE = Path(__file__).parent
SONG_SECONDS = 240
SONG_RATE = 44100


@commandline.script
def main(argv: list[str] | None = None) -> int:
    """Run one benchmark, on the CPU, and print its figures."""
    benchmarks = {
        "network": network,
        "generate": generate,
        "memory": memory,
        "build": build,
        "read": read,
        "startup": startup,
    }
    parser = commandline.make_parser(__doc__, EPILOG)
    parser.add_argument("what", choices=benchmarks, help="which part to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in alternation (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)
    hp = commandline.settings_of(args)

    import torch

    figures = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        figures |= benchmarks[args.what](hp, args.rounds, Path(folder))
    if args.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:44} {value:.4g}" if isinstance(value, float) else f"{name:44} {value}")
    return 0


def network(hp: HParams, rounds: int, _folder: Path) -> dict[str, Any]:
    """Compare one dense pass with separate slices, and with the original's kind of network."""
    import torch

    import model as networks

    n = hp.block_frames
    net = networks.for_inference(networks.build_model(hp))
    original = networks.for_inference(_original_network())
    block = torch.rand(1, 1, hp.n_bins, n + hp.stft_frames - 1)
    matrix = torch.rand(2048, 2048)
    work = {"matrix product": lambda: matrix @ matrix, "dense": lambda: net(block)}
    for size in (1, 4, 16, 64):
        slices = torch.rand(size, 1, hp.n_bins, hp.stft_frames)
        work[f"slices {size}"] = lambda slices=slices: net(slices)
    window = torch.rand(1, 1, hp.n_bins, hp.stft_frames)
    work["original"] = lambda: original(window)
    with torch.inference_mode():
        took = best_seconds(work, rounds)
    dense = took["dense"] / n
    per_slice = {k: took[k] / int(k.split()[1]) for k in took if k.startswith("slices")}
    best = min(per_slice, key=per_slice.get)
    operations = networks.operations_per_column(net, hp)
    return {
        "network": f"{hp.model_type}, width {hp.width}, {hp.stft_frames} frames",
        "operations per column [MFLOP]": operations / 1e6,
        "dense pass [ms per column]": dense * 1e3,
        "dense pass [GFLOP/s]": operations / dense / 1e9,
        "matrix product 2048 [GFLOP/s]": 2 * 2048**3 / took["matrix product"] / 1e9,
        "best batch of separate slices": best.split()[1],
        "separate slices / dense pass": per_slice[best] / dense,
        "original window [GFLOP]": _operations(original, window) / 1e9,
        "original window by window / dense pass": took["original"] / dense,
    }


def generate(hp: HParams, rounds: int, folder: Path) -> dict[str, Any]:
    """Time a song from file to files beside the network alone on as many blocks."""
    import torch

    import soundio
    from separation import separate_file

    separator = _untrained_separator(hp)
    song = _write_song(folder / "song.wav", SONG_SECONDS)
    n_frames = 1 + SONG_SECONDS * hp.sample_rate // hp.hop_length
    n_blocks = -(-(n_frames + hp.context) // hp.block_frames)
    block = torch.rand(hp.n_bins, hp.block_frames + hp.stft_frames - 1)

    def whole() -> None:
        outputs = [folder / "song_vocals.wav", folder / "song_accompaniment.wav"]
        with soundio.Reader(song) as reader, soundio.OutputFiles(outputs, reader.info) as files:
            separate_file(
                separator, reader, lambda *both: [files.write(i, both[i]) for i in (0, 1)]
            )

    def alone() -> None:
        for _ in range(n_blocks):
            separator.mask(block)

    took = best_seconds({"whole": whole, "network": alone}, rounds)
    return {
        "network": f"{hp.model_type}, width {hp.width}",
        "song": f"{SONG_SECONDS} s, {SONG_RATE} Hz stereo, to vocals and accompaniment",
        "whole [s]": took["whole"],
        "network alone [s]": took["network"],
        "whole / network alone": took["whole"] / took["network"],
        "real-time factor": took["whole"] / SONG_SECONDS,
    }


def memory(hp: HParams, _rounds: int, folder: Path) -> dict[str, Any]:
    """Compare the peak memory of generate.py on 4 minutes and on 2 hours."""
    checkpoint = _untrained_checkpoint(hp, folder)
    figures = {}
    for name, seconds in (("4 minutes", 240), ("2 hours", 7200)):
        song = _write_song(folder / "song.wav", seconds)
        words = ["generate.py", checkpoint, song, "--background", "--output-dir", folder / "out"]
        figures[f"peak memory, {name} [MB]"] = _peak_megabytes([*words, "--device", "cpu"])
    return figures


def build(_hp: HParams, _rounds: int, folder: Path) -> dict[str, Any]:
    """Time build_dataset.py on a DSD100 tree of synthesised songs."""
    import synthesis

    n_songs, seconds = 4, 120
    synthesis.write_dsd100(folder / "tree", n_songs - 1, 1, seconds, SONG_RATE, seed=0)
    figures = {"songs": f"{n_songs} of {seconds} s, {SONG_RATE} Hz stereo"}
    for workers in (1, os.cpu_count() or 1):
        words = ["build_dataset.py", folder / "tree", folder / f"data{workers}"]
        started = time.perf_counter()
        _run([*words, "--workers", str(workers)])
        took = time.perf_counter() - started
        figures[f"{workers} workers [s of music per s, start-up included]"] = (
            n_songs * seconds / took
        )
    return figures


def read(hp: HParams, rounds: int, folder: Path) -> dict[str, Any]:
    """Compare reading chunks from the open memory-map with opening the file for every slice."""
    import numpy as np

    import dataset

    n_frames, n_chunks = 60_000, 20
    path = folder / "song.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.random((n_frames, 2, hp.n_bins, 2), np.float32).astype(np.float16))
    song = dataset.Song(
        "song", path.name, "train", "song", "song", dataset.PARTS, n_frames, 0, 0.0, "", ()
    )
    levels = dict.fromkeys(dataset.PARTS, 0.0)
    opened = dataset.OpenSong(song, dataset.open_spectrogram(folder, song, hp.n_bins), levels)
    starts = rng.integers(0, n_frames - 500, n_chunks).tolist()
    chunks = [dataset.Chunk(0, start, 0, start, 1.0, 1.0) for start in starts]

    def from_map() -> None:
        for chunk in chunks:
            dataset.read_batch([opened], [chunk], hp)

    def reopening() -> None:
        for start in starts:
            for slice_start in range(start, start + hp.chunk_slices):
                array = np.load(path, mmap_mode="r")
                np.array(array[slice_start : slice_start + hp.stft_frames])

    took = best_seconds({"map": from_map, "reopening": reopening}, rounds)
    return {
        "slices per chunk": hp.chunk_slices,
        "chunk from the open map [ms]": took["map"] / n_chunks * 1e3,
        "its slices, re-opening for each [ms]": took["reopening"] / n_chunks * 1e3,
        "re-opening / open map": took["reopening"] / took["map"],
    }


def startup(hp: HParams, rounds: int, folder: Path) -> dict[str, Any]:
    """Time how fast generate.py answers --help, and a wrong path."""
    checkpoint = _untrained_checkpoint(replace(hp, width=4), folder)
    took = best_seconds(
        {
            "--help": lambda: _run(["generate.py", "--help"]),
            "wrong path": lambda: _run(["generate.py", checkpoint, "missing.wav"], expected=1),
            "python -c pass": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        },
        rounds,
    )
    return {f"{name} [s]": seconds for name, seconds in took.items()}


def best_seconds(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Run pieces of work in alternation; return the shortest time of each [s]."""
    best = dict.fromkeys(work, float("inf"))
    for piece in work.values():
        piece()  # first calls pay for what the later ones find ready
    for _ in range(rounds):
        for name, piece in work.items():
            started = time.perf_counter()
            piece()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _original_network() -> torch.nn.Module:
    """Build the original's kind of network: padded, full resolution in time, one answer a window.

    ResNet18 of width 64 over 513 bins and 25 frames, with stride and pooling in frequency only.
    """
    from torch import nn

    def convolution(n_in: int, n_out: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(n_in, n_out, 3, (stride, 1), padding=1, bias=False)
        return [layer, nn.ReLU(inplace=True)]

    layers = [nn.Conv2d(1, 64, 7, (2, 1), padding=3), nn.MaxPool2d((3, 1), (2, 1), (1, 0))]
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    for i in range(8):
        stride = 2 if widths[i + 1] > widths[i] else 1
        layers += convolution(widths[i], widths[i + 1], stride)
        layers += convolution(widths[i + 1], widths[i + 1], 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 513))


def _operations(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Count the operations of one pass as torch does."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def _untrained_checkpoint(hp: HParams, folder: Path) -> Path:
    """Write a checkpoint with random weights: the time it takes does not depend on them."""
    import torch

    import audio
    import model as networks

    torch.manual_seed(0)
    networks.save_checkpoint(
        folder / "untrained.pth",
        networks.build_model(hp),
        hp,
        curve_db=audio.weighting_curve_db(hp),
        mask_settings=UNTUNED_MASK,
    )
    return folder / "untrained.pth"


def _untrained_separator(hp: HParams) -> Any:
    """Load a network with random weights as generate.py would."""
    from separation import Separator

    with tempfile.TemporaryDirectory() as folder:
        return Separator.load(_untrained_checkpoint(hp, Path(folder)), settings=hp)


def _write_song(path: Path, seconds: int) -> Path:
    """Write a stereo 16-bit song of the given length, 20 s of noise and tones repeated."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    times = np.arange(20 * SONG_RATE)[:, None] / SONG_RATE
    wav = 0.3 * np.sin(2 * np.pi * times * [220, 330]) + 0.05 * rng.standard_normal((len(times), 2))
    with soundfile.SoundFile(path, "w", SONG_RATE, 2, "PCM_16") as file:
        for _ in range(seconds // 20):
            file.write(wav)
    return path


def _run(words: list[str | Path], expected: int = 0) -> None:
    """Run a script of the project and insist on its exit code."""
    command = [sys.executable, HERE / words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != expected:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr}")


def _peak_megabytes(words: list[str | Path]) -> float:
    """Run a script and return the largest resident memory it had [MB]."""
    command = [sys.executable, HERE / words[0], *map(str, words[1:])]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{words[0]} failed")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
