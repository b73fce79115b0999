"""Measure what the project costs on this machine.

The four figures are the network alone, a song from file to files, a step of training, and live
sound. The best of several rounds counts, as machines are noisy.

  python -m tools.benchmark network                      # one pass of the network
  python -m tools.benchmark train --set width=16         # a step of training
  python -m tools.benchmark generate --device cuda       # a whole song, by the shipped network
  python -m tools.benchmark live                         # 48 kHz in packets of 20 ms
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cli
from hparams import MASK_SETTINGS, UNTUNED_MASK, HParams

if TYPE_CHECKING:
    import torch

    from dataset import OpenSong
    from separation import Separator

GENERATE = Path(__file__).parent.parent / "generate.py"
SONG_RATE = 44100  # Hz
Figures = dict[str, float | str]


class Bench(NamedTuple):
    """What all benchmarks are given."""

    hp: HParams
    device: torch.device
    seconds: int  # of music
    rounds: int


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run one benchmark and print its figures."""
    benchmarks = {"network": network, "generate": generate, "train": training, "live": live}
    parser = cli.make_parser(__doc__)
    add, count = parser.add_argument, cli.positive_count
    add("what", choices=list(benchmarks), help="which part to measure")
    add("--rounds", type=count, default=5, help="of which the best counts (%(default)s)")
    add("--seconds", type=count, default=240, metavar="N", help="of music (%(default)s)")
    cli.add_device_option(parser)
    args = parser.parse_args(argv)
    hp = cli.settings_of(args)

    import torch

    from model import is_narrow

    device = cli.device_of(args, parser)
    narrow = is_narrow(hp, device, for_inference=args.what != "train")
    figures: Figures = {
        "torch": torch.__version__,
        "network": f"{hp.model_type}, width {hp.width}",
        "precision": "bfloat16" if narrow else "float32",
    }
    figures |= benchmarks[args.what](Bench(hp, device, args.seconds, args.rounds))
    for name, value in figures.items():
        print(f"{name:46} {value:.4g}" if isinstance(value, float) else f"{name:46} {value}")
    return 0


def network(bench: Bench) -> Figures:
    """Time one dense pass over a block of frames."""
    import torch

    from model import operations_per_column

    hp, separator = bench.hp, untrained_separator(bench)
    n_frames = separator.block_frames + hp.stft_frames - 1
    x = torch.rand(1, 1, hp.n_bins, n_frames, device=bench.device, dtype=separator.dtype)
    took = best_seconds(bench, torch.inference_mode()(lambda: separator.model(x)))
    column, operations = took / separator.block_frames, operations_per_column(hp)
    return {
        "operations per column [MFLOP]": operations / 1e6,
        "dense pass [ms per column]": column * 1e3,
        "dense pass [GFLOP/s]": operations / column / 1e9,
        "real-time factor": column * hp.sample_rate / hp.hop_length,
    }


def generate(bench: Bench) -> Figures:
    """Time generate.py from Enter to two files of noise."""
    import numpy as np
    import soundfile

    noise = np.random.default_rng(0).normal(0, 0.1, (SONG_RATE, 2))
    with tempfile.TemporaryDirectory() as folder:
        song = Path(folder) / "song.wav"
        soundfile.write(song, np.tile(noise, (bench.seconds, 1)), SONG_RATE)
        options = ["--background", "--overwrite", "--device", bench.device.type]
        command = [sys.executable, GENERATE, song, *options, "--output-dir", folder]
        names = (*MASK_SETTINGS, "stereo", "precision", "block_frames")  # the network has the rest
        command += [f"--set={name}={getattr(bench.hp, name)}" for name in names]
        run = functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        took = best_seconds(bench, run)
    return {
        "network": cli.PRETRAINED.name,
        "song": f"{bench.seconds} s, {SONG_RATE} Hz stereo",
        "from Enter to vocals and accompaniment [s]": took,
        "real-time factor": took / bench.seconds,
    }


def training(bench: Bench) -> Figures:
    """Time a step of training."""
    from dataset import Feed, batches_of, plan_epoch
    from learning.run import WARM_UP_STEPS, Run
    from model import operations_per_column

    hp, songs = bench.hp, [song_in_memory(bench)]
    feed = Feed(songs, hp, bench.device, resident=True)
    run = Run(replace(hp, steps=10**9), feed, [])
    batch = batches_of(plan_epoch(songs, hp, 0), hp)[0]
    for _ in range(WARM_UP_STEPS + 1 if bench.device.type == "cuda" else 0):  # it is captured
        run.take_step(next(feed.batches([batch])))
    took = best_seconds(bench, lambda: run.take_step(next(feed.batches([batch]))))
    rate = len(batch) * hp.chunk_slices / took
    operations = 3 * operations_per_column(hp) * hp.stft_stride * rate  # backward takes two thirds
    return {
        "step": f"{len(batch)} chunks of {hp.chunk_slices}",
        "step [ms]": took * 1e3,
        "slices per second": rate,
        "step [GFLOP/s]": operations / 1e9,
    }


def live(bench: Bench) -> Figures:
    """Time 48 kHz mono in packets of 20 ms, packet by packet, on one thread."""
    import numpy as np
    import torch

    torch.set_num_threads(1)  # as generate.py does
    rate, n_packet = 48000, 960
    packet = np.random.default_rng(0).normal(0, 0.1, (1, n_packet)).astype(np.float32)
    stream = untrained_separator(bench).stream(rate, 1, live=True)
    times = []
    for _ in range(50 + bench.rounds * bench.seconds * rate // n_packet):
        started = time.perf_counter()
        stream.push(packet)
        times.append(1e3 * (time.perf_counter() - started))
    times = times[50:]  # the first calls pay for what the later ones find ready
    return {
        "delay [ms]": 1e3 * stream.delay / rate,
        "work per packet of 20 ms, median [ms]": float(np.median(times)),
        "99.9th percentile [ms]": float(np.percentile(times, 99.9)),
        "slowest packet [ms]": max(times),
    }


def best_seconds(bench: Bench, work: Callable[[], Any]) -> float:
    """Do some work several times; return the shortest time [s]."""
    import torch

    def to_the_end() -> None:
        work()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    if bench.rounds > 1:
        to_the_end()  # the first call pays for what the later ones find ready
    return min(timeit.repeat(to_the_end, number=1, repeat=bench.rounds))


def untrained_separator(bench: Bench) -> Separator:
    """Make one with random weights: the time does not depend on them."""
    import audio
    from model import build_model
    from separation import Separator

    hp = bench.hp
    curve_db = audio.weighting_curve_db(hp)
    return Separator(build_model(hp), hp, curve_db, UNTUNED_MASK, bench.device)


def song_in_memory(bench: Bench) -> OpenSong:
    """Make a song of noise, as an opened dataset has it."""
    import numpy as np

    from dataset import PARTS, OpenSong, Song

    n_bins, rate = bench.hp.n_bins, bench.hp.sample_rate
    some = 0.05 * np.random.default_rng(0).standard_normal((1024, 2, n_bins, 2), np.float32)
    n_frames = 1 + bench.seconds * rate // bench.hp.hop_length
    array = np.resize(some.astype(np.float16), (n_frames, 2, n_bins, 2))
    names = dict.fromkeys(("id", "file", "singer", "group", "sha256"), "song")
    size = {"n_frames": n_frames, "sample_rate": rate, "seconds": float(bench.seconds)}
    song = Song(**names, **size, split="train", parts=PARTS, inputs=())
    return OpenSong(song, array, dict.fromkeys(PARTS, -20.0))


if __name__ == "__main__":
    sys.exit(main())
