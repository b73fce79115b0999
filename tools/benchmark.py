"""Measure what the project costs on this machine, beside the least that the machine allows.

The four figures are the network alone, a song from file to files, a step of training, and live
sound. Pieces run in alternation and the best of several rounds counts, as machines are noisy. The
roofline [1] is the least time that a task can take at the rates of a large matrix product and of a
large copy, measured in the same run.

References
----------
.. [1] Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cli
from hparams import UNTUNED_MASK, HParams

if TYPE_CHECKING:
    import torch

    from dataset import OpenSong
    from separation import Separator

EPILOG = """examples:
  python -m tools.benchmark network                      # one pass of the network
  python -m tools.benchmark train --set width=16         # a step of training
  python -m tools.benchmark generate --device cuda       # a whole song
  python -m tools.benchmark live                         # 48 kHz in packets of 20 ms"""
HERE = Path(__file__).parent.parent
SONG_RATE = 44100  # Hz
MATRIX, VALUES = {"cpu": 2048, "cuda": 8192}, {"cpu": 2**26, "cuda": 2**28}  # of the two rates
EPOCH_SLICES = 2_000_000  # 100 songs of 4 minutes: the size of DSD100

Figures = dict[str, float | str]


class Bench(NamedTuple):
    """What all benchmarks are given."""

    folder: Path  # temporary
    device: torch.device
    dtype: torch.dtype  # of the numbers the network computes in
    seconds: int  # of music
    rounds: int


