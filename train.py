"""Train a network on datasets that build_dataset.py made.

A run writes runs/<name>/last.pth after every epoch, every five minutes and on Ctrl-C, best.pth
whenever the held-out songs sound better than before, and its curves beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from hparams import TRAINED, HParams, InputError, UsageError, parse_settings
from learning import ranks
from learning.ranks import World
from sound import writing
from tools.charts import Chart, svg

if TYPE_CHECKING:
    import torch

    import dataset
    from learning import run as training

RESUMABLE = ("last.pth", "previous.pth")
CHECKPOINTS = (*RESUMABLE, "best.pth")
EPILOG = """examples:
  python train.py data/dsd100
  python train.py data/mir1k data/backings --name mixed --set width=16 --set epochs=20
  python train.py data/dsd100 --minutes 30                           # as many steps as fit
  python train.py data/dsd100 --find-lr                              # which learning rate?
  python train.py data/dsd100 --checkpoint runs/resnet18/last.pth    # go on from there
  torchrun --nproc-per-node 8 train.py data/dsd100                   # on 8 GPUs
  tensorboard --logdir runs                                          # watch it"""


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Set a run up and see it through."""
    parser = make_parser()
    args = parser.parse_args(argv)
    hp, run_dir, world = cli.settings_of(args), run_folder(args), ranks.world()
    for folder in [*args.data, *args.validate_on]:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder (build_dataset.py makes datasets)")
    writing.check_writable(run_dir / "last.pth")

    with contextlib.ExitStack() as stack:
        if world.rank:  # one voice is enough
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        device = cli.device_of(args, parser, world.local_rank)
        stack.enter_context(ranks.joined(world, device.type))
        stack.enter_context(locked(run_dir, world))
        run, goes_on = set_up(args, hp, world, device)
        if args.find_lr:
            find_lr(run, run_dir)
            return 0
        return train(run, goes_on, args, run_dir)


def set_up(
    args: argparse.Namespace, hp: HParams, world: World, device: torch.device
) -> tuple[training.Run, bool]:
    """Make the run that the command line asks for, new or resumed, and print what it is.

    Also returns whether it goes on where a checkpoint stopped.
    """
    import dataset  # here, so that --help and wrong paths answer before torch is loaded
    from learning import planning, sampling
    from learning import run as training

    checkpoint = load_checkpoint(args.checkpoint, world) if args.checkpoint else None
    if checkpoint:
        hp = resumed_settings(args, checkpoint)
    if hp.batch_size % world.size:
        raise InputError(
            f"batch_size is {hp.batch_size}, which {world.size} processes cannot share evenly "
            f"(--set batch_size={-(-hp.batch_size // world.size) * world.size})"
        )
    songs = dataset.open_songs(args.data, hp)
    if args.all_songs:
        songs = [replace(s, song=replace(s.song, split="train")) for s in songs]
    if args.validate_on:
        others = dataset.open_songs(args.validate_on, hp)
        learn, valid = dataset.validate_elsewhere(songs, others)
    else:
        learn, valid = dataset.hold_out(songs, hp)
    describe(hp, learn, valid)
    resident, reason = planning.place(learn, hp, device, world, args.dataset_on)
    print(f"dataset: {reason}")
    feed = sampling.Feed(learn, hp, device, resident)
    if args.minutes:
        trial = training.Run(hp, feed, valid, world)
        hp = replace(hp, steps=planning.steps_in(trial, args.minutes))
    run = training.Run(hp, feed, valid, world)
    goes_on = checkpoint is not None and resume(run, checkpoint, args)
    n_weights = sum(weight.numel() for weight in run.model.parameters())
    epochs = run.n_steps / run.steps_per_epoch if hp.steps else hp.epochs
    print(
        f"{hp.model_type}, width {hp.width}: {n_weights / 1e6:.2f} million weights; "
        f"{run.n_steps} steps, {epochs:.3g} epochs"
    )
    return run, goes_on


def train(run: training.Run, goes_on: bool, args: argparse.Namespace, run_dir: Path) -> int:
    """Train, validate and save, epoch after epoch; returns the exit code."""
    from learning import run as training
    from learning import validation

    hp, world, valid = run.hp, run.world, run.valid
    bounds = validation.bounds(run.listener, valid)
    print("held-out vocals, SI-SDR: " + ", ".join(f"{k} {v:.2f} dB" for k, v in bounds.items()))

    saves = training.Saves(run, run_dir, cli.warn)
    if not (goes_on and args.checkpoint.parent.resolve() == run_dir.resolve()):
        run.best_db = -math.inf  # the best.pth of another folder is not this run's
        refuse_overwriting(run_dir, args)
        if args.overwrite:
            saves.last(is_final=True)  # the old last.pth stays for a while, as previous.pth
            if not world.rank:
                remove_rest(run_dir)
    log = training.Log(None if world.rank else run_dir, cli.warn)
    with cli.Stop() as stop:
        while not run.is_finished:
            started, first_step = time.perf_counter(), run.step
            with cli.progress(run.slices_left_in_epoch(), " slices") as bar:
                loss = training.train_epoch(run, bar.update, log.scalars, stop, saves.last)
            if world.any(stop()):
                break  # also after the last step: the resumed run begins with the validation
            took = time.perf_counter() - started
            scores = validation.validate(run.listener, valid)
            if not math.isfinite(scores["loss"]):
                raise InputError(
                    f"the loss on held-out songs is {scores['loss']} after step {run.step}: the "
                    "weights have diverged (--set learning_rate= a smaller one); "
                    "what was saved before is untouched"
                )
            run.finish_epoch(loss, scores)
            if run.latest_db > run.best_db and saves.best():
                run.best_db = run.latest_db
            saves.last()
            rate = (run.step - first_step) * hp.batch_size * hp.chunk_slices / took
            print(
                f"epoch {run.epoch:3d}  train {loss:.4f}  valid {scores['loss']:.4f}  "
                f"SI-SDR soft {scores['soft']:6.2f} dB  binary {scores['binary']:6.2f} dB  "
                f"{rate:.0f} slices/s",
                flush=True,
            )
            log.scalars({f"valid/{k}": value for k, value in (scores | bounds).items()}, run.step)
            if not world.rank:
                log.song(*validation.picture_and_sound(run.listener, valid[0]), hp, run.step)
                draw_curves(run, bounds, run_dir / "curves.svg")
        log.close()
        if world.any(stop()):
            saves.last(is_final=True)
            world.gather("saved")  # torchrun ends all processes as soon as one has left
            print(f"stopped at step {run.step}; resume with --checkpoint {run_dir / 'last.pth'}")
            return stop.exit_code
    if saves.is_behind or not (run_dir / "last.pth").exists():  # or a finished run, renamed
        saves.last(is_final=True)
    if run.latest_db > run.best_db:  # the disk was full when it should have been written
        saves.best(is_final=True)
    print(f"the run is in {run_dir}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__, EPILOG)
    parser.add_argument("data", type=Path, nargs="+", help="folders that build_dataset.py made")
    parser.add_argument("--name", help="the run's folder is runs/<name> (the model type)")
    parser.add_argument(
        "--checkpoint", type=Path, help="resume from this last.pth, with the settings it holds"
    )
    parser.add_argument(
        "--adapt",
        action="store_true",
        help="go on from --checkpoint although data, settings or number of processes differ: the "
        "weights stay and a new schedule starts; with only another number of processes the run "
        "goes on where it was",
    )
    parser.add_argument(
        "--minutes",
        type=cli.positive_number,
        metavar="M",
        help="measure the speed for some seconds, then train as many steps as take M minutes",
    )
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="train nothing: raise the learning rate over 200 steps, write the losses as "
        "runs/<name>/find_lr.svg, and suggest one",
    )
    parser.add_argument(
        "--dataset-on",
        choices=["auto", "device", "disk"],
        default="auto",
        help="load the dataset to the device's memory once, or read it from disk ahead of the "
        "steps; auto (the default) loads what fits, in main memory into half of what is free",
    )
    parser.add_argument(
        "--validate-on",
        type=Path,
        nargs="+",
        default=[],
        metavar="DATA",
        help="score on the songs of these datasets (not those learnt from), and hold out none",
    )
    parser.add_argument(
        "--all-songs",
        action="store_true",
        help="learn from the songs of test splits, too: for a network that ships, not for scores",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run of this name")
    cli.add_device_option(parser)
    return parser


def run_folder(args: argparse.Namespace) -> Path:
    """Choose where the run is written; a finished or interrupted run is not overwritten unasked."""
    if args.checkpoint and not args.checkpoint.is_file():
        previous = args.checkpoint.with_name("previous.pth")
        hint = f" ({previous} is there)" if previous.is_file() else ""
        raise InputError(f"{args.checkpoint}: no such checkpoint{hint}")
    if args.find_lr and (args.checkpoint or args.minutes):
        raise UsageError("--find-lr stands alone: it tests a new network")
    if args.adapt and not args.checkpoint:
        raise UsageError("--adapt goes with --checkpoint")
    if args.minutes and (args.checkpoint and not args.adapt):
        raise UsageError("--minutes: a resumed run keeps its number of steps (--adapt starts anew)")
    if args.name is not None and (not args.name or Path(args.name).name != args.name):
        raise UsageError(f"--name {args.name!r}: a name, not a path (runs/<name> is made)")
    if args.adapt and not args.name and args.checkpoint.name not in RESUMABLE:
        raise UsageError(f"--adapt: {args.checkpoint} is no run's last.pth (--name the new run)")
    if args.checkpoint and not args.name:
        return args.checkpoint.parent  # whether it may be written there, the checkpoint tells
    folder = Path("runs") / (args.name or cli.settings_of(args).model_type)
    refuse_overwriting(folder, args)
    return folder


def refuse_overwriting(folder: Path, args: argparse.Namespace) -> None:
    """Raise InputError if a folder holds a run that nobody said to overwrite."""
    holds_run = any((folder / name).exists() for name in CHECKPOINTS)
    if holds_run and not args.overwrite and not args.find_lr:
        raise InputError(
            f"{folder}: holds a run (--name another one, --overwrite it, "
            f"or resume it with --checkpoint {folder / 'last.pth'})"
        )


def remove_rest(folder: Path) -> None:
    """Remove what an older run left, so that its best.pth and curves do not pass for the new."""
    for name in ("best.pth", "curves.svg", "events.out.tfevents.*"):
        for path in folder.glob(name):
            path.unlink()


@contextlib.contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Keep a second run out of the same folder; the lock dies with the process."""
    if world.rank:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{folder}: another run writes there (--name another one)") from None
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, world: World) -> dict[str, Any]:
    """Load the checkpoint to go on from, or, if it is damaged, the one that was saved before it."""
    import model

    try:
        return model.load_checkpoint(path)
    except InputError as error:
        previous = path.with_name("previous.pth")
        if path.name != "last.pth" or not previous.is_file():
            raise
        try:
            checkpoint = model.load_checkpoint(previous)
        except InputError as worse:
            raise InputError(f"{error}; {worse}") from worse
        if not world.rank:
            cli.warn(f"{error}; going on from {previous}, step {checkpoint['step']}")
        return checkpoint


