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
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cli
import dataset
from hparams import MASK_SETTINGS, HParams, InputError, UsageError, parse_settings
from scoring import comparison, estimates, scorebook, tables, workers
from scoring.scorebook import Record
from sound import reading, tracks, writing

if TYPE_CHECKING:
    from scoring import evaluation, tuning

EPILOG = """more:
  evaluate.py bounds ROOT           floor and ceilings alone, of the STFT that --set describes
  evaluate.py compare A.json B.json  is one better, or is it chance?
  evaluate.py tune CHECKPOINT DATA  choose the mask settings on validation songs

examples:
  python evaluate.py runs/resnet18/best.pth music/dsd100 --workers 4
  python evaluate.py runs/resnet18/best.pth music/dsd100 --estimates other=their/wavs --plot a.svg
  python evaluate.py bounds music/mir1k --every 20 --set n_fft=2048 --set hop_length=512
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
  python evaluate.py bounds music/mir1k --every 20 --set n_fft=2048 --set hop_length=512
  python evaluate.py bounds music/dsd100 --estimates ours=generated --estimates other=theirs"""


@cli.script
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
    parser = cli.make_parser(*texts[command])
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
        type=cli.positive_count,
        default=1,
        metavar="K",
        help="take only every K-th song",
    )
    songs.add_argument(
        "--subset",
        type=cli.positive_count,
        metavar="N",
        help="take only N songs, evenly spread over the others",
    )
    by_default = f"{seconds:g}" if seconds else "all"
    songs.add_argument(
        "--seconds",
        type=cli.positive_number,
        default=seconds,
        metavar="S",
        help=f"take only the middle S seconds of a song (default: {by_default})",
    )
    parser.add_argument(
        "--workers",
        type=cli.positive_count,
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
        "--overwrite",
        action="store_true",
        help="drop what the output holds and score again; without it an interrupted run goes on",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw every song's scores (.svg)")


def named_folder(text: str) -> tuple[str, Path]:
    """Read ``name=folder`` for argparse."""
    name, equals, folder = text.partition("=")
    if not (name.isprintable() and name and equals and folder):
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
    cli.add_device_option(parser)
    args = parser.parse_args(argv)
    cli.refuse_missing(args.checkpoint)
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
    parser.add_argument(
        "root", type=Path, help="folder of music that build_dataset.py reads (not what it makes)"
    )
    add_song_options(parser, "which songs: by default test, or all where the layout has none")
    add_score_options(parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Score songs in parallel, keeping each as it is done; print, draw and store the result."""
    hp = cli.settings_of(args)
    folders = theirs(args)
    refuse_built(args.root)
    found = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    chosen, split = estimates.choose(args.root, found.tracks, args.split, args.every, args.subset)
    jobs, lacking = estimates.pair(chosen, folders)
    for message in (*found.bad, *lacking):
        cli.complain(message)
    output = args.output or default_output(args, hp)
    check_outputs(output, args, [path for song in found.tracks for path in song.paths])

    from scoring import evaluation  # here: a wrong path is told before torch is loaded

    say(f"{args.root}: {found.layout}: {len(jobs)} songs of the split {split!r}")
    network = network_of(args, parser, hp) if args.checkpoint else None
    task = evaluation.Task(args.root, hp, args.seconds, args.v3, network, args.both_masks)
    learnt, tuned = evaluation.known_songs(args.checkpoint) if network else (None, [])
    mark = functools.partial(evaluation.marks, learnt=learnt, tuned=tuned)
    about = evaluation.describe(task, found.layout, folders)
    with scorebook.Scorebook(output, about, args.overwrite) as book:
        book.refuse_loss([song.name for song in chosen])
        waiting = [job for job in jobs if not is_held(book, job, args.root)]
        if len(waiting) < len(jobs):
            say(f"{len(jobs) - len(waiting)} of {len(jobs)} songs are scored already")
        score_job = functools.partial(evaluation.score_track, task)
        failed = score(book, score_job, mark, waiting, args.workers)
        names = sorted({job.track.name for job in jobs} - failed)
        n_failed = len(found.bad) + len(lacking) + len(failed)
        records = [book.records[name] for name in names]
        totals = tables.summarise(records)
        counts = {"n_songs": len(records), "n_failed": n_failed}
        selection = {"split": split, "every": args.every, "subset": args.subset}
        book.finish(names, totals, {**selection, **counts})
    report(records, totals)
    if n_failed:
        aside = book.records.keys() - set(names)
        cli.warn(
            f"{n_failed} songs failed, each named above"
            + f"; earlier scores of {len(aside)} are kept aside, not counted" * bool(aside)
        )
    if network is None and records:
        grid = f"{hp.n_fft}, {hp.hop_length}"
        rows = tables.markdown(args.root.resolve().name, grid, len(records), totals)
        say("", *rows, "")
    if args.plot:
        drawn = tables.figure(records).encode()
        writing.replace_atomically(args.plot, lambda file: file.write(drawn))
    say(f"{output}: every frame's scores" + (f"; {args.plot}: every song's" * bool(args.plot)))
    return int(n_failed > 0)


def say(*lines: object) -> None:
    """Print results at once, whatever characters names have."""
    print(*map(cli.printable, lines), sep="\n", flush=True)


def refuse_built(root: Path) -> None:
    """Tell a built dataset from the recordings that are wanted."""
    if (root / dataset.MANIFEST).is_file():
        raise InputError(
            f"{root}: a dataset that build_dataset.py made (give the folder of music that it was "
            "made from)"
        )


def check_outputs(output: Path, args: argparse.Namespace, songs: list[Path]) -> None:
    """Refuse, before any work, outputs that cannot be written or would overwrite an input."""
    for path, ending in ((output, ".json"), (args.plot, ".svg")):
        if path is not None and path.suffix != ending:
            raise UsageError(f"{path}: is written as {ending[1:]} (call it something{ending})")
    inputs = [*songs, *([args.checkpoint] if args.checkpoint else [])]
    paths = [output, scorebook.partial(output), *([args.plot] if args.plot else [])]
    writing.check_outputs(dict.fromkeys(paths, 0), writing.identities(inputs))


def is_held(book: scorebook.Scorebook, job: estimates.Job, root: Path) -> bool:
    """Say whether a song is scored already, from files of this very content."""
    try:
        return job.track.name in book.records and book.holds(
            job.track.name, estimates.sources(job, root)
        )
    except InputError:  # told when the song is read
        return False


def score(
    book: scorebook.Scorebook,
    score_job: Callable[[estimates.Job], Record],
    mark: Callable[[Record], Record],
    jobs: list[estimates.Job],
    n_workers: int | None,
) -> set[str]:
    """Score songs and keep each as it is done; returns which failed, each of which is told."""
    failed = {job.track.name for job in jobs}
    with (
        contextlib.closing(workers.in_parallel(score_job, jobs, n_workers)) as results,
        cli.progress(len(jobs), " songs") as bar,
    ):
        for result in results:
            bar.update()
            if isinstance(result, InputError):
                cli.complain(result)
            else:
                book.add(result | mark(result))
                failed.remove(result["name"])
    return failed


def theirs(args: argparse.Namespace) -> dict[str, Path]:
    """Return the folders of other systems; a name that is taken is refused."""
    names = [name for name, _ in args.estimates]
    own = (["hard", "soft"] if args.both_masks else ["model"]) if args.checkpoint else []
    for name in names:
        if name in (tables.FLOOR, *tables.IDEALS, "reference", *own) or names.count(name) > 1:
            raise UsageError(f"--estimates {name}: the name is taken (choose another)")
    return dict(args.estimates)


def network_of(
    args: argparse.Namespace, parser: argparse.ArgumentParser, hp: HParams
) -> evaluation.Network:
    """Say which network runs where, and with which settings."""
    from scoring import evaluation

    device = str(cli.device_of(args, parser))
    explicit = tuple(parse_settings(args.settings).items())
    return evaluation.Network(args.checkpoint, device, hp, explicit)


def default_output(args: argparse.Namespace, hp: HParams) -> Path:
    """Name the output after what is scored."""
    root = args.root.resolve().name
    if args.checkpoint is not None:
        return args.checkpoint.with_name(f"{args.checkpoint.stem}_{root}.json")
    return Path("runs") / f"bounds_{root}_{hp.n_fft}_{hp.hop_length}.json"


def report(records: list[Record], totals: tables.Summary) -> None:
    """Print the tables, and what they do not show."""
    for record in records:
        for note in record["notes"]:
            cli.warn(f"{record['name']}: {note}")
    say(*tables.tables(totals))
    minutes = sum(record["seconds"] for record in records) / 60
    print(f"\n{len(records)} songs, {minutes:.1f} minutes, scores in dB", end="")
    print("; % is the part of the way from the floor to the ideal ratio mask" * bool(records))
    for line in tables.omissions(records, totals):
        say(line)
    if n_learnt := sum(record["learnt"] for record in records):
        cli.warn(f"{n_learnt} songs are called like songs that the checkpoint learnt from")
    if n_tuned := sum(record["tuned"] for record in records):
        cli.warn(
            f"{n_tuned} songs are, or are called like, those that the mask settings were tuned on"
        )


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
        choices=tables.METRIC_NAMES,
        help="only this one, with the difference of every song",
    )
    parser.add_argument(
        "--stem", choices=["vocals", "accompaniment"], default="vocals", help="(%(default)s)"
    )
    args = parser.parse_args(argv)
    cli.settings_of(args)
    names = args.systems or ["model"]
    if len(names) > 2:
        raise UsageError("--systems: one name for both files, or one for each")
    systems, paths = (names[0], names[-1]), (args.before, args.after)
    pairs, n_single = comparison.pair(paths, tuple(map(scorebook.read, paths)), systems)
    say(
        f"{args.before} ({systems[0]}) → {args.after} ({systems[1]}): {args.stem} of "
        f"{len(pairs)} songs" + f"; {n_single} are in one file only" * bool(n_single)
    )
    for metric in tables.METRICS:
        if args.metric not in (None, metric.name):
            continue
        found = comparison.differences(pairs, systems, args.stem, metric.name)
        for song in found if args.metric else ():
            say(f"{song.gain:+8.2f} dB  {song.before:7.2f} → {song.after:7.2f}  {song.name}")
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
    cli.add_device_option(parser)
    args = parser.parse_args(argv)
    hp = cli.settings_of(args)
    named = parse_settings(args.settings).keys() & set(MASK_SETTINGS)
    if named:
        raise UsageError(f"--set {min(named)}: is what is being chosen (leave it out)")
    cli.refuse_missing(args.checkpoint)

    if not args.dry_run:
        writing.check_writable(args.checkpoint)

    from scoring import evaluation, tuning

    before = reading.sha256(args.checkpoint)
    network = network_of(args, parser, hp)
    learnt, _ = evaluation.known_songs(args.checkpoint)
    if learnt is None:
        cli.warn(f"{args.checkpoint}: does not say which songs it has learnt from")
    how = {"kind": args.kind, "voice_pattern": args.voice_pattern}
    grid, split = evaluation.load(network).hp, args.split or "train"
    songs, left_out, bad = tuning.validation_songs(args.data, learnt or {}, grid, split, **how)
    for message in bad:
        cli.complain(message)
    n_failed, songs = len(bad), estimates.thin(songs, args.every, args.subset)
    names = ", ".join(song.name for song in songs[:8]) + ", …" * (len(songs) > 8)
    say(f"left out: {left_out}", f"tuned on {len(songs)} songs: {names}")
    tune_song = functools.partial(tuning.tune_candidate, network, args.seconds)
    tuned: list[tuning.Tuned] = []
    with (
        contextlib.closing(workers.in_parallel(tune_song, songs, args.workers)) as results,
        cli.progress(len(songs), " songs") as bar,
    ):
        for result in results:
            bar.update()
            if isinstance(result, InputError):
                cli.complain(result)
                n_failed += 1
            elif math.isnan(result.scores[0]):
                cli.warn(f"{result.name}: silent vocals; left out")
            else:
                tuned.append(result)
    if not tuned:
        raise InputError(f"{args.checkpoint}: no song left to tune on")
    mean = tuning.mean_scores(tuned)
    settings = tuning.best_settings(mean)
    say(*tuning.curves(mean, settings))
    if args.dry_run:
        say(f"{args.checkpoint}: left as it is (--dry-run)")
    elif n_failed:
        cli.warn(f"{n_failed} songs failed; {args.checkpoint} is left as it is")
    else:
        tuning.store(args.checkpoint, settings, before, tuned)
        say(f"{args.checkpoint}: these are its defaults now")
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
