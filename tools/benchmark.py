"""Measure what the project costs on this machine, each figure beside what it is compared with.

Machines are noisy: whatever is compared runs in alternation, the best of several rounds counts,
and only ratios mean something elsewhere. The roofline (roofline.py) is the least time that a task
can take at the rates of a large matrix product and of a large copy, measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cli
from hparams import UNTUNED_MASK, HParams, override
from learning import ranks as distributed

if TYPE_CHECKING:
    import torch

    from tools.roofline import Rates

EPILOG = """examples:
  python -m tools.benchmark train                               # a training step, stage by stage
  python -m tools.benchmark train --against width=16            # beside another setting
  torchrun --nproc-per-node 2 -m tools.benchmark train          # the same on two processes
  python -m tools.benchmark generate --set width=16 --json      # a whole song"""
HERE = Path(__file__).parent.parent
SONG_SECONDS = 240
SONG_RATE = 44100
EPOCH_SLICES = 2_000_000  # 100 songs of 4 minutes: the size of DSD100
ON_DEVICE = ("network", "train", "generate", "live")

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
    world: distributed.World
    n_songs: int
    rates: Rates | None  # for those that run on the device


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run one benchmark, for one or several settings, and print its figures."""
    benchmarks = {
        "network": network,
        "train": train,
        "ranks": ranks,
        "generate": generate,
        "live": live,
        "memory": memory,
        "build": build,
        "read": read,
        "startup": startup,
    }
    parser = make_parser(benchmarks)
    args = parser.parse_args(argv)
    hp, world = cli.settings_of(args), distributed.world()
    settings = [hp, *(override(hp, against) for against in args.against)]
    if args.device == "cuda" and args.what not in ON_DEVICE:
        parser.error(f"--device cuda: {args.what} has no part that runs there")

    import torch

    import model as networks
    from tools import roofline

    if args.what not in ON_DEVICE:
        args.device = "cpu"
    device = quietly(cli.device_of, args, parser, world.local_rank)
    names = ["these settings", *(" ".join(against) for against in args.against)]
    with tempfile.TemporaryDirectory() as folder, distributed.joined(world, device.type):
        about = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "processes": world.size,
            "threads of each": torch.get_num_threads(),
        }
        rates = None
        if args.what in ON_DEVICE:
            is_narrow = networks.is_narrow(hp, device, for_inference=args.what != "train")
            rates = roofline.measure_rates(device, is_narrow)
            about["matrix product [GFLOP/s]"] = rates.operations / 1e9
            about["copy [GB/s]"] = rates.copied / 1e9
        bench = Bench(Path(folder), device, world, args.songs, rates)
        prepared = [benchmarks[args.what](one, bench) for one in settings]
        pieces = {
            (i, name): piece for i, one in enumerate(prepared) for name, piece in one.work.items()
        }
        took = roofline.best_seconds(pieces, args.rounds, device)
        results = [
            one.figures({name: took[i, name] for name in one.work})
            for i, one in enumerate(prepared)
        ]
    if not world.rank:
        show(about, dict(zip(names, results, strict=True)), args.json)
    return 0


def make_parser(benchmarks: dict[str, Any]) -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__, EPILOG)
    parser.add_argument("what", choices=benchmarks, help="which part to measure")
    parser.add_argument(
        "--rounds",
        type=cli.positive_count,
        default=5,
        help="rounds in alternation (%(default)s)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="also measure with these settings changed, in alternation; may be given several times",
    )
    parser.add_argument(
        "--songs",
        type=cli.positive_count,
        default=4,
        metavar="N",
        help="train: songs of 4 minutes in the dataset; 100 is the size of DSD100 (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    cli.add_device_option(parser)
    return parser


def show(about: Figures, results: dict[str, Figures], as_json: bool) -> None:
    """Print the figures of all settings side by side, with the ratio of the last to the first."""
    if as_json:
        print(json.dumps({**about, "results": results}, indent=1))
        return
    for name, value in about.items():
        print(f"{name:52} {_text(value)}")
    columns = list(results.values())
    if len(columns) > 1:
        print(f"\n{'':52} " + " ".join(f"{name[-18:]:>18}" for name in [*results, "last / first"]))
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, "") for column in columns]
        if len(values) > 1 and all(isinstance(v, float) and v for v in (values[0], values[-1])):
            values.append(values[-1] / values[0])
        cells = [_text(value) for value in values]
        wide = len(cells) > 1
        print(f"{name:52} " + " ".join(f"{cell:>18}" if wide else cell for cell in cells))


def network(hp: HParams, bench: Bench) -> Benchmark:
    """Compare one dense pass with separate slices, and with the original's kind of network."""
    import torch

    import model as networks
    from tools import roofline

    device, separator = bench.device, _untrained_separator(hp, bench.device)
    n, net, dtype = separator.block_frames, separator.model, separator.dtype
    original = networks.for_inference(_original_network()).to(device, dtype)

    def in_inference(model: torch.nn.Module, *shape: int) -> Callable[[], Any]:
        x = torch.rand(*shape, device=device, dtype=dtype)
        return torch.inference_mode()(lambda: model(x))

    work = {"dense": in_inference(net, 1, 1, hp.n_bins, n + hp.stft_frames - 1)}
    for size in (1, 4, 16, 64):
        work[f"slices {size}"] = in_inference(net, size, 1, hp.n_bins, hp.stft_frames)
    work["original"] = in_inference(original, 1, 1, hp.n_bins, hp.stft_frames)
    operations = networks.operations_per_column(hp)

    def figures(took: dict[str, float]) -> Figures:
        dense = took["dense"] / n
        per_slice = {k: took[k] / int(k.split()[1]) for k in took if k.startswith("slices")}
        best = min(per_slice, key=per_slice.get)
        window = torch.zeros(1, 1, hp.n_bins, hp.stft_frames, device=device, dtype=dtype)
        return {
            "network": f"{hp.model_type}, width {hp.width}, {hp.stft_frames} frames",
            "precision": str(dtype).removeprefix("torch."),
            "operations per column [MFLOP]": operations / 1e6,
            "dense pass [ms per column]": dense * 1e3,
            "dense pass [GFLOP/s]": operations / dense / 1e9,
            "dense pass, share of the roofline": roofline.least_seconds(hp, bench.rates, n)
            / took["dense"],
            "best batch of separate slices": best.split()[1],
            "separate slices / dense pass": per_slice[best] / dense,
            "original window [GFLOP]": _operations(original, window) / 1e9,
            "original window by window / dense pass": took["original"] / dense,
        }

    return Benchmark(work, figures)


