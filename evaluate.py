"""Score a network, or anybody's files, on songs of which the truth is known.

Vocals and accompaniment of every test song are scored by BSSEval v4 (frames of 1 s, median over
frames, then over songs, as SiSEC 2018), by BSSEval v3 (GNSDR, GSIR, GSAR: means over songs,
weighted by length, as on MIR-1K) and by SI-SDR (mean over songs). Beside every score stand the
floor, which is the mixture as estimate, and the ceilings, which are ideal masks on this project's
own STFT; a percentage is the part of the way from the floor to the ideal ratio mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import commandline
import outputs
import scorebook
import soundio
import tracks
from hparams import MASK_SETTINGS, TRAINED, HParams, InputError, UsageError, parse_settings
from tracks import Part, Track

if TYPE_CHECKING:
    import numpy as np

    from dataset import Song
    from separation import Separator

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
BOTH = {"hard": {"mask_at_eval": True}, "soft": {"mask_at_eval": False}}
NO_SYSTEMS = ("floor", "ideal_binary", "ideal_ratio", "reference")  # names that are taken
FEWEST = 6  # songs: of fewer, all may differ the same way by chance in more than 1 of 20 cases
METRIC_NAMES = ("sdr", "isr", "sir", "sar", "nsdr", "v3_sir", "v3_sar", "si_sdr")
Record = dict[str, Any]  # of a song, as it is stored


@dataclasses.dataclass(frozen=True)
class Task:
    """What every process knows."""

    root: Path
    checkpoint: Path | None  # None: bounds
    device: str
    hp: HParams  # with --set
    explicit: tuple[tuple[str, Any], ...]  # what --set named
    seconds: float | None
    both_masks: bool = False
    v3: bool | None = None  # as `scoring.score_song` takes it


class Job(NamedTuple):
    """A song, and the files that systems have made of it: by system, by stem."""

    track: Track
    estimates: dict[str, dict[str, Path]]


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


def add_song_options(parser: argparse.ArgumentParser, split: str) -> None:
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
    songs.add_argument(
        "--seconds",
        type=commandline.positive_number,
        metavar="S",
        help="take only the middle S seconds of a song",
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
        "only, as it takes three times as long as all else",
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
    if not os.path.isfile(args.checkpoint):
        raise InputError(f"{args.checkpoint}: no such checkpoint")
    own = list(BOTH) if args.both_masks else ["model"]
    return run(args, parser, own)


def bounds(argv: list[str]) -> int:
    """Score what needs no checkpoint."""
    parser = make_parser("bounds")
    add_scoring(parser)
    args = parser.parse_args(argv)
    args.checkpoint, args.both_masks, args.device = None, False, "cpu"
    return run(args, parser, [])


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add what `evaluate` and `bounds` share."""
    parser.add_argument("root", type=Path, help="folder of music in a layout of build_dataset.py")
    add_song_options(parser, "which songs: by default test, or all where the layout has none")
    add_score_options(parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser, own: list[str]) -> int:
    """Score songs in parallel, keeping each as it is done; print, draw and store the result."""
    hp = commandline.settings_of(args)
    names = [name for name, _ in args.estimates]
    for name in names:
        if name in (*NO_SYSTEMS, *own) or names.count(name) > 1:
            raise UsageError(f"--estimates {name}: the name is taken (choose another)")
    found = tracks.find_tracks(args.root, args.kind, args.voice_pattern)
    chosen, split = choose(args, found.tracks)
    for message in found.bad:
        commandline.complain(message)
    jobs, n_failed = pair(chosen, args.estimates)
    n_failed += len(found.bad)
    output = args.output or default_output(args, hp)
    for path in [output, args.plot] if args.plot else [output]:
        outputs.check_writable(path)

    import scoring  # here: a wrong path is told before torch is loaded

    print(f"{args.root}: {found.layout}: {len(jobs)} songs of the split {split!r}", flush=True)

    device = str(commandline.device_of(args, parser)) if args.checkpoint else "cpu"
    explicit = tuple(parse_settings(args.settings).items())
    task = Task(
        args.root, args.checkpoint, device, hp, explicit, args.seconds, args.both_masks, args.v3
    )
    about = describe(task, found.layout, names)
    learnt = learnt_names(args.checkpoint)
    with scorebook.Scorebook(output, about, args.overwrite) as book:
        book.refuse_loss([song.name for song in chosen])
        waiting = [job for job in jobs if not book.holds(job.track.name, sources_of(task, job))]
        if len(waiting) < len(jobs):
            print(f"{len(jobs) - len(waiting)} of {len(jobs)} songs are scored already")
        function = functools.partial(score_track, task)
        with commandline.progress(len(waiting), " songs") as bar:
            for result in in_parallel(function, waiting, args.workers):
                bar.update()
                if isinstance(result, InputError):
                    commandline.complain(result)
                    n_failed += 1
                    continue
                result["learnt"] = result["name"] in learnt
                book.add(result)
        records = [
            book.records[name]
            for name in sorted(j.track.name for j in jobs)
            if name in book.records
        ]
        selection = {"split": split, "every": args.every, "subset": args.subset}
        summary = scoring.summarise(records)
        counts = {"n_songs": len(records), "n_failed": n_failed}
        book.finish(records, summary, {**selection, **counts})
    for record in records:
        for note in record["notes"]:
            commandline.warn(f"{record['name']}: {note}")
    report(records, summary, n_failed)
    if args.checkpoint is None and records:
        print_row(args.root, hp, records, summary)
    if args.plot:
        plot(args.plot, records)
    print(f"{output}: every frame's scores" + (f"; {args.plot}: every song's" * bool(args.plot)))
    return int(n_failed > 0)


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


