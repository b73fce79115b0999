"""Separate songs: write the vocals of every file, and with --background the rest.

Outputs have the input's sample rate, channels and length; vocals plus accompaniment are the input.

  python generate.py song.wav --background --report
  python generate.py song.wav --set mask_sharpness=1.5  # drier; hparams.py has more of these
  python generate.py albums --format flac --output-dir stems
  ffmpeg -i song.m4a -f wav - | python generate.py - | ffplay -
  python generate.py --live
  python generate.py runs/resnet18/best.pth song.wav  # a network of your own
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cli
from hparams import MASK_SETTINGS, InputError, UsageError, parse_settings

if TYPE_CHECKING:
    from separation import Separator
    from sound import writing
    from sound.pipes import PipeReader, SoundCard
    from sound.reading import Reader
    from sound.writing import Separated

PIPE = Path("-")
FILES_ONLY = ("background", "report", "format", "subtype", "start", "duration", "overwrite")
STEMS = ("vocals", "accompaniment")
LEFT_BEHIND = 3600  # seconds after which a temporary file is one of a run that was killed


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Separate every file; one that fails does not stop the rest."""
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    n_words = words.index("--") if "--" in words else len(words)  # behind it all are names
    args = parser.parse_intermixed_args(words[:n_words])  # options may stand between names
    args.audio += map(as_path, words[n_words + 1 :])
    cli.settings_of(args)  # a wrong one is told now
    args.checkpoint = cli.PRETRAINED
    if args.audio and args.audio[0].suffix.lower() == ".pth":
        args.checkpoint, *args.audio = args.audio
    is_pipe = args.live or PIPE in args.audio
    check_usage(args, is_pipe)
    cli.refuse_missing(args.checkpoint)
    jobs, failed, n_songs = ({}, [], 0) if is_pipe else plan(args)
    if jobs or is_pipe:
        from separation import Separator  # here: a wrong path is told before torch is loaded

        # A pipe's standard output is sound: what there is to say goes beside it.
        with contextlib.redirect_stdout(sys.stderr) if is_pipe else contextlib.nullcontext():
            device, settings = cli.device_of(args, parser), parse_settings(args.settings)
            separator = Separator.load(args.checkpoint, device, settings)
            if separator.licence:
                print(cli.printable(f"network: {args.checkpoint}: {separator.licence}"))
    if is_pipe:
        return pass_through(separator, args)
    failed += [path for path in jobs if not attempt(separator, path, jobs[path], args)]
    if failed and n_songs > 1:
        cli.warn(f"{len(failed)} of {n_songs} files failed: {', '.join(map(str, failed))}")
    return int(bool(failed))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "audio",
        type=as_path,
        nargs="*",
        metavar="path",
        help="songs (wav, flac, ogg, mp3, aiff …, m4a with PyAV), folders of them, or -: wav or "
        "raw PCM from standard input, to standard output; before them a .pth file that train.py "
        "wrote, if another network than the project's is to separate them",
    )
    add = parser.add_argument_group("what is written").add_argument
    folder = Path("generated")
    add("--output-dir", type=as_path, default=folder, help="made if missing (%(default)s)")
    add("--background", action="store_true", help="also write <name>_accompaniment.wav")
    add("--format", choices=["wav", "flac", "ogg", "mp3"], help="of the sound (wav)")
    add("--subtype", help="PCM_16, PCM_24, of wav also PCM_U8, PCM_32, FLOAT, DOUBLE (the song's)")
    add("--report", action="store_true", help="also write <name>.html, to listen and compare")
    add("--overwrite", action="store_true", help="separate again what is already there")
    add = parser.add_argument_group("how a song is taken").add_argument
    add("--start", type=float, default=0.0, help="seconds into the song (0)")
    add("--duration", type=cli.positive_number, help="seconds of it (all)")
    add("--allow-truncated", action="store_true", help="take files shorter than they promise")
    add = parser.add_argument_group("pipes and live sound").add_argument
    add(
        "--live",
        action="store_true",
        help="0.2 s behind the input, not seconds: from the microphone to the loudspeakers, or "
        "with - from standard input to standard output",
    )
    what = "what a pipe or the loudspeakers get (%(default)s)"
    add("--stem", choices=STEMS, default="vocals", help=what)
    add("--sample-format", choices=["s16le", "f32le"], help="raw PCM in and out, and not wav")
    add("--rate", type=cli.positive_count, help="raw and live: samples a second (live: 48000)")
    add("--channels", type=cli.positive_count, help="raw and live (live: 1)")
    cli.add_device_option(parser)
    return parser


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
    for name in (name for name in FILES_ONLY if is_pipe and getattr(args, name)):
        raise UsageError(f"--{name}: is for files (a pipe gives one stem as it came: --stem)")
    raw, is_card = (args.sample_format, args.rate, args.channels), args.live and not args.audio
    if is_card and args.sample_format:
        raise UsageError("--sample-format: is for pipes (name - as the audio)")
    if any(raw) and not is_card and not (is_pipe and all(raw)):
        raise UsageError(
            "--sample-format, --rate and --channels describe raw PCM from -, all three"
        )
    if args.subtype is not None:
        from sound.writing import SUBTYPES

        if args.subtype not in (known := SUBTYPES[args.format or "wav"]):
            raise UsageError(f"--subtype {args.subtype}: choose one of {', '.join(known)}")
    if not args.start >= 0:
        raise UsageError(f"--start {args.start}: is not 0 or more")
    if not is_pipe and args.stem != "vocals":
        raise UsageError("--stem: is for pipes and live sound (files: --background)")


