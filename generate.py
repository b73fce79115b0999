"""Separate songs: write the vocals of every file, and with --background the rest.

Outputs have the input's sample rate, channels and length; vocals plus accompaniment are the input.

    python generate.py song.wav
    python generate.py albums --background --format flac --output-dir stems
    ffmpeg -i song.m4a -f wav - | python generate.py - | ffplay -
    torchrun --nproc-per-node 2 generate.py albums
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cli
from cli import positive_count, positive_number
from hparams import InputError, UsageError, parse_settings
from learning import ranks

if TYPE_CHECKING:
    import numpy as np

    from separation import Separator
    from sound import reading
    from sound.page import Report
    from sound.pipes import PipeReader
    from sound.reading import AudioInfo
    from sound.writing import Identity, OutputFormat

EPILOG = """what you hear:
  --set mask_at_eval=true        binary mask: cleaner pauses, harsher consonants
  --set eval_mask_threshold=0.6  binary: drier, less of the band and of the voice
  --set noise_gate=0.2           soft: fewer remains between the words, thinner voice
  --set mask_sharpness=1.5       soft: drier; below 1 more of everything

examples:
  python generate.py song.wav --background --report
  python generate.py albums --format flac --output-dir stems
  ffmpeg -i song.m4a -f wav - | python generate.py - | ffplay -
  python generate.py --live
  python generate.py runs/resnet18/best.pth song.wav    # a network of your own"""
PIPE = Path("-")
FILES_ONLY = ("background", "report", "format", "subtype", "start", "duration")
RAW = ("sample_format", "rate", "channels")
REPORT_BYTES = 60_000  # of a page, a second at most: for the check of the disk
REPORT_SECONDS = 600  # a page shows no more of a song
STEMS = ("vocals", "accompaniment")
PACKET = 0.02  # seconds of live sound that are worked on at a time
LIVE_RATE = 48000  # Hz