def pair(songs: list[Track], estimates: list[tuple[str, Path]]) -> tuple[list[Job], int]:
    """Give each song the files that systems made of it; those that lack some are told."""
    files = {name: tracks.find_estimates(folder, songs) for name, folder in estimates}
    jobs, n_failed = [], 0
    for song in songs:
        own = {name: of_songs[song.name] for name, of_songs in files.items()}
        missing = [str(folder) for name, folder in estimates if not own[name]]
        if missing:
            commandline.complain(
                f"{song.name}: no estimate in {', '.join(missing)} "
                "(<song>/vocals.wav or <song>_vocals.wav)"
            )
            n_failed += 1
        else:
            jobs.append(Job(song, own))
    # A long song at the end would keep all waiting.
    return sorted(
        jobs, key=lambda j: (-sum(map(scorebook.size_of, j.track.paths)), j.track.name)
    ), n_failed


def default_output(args: argparse.Namespace, hp: HParams) -> Path:
    """Name the output after what is scored."""
    root = args.root.resolve().name
    if args.checkpoint is not None:
        return args.checkpoint.with_name(f"{args.checkpoint.stem}_{root}.json")
    return Path("runs") / f"bounds_{root}_{hp.n_fft}_{hp.hop_length}.json"


def describe(task: Task, layout: str, estimates: list[str]) -> dict[str, Any]:
    """Collect what decides the scores: two runs of which this is equal give the same."""
    import numpy as np
    import torch

    about: dict[str, Any] = {
        "dataset": {"name": task.root.resolve().name, "layout": layout},
        "seconds": task.seconds,
        "v3": task.v3,
        "estimates": estimates,
        "checkpoint": None,
        "hparams": dataclasses.asdict(task.hp),
        "conventions": {
            "bsseval_v4": "frames of 1 s, 512 taps, NaN where a source or estimate is silent",
            "bsseval_v3": "whole song, mean of the channels, 512 taps",
            "rounding": "references and estimates to 16 bits before BSSEval, not before SI-SDR",
            "ceilings": "one mask of 8 bits for all channels on the network's bins",
            "worst_si_sdr_db": -30,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "project": project_commit(),
        },
    }
    if task.checkpoint is not None:
        separator = load(task)
        about["checkpoint"] = {
            "file": task.checkpoint.name,
            "sha256": soundio.sha256(task.checkpoint),
            "dtype": str(separator.dtype).removeprefix("torch."),
            "device": task.device.split(":")[0],
        }
        about["hparams"] = dataclasses.asdict(separator.hp)
        about["mask_settings"] = separator.mask_settings
        about["both_masks"] = task.both_masks
    return json.loads(json.dumps(about))  # as it is when it is read again