# --- Files --------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """What is to be written of one song."""

    paths: dict[str, Path]  # of "vocals", and "accompaniment" and "report"
    record: Callable[[], writing.Record]  # what they are made of, read when asked; they hold it


def plan(args: argparse.Namespace) -> tuple[dict[Path, Outputs], list[Path], int]:
    """Find the songs, and name the files that come of each.

    Returns each song that is to be separated, what cannot be and has been told, and the number of
    songs, with those done already.
    """
    from sound import reading, tracks, writing

    suffixes = {stem: f"_{stem}.{args.format or 'wav'}" for stem in STEMS[: 1 + args.background]}
    suffixes |= {"report": ".html"} if args.report else {}
    songs, jobs, failed, taken, n_done = {}, {}, [], {}, 0
    network = reading.sha256(args.checkpoint)
    for root in args.audio:
        try:
            found, left_out = tracks.find_songs(root)
            songs |= found
            if left_out:
                print(cli.printable(f"{root}: {left_out}"))
        except InputError as error:
            cli.complain(error)
            failed.append(root)
    inputs = writing.identities(songs)
    for path, folder in songs.items():
        try:
            reading.check_path(path)
            place = args.output_dir / folder
            paths = {kind: place / f"{path.stem}{end}" for kind, end in suffixes.items()}
            if (other := taken.setdefault(os.path.normcase(paths["vocals"]), path)) is not path:
                raise InputError(
                    f"{path}: {other} already becomes {paths['vocals']} "
                    "(separate them in two runs with different --output-dir)"
                )
            writing.check_outputs(paths.values(), inputs)
            record = functools.cache(functools.partial(record_of, path, network, args))
            if not args.overwrite and writing.are_done(paths.values(), record):
                n_done += 1
                continue
            jobs[path] = Outputs(paths, record)
        except InputError as error:
            cli.complain(error)
            failed.append(path)
    for place in {outputs.paths["vocals"].parent for outputs in jobs.values()}:
        for path in place.glob(".*.tmp-*"):
            with contextlib.suppress(OSError):  # another run may have renamed it
                if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                    path.unlink()
    if n_done:
        print(
            f"{n_done} of {len(songs)} {'is' if n_done == 1 else 'are'} already there "
            "(--overwrite separates again)"
        )
    return jobs, failed, len(jobs) + len(failed) + n_done


def record_of(path: Path, network: str, args: argparse.Namespace) -> writing.Record:
    """Name all that decides what the stems of a song are: source, network and settings."""
    from sound import reading, writing

    hp = vars(cli.settings_of(args))
    settings = {name: hp[name] for name in (*MASK_SETTINGS, "stereo", "precision")}
    excerpt = args.start, args.duration
    texts = os.path.realpath(path), repr([network, settings, excerpt, args.subtype])
    place, how = (hashlib.sha256(os.fsencode(text)).hexdigest()[:8] for text in texts)
    return writing.Record(reading.sha256(path)[:8], place, how)


