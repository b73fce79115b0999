"""Score a network, or anybody's files, on songs of which the truth is known.

Vocals and accompaniment of every test song are scored by BSSEval v4 (frames of 1 s, median over
frames, then over songs, as SiSEC 2018), by BSSEval v3 (GNSDR, GSIR, GSAR: means over songs,
weighted by length, as on MIR-1K) and by SI-SDR (mean over songs). Beside every score stand the
floor, which is the mixture as estimate, and the ceilings, which are ideal masks on this project's
own STFT; a percentage is the part of the way from the floor to the ideal ratio mask.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import commandline
import comparison
import estimates
import outputs
import scorebook
import soundio
import summary
import tracks
import workers
from hparams import MASK_SETTINGS, HParams, InputError, UsageError, parse_settings
from scorebook import Record
from tracks import Track

if TYPE_CHECKING:
    import evaluation
    import tuning

EPILOG = """more:
  evaluate.py bounds ROOT           floor and ceilings alone, of the STFT that --set describes
  evaluate.py compare A.json B.json  is one better, or is it chance?
  evaluate.py tune CHECKPOINT DATA  choose the mask settings on validation songs

examples:
  python evaluate.py runs/resnet18/best.pth data/dsd100 --workers 4
  python evaluate.py runs/resnet18/best.pth data/dsd100 --estimates other=their/wavs --plot a.svg
  python evaluate.py bounds data/mir1k --every 20 --set n_fft=2048 --set hop_length=512
  python evaluate.py compare before.json after.json
  python evaluate.py tune runs/resnet18/best.pth data/dsd100"""
COMPARE = """Say whether one system is better than another on the same songs.

The interval is that of the mean difference, from 10 000 paired resamples of the songs: where it
holds 0, the difference may be chance."""
COMPARE_EPILOG = """examples:
  python evaluate.py compare before.json after.json
  python evaluate.py compare both.json both.json --systems soft hard --metric si_sdr"""
TUNE = """Choose the mask settings that sound best on validation songs, and store them.

Songs that the checkpoint has learnt from are left out, and so are test songs unless --split names
them. The network listens to each song once; every setting renders the mask that it gave."""
TUNE_EPILOG = """examples:
  python evaluate.py tune runs/resnet18/best.pth data/dsd100
  python evaluate.py tune runs/resnet18/best.pth music/mir1k --every 5 --dry-run"""
BOUNDS = """Score the mixture itself and the ideal masks: what no network changes.

The STFT is that of --set sample_rate, n_fft and hop_length, moved to each song's own rate."""
BOUNDS_EPILOG = """examples:
  python evaluate.py bounds data/mir1k --every 20 --set n_fft=2048 --set hop_length=512
  python evaluate.py bounds data/dsd100 --estimates ours=generated --estimates other=theirs"""


@commandline.script
def main(argv: list[str] | None = None) -> int:
    """Run one of the four commands."""
    words = sys.argv[1:] if argv is None else argv
    commands = {"bounds": bounds, "compare": compare, "tune": tune}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    return evaluate(words)


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """Describe the command line of one command; the first one has no name."""
    texts = {
        "": (__doc__, EPILOG),
        "bounds": (BOUNDS, BOUNDS_EPILOG),
        "compare": (COMPARE, COMPARE_EPILOG),
        "tune": (TUNE, TUNE_EPILOG),
    }
    parser = commandline.make_parser(*texts[command])
    parser.description = texts[command][0]  # all of it: it says what the numbers are
    parser.prog = f"{parser.prog} {command}".rstrip()
    return parser


