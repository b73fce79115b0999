"""Measure what the project costs on this machine, beside the least that the machine allows.

The four figures are the network alone, a song from file to files, a step of training, and live
sound. Whatever is compared runs in alternation and the best of several rounds counts, as machines
are noisy; only ratios mean something elsewhere. The roofline [1] is the least time that a task can
take at the rates of a large matrix product and of a large copy, measured in the same run.

References
----------
.. [1] Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cli
from hparams import UNTUNED_MASK, HParams, override

if TYPE_CHECKING:
    import argparse

    import torch

    from separation import Separator

EPILOG = """examples:
  python -m tools.benchmark network                      # one pass of the network
  python -m tools.benchmark train --against width=16     # a training step, beside another setting
  python -m tools.benchmark generate --device cuda       # a whole song
  python -m tools.benchmark live --json                  # 48 kHz in packets of 20 ms"""
HERE = Path(__file__).parent.parent
SONG_RATE = 44100  # Hz
MATRIX, VALUES = {"cpu": 2048, "cuda": 8192}, {"cpu": 2**26, "cuda": 2**28}  # of the two rates
EPOCH_SLICES = 2_000_000  # 100 songs of 4 minutes: the size of DSD100

Work = dict[str, Callable[[], Any]]
Figures = dict[str, Any]


class Benchmark(NamedTuple):
    """Pieces of work to be timed, and what their seconds mean."""

    work: Work
    figures: Callable[[dict[str, float]], Figures]


class Bench(NamedTuple):
    """What all benchmarks are given."""

    folder: Path  # temporary
    device: torch.device
    rates: Rates
    seconds: int  # of music
    rounds: int


class Rates(NamedTuple):
    """What a device was measured to do at best."""

    operations: float  # [1/s], of a large matrix product
    copied: float  # [bytes/s], read and written by a large copy
    value_bytes: int  # of the numbers the network computes in


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run one benchmark, for one or several settings, and print its figures."""
    benchmarks = {"network": network, "generate": generate, "train": training, "live": live}
    parser = make_parser(list(benchmarks))
    args = parser.parse_args(argv)
    hp = cli.settings_of(args)
    settings = {"these settings": hp}
    settings |= {" ".join(against): override(hp, against) for against in args.against}

    import torch

    import model as networks

    device = cli.device_of(args, parser)
    with tempfile.TemporaryDirectory() as folder:
        is_narrow = networks.is_narrow(hp, device, for_inference=args.what != "train")
        bench = Bench(
            Path(folder), device, measure_rates(device, is_narrow), args.seconds, args.rounds
        )
        prepared = {name: benchmarks[args.what](one, bench) for name, one in settings.items()}
        pieces = {
            (name, piece): work
            for name, one in prepared.items()
            for piece, work in one.work.items()
        }
        took = best_seconds(pieces, args.rounds, device)
    results = {
        name: one.figures({piece: took[name, piece] for piece in one.work})
        for name, one in prepared.items()
    }
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matrix product [GFLOP/s]": bench.rates.operations / 1e9,
        "copy [GB/s]": bench.rates.copied / 1e9,
    }
    if args.json:
        print(json.dumps({**about, "results": results}, indent=1))
    else:
        show(about, results)
    return 0


def make_parser(names: list[str]) -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("what", choices=names, help="which part to measure")
    add("--rounds", type=cli.positive_count, default=5, help="in alternation (%(default)s)")
    add(
        "--against",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="also measure with these settings changed, in alternation; may be given several times",
    )
    add(
        "--seconds",
        type=cli.positive_count,
        default=240,
        metavar="N",
        help="of music that is separated or learnt from (%(default)s)",
    )
    add("--json", action="store_true", help="print the figures as JSON")
    cli.add_device_option(parser)
    return parser


def show(about: Figures, results: dict[str, Figures]) -> None:
    """Print the figures of all settings side by side, with the ratio of the last to the first."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    for name, value in about.items():
        print(f"{name:46} {text(value)}")
    columns = list(results.values())
    if len(columns) > 1:
        print(f"\n{'':46} " + " ".join(f"{name[-18:]:>18}" for name in [*results, "last / first"]))
    for name in columns[0]:
        values = [column[name] for column in columns]
        if len(values) > 1 and isinstance(values[0], float) and values[0]:
            values.append(values[-1] / values[0])
        print(f"{name:46} " + " ".join(f"{text(v):>18}" for v in values))