class Job(NamedTuple):
    """A song to be separated, and the files that come of it."""

    path: Path
    outputs: dict[str, Path]  # of "vocals", "accompaniment", "mask", "report": those wanted


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Separate every file; one that fails does not stop the rest."""
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    n_words = words.index("--") if "--" in words else len(words)  # behind it all are names
    args = parser.parse_intermixed_args(words[:n_words])  # options may stand between names
    args.audio += map(as_path, words[n_words + 1 :])
    settings = cli.settings_of(args)
    choose_network(args)
    is_pipe = args.live or PIPE in args.audio
    check_usage(args, is_pipe)
    world = ranks.world()
    if not is_pipe:
        jobs, failed, n_done = plan(args, is_first=not world.rank)
        if not jobs:
            return finish(failed, len(failed) + n_done, world)
    cli.refuse_missing(args.checkpoint)

    from separation import Separator  # here: a wrong path is told before torch is loaded

    # A pipe's standard output is sound: what there is to say goes beside it.
    with contextlib.redirect_stdout(sys.stderr) if is_pipe else contextlib.nullcontext():
        device = cli.device_of(args, parser, world.local_rank)
    separator = Separator.load(args.checkpoint, device, settings, parse_settings(args.settings))
    if separator.licence and not world.rank:
        network = cli.printable(f"{args.checkpoint}: {separator.licence}")
        print(f"network: {network}", file=sys.stderr if is_pipe else sys.stdout)
    if args.live and device.type == "cpu":
        import torch

        # Layers of one column are too small for two threads: they wait for each other, and long
        # where another program has one of the cores.
        torch.set_num_threads(1)
    if is_pipe:
        return pipe(separator, args) if args.audio else live(separator, args)
    n_songs = len(jobs) + len(failed) + n_done
    with ranks.joined(world):  # torchrun ends all where one ends badly: they leave together
        bad = [job.path for job in world.share(jobs) if not attempt(separator, job, args)]
        failed += [path for paths in world.gather(bad) for path in paths]
    return finish(failed, n_songs, world)


def choose_network(args: argparse.Namespace) -> None:
    """Take a first path that ends in ``.pth`` as the network, or else the project's own.

    Raises
    ------
    UsageError
        If another network seems to be meant: nobody wants the project's instead.
    """
    args.checkpoint = cli.PRETRAINED
    if args.audio and args.audio[0].suffix.lower() == ".pth":
        args.checkpoint, *args.audio = args.audio
    elif len(args.audio) > 1 and is_mistaken(args.audio[0]):
        raise UsageError(f"{args.audio[0]}: neither a network (a .pth file) nor a song")
    for path in args.audio:
        if path.suffix.lower() == ".pth":
            if args.checkpoint != cli.PRETRAINED:
                raise UsageError(f"{path}: a second network beside {args.checkpoint} (name one)")
            raise UsageError(f"{path}: is a network; the network comes first")
        if is_network(path):
            raise UsageError(f"{path}: is a network (call it something.pth, and name it first)")
        if args.checkpoint == cli.PRETRAINED and os.path.isdir(path):
            for network in sorted(path.glob("*.pth")):
                raise UsageError(f"{path}: holds networks (name the one to take, as {network})")


def is_mistaken(path: Path) -> bool:
    """Return whether a path leads nowhere and is not called like a song."""
    from sound import tracks

    return path != PIPE and not os.path.exists(path) and path.suffix.lower() not in tracks.AUDIO


def is_network(path: Path) -> bool:
    """Return whether a file is what torch.save writes, whatever its name."""
    try:
        if not os.path.isfile(path):  # opening a FIFO would wait for ever
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def finish(failed: list[Path], n_songs: int, world: ranks.World) -> int:
    """Name what failed; returns the exit code."""
    if failed and not world.rank and n_songs > 1:
        names = ", ".join(map(str, failed))
        cli.warn(f"{len(failed)} of {n_songs} files failed: {names}")
    return int(bool(failed))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__, EPILOG)
    parser.add_argument(
        "audio",
        type=as_path,
        nargs="*",
        metavar="path",
        help="songs (wav, flac, ogg, mp3, aiff …, m4a with PyAV or ffmpeg), folders of them, or -: "
        "wav or raw PCM from standard input, to standard output; before them a .pth file that "
        "train.py wrote, if another network than the project's is to separate them",
    )
    files = parser.add_argument_group("what is written")
    files.add_argument(
        "--output-dir",
        type=as_path,
        default=Path("generated"),
        help="made if missing (%(default)s)",
    )
    files.add_argument(
        "--background", action="store_true", help="also write <name>_accompaniment.wav"
    )
    files.add_argument("--format", choices=["wav", "flac", "ogg", "mp3"], help="of the sound (wav)")
    files.add_argument("--subtype", help="PCM_16, PCM_24, FLOAT …; by default the song's own")
    files.add_argument(
        "--report", action="store_true", help="also write <name>.html, to listen and compare"
    )
    files.add_argument(
        "--overwrite", action="store_true", help="separate again what is already there"
    )
    song = parser.add_argument_group("how a song is taken")
    song.add_argument("--start", type=as_seconds, default=0.0, help="seconds into the song (0)")
    song.add_argument("--duration", type=positive_number, help="seconds of it (all)")
    song.add_argument(
        "--per-channel", action="store_true", help="a mask for every channel, not one for all"
    )
    song.add_argument(
        "--allow-truncated", action="store_true", help="take files shorter than they promise"
    )
    song.add_argument(
        "--fix-nonfinite", action="store_true", help="take NaN and infinite samples as silence"
    )
    pipes = parser.add_argument_group("pipes and live sound")
    pipes.add_argument(
        "--live",
        action="store_true",
        help="0.19 s behind the input, not seconds: from the microphone to the loudspeakers, or "
        "with - from standard input to standard output",
    )
    pipes.add_argument(
        "--stem",
        choices=STEMS,
        default="vocals",
        help="what a pipe or the loudspeakers get (%(default)s)",
    )
    pipes.add_argument(
        "--sample-format",
        choices=["u8", "s16le", "s24le", "s32le", "f32le", "f64le"],
        help="the pipe holds raw PCM, in and out, and not wav",
    )
    pipes.add_argument(
        "--rate", type=positive_count, help="raw and live: samples a second (live: 48000)"
    )
    pipes.add_argument("--channels", type=positive_count, help="raw and live (live: 1)")
    cli.add_device_option(parser)
    return parser


def as_seconds(text: str) -> float:
    """Read a time for argparse."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more seconds")
    return float(text)