def add_song_options(
    parser: argparse.ArgumentParser, split: str, seconds: float | None = None
) -> None:
    """Add which songs are taken, how much of them, and by how many processes."""
    songs = parser.add_argument_group("songs")
    songs.add_argument("--split", choices=["test", "train", "all"], help=split)
    songs.add_argument(
        "--as",
        dest="kind",
        choices=tracks.KINDS[:1],
        help="read a folder without a data set's layout as one folder of stems per song",
    )
    songs.add_argument(
        "--voice-pattern", metavar="REGEX", default=tracks.VOICE_PATTERN, help="as build_dataset.py"
    )
    songs.add_argument(
        "--every",
        type=commandline.positive_count,
        default=1,
        metavar="K",
        help="take only every K-th song",
    )
    songs.add_argument(
        "--subset",
        type=commandline.positive_count,
        metavar="N",
        help="take only N songs, evenly spread over the others",
    )
    by_default = f"{seconds:g}" if seconds else "all"
    songs.add_argument(
        "--seconds",
        type=commandline.positive_number,
        default=seconds,
        metavar="S",
        help=f"take only the middle S seconds of a song (default: {by_default})",
    )
    parser.add_argument(
        "--workers",
        type=commandline.positive_count,
        metavar="N",
        help="processes, each with one song and one thread; 3 GB each for stereo songs of 4 "
        "minutes (default: one a core)",
    )


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Add what is scored beside the network, and where the scores go."""
    parser.add_argument(
        "--estimates",
        action="append",
        default=[],
        type=named_folder,
        metavar="NAME=DIR",
        help="also score the files of another system: <song>/vocals.wav or <song>_vocals.wav, and "
        "the same with accompaniment, which otherwise is mixture − vocals; several times",
    )
    parser.add_argument(
        "--v3",
        action=argparse.BooleanOptionalAction,
        help="BSSEval v3 (GNSDR, GSIR, GSAR) on the mean of the channels; by default of mono songs "
        "only, of which it has been reported",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="of all scores (.json); an interrupted run "
        "goes on from it; by default beside the checkpoint, or in runs/",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="drop what the output holds and score again"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw every song's scores (.svg)")


def named_folder(text: str) -> tuple[str, Path]:
    """Read ``name=folder`` for argparse."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as name=folder")
    return name, Path(folder)


# --- Scores ---------------------------------------------------------------------------------------


def evaluate(argv: list[str]) -> int:
    """Score a checkpoint."""
    parser = make_parser()
    parser.add_argument("checkpoint", type=Path, help="a .pth file that train.py wrote")
    add_scoring(parser)
    parser.add_argument(
        "--both-masks",
        action="store_true",
        help="score the binary mask (hard) and the soft one (soft), each as tuned, and not only "
        "the one that the checkpoint prefers",
    )
    commandline.add_device_option(parser)
    args = parser.parse_args(argv)
    refuse_missing(args.checkpoint)
    return run(args, parser)


def bounds(argv: list[str]) -> int:
    """Score what needs no checkpoint."""
    parser = make_parser("bounds")
    add_scoring(parser)
    args = parser.parse_args(argv)
    args.checkpoint, args.both_masks, args.device = None, False, "cpu"
    return run(args, parser)


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add what `evaluate` and `bounds` share."""
    parser.add_argument("root", type=Path, help="folder of music in a layout of build_dataset.py")
    add_song_options(parser, "which songs: by default test, or all where the layout has none")
    add_score_options(parser)


def refuse_missing(checkpoint: Path) -> None:
    """Tell a wrong path before torch is loaded."""
    if not os.path.isfile(checkpoint):
        raise InputError(f"{checkpoint}: no such checkpoint")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Score songs in parallel, keeping each as it is done; print, draw and store the result."""
    hp = commandline.settings_of(args)
    folders = theirs(args)
    found = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    chosen, split = choose(args, found.tracks)
    jobs, lacking = estimates.pair(chosen, folders)
    for message in (*found.bad, *lacking):
        commandline.complain(message)
    output = args.output or default_output(args, hp)
    for path in [output, args.plot] if args.plot else [output]:
        outputs.check_writable(path)

    import evaluation  # here: a wrong path is told before torch is loaded

    print(f"{args.root}: {found.layout}: {len(jobs)} songs of the split {split!r}", flush=True)
    network = network_of(args, parser, hp) if args.checkpoint else None
    task = evaluation.Task(args.root, hp, args.seconds, args.v3, network, args.both_masks)
    learnt = set((evaluation.learnt_songs(args.checkpoint) or {}).values()) if network else set()
    about = evaluation.describe(task, found.layout, list(folders))
    n_failed = len(found.bad) + len(lacking)
    with scorebook.Scorebook(output, about, args.overwrite) as book:
        book.refuse_loss([song.name for song in chosen])
        waiting = [
            job for job in jobs if not book.holds(job.track.name, estimates.sources(job, args.root))
        ]
        if len(waiting) < len(jobs):
            print(f"{len(jobs) - len(waiting)} of {len(jobs)} songs are scored already")
        n_failed += score(
            book, functools.partial(evaluation.score_track, task), waiting, learnt, args.workers
        )
        names = sorted(job.track.name for job in jobs)
        records = [book.records[name] for name in names if name in book.records]
        totals = summary.summarise(records)
        counts = {"n_songs": len(records), "n_failed": n_failed}
        selection = {"split": split, "every": args.every, "subset": args.subset}
        book.finish(records, totals, {**selection, **counts})
    report(records, totals, n_failed)
    if network is None and records:
        grid = f"{hp.n_fft}, {hp.hop_length}"
        rows = summary.markdown(args.root.resolve().name, grid, len(records), totals)
        print("", *rows, "", sep="\n")
    if args.plot:
        drawn = summary.figure(records).encode()
        outputs.replace_atomically(args.plot, lambda file: file.write(drawn))
    print(f"{output}: every frame's scores" + (f"; {args.plot}: every song's" * bool(args.plot)))
    return int(n_failed > 0)