class Rates(NamedTuple):
    """What a device was measured to do at best."""

    operations: float  # [1/s], of a large matrix product
    copied: float  # [bytes/s], read and written by a large copy
    value_bytes: int  # of the numbers the network computes in


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run one benchmark and print its figures."""
    benchmarks = {"network": network, "generate": generate, "train": training, "live": live}
    parser = cli.make_parser(__doc__, EPILOG)
    add, count = parser.add_argument, cli.positive_count
    add("what", choices=list(benchmarks), help="which part to measure")
    add("--rounds", type=count, default=5, help="in alternation (%(default)s)")
    text = "of music that is separated or learnt from (%(default)s)"
    add("--seconds", type=count, default=240, metavar="N", help=text)
    cli.add_device_option(parser)
    args = parser.parse_args(argv)
    hp = cli.settings_of(args)

    import torch

    import model as networks

    device = cli.device_of(args, parser)
    is_narrow = networks.is_narrow(hp, device, for_inference=args.what != "train")
    dtype = torch.bfloat16 if is_narrow else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, dtype, args.seconds, args.rounds)
        rates = measure_rates(bench)
        figures = benchmarks[args.what](hp, bench, rates)
    about = {
        "torch": torch.__version__,
        "matrix product [GFLOP/s]": rates.operations / 1e9,
        "copy [GB/s]": rates.copied / 1e9,
        "network": f"{hp.model_type}, width {hp.width}",
        "precision": str(dtype).removeprefix("torch."),
    }
    for name, value in {**about, **figures}.items():
        print(f"{name:46} {value:.4g}" if isinstance(value, float) else f"{name:46} {value}")
    return 0


def network(hp: HParams, bench: Bench, rates: Rates) -> Figures:
    """Time one dense pass over a block of frames, and the same columns as separate slices."""
    import torch

    import model as networks

    separator = untrained_separator(hp, bench)
    n, batch = separator.block_frames, 16

    def pass_over(size: int, n_frames: int) -> Callable[[], Any]:
        x = torch.rand(size, 1, hp.n_bins, n_frames, device=bench.device, dtype=separator.dtype)
        return torch.inference_mode()(lambda: separator.model(x))

    dense = pass_over(1, n + hp.stft_frames - 1)
    took = best_seconds(bench, dense=dense, slices=pass_over(batch, hp.stft_frames))
    column, operations = took["dense"] / n, networks.operations_per_column(hp)
    return {
        "operations per column [MFLOP]": operations / 1e6,
        "dense pass [ms per column]": column * 1e3,
        "dense pass [GFLOP/s]": operations / column / 1e9,
        "dense pass, share of the roofline": least_seconds(hp, rates, n) / took["dense"],
        "real-time factor": column * hp.sample_rate / hp.hop_length,
        "separate slices / dense pass": took["slices"] / batch / column,
    }


def generate(hp: HParams, bench: Bench, rates: Rates) -> Figures:
    """Time generate.py from Enter to two files, beside its start-up and the network alone."""
    import torch

    separator = untrained_separator(hp, bench)
    block = separator.block_frames
    n_blocks = -(-bench.seconds * hp.sample_rate // (hp.hop_length * block))
    x = torch.rand(1, hp.n_bins, block + hp.stft_frames - 1, device=bench.device)

    def script(seconds: int) -> Callable[[], None]:
        song = write_song(bench.folder / f"{seconds}.wav", seconds)
        words = [HERE / "generate.py", bench.folder / "network.pth", song, "--background"]
        words += ["--overwrite", "--device", bench.device.type, "--output-dir", bench.folder]
        for name in ("precision", "block_frames"):
            words += ["--set", f"{name}={getattr(hp, name)}"]
        return lambda: subprocess.run(
            [sys.executable, *words], check=True, stdout=subprocess.DEVNULL
        )

    def network_alone() -> None:
        for _ in range(n_blocks):
            separator.mask(x)

    whole, start = script(bench.seconds), script(1)
    took = best_seconds(bench, whole=whole, start=start, network=network_alone)
    working = max(took["whole"] - took["start"], 1e-9)
    least = n_blocks * least_seconds(hp, rates, block)
    return {
        "song": f"{bench.seconds} s, {SONG_RATE} Hz stereo",
        "from Enter to vocals and accompaniment [s]": took["whole"],
        "of this the start, up to a song of 1 s [s]": took["start"],
        "real-time factor without the start": working / max(bench.seconds - 1, 1),
        "the same / network alone": working / took["network"],
        "network alone, share of the roofline": least / took["network"],
    }


def training(hp: HParams, bench: Bench, rates: Rates) -> Figures:
    """Time a step of training, stage by stage."""
    import torch

    from dataset import Feed, batches_of, plan_epoch
    from learning.run import Run, loss_of
    from learning.targets import make_example

    songs = [song_in_memory(hp, bench.seconds)]
    feed = Feed(songs, hp, bench.device, resident=True)
    run = Run(replace(hp, steps=10**9, schedule="constant"), feed, [])
    batch = batches_of(plan_epoch(songs, hp, 0), hp)[0]
    (fed,) = feed.batches([batch])

    def mix() -> tuple[torch.Tensor, ...]:
        return make_example(feed.spectrograms(fed), fed.gains, fed.eq_db, run.curve_db, hp)

    example = mix()
    took = best_seconds(
        bench,
        step=lambda: run.take_step(next(feed.batches([batch]))),
        gather=lambda: feed.spectrograms(next(feed.batches([batch]))),
        mix=mix,
        passes=lambda: loss_of(run, *example).backward(),
    )
    rate = len(batch) * hp.chunk_slices / took["step"]
    least = least_seconds(hp, rates, hp.chunk_slices, len(batch), training=True)
    figures: Figures = {
        "step": f"{len(batch)} chunks of {hp.chunk_slices}",
        "step [ms]": took["step"] * 1e3,
        "slices per second": rate,
        f"{EPOCH_SLICES} slices [s]": EPOCH_SLICES / rate,
        "step, share of the roofline": least / took["step"],
        "forward and backward / step": took["passes"] / took["step"],
        "gather / step": took["gather"] / took["step"],
        "gather, mix, features, target / step": took["mix"] / took["step"],
    }
    if bench.device.type == "cuda":
        figures["most memory [GB]"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def live(hp: HParams, bench: Bench, _rates: Rates) -> Figures:
    """Time 48 kHz mono in packets of 20 ms, packet by packet, on one thread."""
    import numpy as np
    import torch

    torch.set_num_threads(1)  # as generate.py does
    rate, n_packet = 48000, 960
    packets = np.random.default_rng(0).normal(0, 0.1, (50, 1, n_packet)).astype(np.float32)
    stream = untrained_separator(hp, bench).stream(rate, 1, live=True)
    times: list[float] = []
    for i in range(bench.rounds * bench.seconds * rate // n_packet):
        started = time.perf_counter()
        stream.push(packets[i % len(packets)])
        times.append(1e3 * (time.perf_counter() - started))
    times = times[50:]  # the first calls pay for what the later ones find ready
    return {
        "delay [ms]": 1e3 * stream.delay / rate,
        "mean work per packet of 20 ms [ms]": float(np.mean(times)),
        "median [ms]": float(np.median(times)),
        "99.9th percentile [ms]": float(np.percentile(times, 99.9)),
        "slowest packet [ms]": max(times),
    }


def measure_rates(bench: Bench) -> Rates:
    """Measure the rates of a large matrix product and of a large copy, in the network's numbers."""
    import torch

    device, size = bench.device, MATRIX[bench.device.type]
    matrix = torch.rand(size, size, device=device, dtype=bench.dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as training and cuDNN have it
    values = torch.zeros(VALUES[device.type], device=device)
    target = torch.empty_like(values)
    took = best_seconds(bench, matrix=lambda: matrix @ matrix, copy=lambda: target.copy_(values))
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


def best_seconds(bench: Bench, **work: Callable[[], Any]) -> dict[str, float]:
    """Run pieces of work in alternation; return the shortest time of each [s]."""
    import torch

    wait = torch.cuda.synchronize if bench.device.type == "cuda" else lambda: None
    best = dict.fromkeys(work, float("inf"))
    for piece in work.values() if bench.rounds > 1 else ():
        piece()  # first calls pay for what the later ones find ready
    for _ in range(bench.rounds):
        for name, piece in work.items():
            wait()
            started = time.perf_counter()
            piece()
            wait()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def untrained_separator(hp: HParams, bench: Bench) -> Separator:
    """Load ``network.pth``, written with random weights: the time does not depend on them."""
    import torch

    import audio
    import model as networks
    from separation import Separator

    torch.manual_seed(0)
    path = bench.folder / "network.pth"
    about = {"curve_db": audio.weighting_curve_db(hp), "mask_settings": UNTUNED_MASK}
    networks.save_checkpoint(path, networks.build_model(hp), hp, **about)
    return Separator.load(path, bench.device, settings=hp)


def song_in_memory(hp: HParams, seconds: int) -> OpenSong:
    """Make a song of noise, as an opened dataset has it."""
    import numpy as np

    from dataset import PARTS, OpenSong, Song

    n_frames = 1 + seconds * hp.sample_rate // hp.hop_length
    some = 0.05 * np.random.default_rng(0).standard_normal((1024, 2, hp.n_bins, 2), np.float32)
    array = np.resize(some.astype(np.float16), (n_frames, 2, hp.n_bins, 2))
    names = dict.fromkeys(("id", "file", "singer", "group", "sha256"), "song")
    size = {"n_frames": n_frames, "sample_rate": hp.sample_rate, "seconds": float(seconds)}
    song = Song(**names, **size, split="train", parts=PARTS, inputs=())
    return OpenSong(song, array, dict.fromkeys(PARTS, -20.0))


def write_song(path: Path, seconds: int) -> Path:
    """Write a stereo 16-bit song: a second of noise, repeated."""
    import numpy as np
    import soundfile

    noise = np.random.default_rng(0).normal(0, 0.1, (SONG_RATE, 2))
    soundfile.write(path, np.tile(noise, (seconds, 1)), SONG_RATE)
    return path


if __name__ == "__main__":
    sys.exit(main())