# --- The four figures -----------------------------------------------------------------------------


def network(hp: HParams, bench: Bench) -> Benchmark:
    """Time one dense pass over a block of frames, and the same columns as separate slices."""
    import torch

    import model as networks

    separator = untrained_separator(hp, bench)
    n, batch = separator.block_frames, 16

    def pass_over(size: int, n_frames: int) -> Callable[[], Any]:
        x = torch.rand(size, 1, hp.n_bins, n_frames, device=bench.device, dtype=separator.dtype)
        return torch.inference_mode()(lambda: separator.model(x))

    work = {
        "dense": pass_over(1, n + hp.stft_frames - 1),
        "slices": pass_over(batch, hp.stft_frames),
    }
    operations = networks.operations_per_column(hp)

    def figures(took: dict[str, float]) -> Figures:
        column = took["dense"] / n
        return {
            **description(hp, separator.dtype),
            "operations per column [MFLOP]": operations / 1e6,
            "dense pass [ms per column]": column * 1e3,
            "dense pass [GFLOP/s]": operations / column / 1e9,
            "dense pass, share of the roofline": least_seconds(hp, bench.rates, n) / took["dense"],
            "real-time factor": column * hp.sample_rate / hp.hop_length,
            "separate slices / dense pass": took["slices"] / batch / column,
        }

    return Benchmark(work, figures)