def project_commit() -> str | None:
    """Return the commit of this code, with -dirty where it was changed; None without git."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        ran = subprocess.run(
            [*command, "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def learnt_names(checkpoint: Path | None) -> set[str]:
    """Return the names of the songs that a checkpoint was trained on, where it knows them."""
    if checkpoint is None:
        return set()
    import model as networks

    return {
        song.rpartition(" ")[0] for song in networks.load_checkpoint(checkpoint).get("data", ())
    }


@functools.lru_cache(maxsize=1)
def load(task: Task) -> Separator:
    """Load the network, once in each process."""
    from separation import Separator

    return Separator.load(task.checkpoint, task.device, task.hp, dict(task.explicit))


def score_track(task: Task, job: Job) -> Record:
    """Separate one song in every way, and score it."""
    import numpy as np

    import scoring

    track, extent = job.track, tracks.measure(job.track)
    rate, notes = extent.sample_rate, list(extent.notes)
    references = tracks.read_channels(track)
    theirs = {
        name: read_estimate(name, files, references, rate, notes)
        for name, files in job.estimates.items()
    }
    kept = scoring.middle(references.shape[-1], task.seconds and task.seconds * rate)
    references = np.ascontiguousarray(references[..., kept])
    estimates, hp, mixture = {}, task.hp, references.sum(0)
    if task.checkpoint is not None:
        separator = load(task)
        hp = separator.hp
        if task.both_masks:
            columns: list[np.ndarray] = []
            first, *others = BOTH.items()
            estimates[first[0]] = scoring.render(
                separator, mixture, rate, first[1], on_mask=columns.append
            )
            levels = np.concatenate(columns, -1)
            for name, settings in others:
                saved = scoring.replay(levels)
                estimates[name] = scoring.render(separator, mixture, rate, settings, saved=saved)
        else:
            estimates["model"] = scoring.render(separator, mixture, rate)
    estimates |= {name: np.ascontiguousarray(wav[..., kept]) for name, wav in theirs.items()}
    estimates |= scoring.ideals(references, rate, hp)
    del theirs
    n_channels, n_samples = references.shape[1:]
    if n_samples < rate:
        notes.append(f"shorter than a frame of 1 s: one frame of {n_samples} samples")
    return {
        "name": track.name,
        "group": track.group,
        "split": track.split,
        "sample_rate": rate,
        "n_channels": n_channels,
        "seconds": n_samples / rate,
        **sources_of(task, job, with_hash=True),
        "notes": notes,
        **scoring.score_song(references, estimates, rate, task.v3),
    }


def read_estimate(
    system: str, files: dict[str, Path], references: np.ndarray, rate: int, notes: list[str]
) -> np.ndarray:
    """Read what a system made of a song, in the song's shape; `notes` get what was done to it."""
    import numpy as np

    mixture, wavs = references.sum(0), {}
    n_channels, n_samples = mixture.shape
    for stem, path in files.items():
        info = soundio.probe(path)
        if info.sample_rate != rate:
            raise InputError(f"{path}: {info.sample_rate} Hz, the song has {rate} Hz; convert it")
        wav = tracks.read_part(Part(path))
        if abs(wav.shape[-1] - n_samples) > tracks.TRIM_SECONDS * rate:
            raise InputError(
                f"{path}: {wav.shape[-1]} samples, the song has {n_samples}; export it again from "
                "the same start to the same end"
            )
        if wav.shape[-1] != n_samples:
            done = "trimmed" if wav.shape[-1] > n_samples else "padded with silence"
            notes.append(
                f"{stem} of {system}: {wav.shape[-1]} samples, the song has {n_samples}; {done}"
            )
            wav = np.pad(wav[:, :n_samples], ((0, 0), (0, max(0, n_samples - wav.shape[-1]))))
        if len(wav) != n_channels:
            if 1 not in (len(wav), n_channels):
                raise InputError(f"{path}: {len(wav)} channels, the song has {n_channels}")
            done = "copied" if n_channels > 1 else "averaged"
            notes.append(f"{stem} of {system}: {len(wav)} channels {done} to {n_channels}")
            wav = np.broadcast_to(wav.mean(0), mixture.shape)
        wavs[stem] = wav
    vocals = wavs["vocals"] if "vocals" in wavs else mixture - wavs["accompaniment"]
    return np.stack([vocals, wavs.get("accompaniment", mixture - vocals)])