def score(
    book: scorebook.Scorebook,
    score_job: Callable[[estimates.Job], Record],
    jobs: list[estimates.Job],
    learnt: set[str],
    n_workers: int | None,
) -> int:
    """Score songs and keep each as it is done; returns how many failed, each of which is told."""
    n_failed = 0
    with (
        contextlib.closing(workers.in_parallel(score_job, jobs, n_workers)) as results,
        commandline.progress(len(jobs), " songs") as bar,
    ):
        for result in results:
            bar.update()
            if isinstance(result, InputError):
                commandline.complain(result)
                n_failed += 1
            else:
                book.add({**result, "learnt": result["name"] in learnt})
    return n_failed


def theirs(args: argparse.Namespace) -> dict[str, Path]:
    """Return the folders of other systems; a name that is taken is refused."""
    names = [name for name, _ in args.estimates]
    own = (["hard", "soft"] if args.both_masks else ["model"]) if args.checkpoint else []
    for name in names:
        if name in (summary.FLOOR, *summary.IDEALS, "reference", *own) or names.count(name) > 1:
            raise UsageError(f"--estimates {name}: the name is taken (choose another)")
    return dict(args.estimates)


def network_of(
    args: argparse.Namespace, parser: argparse.ArgumentParser, hp: HParams
) -> evaluation.Network:
    """Say which network runs where, and with which settings."""
    import evaluation

    device = str(commandline.device_of(args, parser))
    explicit = tuple(parse_settings(args.settings).items())
    return evaluation.Network(args.checkpoint, device, hp, explicit)


def choose(args: argparse.Namespace, found: list[Track]) -> tuple[list[Track], str]:
    """Return the songs that are asked for, and the name of their split."""
    songs = [track for track in found if len(track.signals) == 2]
    if not songs:
        raise InputError(f"{args.root}: no song has both vocals and accompaniment to compare with")
    split = args.split or ("test" if any(song.split == "test" for song in songs) else "all")
    songs = [song for song in songs if split in (song.split, "all")]
    if not songs:
        raise InputError(f"{args.root}: no songs of the split {split!r} (try --split all)")
    return thin(songs, args), split