def resumed_settings(args: argparse.Namespace, checkpoint: dict[str, Any]) -> HParams:
    """Take the settings of the run that goes on; one that contradicts them is refused."""
    import model
    from learning import run as training

    _, hp = model.restore_model(args.checkpoint, checkpoint)
    asked = parse_settings(args.settings)
    for name, value in asked.items():
        stays = name in TRAINED or not (args.adapt or name in training.FREE)
        if stays and getattr(hp, name) != value:
            how = "" if name in TRAINED else "; --adapt starts a new schedule with it"
            raise InputError(
                f"{args.checkpoint}: its {name} is {getattr(hp, name)}, not {value}{how}"
            )
    return replace(hp, **asked)


def resume(run: training.Run, checkpoint: dict[str, Any], args: argparse.Namespace) -> bool:
    """Go on where the checkpoint stopped and return true; if the run differs, only deliberately.

    False means that it starts anew, from the weights of the checkpoint.
    """
    import dataset
    import model

    differing = run.differences(checkpoint)
    if differing and not args.adapt:
        raise InputError(
            f"{args.checkpoint}: {'; '.join(differing.values())} "
            "(give what it was trained with, or --adapt)"
        )
    if differing.keys() <= {"processes"}:
        run.restore(checkpoint)
        return True
    run.start_from(checkpoint)
    are_learnt = dataset.are_learnt((s.song for s in run.valid), model.learnt_songs(checkpoint))
    if any(are_learnt) and not run.world.rank:
        cli.warn(
            f"{args.checkpoint}: has learnt from {sum(are_learnt)} of the {len(run.valid)} songs "
            "to validate on; their scores flatter it (hold others out with --validate-on)"
        )
    print(f"adapting {args.checkpoint}: {'; '.join(differing.values())}")
    return False