def as_path(text: str) -> Path:
    """Read a path for argparse; UsageError for an empty one, which would be the current folder."""
    if not text:
        raise UsageError("a path is empty (leave it out, or name a file)")
    return Path(text)


def check_usage(args: argparse.Namespace, is_pipe: bool) -> None:
    """Refuse options that do not go together."""
    if args.live and args.audio not in ([], [PIPE]):
        raise UsageError("--live: takes sound as it comes (name no file, or - for a pipe)")
    if not args.live and not args.audio:
        raise UsageError("name a song, a folder, or - for a pipe")
    if PIPE in args.audio and len(args.audio) > 1:
        raise UsageError("-: is standard input and stands alone (name files in another run)")
    if is_pipe and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("pipes and live sound are one process (leave torchrun out)")
    for name in FILES_ONLY if is_pipe else ():
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option}: is for files (a pipe gives one stem as it came: --stem)")
    raw = [getattr(args, name) is not None for name in RAW]
    if args.live and not args.audio:
        if raw[0]:
            raise UsageError("--sample-format: is for pipes (name - as the audio)")
    elif any(raw) and not (is_pipe and all(raw)):
        raise UsageError(
            "--sample-format, --rate and --channels: describe raw PCM from -, all three"
        )
    if not is_pipe and args.stem != "vocals":
        raise UsageError("--stem: is for pipes and live sound (files: --background)")


# --- Files --------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, is_first: bool) -> tuple[list[Job], list[Path], int]:
    """Pair songs with outputs; returns what is to be done, what failed, how many are done already.

    Only the first of several processes tells what is wrong.
    """
    from sound.writing import identities

    complain: Callable[[object], None] = cli.complain if is_first else lambda _: None
    songs, failed = [], []
    for root in args.audio:
        try:
            found, closed = songs_of(root, args.output_dir)
        except InputError as error:
            complain(error)
            failed.append(root)
            continue
        songs += found
        failed += closed
        for folder in closed:
            complain(f"{folder}: permission denied (change its permissions)")
    inputs = identities(path for path, _ in songs)
    jobs, taken, n_done = [], {}, 0
    for path, folder in songs:
        try:
            job = Job(path, outputs_of(path, folder, args))
            other = taken.setdefault(job.outputs["vocals"], path)
            if other is not path:
                raise InputError(
                    f"{path}: {other} already becomes {job.outputs['vocals']} "
                    "(separate them in two runs with different --output-dir)"
                )
            if check_job(job, inputs, args):
                jobs.append(job)
            else:
                n_done += 1
        except InputError as error:
            complain(error)
            failed.append(path)
    if n_done and is_first:
        are = "is" if n_done == 1 else "are"
        print(
            f"{n_done} of {len(songs)} {are} already there "
            "(--overwrite separates again, also another excerpt or with another network or setting)"
        )
    return jobs, failed, n_done


