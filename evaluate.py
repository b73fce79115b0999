"""Score a network, or anybody's files, on songs of which the truth is known.

Every test song is scored by BSSEval v4 (frames of 1 s, median over frames, then over songs, as
SiSEC 2018), v3 (GNSDR, GSIR, GSAR: means weighted by length, as on MIR-1K) and SI-SDR (mean). The
floor is the mixture as estimate, the ceilings are ideal masks, one for all channels (two, of mid
and side, can reach more).

  python evaluate.py runs/resnet18/best.pth music/dsd100 --workers 4
  python evaluate.py runs/resnet18/best.pth music/dsd100 --estimates other=their/wavs --plot a.svg
  python evaluate.py bounds music/mir1k --set n_fft=2048        # floor and ceilings
  python evaluate.py compare a.json b.json                      # is one better, or is it chance?
  python evaluate.py tune runs/resnet18/best.pth music/dsd100   # choose the mask settings
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

import cli
import dataset
from hparams import MASK_SETTINGS, InputError, UsageError, parse_settings
from scoring import tables
from sound import tracks

ABOUT = __doc__.rpartition("\n\n")[0]
BOUNDS = """Score the mixture itself and the ideal masks: what no network changes.

The STFT is that of --set sample_rate, n_fft and hop_length, moved to each song's own rate."""
COMPARE = """Say whether one system is better than another on the same songs.

The interval is that of the mean difference, from 10 000 paired resamples of the songs: where it
holds 0, the difference may be chance."""
TUNE = """Choose the mask settings that sound best on validation songs, and store them.

Songs that the checkpoint has learnt from are left out, and so are test songs unless --split names
them. The network separates each song once; every setting renders the mask that it gave."""


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Run one of the four commands."""
    words = sys.argv[1:] if argv is None else argv
    commands = {"bounds": score, "compare": compare, "tune": tune}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    return score(words, has_network=True)


def make_parser(command: str, text: str) -> argparse.ArgumentParser:
    """Describe the command line of one command; the first one has no name."""
    parser = cli.make_parser(__doc__)
    parser.description = text  # all of it: it says what the numbers are
    parser.prog += f" {command}" * bool(command)
    return parser


def add_song_options(parser: argparse.ArgumentParser, split: str, seconds: float | None) -> None:
    """Add which songs are taken, how much of them, and by how many processes."""
    add = parser.add_argument_group("songs").add_argument
    add("--split", choices=["test", "train", "all"], help=f"which songs (default: {split})")
    add("--as", dest="kind", choices=tracks.KINDS[:1], help="one folder of stems for each song")
    pattern = tracks.VOICE_PATTERN
    add("--voice-pattern", metavar="REGEX", default=pattern, help="as build_dataset.py")
    add("--every", type=cli.positive_count, default=1, metavar="K", help="take only every K-th")
    text = f"take only the middle S seconds of a song (default: {seconds or 'all'})"
    add("--seconds", type=cli.positive_number, default=seconds, metavar="S", help=text)
    text = "songs at a time; 3 GB for a stereo song of 4 minutes (default: cores; 2 on a GPU)"
    parser.add_argument("--workers", type=cli.positive_count, metavar="N", help=text)


def a_system(text: str) -> tuple[str, Path]:
    """Read ``name=folder`` for argparse."""
    name, equals, folder = text.partition("=")
    if not (name.isprintable() and name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as name=folder")
    return name, Path(folder)


def choose_songs(args: argparse.Namespace) -> tuple[tracks.Collection, list[tracks.Track]]:
    """Return what the folder holds, and its songs of the split that have both signals."""
    if os.path.isfile(args.root / dataset.MANIFEST):
        what = "a dataset that build_dataset.py made (give the folder of music)"
        raise InputError(f"{args.root}: {what}")
    listing = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    if not (both := [track for track in listing.tracks if len(track.signals) == 2]):
        raise InputError(f"{args.root}: no song has vocals and accompaniment to compare with")
    if args.split is None:
        args.split = "test" if any(track.split == "test" for track in both) else "all"
    if not (chosen := [track for track in both if args.split in (track.split, "all")]):
        raise InputError(f"{args.root}: no songs of the split {args.split!r} (try --split all)")
    return listing, chosen


def say(*lines: object) -> None:
    """Print results at once, whatever characters names have."""
    print(*map(cli.printable, lines), sep="\n", flush=True)


def refuse_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be scored or written, before any work."""
    names = [name for name, _ in args.estimates]
    for name in names:
        if name in (tables.FLOOR, *tables.IDEALS, "model") or names.count(name) > 1:
            raise UsageError(f"--estimates {name}: the name is taken (choose another)")
    if args.output and args.output.suffix != ".json":
        raise UsageError(f"{args.output}: is written as json (call it something.json)")
    if args.plot and args.plot.suffix not in (".svg", ".png", ".pdf"):
        raise UsageError(f"{args.plot}: a picture's name ends in .svg, .png or .pdf")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise InputError("pictures need matplotlib (pip install matplotlib)")