def train(hp: HParams, bench: Bench) -> Benchmark:
    """Time a training step stage by stage, beside its roofline and beside separate slices."""
    import model as networks
    from learning import planning, sampling
    from learning import run as training
    from tools import roofline

    device, world = bench.device, bench.world
    songs = _songs_in_memory(hp, bench.n_songs)
    started = time.perf_counter()
    feed = sampling.Feed(songs, hp, device, resident=True)
    loaded = time.perf_counter() - started
    _forget_peak(device)
    held = _peak_bytes(device)
    run = _endless_run(hp, feed, world)
    plan = sampling.plan_epoch(songs, hp, 0)
    batch = world.share(sampling.batches_of(plan, hp)[0])
    fed = next(feed.batches([batch]))
    example = training.make_example(run, *fed)
    started = time.perf_counter()
    training.train_step(run, *fed)
    roofline.wait_for(device)
    first_step = time.perf_counter() - started
    for _ in range(2):
        training.train_step(run, *fed)
    roofline.wait_for(device)
    step_peak = _peak_bytes(device) - held

    n = hp.batch_size * hp.chunk_slices
    separate = replace(hp, chunk_slices=1, batch_size=world.size * 32)
    apart = _endless_run(separate, sampling.Feed(songs[:1], separate, device, False), world)
    one_by_one = next(apart.feed.batches([sampling.plan_epoch(songs[:1], separate, 0)[:32]]))

    def backward() -> None:
        training.forward(run, *example).backward()

    def step() -> None:
        (ready,) = feed.batches([batch])
        training.train_step(run, *ready)

    work = {
        "step": step,
        "gather": lambda: next(feed.batches([batch])),
        "mix": lambda: training.make_example(run, *fed),
        "forward and backward": backward,
        "forward": lambda: training.forward(run, *example),
        "update": lambda: training.update(run),
        "separate": lambda: training.train_step(apart, *one_by_one),
    }

    def figures(took: dict[str, float]) -> Figures:
        rate = n / took["step"]
        network_seconds = took["forward and backward"]
        least = roofline.least_seconds(hp, bench.rates, hp.chunk_slices, len(batch), training=True)
        return {
            "network": f"{hp.model_type}, width {hp.width}",
            "step": f"{hp.batch_size} chunks of {hp.chunk_slices} slices",
            "precision": "bfloat16" if networks.is_narrow(hp, device) else "float32",
            "compile": hp.compile,
            "step [ms]": took["step"] * 1e3,
            "slices per second": rate,
            f"epoch of {EPOCH_SLICES} slices [s]": EPOCH_SLICES / rate,
            "roofline of the step [ms]": least * 1e3,
            "step, share of the roofline": least / took["step"],
            "forward and backward / step": network_seconds / took["step"],
            "  forward / step": took["forward"] / took["step"],
            "gather / step": took["gather"] / took["step"],
            "mix, features, target / step": took["mix"] / took["step"],
            "update / step": took["update"] / took["step"],
            "separate slices / chunks, time of a slice": (
                took["separate"] / (32 * world.size) * rate
            ),
            "memory of a step by arithmetic [MB]": (
                planning.step_bytes(hp, device, world.size) / 1e6
            ),
            "memory of a step, measured [MB]": step_peak / 1e6,
            "dataset [MB]": sum(song.spectrogram.nbytes for song in songs) / 1e6,
            "loading it [s]": loaded,
            "first step [s]": first_step,
        }

    return Benchmark(work, figures)