def thin(songs: list[Any], args: argparse.Namespace) -> list[Any]:
    """Leave of the songs what --every and --subset ask for."""
    songs = songs[:: args.every]
    n = min(args.subset or len(songs), len(songs))
    return [songs[i * len(songs) // n] for i in range(n)]


def default_output(args: argparse.Namespace, hp: HParams) -> Path:
    """Name the output after what is scored."""
    root = args.root.resolve().name
    if args.checkpoint is not None:
        return args.checkpoint.with_name(f"{args.checkpoint.stem}_{root}.json")
    return Path("runs") / f"bounds_{root}_{hp.n_fft}_{hp.hop_length}.json"


def report(records: list[Record], totals: summary.Summary, n_failed: int) -> None:
    """Print the tables, and what they do not show."""
    for record in records:
        for note in record["notes"]:
            commandline.warn(f"{record['name']}: {note}")
    for line in summary.tables(totals):
        print(line)
    minutes = sum(record["seconds"] for record in records) / 60
    print(f"\n{len(records)} songs, {minutes:.1f} minutes, scores in dB", end="")
    print("; % is the part of the way from the floor to the ideal ratio mask" * bool(records))
    for line in summary.omissions(records, totals):
        print(line)
    n_learnt = sum(record["learnt"] for record in records)
    if n_learnt:
        commandline.warn(f"{n_learnt} songs are called like songs that the checkpoint learnt from")
    if n_failed:
        commandline.warn(f"{n_failed} songs failed, each named above")


# --- Comparing ------------------------------------------------------------------------------------


def compare(argv: list[str]) -> int:
    """Compare two systems song by song."""
    parser = make_parser("compare")
    parser.add_argument("before", type=Path, help="a .json file that evaluate.py wrote")
    parser.add_argument("after", type=Path, help="another one, or the same")
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="whose scores: one name for both files, or one for each (default: model)",
    )
    parser.add_argument(
        "--metric",
        choices=summary.METRIC_NAMES,
        help="only this one, with the difference of every song",
    )
    parser.add_argument(
        "--stem", choices=["vocals", "accompaniment"], default="vocals", help="(%(default)s)"
    )
    args = parser.parse_args(argv)
    commandline.settings_of(args)
    names = args.systems or ["model"]
    if len(names) > 2:
        raise UsageError("--systems: one name for both files, or one for each")
    systems, paths = (names[0], names[-1]), (args.before, args.after)
    pairs, n_single = comparison.pair(paths, tuple(map(scorebook.read, paths)), systems)
    print(
        f"{args.before} ({systems[0]}) → {args.after} ({systems[1]}): {args.stem} of "
        f"{len(pairs)} songs" + f"; {n_single} are in one file only" * bool(n_single)
    )
    for metric in summary.METRICS:
        if args.metric not in (None, metric.name):
            continue
        found = comparison.differences(pairs, systems, args.stem, metric.name)
        for song in found if args.metric else ():
            name = commandline.printable(song.name)
            print(f"{song.gain:+8.2f} dB  {song.before:7.2f} → {song.after:7.2f}  {name}")
        print(f"{metric.song_label:>9}: {comparison.verdict(found, len(pairs) - len(found))}")
    return 0


# --- Tuning ---------------------------------------------------------------------------------------


def tune(argv: list[str]) -> int:
    """Choose and store mask settings."""
    parser = make_parser("tune")
    parser.add_argument("checkpoint", type=Path, help="a .pth file that train.py wrote")
    parser.add_argument(
        "data", type=Path, nargs="+", help="built datasets, or folders of music: validation songs"
    )
    add_song_options(parser, "which songs: by default train, those not learnt from", seconds=60.0)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the curves; leave the checkpoint as it is"
    )
    commandline.add_device_option(parser)
    args = parser.parse_args(argv)
    hp = commandline.settings_of(args)
    named = parse_settings(args.settings).keys() & set(MASK_SETTINGS)
    if named:
        raise UsageError(f"--set {min(named)}: is what is being chosen (leave it out)")
    refuse_missing(args.checkpoint)

    import numpy as np

    import evaluation
    import tuning

    before = soundio.sha256(args.checkpoint)
    network = network_of(args, parser, hp)
    songs, n_failed = validation_songs(args, evaluation.load(network).hp)
    names = ", ".join(song.name for song in songs[:8]) + ", …" * (len(songs) > 8)
    print(f"tuned on {len(songs)} songs: {commandline.printable(names)}", flush=True)
    tune_song = functools.partial(tuning.tune_candidate, network, args.seconds)
    scores = {}
    with (
        contextlib.closing(workers.in_parallel(tune_song, songs, args.workers)) as results,
        commandline.progress(len(songs), " songs") as bar,
    ):
        for result in results:
            bar.update()
            if isinstance(result, InputError):
                commandline.complain(result)
                n_failed += 1
            elif np.isnan(result[1]).any():
                commandline.warn(f"{result[0]}: silent vocals; left out")
            else:
                scores[result[0]] = result[1]
    if not scores:
        raise InputError(f"{args.checkpoint}: no song left to tune on")
    mean = np.mean([scores[name] for name in sorted(scores)], 0)
    settings = tuning.best_settings(mean)
    print(*tuning.curves(mean, settings), sep="\n")
    if args.dry_run:
        print(f"{args.checkpoint}: left as it is (--dry-run)")
    elif n_failed:
        commandline.warn(f"{n_failed} songs failed; {args.checkpoint} is left as it is")
    else:
        tuning.store(args.checkpoint, settings, before)
        print(f"{args.checkpoint}: these are its defaults now")
    return int(n_failed > 0)


def validation_songs(args: argparse.Namespace, hp: HParams) -> tuple[list[tuning.Candidate], int]:
    """List the songs to tune on, and count those that cannot be read; what is left out is told."""
    import evaluation
    import tuning

    learnt = evaluation.learnt_songs(args.checkpoint)
    if learnt is None:
        commandline.warn(f"{args.checkpoint}: does not say which songs it has learnt from")
    listed: list[tuning.Candidate] = []
    n_failed = 0
    for folder in args.data:
        songs, bad = tuning.candidates(folder, learnt or {}, hp, args.kind, args.voice_pattern)
        listed += songs
        for message in bad:
            commandline.complain(message)
        n_failed += len(bad)
    wanted = [song for song in listed if (args.split or "train") in (song.split, "all")]
    songs = [song for song in wanted if not song.is_learnt]
    left_out = (
        f"{len(wanted) - len(songs)} that were learnt from and {len(listed) - len(wanted)} of "
        "another split"
    )
    if not songs:
        raise InputError(
            f"{args.data[0]}: no validation songs: {left_out} are left out (give other songs, or "
            "name a --split)"
        )
    print(f"left out: {left_out}")
    return thin(songs, args), n_failed


if __name__ == "__main__":
    sys.exit(main())