def attempt(separator: Separator, path: Path, outputs: Outputs, args: argparse.Namespace) -> bool:
    """Separate one file and say how it went."""
    import torch

    from sound.reading import Reader

    started = time.perf_counter()
    try:
        with Reader(path, args.allow_truncated, args.start, args.duration) as reader:
            separate_song(separator, reader, outputs, args)
    except InputError as error:
        cli.complain(error)
        return False
    except torch.OutOfMemoryError:
        fewer = max(16, separator.block_frames // 4)
        cli.complain(f"{path}: out of memory on the GPU (try --set block_frames={fewer})")
        return False
    length, took = reader.n_read / reader.info.sample_rate, time.perf_counter() - started
    written = cli.printable(", ".join(map(str, outputs.paths.values())))
    print(
        f"{written}: {length:.1f} s in {took:.1f} s, "
        f"real-time factor {took / length:.3f} ({length / took:.0f} × real time)"
    )
    return True


def separate_song(
    separator: Separator, reader: Reader, outputs: Outputs, args: argparse.Namespace
) -> None:
    """Read, split and write one song; every file appears whole or not at all."""
    import separation
    from sound import page, writing

    info, hp, record = reader.info, separator.hp, outputs.record()
    fmt = writing.choose_format(info, args.format or "wav", args.subtype)
    stream = separator.stream(info.sample_rate, info.n_channels)
    blocks = reader.blocks(separation.READ_SAMPLES, fmt.sample_format)
    with contextlib.ExitStack() as stack:
        writers = []
        for kind, path in outputs.paths.items():
            if kind == "report":
                about = {
                    "network": f"{hp.model_type}, width {hp.width}, {hp.stft_frames} frames",
                    **{name: str(value) for name, value in separator.mask_settings.items()},
                    "checkpoint": os.fsdecode(args.checkpoint.name),
                    "made by": f"{writing.MADE_BY} {record}",
                }
                writer = page.PageWriter(path, info, fmt.sample_format, about)
            else:
                writer = writing.SoundWriter(path, info, fmt, kind, record)
            writers.append(stack.enter_context(writer))
        parts = separation.split(stream, blocks, fmt.sample_format)
        if args.report or fmt.container == "mp3":  # LAME takes as long as the network
            parts = stack.enter_context(contextlib.closing(cli.ahead(parts)))
        write_parts(parts, reader, writers)


def write_parts(
    parts: Iterable[Separated], reader: Reader | PipeReader | SoundCard, writers: list[Any]
) -> None:
    """Write a sound as it is separated, with a progress bar; tell what was odd about it."""
    info, n_limited = reader.info, 0
    seconds = info.n_samples and round(info.n_samples / info.sample_rate, 1)  # None of a pipe
    with cli.progress(seconds, " s") as bar:
        for part in parts:
            for writer in writers:
                writer.write(part)
            n_limited += part.n_limited
            bar.update(part.vocals.shape[1] / info.sample_rate)
    limited = f"{n_limited} samples of the vocals limited so that the sum fits"
    for warning in [*reader.warnings, *([limited] if n_limited else [])]:
        cli.warn(f"{info.path}: {warning}")


# --- Pipes and live sound -----------------------------------------------------------------------


def pass_through(separator: Separator, args: argparse.Namespace) -> int:
    """Separate standard input, or the microphone's sound, as it comes and as long as it comes."""
    import torch

    import separation
    from sound import pipes

    if args.live and separator.device.type == "cpu":
        # Layers of one column are too small for two threads: they wait for each other, and long
        # where another program has one of the cores.
        torch.set_num_threads(1)
    if args.audio:
        raw = args.sample_format and pipes.RawFormat(args.rate, args.channels, args.sample_format)
        reader = pipes.PipeReader(sys.stdin, raw, args.allow_truncated)
    else:
        reader = writer = pipes.SoundCard(args.rate or 48000, args.channels or 1, args.stem)
    info = reader.info
    form = info.sample_rate, info.n_channels
    stream = separator.stream(*form, live=args.live)
    if args.audio:  # only now: what cannot be separated is answered by nothing
        writer = pipes.PipeWriter(sys.stdout, reader.raw, args.stem, has_header=not raw)
    n_block = separation.READ_SAMPLES
    if args.live:
        n_block = round(0.02 * info.sample_rate)
        warming_up = separator.stream(*form, live=True)
        for _ in range(50):  # then packets are quick from the first one on
            warming_up.push(torch.zeros(info.n_channels, n_block))
        reader.n_behind = stream.delay  # samples
        delay_ms = 1000 * (stream.delay + n_block) / info.sample_rate
        print(f"live: {delay_ms:.0f} ms behind its input", file=sys.stderr)
    parts = separation.split(stream, reader.blocks(n_block), info.sample_format)
    write_parts(parts, reader, [writer])
    return 0


if __name__ == "__main__":
    sys.exit(main())