def describe(hp: HParams, learn: list[dataset.OpenSong], valid: list[dataset.OpenSong]) -> None:
    """Print what is trained on what."""
    for what, songs in (("learn from", learn), ("validate on", valid)):
        n_frames = sum(song.song.n_frames for song in songs)
        minutes = n_frames * hp.hop_length / hp.sample_rate / 60
        n_singers = len({song.song.singer for song in songs})
        print(
            f"{what} {len(songs)} songs of {n_singers} singers or bands, "
            f"{minutes:.1f} min, {n_frames // hp.stft_stride} slices"
        )


def find_lr(run: training.Run, run_dir: Path) -> None:
    """Do the range test; write its picture and print the suggestion."""
    from learning import planning

    with cli.progress(planning.FIND_LR_STEPS, " steps") as bar:
        curve, suggestion = planning.find_lr(run, bar.update)
    chart = Chart(
        "Learning-rate range test",
        "learning rate",
        {"loss": curve},
        marks={"suggested": suggestion},
        log_x=True,
    )
    write_svg(run, run_dir / "find_lr.svg", [chart])
    print(
        f"loss {curve[0][1]:.4f} at {curve[0][0]:.1e}, least {min(y for _, y in curve):.4f}; "
        f"suggested: --set learning_rate={suggestion:.1g} ({run_dir / 'find_lr.svg'})"
    )


def draw_curves(run: training.Run, bounds: dict[str, float], path: Path) -> None:
    """Draw loss and SI-SDR of every epoch so far."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in run.history]

    losses = {"train": points("loss/train"), "held out": points("loss")}
    sounds = {"soft": points("soft"), "binary": points("binary")}
    floor = {"the mixture itself": bounds["floor"]}
    charts = [
        Chart("Loss", "steps", losses),
        Chart("SI-SDR of held-out vocals [dB]", "steps", sounds, floor),
    ]
    write_svg(run, path, charts)


def write_svg(run: training.Run, path: Path, charts: list[Chart]) -> None:
    """Write charts on rank 0; a picture that cannot be written ends no run."""
    if run.world.rank:
        return
    try:
        writing.replace_atomically(path, lambda file: file.write(svg(charts).encode()))
    except InputError as error:
        cli.warn(error)


if __name__ == "__main__":
    ranks.leave(main())