def ranks(hp: HParams, bench: Bench) -> Benchmark:
    """Compare two processes of one thread with one process of two threads."""
    settings = [f"{name}={value}" for name, value in vars(hp).items() if value is not None]
    words = ["tools/benchmark.py", "train", "--rounds=3", "--songs=1", "--json", "--device=cpu"]
    words += [word for setting in settings for word in ("--set", setting)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found: dict[str, float] = {}

    def measure(name: str, prefix: list[str], threads: str) -> None:
        done = _run(
            [*words],
            environment={"OMP_NUM_THREADS": threads, "PYTHONPATH": str(HERE)},
            prefix=prefix,
        )
        rate = json.loads(done)["results"]["these settings"]["slices per second"]
        found[name] = max(found.get(name, 0.0), rate)

    work = {
        "one": lambda: measure("one", [], "2"),
        "two": lambda: measure("two", launcher, "1"),
    }
    return Benchmark(
        work,
        lambda _took: {
            "network": f"{hp.model_type}, width {hp.width}",
            "one process, two threads [slices per second]": found["one"],
            "two processes, one thread each [slices per second]": found["two"],
            "two processes / one": found["two"] / found["one"],
        },
    )


def generate(hp: HParams, bench: Bench) -> Benchmark:
    """Time a song from file to files, stage by stage, beside the network's roofline."""
    import torch

    import audio
    import separation
    from sound import reading
    from sound.writing import Part, SoundWriter, choose_format
    from tools import roofline

    device, folder = bench.device, bench.folder
    separator = _untrained_separator(hp, device)
    song = _write_song(folder / "song.wav", SONG_SECONDS)
    outputs = [folder / "song_vocals.wav", folder / "song_accompaniment.wav"]
    grid = audio.grid_at(SONG_RATE, hp)
    block = separator.block_frames
    n_frames = 1 + SONG_SECONDS * hp.sample_rate // hp.hop_length
    n_blocks = -(-(n_frames + hp.lookahead) // block)
    unit = torch.randn(2, (block - 1) * grid.hop_length + grid.n_fft, device=device) / 10
    spec = audio.frames_to_spec(unit, grid)
    seen = torch.rand(1, hp.n_bins, block + hp.stft_frames - 1, device=device)
    mask = torch.rand(1, block, hp.n_bins, device=device).mT

    @contextlib.contextmanager
    def opened() -> Iterator[tuple[reading.Reader, list[SoundWriter]]]:
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(reading.Reader(song))
            form, stems = (reader.info, choose_format(reader.info)), ("vocals", "accompaniment")
            both = [SoundWriter(p, *form, s) for p, s in zip(outputs, stems, strict=True)]
            yield reader, [stack.enter_context(sound) for sound in both]

    def whole() -> None:
        with opened() as (reader, sounds):
            stream = separator.stream(SONG_RATE, 2)
            fmt = reader.info.sample_format
            for part in separation.split(stream, reader.blocks(separation.READ_SAMPLES), fmt):
                for sound in sounds:
                    sound.write(part)

    def copy() -> None:
        with opened() as (reader, sounds):
            fmt = reader.info.sample_format
            for codes in reader.blocks(separation.READ_SAMPLES):
                vocals = reading.to_codes(reading.to_float(codes, fmt), fmt)
                vocals, _ = reading.limit_to_remainder(vocals, codes, fmt)
                for sound in sounds:
                    sound.write(Part(codes, vocals, codes - vocals))

    def hear() -> None:
        for _ in range(n_blocks):
            heard = audio.mono(audio.to_network_bins(audio.frames_to_spec(unit, grid), hp))
            audio.features(heard, separator.curve_db, hp.mixture_power, hp)

    def think() -> None:
        for _ in range(n_blocks):
            separator.mask(seen)

    def invert() -> None:
        for _ in range(n_blocks):
            applied = audio.vocals_mask(mask, **separator.mask_settings)
            audio.spec_to_frames(audio.apply_mask(spec, applied), grid)

    def figures(took: dict[str, float]) -> Figures:
        least = n_blocks * roofline.least_seconds(hp, bench.rates, block)
        whole = took["whole"]
        return {
            "network": f"{hp.model_type}, width {hp.width}",
            "precision": str(separator.dtype).removeprefix("torch."),
            "song": f"{SONG_SECONDS} s, {SONG_RATE} Hz stereo, to vocals and accompaniment",
            "whole [s]": whole,
            "real-time factor": whole / SONG_SECONDS,
            "whole / network alone": whole / took["network"],
            "network / whole": took["network"] / whole,
            "network, share of its roofline": least / took["network"],
            "reading and writing / whole": took["files"] / whole,
            "STFT and features / whole": took["stft"] / whole,
            "mask and inverse / whole": took["inverse"] / whole,
        }

    inference = torch.inference_mode()
    work = {"whole": whole, "network": think, "files": copy}
    return Benchmark(work | {"stft": inference(hear), "inverse": inference(invert)}, figures)


def live(hp: HParams, bench: Bench) -> Benchmark:
    """Time a voice call: 48 kHz mono in packets of 20 ms, packet by packet, on one thread."""
    import numpy as np
    import torch

    torch.set_num_threads(1)  # as generate.py does
    separator = _untrained_separator(hp, bench.device)
    rate, n_packet, n_packets = 48000, 960, 3000
    packets = np.random.default_rng(0).normal(0, 0.1, (50, 1, n_packet)).astype(np.float32)
    stream, times = separator.stream(rate, 1, live=True), []
    for packet in packets:
        stream.push(packet)

    def call() -> None:
        for i in range(n_packets):
            started = time.perf_counter()
            stream.push(packets[i % len(packets)])
            times.append(time.perf_counter() - started)

    def figures(_took: dict[str, float]) -> Figures:
        milliseconds = np.sort(times) * 1e3
        hops = n_packet / stream.grid.hop_length
        return {
            "network": f"{hp.model_type}, width {hp.width}",
            "delay [ms]": 1e3 * stream.delay / rate,
            "packets of 20 ms": len(milliseconds),
            "mean work per hop of 11.7 ms [ms]": milliseconds.mean() / hops,
            "mean work per packet [ms]": milliseconds.mean(),
            "median [ms]": np.percentile(milliseconds, 50),
            "99th percentile [ms]": np.percentile(milliseconds, 99),
            "99.9th percentile [ms]": np.percentile(milliseconds, 99.9),
            "slowest packet [ms]": milliseconds[-1],
        }

    return Benchmark({"call": call}, figures)


def memory(hp: HParams, bench: Bench) -> Benchmark:
    """Compare the peak memory of generate.py on 4 minutes and on 2 hours."""
    checkpoint = _untrained_checkpoint(hp, bench.folder)
    figures = {}
    for name, seconds in (("4 minutes", 240), ("2 hours", 7200)):
        song = _write_song(bench.folder / "song.wav", seconds)
        words = ["generate.py", checkpoint, song, "--background", "--output-dir"]
        words += [bench.folder / "out", "--device", "cpu"]
        figures[f"peak memory, {name} [MB]"] = _peak_megabytes(words)
    return Benchmark({}, lambda _took: figures)


def build(hp: HParams, bench: Bench) -> Benchmark:
    """Time build_dataset.py on a DSD100 tree of synthesised songs, and the stages of one song."""
    import hashlib

    import audio
    from demo import synthesis
    from learning import building
    from sound import tracks

    n_songs, seconds, tree = 4, 120, bench.folder / "tree"
    if not tree.exists():
        synthesis.write_dsd100(tree, n_songs - 1, 1, seconds, SONG_RATE, seed=0)
    track = tracks.find_tracks(tree).tracks[0]
    grid = audio.grid_at(SONG_RATE, hp)
    blocks = list(tracks.read_blocks(track, building.BLOCK))
    arrays = list(building.spectrogram_blocks(iter(blocks), grid, hp))

    def decode() -> None:
        for _ in tracks.read_blocks(track, building.BLOCK):
            pass

    def transform() -> None:
        for _ in building.spectrogram_blocks(iter(blocks), grid, hp):
            pass

    def write() -> None:
        digest = hashlib.sha256()
        with open(bench.folder / "song.npy", "wb") as file:
            for array in arrays:
                digest.update(array)
                file.write(array)

    def script(workers: int) -> Callable[[], None]:
        output = bench.folder / f"data{workers}"
        words = ["build_dataset.py", tree, output, "--overwrite", "--workers", str(workers)]

        def run() -> None:
            subprocess.run(["rm", "-rf", output], check=True)
            _run(words)

        return run

    n_cores = os.cpu_count() or 1
    work = {"decode": decode, "transform": transform, "write": write, "1": script(1)}
    work |= {str(n_cores): script(n_cores)}

    def figures(took: dict[str, float]) -> Figures:
        stages = {name: took[name] for name in ("decode", "transform", "write")}
        total = sum(stages.values())
        return {
            "songs": f"{n_songs} of {seconds} s, {SONG_RATE} Hz stereo",
            "one song, one core [s of music per s]": seconds / total,
            "  decoding": stages["decode"] / total,
            "  STFT and conversion": stages["transform"] / total,
            "  hashing and writing": stages["write"] / total,
            **{
                f"script, {n} workers [s of music per s, start-up included]": (
                    n_songs * seconds / took[str(n)]
                )
                for n in (1, n_cores)
            },
        }

    return Benchmark(work, figures)


def read(hp: HParams, bench: Bench) -> Benchmark:
    """Compare reading chunks from the open memory-map with opening the file for every slice."""
    import numpy as np

    import dataset
    from learning import sampling

    n_frames, n_chunks = 60_000, 20
    path = bench.folder / "song.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.random((n_frames, 2, hp.n_bins, 2), np.float32).astype(np.float16))
    song = _song(path.name, n_frames)
    levels = dict.fromkeys(dataset.PARTS, 0.0)
    opened = dataset.OpenSong(song, dataset.open_spectrogram(bench.folder, song, hp.n_bins), levels)
    starts = rng.integers(0, n_frames - 500, n_chunks)
    pairs = np.stack([starts, starts], 1)
    no_effects = np.zeros((n_chunks, 0), np.float32)
    chunks = sampling.Chunks(0 * pairs, pairs, np.ones(pairs.shape, np.float32), no_effects)

    def reopening() -> None:
        for start in starts.tolist():
            for slice_start in range(start, start + hp.chunk_slices):
                array = np.load(path, mmap_mode="r")
                np.array(array[slice_start : slice_start + hp.stft_frames])

    def figures(took: dict[str, float]) -> Figures:
        return {
            "slices per chunk": hp.chunk_slices,
            "chunk from the open map [ms]": took["map"] / n_chunks * 1e3,
            "its slices, re-opening for each [ms]": took["reopening"] / n_chunks * 1e3,
            "re-opening / open map": took["reopening"] / took["map"],
        }

    work = {"map": lambda: sampling.read_batch([opened], chunks, hp), "reopening": reopening}
    return Benchmark(work, figures)


def startup(hp: HParams, bench: Bench) -> Benchmark:
    """Time how fast generate.py answers --help, and a wrong path."""
    checkpoint = _untrained_checkpoint(replace(hp, width=4), bench.folder)
    work = {
        "--help": lambda: _run(["generate.py", "--help"]),
        "wrong path": lambda: _run(["generate.py", checkpoint, "missing.wav"], expected=1),
        "python -c pass": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
    }
    return Benchmark(work, lambda took: {f"{name} [s]": took[name] for name in took})


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function whose prints are not part of our output."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def _endless_run(hp: HParams, feed: Any, world: distributed.World) -> Any:
    """Make a run whose schedule never ends."""
    from learning import run as training

    return training.Run(replace(hp, steps=10**9, schedule="constant"), feed, [], world)


def _songs_in_memory(hp: HParams, n_songs: int) -> list[Any]:
    """Make a dataset of songs of 4 minutes; the sound is the same in all of them."""
    import numpy as np

    import dataset

    n_frames = 1 + SONG_SECONDS * hp.sample_rate // hp.hop_length
    rng = np.random.default_rng(0)
    some = 0.05 * rng.standard_normal((1024, 2, hp.n_bins, 2), np.float32)
    array = np.resize(some.astype(np.float16), (n_frames, 2, hp.n_bins, 2))
    levels = dict.fromkeys(dataset.PARTS, -20.0)
    return [dataset.OpenSong(_song(f"{i}", n_frames), array, levels) for i in range(n_songs)]


def _song(name: str, n_frames: int) -> Any:
    """Describe a song that no manifest lists."""
    import dataset

    rate = 44100
    return dataset.Song(
        name, name, "train", name, name, dataset.PARTS, n_frames, rate, 0.0, name, ()
    )


def _forget_peak(device: torch.device) -> None:
    """Begin to look for the largest memory in use anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def _peak_bytes(device: torch.device) -> int:
    """Return the most memory that was in use since `_forget_peak` [bytes]."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def _untrained_separator(hp: HParams, device: torch.device) -> Any:
    """Load a network with random weights as generate.py would."""
    from separation import Separator

    with tempfile.TemporaryDirectory() as folder:
        return Separator.load(_untrained_checkpoint(hp, Path(folder)), device, settings=hp)


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


def _run(
    words: list[str | Path],
    expected: int = 0,
    environment: dict[str, str] | None = None,
    prefix: list[str] | None = None,
) -> str:
    """Run a script of the project, insist on its exit code, and return what it printed."""
    command = [sys.executable, *(prefix or []), HERE / words[0], *words[1:]]
    variables = os.environ | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode != expected:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def _peak_megabytes(words: list[str | Path]) -> float:
    """Run a script and return the largest resident memory it had [MB]."""
    command = [sys.executable, HERE / words[0], *map(str, words[1:])]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{words[0]} failed")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    distributed.leave(main())