def generate(hp: HParams, bench: Bench) -> Benchmark:
    """Time generate.py from Enter to two files, beside its start-up and the network alone."""
    import torch

    separator = untrained_separator(hp, bench)
    checkpoint = write_checkpoint(hp, bench.folder)
    block = separator.block_frames
    n_blocks = -(-bench.seconds * hp.sample_rate // (hp.hop_length * block))
    x = torch.rand(1, hp.n_bins, block + hp.stft_frames - 1, device=bench.device)

    def script(seconds: int) -> Callable[[], None]:
        song = write_song(bench.folder / f"{seconds}.wav", seconds)
        words = ["generate.py", checkpoint, song, "--background", "--overwrite"]
        words += ["--device", bench.device.type, "--output-dir", bench.folder / "out"]
        for name in ("precision", "block_frames"):
            words += ["--set", f"{name}={getattr(hp, name)}"]
        command = [sys.executable, HERE / words[0], *words[1:]]
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def network_alone() -> None:
        for _ in range(n_blocks):
            separator.mask(x)

    work = {"whole": script(bench.seconds), "start": script(1), "network": network_alone}

    def figures(took: dict[str, float]) -> Figures:
        working = max(took["whole"] - took["start"], 1e-9)
        least = n_blocks * least_seconds(hp, bench.rates, block)
        return {
            **description(hp, separator.dtype),
            "song": f"{bench.seconds} s, {SONG_RATE} Hz stereo",
            "from Enter to vocals and accompaniment [s]": took["whole"],
            "of this the start, up to a song of 1 s [s]": took["start"],
            "real-time factor without the start": working / max(bench.seconds - 1, 1),
            "the same / network alone": working / took["network"],
            "network alone, share of the roofline": least / took["network"],
        }

    return Benchmark(work, figures)


def training(hp: HParams, bench: Bench) -> Benchmark:
    """Time a step of training, stage by stage."""
    import torch

    import model as networks
    from dataset import Feed, batches_of, plan_epoch
    from learning.run import Run, loss_of
    from learning.targets import make_example

    device = bench.device
    songs = [song_in_memory(hp, bench.seconds)]
    feed = Feed(songs, hp, device, resident=True)
    endless = replace(hp, steps=10**9, schedule="constant")
    run = Run(endless, feed, [])
    batch = batches_of(plan_epoch(songs, hp, 0), hp)[0]
    (fed,) = feed.batches([batch])

    def mix() -> tuple[torch.Tensor, ...]:
        return make_example(feed.spectrograms(fed), fed.gains, fed.eq_db, run.curve_db, hp)

    example = mix()

    def step() -> None:
        run.take_step(next(feed.batches([batch])))

    work = {
        "step": step,
        "gather": lambda: feed.spectrograms(next(feed.batches([batch]))),
        "gather and mix": mix,
        "forward and backward": lambda: loss_of(run, *example).backward(),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def figures(took: dict[str, float]) -> Figures:
        rate = len(batch) * hp.chunk_slices / took["step"]
        least = least_seconds(hp, bench.rates, hp.chunk_slices, len(batch), training=True)
        is_narrow = networks.is_narrow(hp, device)
        figures = {
            **description(hp, torch.bfloat16 if is_narrow else torch.float32),
            "step": f"{len(batch)} chunks of {hp.chunk_slices}",
            "step [ms]": took["step"] * 1e3,
            "slices per second": rate,
            f"{EPOCH_SLICES} slices [s]": EPOCH_SLICES / rate,
            "step, share of the roofline": least / took["step"],
            "forward and backward / step": took["forward and backward"] / took["step"],
            "gather / step": took["gather"] / took["step"],
            "gather, mix, features, target / step": took["gather and mix"] / took["step"],
        }
        if device.type == "cuda":
            figures["most memory [GB]"] = torch.cuda.max_memory_allocated() / 1e9
        return figures

    return Benchmark(work, figures)


def live(hp: HParams, bench: Bench) -> Benchmark:
    """Time 48 kHz mono in packets of 20 ms, packet by packet, on one thread."""
    import numpy as np
    import torch

    torch.set_num_threads(1)  # as generate.py does
    separator = untrained_separator(hp, bench)
    rate, n_packet = 48000, 960
    n_packets = bench.seconds * rate // n_packet
    packets = np.random.default_rng(0).normal(0, 0.1, (50, 1, n_packet)).astype(np.float32)
    stream = separator.stream(rate, 1, live=True)
    times: list[float] = []

    def call() -> None:
        for i in range(n_packets):
            started = time.perf_counter()
            stream.push(packets[i % len(packets)])
            times.append(time.perf_counter() - started)

    def figures(_took: dict[str, float]) -> Figures:
        milliseconds = np.sort(times[-n_packets * bench.rounds :]) * 1e3  # without the first calls
        return {
            **description(hp, separator.dtype),
            "delay [ms]": 1e3 * stream.delay / rate,
            "packets of 20 ms": len(milliseconds),
            "mean work per packet [ms]": float(milliseconds.mean()),
            "median [ms]": float(np.median(milliseconds)),
            "99.9th percentile [ms]": float(np.percentile(milliseconds, 99.9)),
            "slowest packet [ms]": float(milliseconds[-1]),
        }

    return Benchmark({"call": call}, figures)


# --- What the machine allows ----------------------------------------------------------------------


def measure_rates(device: torch.device, is_narrow: bool) -> Rates:
    """Measure the rates of a large matrix product and of a large copy, in float32 or bfloat16."""
    import torch

    size = MATRIX[device.type]
    matrix = torch.rand(size, size, device=device)
    matrix = matrix.bfloat16() if is_narrow else matrix
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as training and cuDNN have it
    values = torch.zeros(VALUES[device.type], device=device)
    target = torch.empty_like(values)
    took = best_seconds(
        {"matrix": lambda: matrix @ matrix, "copy": lambda: target.copy_(values)}, 5, device
    )
    n_bytes = 2 * values.numel() * values.element_size()
    return Rates(2 * size**3 / took["matrix"], n_bytes / took["copy"], matrix.element_size())


def least_seconds(
    hp: HParams, rates: Rates, n_columns: int, n_chunks: int = 1, training: bool = False
) -> float:
    """Return the least time of a pass over some chunks, or of a training step on them [s].

    For every layer it is the larger of its operations over the rate of a matrix product and its
    bytes over that of a copy; whatever could be fused into a layer is free. In training a layer
    makes three passes (the first two), and a batch norm passes eight times over its input.
    """
    import torch

    import model as networks

    seconds, n_layers = 0.0, 0

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal seconds, n_layers
        n_in, n_out = n_chunks * inputs[0].numel(), n_chunks * output.numel()
        if isinstance(module, torch.nn.BatchNorm2d):
            seconds += training * 8 * n_in * rates.value_bytes / rates.copied
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            n_operations = 2 * n_out * module.weight[0].numel()
            n_bytes = rates.value_bytes * (n_in + n_out + module.weight.numel())
            n_passes = (3 if n_layers else 2) if training else 1  # the picture needs no gradient
            seconds += n_passes * max(n_operations / rates.operations, n_bytes / rates.copied)
            n_layers += 1

    with torch.device("meta"), torch.no_grad():  # shapes without arithmetic
        net = networks.build_model(hp)
        for module in net.modules():
            module.register_forward_hook(count)
        stride = hp.stft_stride if training else 1
        net(torch.zeros(1, 1, hp.n_bins, (n_columns - 1) * stride + hp.stft_frames))
    return seconds


def best_seconds(
    work: dict[Any, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[Any, float]:
    """Run pieces of work in alternation; return the shortest time of each [s]."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = dict.fromkeys(work, float("inf"))
    for piece in work.values() if rounds > 1 else ():
        piece()  # first calls pay for what the later ones find ready
    for _ in range(rounds):
        for name, piece in work.items():
            wait()
            started = time.perf_counter()
            piece()
            wait()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


# --- Material -------------------------------------------------------------------------------------


def description(hp: HParams, dtype: torch.dtype) -> Figures:
    """Say which network it is."""
    precision = str(dtype).removeprefix("torch.")
    return {"network": f"{hp.model_type}, width {hp.width}", "precision": precision}


def write_checkpoint(hp: HParams, folder: Path) -> Path:
    """Write a checkpoint with random weights: the time it takes does not depend on them."""
    import torch

    import audio
    import model as networks

    torch.manual_seed(0)
    path, net = folder / f"{hash(hp)}.pth", networks.build_model(hp)
    curve_db = audio.weighting_curve_db(hp)
    networks.save_checkpoint(path, net, hp, curve_db=curve_db, mask_settings=UNTUNED_MASK)
    return path


def untrained_separator(hp: HParams, bench: Bench) -> Separator:
    """Load a network with random weights as generate.py would."""
    from separation import Separator

    return Separator.load(write_checkpoint(hp, bench.folder), bench.device, settings=hp)


def song_in_memory(hp: HParams, seconds: int) -> Any:
    """Make a song of noise, as an opened dataset has it."""
    import numpy as np

    import dataset

    n_frames = 1 + seconds * hp.sample_rate // hp.hop_length
    some = 0.05 * np.random.default_rng(0).standard_normal((1024, 2, hp.n_bins, 2), np.float32)
    array = np.resize(some.astype(np.float16), (n_frames, 2, hp.n_bins, 2))
    names = dict.fromkeys(("id", "file", "singer", "group", "sha256"), "song")
    song = dataset.Song(
        **names,
        split="train",
        parts=dataset.PARTS,
        n_frames=n_frames,
        sample_rate=hp.sample_rate,
        seconds=float(seconds),
        inputs=(),
    )
    return dataset.OpenSong(song, array, dict.fromkeys(dataset.PARTS, -20.0))


def write_song(path: Path, seconds: int) -> Path:
    """Write a stereo 16-bit song: a second of tones and noise, repeated."""
    import numpy as np
    import soundfile

    times = np.arange(SONG_RATE)[:, None] / SONG_RATE
    noise = 0.05 * np.random.default_rng(0).standard_normal((SONG_RATE, 2))
    wav = 0.3 * np.sin(2 * np.pi * times * [220, 330]) + noise
    with soundfile.SoundFile(path, "w", SONG_RATE, 2, "PCM_16") as file:
        for _ in range(seconds):
            file.write(wav)
    return path


if __name__ == "__main__":
    sys.exit(main())