def score(argv: list[str], has_network: bool = False) -> int:
    """Score songs in parallel, keeping each as it is done; print, draw and store the result."""
    parser = make_parser("", ABOUT) if has_network else make_parser("bounds", BOUNDS)
    parser.set_defaults(checkpoint=None)
    add = parser.add_argument
    if has_network:
        add("checkpoint", type=Path, help="a .pth file that train.py wrote")
        cli.add_device_option(parser)
    add("root", type=Path, help="folder of music that build_dataset.py reads (not what it makes)")
    add_song_options(parser, "test, or all where the layout has none", None)
    text = "also score a system's <song>/vocals.* or <song>_vocals.*; may be repeated"
    add("--estimates", action="append", default=[], type=a_system, metavar="NAME=DIR", help=text)
    text = "all scores (.json; by default beside the checkpoint or in runs/), each song's beside it"
    add("--output", type=Path, metavar="FILE", help=text)
    add("--plot", type=Path, metavar="FILE", help="draw them (.svg, .png or .pdf; by matplotlib)")
    args = parser.parse_args(argv)
    if args.checkpoint:
        cli.refuse_missing(args.checkpoint)
    hp = cli.settings_of(args)
    refuse_options(args)
    listing, chosen = choose_songs(args)
    beside, name = Path("runs"), f"bounds_{args.root.resolve().name}_{hp.n_fft}_{hp.hop_length}"
    if args.checkpoint:
        name = f"{args.checkpoint.stem}_{args.root.resolve().name}"
        if args.checkpoint.resolve().parent != cli.PRETRAINED.parent:  # which is the project's
            beside = args.checkpoint.parent
    output = args.output or beside / f"{name}.json"
    tables.refuse_foreign(output)
    folder = output.with_suffix(".songs")
    for path in filter(None, (folder / "song.json", output, args.plot)):
        cli.check_writable(path)

    from scoring import songs  # here: a wrong path is told before torch is loaded

    jobs, lacking = songs.jobs_of(chosen[:: args.every], dict(args.estimates))
    for message in (*listing.bad, *lacking):
        cli.complain(message)
    say(f"{args.root}: {listing.layout}: {len(jobs)} songs of the split {args.split!r}")
    device = str(cli.device_of(args, parser)) if args.checkpoint else "cpu"
    args.workers = args.workers or (None if device == "cpu" else 2)
    task = songs.Evaluation(args.checkpoint, device, tuple(args.settings), args.seconds)
    about = songs.conditions(task)
    work = functools.partial(songs.scores_of, task, about, folder)
    done = [result for _, result in cli.in_processes(work, jobs, args.workers)]
    if n_old := sum(not is_new for _, is_new in done):
        say(f"{n_old} of {len(jobs)} songs were scored before")
    if not done:
        raise InputError(f"{args.root}: no song could be scored (nothing is written)")
    records = sorted((record for record, _ in done), key=lambda record: record["name"])
    summary = tables.summarise(records)
    n_failed = len(listing.bad) + len(lacking) + len(jobs) - len(done)
    tables.write_scores(output, about, summary, records)
    for record in records:
        for note in record["notes"]:
            cli.warn(f"{record['name']}: {note}")
    say(*tables.tables(summary), "")
    say(f"{len(records)} songs, in dB")
    for purpose, names in songs.known_songs(args.checkpoint).items():
        if n_known := sum(songs.song_key(record["name"]) in names for record in records):
            cli.warn(f"{n_known} songs are called like songs that {purpose}")
    if n_failed:
        cli.warn(f"{n_failed} songs failed, each named above")
    if args.plot:
        tables.plot_scores(args.plot, records)
    say(f"{output}: every frame's scores" + (f"; {args.plot}: every song's" * bool(args.plot)))
    return int(n_failed > 0)