def sources_of(task: Task, job: Job, with_hash: bool = False) -> dict[str, Any]:
    """Say which files a song's scores come from."""
    return {
        "files": [scorebook.identity(path, task.root, with_hash) for path in job.track.paths],
        "estimates": {
            name: [scorebook.identity(path, path.parent, with_hash) for path in files.values()]
            for name, files in job.estimates.items()
        },
    }


# --- Results --------------------------------------------------------------------------------------


def report(records: list[Record], summary: dict[str, Any], n_failed: int) -> None:
    """Print the table, and what it does not show."""
    from scoring import METRICS, STEMS

    metrics = [
        m
        for m in METRICS
        if any(of[s][m.name]["n_songs"] for of in summary.values() for s in STEMS)
    ]
    widths = max([len(system) for system in summary] + [13]) + 1
    for stem in STEMS if records else ():
        print(f"\n{stem.ljust(widths)}" + "".join(f"{m.label:>8}       " for m in metrics).rstrip())
        for system in ordered(summary):
            cells = [summary[system][stem][metric.name] for metric in metrics]
            shown = [cell_text(cell, system not in NO_SYSTEMS) for cell in cells]
            print((system.ljust(widths) + "".join(shown)).rstrip())
    minutes = sum(record["seconds"] for record in records) / 60
    print(f"\n{len(records)} songs, {minutes:.1f} minutes, scores in dB", end="")
    print("; % is the part of the way from the floor to the ideal ratio mask" * bool(records))
    n_frames = sum(record["n_frames"] for record in records)
    n_silent = sum(record["silent"]["reference"] for record in records)
    if n_silent:
        print(f"{n_silent} of {n_frames} frames left out of BSSEval v4: a true source is silent")
    for system in ordered(summary):
        n_silent = sum(record["silent"][system] for record in records)
        if n_silent:
            print(f"{n_silent} of {n_frames} frames left out of {system}'s: it is silent there")
        n_without = len(records) - summary[system]["vocals"]["sdr"]["n_songs"]
        if n_without:
            print(
                f"{n_without} of {len(records)} songs: SDR of {system} n/a (silent in every frame)"
            )
    n_learnt = sum(record["learnt"] for record in records)
    if n_learnt:
        commandline.warn(f"{n_learnt} songs are called like songs that the checkpoint learnt from")
    if n_failed:
        commandline.warn(f"{n_failed} songs failed, each named above")


def ordered(systems: Iterable[str]) -> list[str]:
    """Put the floor first and the ceilings last."""
    return sorted(systems, key=lambda s: (s in NO_SYSTEMS[1:]) - (s == NO_SYSTEMS[0]))


def cell_text(cell: dict[str, Any], with_share: bool) -> str:
    """Write a score and, for a system, its share of the way."""
    value = "n/a" if cell["value"] is None else f"{cell['value']:.2f}"
    share = cell["share"] if with_share else None
    return f"{value:>8}" + ("       " if share is None else f"{f'{100 * share:.0f} %':>7}")


def print_row(root: Path, hp: HParams, records: list[Record], summary: dict[str, Any]) -> None:
    """Print floor and ceilings as a row of a table in Markdown."""
    scores = [
        " / ".join(cell_text(summary[s]["vocals"][m], False).strip() for m in ("sdr", "si_sdr"))
        for s in NO_SYSTEMS[:3]
    ]
    print("\n| vocals, SDR / SI-SDR | songs | n_fft, hop | floor | ideal binary | ideal ratio |")
    print("|---|---|---|---|---|---|")
    cells = [root.resolve().name, str(len(records)), f"{hp.n_fft}, {hp.hop_length}", *scores]
    print(f"| {' | '.join(cells)} |\n")