def songs_of(root: Path, output_dir: Path) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """List songs, each with the folder that its outputs go to within that of all outputs.

    A folder keeps its tree; what an earlier run wrote into it is no song. Folders that cannot be
    read are listed, too.
    """
    from sound import tracks

    if not os.path.isdir(root):
        return [(root, Path())], []
    songs, closed = tracks.find_audio(root)
    outputs = Path(os.path.realpath(output_dir))
    if outputs == Path(os.path.realpath(root)):
        stems = {(path.parent, path.stem + f"_{stem}") for path in songs for stem in STEMS}
        songs = [path for path in songs if (path.parent, path.stem) not in stems]
    else:
        songs = [p for p in songs if not Path(os.path.realpath(p)).is_relative_to(outputs)]
    if not songs and not closed:
        raise InputError(f"{root}: no audio files in this folder (name another one)")
    return [(path, path.parent.relative_to(root)) for path in songs], closed


def outputs_of(path: Path, folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Name the files that come of a song."""
    from sound.writing import output_path

    stems = STEMS[: 1 + args.background]
    suffixes = {stem: f"_{stem}.{args.format or 'wav'}" for stem in stems}
    suffixes |= {"report": ".html"} if args.report else {}
    return {
        kind: output_path(args.output_dir / folder, path, suffix)
        for kind, suffix in suffixes.items()
    }


def check_job(job: Job, inputs: Mapping[Identity, Path], args: argparse.Namespace) -> bool:
    """Find out whether a song can be read and its outputs be written; False if all is there."""
    from sound.writing import check_outputs, choose_format, identities

    with open_song(job.path, args) as reader:
        info = reader.info
    fmt = choose_format(info, args.format or "wav", args.subtype)
    is_input = identities(job.outputs.values()).keys() & inputs.keys()
    if not (args.overwrite or is_input) and is_done(job, info, fmt, args):
        return False
    check_outputs(sizes_of(job, info, fmt, args), inputs)
    return True


def is_done(job: Job, info: AudioInfo, fmt: OutputFormat, args: argparse.Namespace) -> bool:
    """Return whether all outputs are there, like the song and younger than what made them."""
    from sound import reading
    from sound.headers import MP3_FRAME

    try:
        written = [os.stat(output).st_mtime_ns for output in job.outputs.values()]
        made_of = [os.stat(path).st_mtime_ns for path in (job.path, args.checkpoint)]
        found = reading.probe(job.outputs["vocals"])
    except (OSError, InputError):
        return False
    return (
        min(written) >= max(made_of)
        and (found.sample_rate, found.n_channels) == (info.sample_rate, info.n_channels)
        and (found.sample_format == fmt.sample_format or fmt.container in ("ogg", "mp3"))
        and abs(found.n_samples - info.n_samples) <= MP3_FRAME
    )


def open_song(path: Path, args: argparse.Namespace) -> reading.Reader:
    """Open a song, or what --start and --duration leave of it."""
    from sound import reading

    return reading.Reader(path, args.allow_truncated, args.fix_nonfinite, args.start, args.duration)


def sizes_of(
    job: Job, info: AudioInfo, fmt: OutputFormat, args: argparse.Namespace
) -> dict[Path, int]:
    """Predict how large each output becomes [bytes]."""
    from sound.writing import predicted_bytes

    sizes = {
        "report": 400_000 + int(REPORT_BYTES * min(info.seconds, REPORT_SECONDS)),
    }
    return {path: sizes.get(kind, predicted_bytes(info, fmt)) for kind, path in job.outputs.items()}


def attempt(separator: Separator, job: Job, args: argparse.Namespace) -> bool:
    """Separate one file and say how it went; nothing appears before all of it is written."""
    import torch

    started = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(open_song(job.path, args))
            n_limited = render(separator, reader, job, args, stack)
    except InputError as error:
        cli.complain(error)
        return False
    except torch.OutOfMemoryError:
        n = separator.block_frames
        cli.complain(
            f"{job.path}: out of memory on the GPU with blocks of {n} frames "
            f"(try --set block_frames={max(16, n // 4)})"
        )
        return False
    warn_of(reader, n_limited)
    length, took = reader.n_read / reader.info.sample_rate, time.perf_counter() - started
    names = ", ".join(map(str, job.outputs.values()))
    print(
        f"{cli.printable(names)}: {length:.1f} s in {took:.1f} s, "
        f"real-time factor {took / length:.3f} ({length / took:.0f} × real time)"
    )
    return True


def warn_of(reader: reading.Reader | PipeReader, n_limited: int) -> None:
    """Tell what was odd about a sound, and what was done about it."""
    warnings = [*reader.info.warnings, *getattr(reader, "warnings", ())]
    if getattr(reader, "n_clipped", 0):
        warnings.append(f"{reader.n_clipped} samples beyond full scale clipped (--subtype FLOAT)")
    if reader.n_fixed:
        warnings.append(f"{reader.n_fixed} non-finite samples taken as silence")
    if n_limited:
        warnings.append(f"{n_limited} samples of the vocals limited so that the sum fits")
    for warning in warnings:
        cli.warn(f"{reader.info.path}: {warning}")


def render(
    separator: Separator,
    reader: reading.Reader,
    job: Job,
    args: argparse.Namespace,
    stack: contextlib.ExitStack,
) -> int:
    """Read, separate and write one song; returns how many samples were limited."""
    import separation
    from sound import reading
    from sound.writing import AtomicFiles, choose_format

    info, outputs = reader.info, job.outputs
    fmt = choose_format(info, args.format or "wav", args.subtype)
    files = stack.enter_context(AtomicFiles(sizes_of(job, info, fmt, args), inputs=[job.path]))
    sounds = {s: files.sound(outputs[s], info, fmt) for s in STEMS if s in outputs}
    report = None
    if "report" in outputs:
        report = stack.enter_context(begin_report(separator, info, args))

    stream = separator.stream(info.sample_rate, info.n_channels, per_channel=args.per_channel)
    bar = stack.enter_context(cli.progress(round(info.seconds, 1), " s"))
    n_limited, started = 0, time.perf_counter()
    blocks = reader.blocks(separation.READ_SAMPLES, fmt.sample_format)
    for part in separation.split(stream, blocks, fmt.sample_format):
        for stem, sound in sounds.items():
            sound.write(getattr(part, stem))
        if report:
            both = (part.mixture, part.vocals)
            report.add(*(reading.to_float(codes, fmt.sample_format) for codes in both))
        n_limited += part.n_limited
        bar.update(part.vocals.shape[1] / info.sample_rate)
        if bar.n:
            factor = (time.perf_counter() - started) / bar.n
            bar.set_postfix_str(f"real-time factor {factor:.3f}", refresh=False)
    if report:
        report.write(files[outputs["report"]])
    return n_limited


def begin_report(separator: Separator, info: AudioInfo, args: argparse.Namespace) -> Report:
    """Start a song's page."""
    import audio
    from sound.page import Report

    hp = separator.hp
    settings = {
        "checkpoint": os.fsdecode(args.checkpoint.name),
        "network": f"{hp.model_type}, width {hp.width}, {hp.stft_frames} frames",
        "sound": f"{info.sample_rate} Hz, {info.n_channels} channels",
        **{name: str(value) for name, value in separator.mask_settings.items()},
    }
    title = info.tags.get("title") or info.path.stem
    grid = audio.grid_at(info.sample_rate, hp)
    return Report(title, grid, info.n_channels, info.n_samples, settings)


# --- Pipes and live sound -----------------------------------------------------------------------


def pipe(separator: Separator, args: argparse.Namespace) -> int:
    """Separate standard input to standard output, as it comes, for as long as it comes."""
    import separation
    from sound.pipes import PipeReader, PipeWriter, RawFormat

    raw = None
    if args.sample_format:
        raw = RawFormat(args.rate, args.channels, args.sample_format)
    # Unbuffered: a buffer would wait until it is full. Blocking: or "nothing yet" is the end.
    stdin = sys.stdin and sys.stdin.buffer.raw
    if stdin:
        os.set_blocking(stdin.fileno(), True)
    reader = PipeReader(stdin, raw, args.allow_truncated, args.fix_nonfinite)
    info, n_limited, watch = reader.info, 0, Stopwatch()
    stream = separator.stream(
        info.sample_rate, info.n_channels, live=args.live, per_channel=args.per_channel
    )
    n_block = round(PACKET * info.sample_rate) if args.live else separation.READ_SAMPLES
    if args.live:
        separator.warm_up(info.sample_rate, info.n_channels, n_block)
    writer = PipeWriter(sys.stdout and sys.stdout.buffer, info, raw=raw is not None)
    blocks = watch.between(reader.blocks(n_block))
    with cli.progress(info.seconds and round(info.seconds, 1), " s") as bar:
        for part in separation.split(stream, blocks, info.sample_format):
            writer.write(getattr(part, args.stem))
            n_limited += part.n_limited
            bar.update(part.vocals.shape[1] / info.sample_rate)
    warn_of(reader, n_limited)
    if args.live:
        print(watch.summary(), file=sys.stderr)
    return 0


def live(separator: Separator, args: argparse.Namespace) -> int:
    """Separate what the microphone hears, until Ctrl-C; the loudspeakers play it."""
    import numpy as np

    import separation
    from sound import reading

    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package is there, PortAudio is not
        raise InputError(
            f"--live: {error} (pip install sounddevice, and on Linux apt install libportaudio2; "
            "or use a pipe: --live -)"
        ) from error
    rate, n_channels = args.rate or LIVE_RATE, args.channels or 1
    n_packet, watch, n_lost = round(PACKET * rate), Stopwatch(), 0
    stream = separator.stream(rate, n_channels, live=True, per_channel=args.per_channel)
    separator.warm_up(rate, n_channels, n_packet)
    floats = reading.SampleFormat("FLOAT", None)

    def hear() -> Iterator[np.ndarray]:
        nonlocal n_lost
        while True:
            packet, is_late = card.read(n_packet)
            n_lost += is_late
            yield packet.T

    try:
        with sounddevice.Stream(rate, n_packet, channels=n_channels, dtype="float32") as card:
            delay_ms = 1000 * (stream.delay + n_packet) / rate
            print(f"live: {delay_ms:.0f} ms behind, and what the sound card adds; Ctrl-C ends")
            # As many samples go out as come in, from silence on: what is ready waits in a line.
            line = np.zeros((n_channels, stream.delay), np.float32)
            for part in separation.split(stream, watch.between(hear()), floats):
                line = np.concatenate([line, getattr(part, args.stem)], axis=1)
                n_lost += card.write(np.ascontiguousarray(line[:, :n_packet].T))
                line = line[:, n_packet:]
    except sounddevice.PortAudioError as error:
        raise InputError(f"--live: {error} (see python -m sounddevice)") from error
    finally:
        if watch.n:
            print(f"{watch.summary()}, {n_lost} too late")
    return 0


class Stopwatch:
    """How long the work on each packet takes, without the time of waiting for it."""

    def __init__(self) -> None:
        self.n, self.total, self.slowest = 0, 0.0, 0.0

    def between(self, packets: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield packets; what happens until the next one is asked for is work."""
        for packet in packets:
            began = time.perf_counter()
            yield packet
            took = time.perf_counter() - began
            self.n, self.total = self.n + 1, self.total + took
            self.slowest = max(self.slowest, took)

    def summary(self) -> str:
        """Say it in one line."""
        mean = 1000 * self.total / max(1, self.n)
        return (
            f"live: {self.n} packets of {1000 * PACKET:.0f} ms, {mean:.1f} ms of work each, "
            f"{1000 * self.slowest:.1f} ms the slowest"
        )


if __name__ == "__main__":
    ranks.leave(main())