def compare(argv: list[str]) -> int:
    """Compare two systems song by song."""
    parser = make_parser("compare", COMPARE)
    add = parser.add_argument
    add("before", type=Path, help="a .json file that evaluate.py wrote")
    add("after", type=Path, help="another one, or the same")
    text = "whose scores, in the first file and in the second (default: model model)"
    add("--systems", nargs=2, default=["model", "model"], metavar="NAME", help=text)
    args = parser.parse_args(argv)
    cli.settings_of(args)
    systems, paths = tuple(args.systems), (args.before, args.after)
    pairs = tables.pair_songs(paths, systems)
    text = f"vocals of the {len(pairs)} songs in both"
    say(f"{args.before} ({systems[0]}) → {args.after} ({systems[1]}): {text}")
    for metric in tables.METRICS:
        gains, groups = tables.gains_of(pairs, systems, metric.name)
        print(f"{metric.label:>9}: {tables.verdict(gains, groups)}")
    return 0


def tune(argv: list[str]) -> int:
    """Choose and store mask settings."""
    parser = make_parser("tune", TUNE)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .pth file that train.py wrote")
    add("root", type=Path, help="folder of music: validation songs")
    add_song_options(parser, "train, those not learnt from", 60.0)
    cli.add_device_option(parser)
    args = parser.parse_args(argv)
    cli.settings_of(args)
    if named := parse_settings(args.settings).keys() & set(MASK_SETTINGS):
        raise UsageError(f"--set {min(named)}: is what is being chosen (leave it out)")
    cli.refuse_missing(args.checkpoint)
    cli.check_writable(args.checkpoint)
    args.split = args.split or "train"
    listing, chosen = choose_songs(args)

    from scoring import songs, tuning  # here: a wrong path is told before torch is loaded

    learnt, _ = songs.known_songs(args.checkpoint).values()
    if not (new := [track for track in chosen if songs.song_key(track.name) not in learnt]):
        raise InputError(
            f"{args.root}: no validation songs: all {len(chosen)} of the split {args.split!r} were "
            "learnt from (give other songs, or name a --split)"
        )
    for message in listing.bad:
        cli.complain(message)
    say(f"{len(chosen) - len(new)} songs left out: they were learnt from")
    device, new = str(cli.device_of(args, parser)), new[:: args.every]
    args.workers = args.workers or (None if device == "cpu" else 2)
    task = songs.Evaluation(args.checkpoint, device, tuple(args.settings), args.seconds)
    work = functools.partial(tuning.tune_track, task)
    done = {track.name: scores for track, scores in cli.in_processes(work, new, args.workers)}
    if not (tuned := {name: s for name, s in done.items() if not np.isnan(s[0])}):
        raise InputError(f"{args.checkpoint}: no song left to tune on")
    mean = np.mean(list(tuned.values()), 0)
    settings = tuning.best_settings(mean)
    best = ", ".join(f"{name}={value}" for name, value in settings.items())
    say(f"tuned on {len(tuned)} songs", f"best: {best}: SI-SDR {max(mean):.2f} dB")
    if n_failed := len(new) - len(done):
        cli.warn(f"{n_failed} songs failed; {args.checkpoint} is left as it is")
    else:
        tuning.store(args.checkpoint, settings, list(tuned))
        say(f"{args.checkpoint}: these are its defaults now")
    return int(bool(n_failed or listing.bad))


if __name__ == "__main__":
    sys.exit(main())