def plot(path: Path, records: list[Record]) -> None:
    """Draw a strip of songs for every system, a chart for every metric and stem."""
    from charts import Strips, svg
    from scoring import METRICS, STEMS, song_score

    systems = ordered(records[0]["scores"]) if records else []
    figures = []
    for stem, metric in product(STEMS, METRICS):
        strips = {
            system: [song_score(r["scores"][system][stem], metric.name) for r in records]
            for system in systems
        }
        label, note = metric.label.removeprefix("G"), ""
        if metric.name == "sar":  # 80 dB of nothing but rounding would press the others together
            note = "; the floor has no artifacts"
            strips.pop(NO_SYSTEMS[0], None)
        is_there = any(math.isfinite(value) for values in strips.values() for value in values)
        if is_there and not metric.name.startswith("v3"):
            figures.append(Strips(f"{label} of the {stem} [dB], one ○ a song{note}", strips))
    text = svg(figures)
    outputs.replace_atomically(path, lambda file: file.write(text.encode()))


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
        "--metric", choices=METRIC_NAMES, help="only this one, with the difference of every song"
    )
    parser.add_argument(
        "--stem", choices=["vocals", "accompaniment"], default="vocals", help="(%(default)s)"
    )
    args = parser.parse_args(argv)
    commandline.settings_of(args)
    names = args.systems or ["model"]
    if len(names) > 2:
        raise UsageError("--systems: one name for both files, or one for each")
    paths = [args.before, args.after]
    stored = [scorebook.read(path) for path in paths]
    systems = [names[0], names[-1]]
    songs = [
        {record["name"]: record for record in check_system(path, scores, system)["songs"]}
        for path, scores, system in zip(paths, stored, systems, strict=True)
    ]
    common = sorted(songs[0].keys() & songs[1].keys())
    if not common:
        raise InputError(f"{args.after}: has no song in common with {args.before}")
    for name in common:
        refuse_other_song(args, songs[0][name], songs[1][name])
    n_single = len(songs[0]) + len(songs[1]) - 2 * len(common)
    print(
        f"{args.before} ({systems[0]}) → {args.after} ({systems[1]}): {args.stem} of "
        f"{len(common)} songs" + f"; {n_single} are in one file only" * bool(n_single)
    )
    for metric in [args.metric] if args.metric else METRIC_NAMES:
        pairs = [[of_file[name] for of_file in songs] for name in common]
        compare_metric(pairs, systems, args.stem, metric, is_long=bool(args.metric))
    return 0


def check_system(path: Path, scores: dict[str, Any], system: str) -> dict[str, Any]:
    """Refuse scores without the system asked for."""
    if system not in scores["summary"]:
        there = ", ".join(scores["summary"]) or "none"
        raise InputError(f"{path}: no system {system!r} (--systems takes of: {there})")
    return scores


def refuse_other_song(args: argparse.Namespace, before: Record, after: Record) -> None:
    """Refuse songs of one name that are not the same music."""
    same = [
        {file["sha256"] for file in record["files"]} | {record["seconds"]}
        for record in (before, after)
    ]
    if same[0] != same[1]:
        raise InputError(
            f"{args.after}: {before['name']} is not the same music as in {args.before}; "
            "score both on the same files and seconds"
        )


def compare_metric(
    pairs: list[list[Record]], systems: list[str], stem: str, metric: str, is_long: bool
) -> None:
    """Print the difference of one metric, and whether it is more than chance."""
    import numpy as np

    from scoring import METRICS, bootstrap, song_score

    label = next(m.label for m in METRICS if m.name == metric).removeprefix("G")
    label += " (v3)" if metric.startswith("v3") or metric == "nsdr" else ""
    differences, groups = [], []
    for both in pairs:
        before, after = (
            song_score(record["scores"][system][stem], metric)
            for record, system in zip(both, systems, strict=True)
        )
        if np.isfinite(after - before):
            differences.append(after - before)
            groups.append(both[0]["group"])
            if is_long:
                name = commandline.printable(both[0]["name"])
                print(f"{after - before:+8.2f} dB  {before:7.2f} → {after:7.2f}  {name}")
    if not differences:
        print(f"{label:>9}: no song has it in both")
        return
    n_groups = len(set(groups))
    mean = float(np.mean(differences))
    text = f"{label:>9}: {mean:+.2f} dB on average"
    if n_groups < 2:
        print(f"{text}; one song tells nothing about others")
        return
    low, high = bootstrap(np.array(differences), groups)
    if n_groups < FEWEST:
        verdict = f"{n_groups} songs are too few to tell"
    elif low > 0 or high < 0:
        verdict = f"the interval excludes 0: {'better' if mean > 0 else 'worse'}"
    else:
        verdict = "the interval holds 0: it may be chance"
    n_better = sum(difference > 0 for difference in differences)
    print(
        f"{text}, 95 % interval {low:+.2f} to {high:+.2f}; {verdict} "
        f"({n_better} of {len(differences)} songs better)"
    )


# --- Tuning ---------------------------------------------------------------------------------------


def tune(argv: list[str]) -> int:
    """Choose and store mask settings."""
    parser = make_parser("tune")
    parser.add_argument("checkpoint", type=Path, help="a .pth file that train.py wrote")
    parser.add_argument(
        "data", type=Path, nargs="+", help="built datasets, or folders of music: validation songs"
    )
    add_song_options(parser, "which songs: by default train, those not learnt from")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the curves; leave the checkpoint as it is"
    )
    commandline.add_device_option(parser)
    parser.set_defaults(seconds=60.0)
    args = parser.parse_args(argv)
    hp = commandline.settings_of(args)
    named = parse_settings(args.settings).keys() & set(MASK_SETTINGS)
    if named:
        raise UsageError(f"--set {min(named)}: is what is being chosen (leave it out)")
    if not os.path.isfile(args.checkpoint):
        raise InputError(f"{args.checkpoint}: no such checkpoint")

    import numpy as np

    import scoring

    device = commandline.device_of(args, parser)
    before = soundio.sha256(args.checkpoint)
    explicit = tuple(parse_settings(args.settings).items())
    task = Task(Path(), args.checkpoint, str(device), hp, explicit, args.seconds)
    songs, n_failed = validation_songs(args, load(task).hp)
    names = ", ".join(name for name, _ in songs[:8]) + ", …" * (len(songs) > 8)
    print(f"tuned on {len(songs)} songs: {commandline.printable(names)}", flush=True)
    scores = {}
    with commandline.progress(len(songs), " songs") as bar:
        for result in in_parallel(functools.partial(tune_source, task), songs, args.workers):
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
    settings = scoring.best_settings(mean)
    print_curves(mean, settings)
    if args.dry_run:
        print(f"{args.checkpoint}: left as it is (--dry-run)")
    elif n_failed:
        commandline.warn(f"{n_failed} songs failed; {args.checkpoint} is left as it is")
    else:
        store(args.checkpoint, settings, before)
        print(f"{args.checkpoint}: these are its defaults now")
    return int(n_failed > 0)


def validation_songs(args: argparse.Namespace, hp: HParams) -> tuple[list[tuple[str, Any]], int]:
    """List songs with what `tune_source` needs to read them, and count those that cannot be.

    A song of a built dataset is a folder and its entry in the manifest, one of a folder of music a
    track. What the checkpoint learnt from is known by its hash, or of unbuilt music by its name.
    """
    import dataset
    import model as networks
    from hparams import differences, from_dict

    learnt = networks.load_checkpoint(args.checkpoint).get("data")
    if learnt is None:
        commandline.warn(f"{args.checkpoint}: does not say which songs it has learnt from")
    learnt = set(learnt or ())
    learnt_ids = {song.rpartition(" ")[0] for song in learnt}
    split, n_failed, n_learnt, n_other = args.split or "train", 0, 0, 0
    songs: list[tuple[str, Any]] = []
    for folder in args.data:
        listed: list[tuple[str, str, bool, Any]]
        if (folder / dataset.MANIFEST).is_file():
            manifest = dataset.load_manifest(folder)
            for name, both in differences(hp, from_dict(manifest.hparams), TRAINED[:3]).items():
                raise InputError(f"{folder}: built with {name}={both[1]}, not {both[0]}")
            listed = [
                (song.id, song.split, f"{song.id} {song.sha256}" in learnt, (folder, song))
                for song in manifest.songs
                if set(song.parts) == set(dataset.PARTS)
            ]
        else:
            found = tracks.find_tracks(folder, args.kind, args.voice_pattern)
            for message in found.bad:
                commandline.complain(message)
            n_failed += len(found.bad)
            listed = [
                (track.name, track.split, track.name in learnt_ids, track)
                for track in found.tracks
                if len(track.signals) == 2
            ]
        wanted = [entry for entry in listed if split in (entry[1], "all")]
        n_other += len(listed) - len(wanted)
        n_learnt += sum(is_learnt for _, _, is_learnt, _ in wanted)
        songs += [(name, source) for name, _, is_learnt, source in wanted if not is_learnt]
    left_out = f"{n_learnt} that were learnt from and {n_other} of another split"
    if not songs:
        raise InputError(
            f"{args.data[0]}: no validation songs: {left_out} are left out (give other songs, or "
            "name a --split)"
        )
    print(f"left out: {left_out}")
    return thin(songs, args), n_failed


def tune_source(
    task: Task, named: tuple[str, Track | tuple[Path, Song]]
) -> tuple[str, list[float]]:
    """Score all mask settings on one song."""
    import numpy as np

    import scoring

    name, source = named
    separator = load(task)
    if isinstance(source, Track):
        rate = tracks.measure(source).sample_rate
        references = tracks.read_channels(source)
        kept = scoring.middle(references.shape[-1], task.seconds * rate)
        references = np.ascontiguousarray(references[..., kept])
    else:
        rate = separator.hp.sample_rate
        references = scoring.read_built(*source, separator.hp, task.seconds)
    return name, scoring.tune_song(separator, references, rate)


def print_curves(scores: np.ndarray, settings: dict[str, Any]) -> None:
    """Print the mean SI-SDR of the vocals for everything that was tried."""
    from scoring import GATES, SHARPNESSES, THRESHOLDS

    print("\nbinary mask: SI-SDR of the vocals [dB] by eval_mask_threshold")
    for threshold, score in zip(THRESHOLDS, scores, strict=False):
        mark = "  ←" if threshold == settings["eval_mask_threshold"] else ""
        print(f"{threshold:6.2f} {score:8.2f}{mark}")
    soft = scores[len(THRESHOLDS) :].reshape(len(GATES), len(SHARPNESSES))
    print("\nsoft mask: by noise_gate (down) and mask_sharpness (across)")
    print(" " * 6 + "".join(f"{sharpness:9.2f}" for sharpness in SHARPNESSES))
    for gate, row in zip(GATES, soft, strict=True):
        here = [
            gate == settings["noise_gate"] and s == settings["mask_sharpness"] for s in SHARPNESSES
        ]
        cells = [
            f"{score:8.2f}{'←' if best else ' '}" for score, best in zip(row, here, strict=True)
        ]
        print(f"{gate:6.2f}" + "".join(cells).rstrip())
    print("\nbest: " + ", ".join(f"{name}={value}" for name, value in settings.items()))


def store(path: Path, settings: dict[str, Any], before: str) -> None:
    """Put mask settings into a checkpoint, and leave all else in it as it is.

    Raises
    ------
    InputError
        If the file is not the one any more that was tuned.
    """
    import model as networks

    if soundio.sha256(path) != before:
        raise InputError(f"{path}: has changed since tuning began (tune it again)")
    contents = networks.load_checkpoint(path)
    model, hp = networks.restore_model(path, contents)
    contents["mask_settings"] = settings
    # Weights and hparams are among the contents and replace those of `model` and `hp`: hparams that
    # an earlier version did not know stay out.
    networks.save_checkpoint(path, model, hp, **contents)


# --- Processes ------------------------------------------------------------------------------------


def in_parallel(
    function: Callable[[Any], Any], jobs: list[Any], n_workers: int | None
) -> Iterator[Any]:
    """Call a function for all jobs, in processes of one thread; yields results or InputErrors."""
    n_workers = min(n_workers or os.cpu_count() or 1, len(jobs))
    if n_workers <= 1:
        yield from map(functools.partial(attempt, function), jobs)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(n_workers, context, start_worker)
    try:
        # Ctrl-C reaches the whole group, and the parent decides: children inherit the block.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [executor.submit(attempt, function, job) for job in jobs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a process that scored a song died; was it out of memory? (run again, with fewer "
            "--workers; what is scored is kept)"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def attempt(function: Callable[[Any], Any], job: Any) -> Any:
    """Return what a function gives, or the InputError that it raises; on one thread.

    The number of threads changes the last bits of a sum, and it is songs that are parallel.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(job)
    except InputError as error:
        return error
    finally:
        torch.set_num_threads(before)


def start_worker() -> None:
    """End with the parent, however it ends."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
