"""Train a network on datasets that build_dataset.py made.

A run writes runs/<name>/last.pth after every epoch, every five minutes and on Ctrl-C, best.pth
whenever the held-out songs sound better than before, and a log for TensorBoard beside them.

  python train.py data/dsd100
  python train.py data/mir1k data/produced --share 1 3               # the second thrice as often
  python train.py data/mir1k --name small --set width=16 --set epochs=20
  python train.py data/dsd100 --checkpoint runs/resnet18/last.pth    # go on from there
  torchrun --nproc-per-node 8 train.py data/dsd100                   # on 8 GPUs
  tensorboard --logdir runs                                          # watch it
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
import dataset
from dataset import OpenSong
from hparams import MASK_SETTINGS, HParams, InputError, UsageError, parse_settings

if TYPE_CHECKING:
    import torch

    from learning.ranks import World
    from learning.run import Run


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Set a run up and see it through."""
    parser = make_parser()
    args = parser.parse_args(argv)
    hp, run_dir = cli.settings_of(args), run_folder(args)
    for folder in [*args.data, *args.validate_on]:
        cli.refuse_missing_folder(folder, "build_dataset.py makes datasets")
    from learning import ranks  # wrong paths are told before torch is loaded

    world = ranks.world()
    with contextlib.ExitStack() as stack:
        if world.rank:  # one voice is enough
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        else:
            stack.enter_context(cli.locked(run_dir))
            for path in run_dir.glob(".*.tmp-*"):  # what a killed run left
                path.unlink(missing_ok=True)
        device = cli.device_of(args, parser, world.local_rank)
        stack.enter_context(ranks.joined(world, device.type))
        run, goes_on = set_up(args, hp, world, device)
        return train(run, goes_on, args, run_dir)


def train(run: Run, goes_on: bool, args: argparse.Namespace, run_dir: Path) -> int:
    """Train, validate and save, epoch after epoch; returns the exit code."""
    from learning.run import open_log, save, train_epoch
    from learning.validation import validate

    hp, world = run.hp, run.world
    save_last = functools.partial(save, run, run_dir, "last.pth")
    save_best = functools.partial(save, run, run_dir, "best.pth")
    if not (goes_on and args.checkpoint.parent.resolve() == run_dir.resolve()):
        begin_folder(run, run_dir, args, save_last)

    with open_log(None if world.rank else run_dir, cli.warn) as log, cli.Stop() as stop:
        while not run.is_finished:
            started, first_step = time.perf_counter(), run.step
            loss = train_epoch(run, log, stop, lambda: save_last(cli.warn))
            if world.any(stop()):
                break  # also after the last step: the resumed run begins with the validation
            seconds = time.perf_counter() - started
            scores = validate(run, run.valid)
            if not math.isfinite(scores["loss"]):  # nothing is saved then
                raise InputError(
                    f"the loss on held-out songs is {scores['loss']} after step {run.step} (lower "
                    "learning_rate; what was saved before is untouched)"
                )
            run.finish_epoch(scores)
            if not (run_dir / "last.pth").exists():  # a best.pth alone could not be resumed
                save_last(cli.warn)
            if run.latest_db > run.best_db and save_best(cli.warn):
                run.best_db = run.latest_db
            save_last(cli.warn)
            rate = (run.step - first_step) * hp.batch_size * hp.chunk_slices / seconds
            print(
                f"epoch {run.epoch:3d}  train {loss:.4f}  valid {scores['loss']:.4f}  "
                f"SI-SDR soft {scores['soft']:6.2f} dB  binary {scores['binary']:6.2f} dB  "
                f"mixture {scores['floor']:6.2f} dB  {rate:.0f} slices/s",
                flush=True,
            )
            log({f"valid/{k}": value for k, value in scores.items()}, run.step)
        if world.any(stop()):
            save_last()
            world.gather("saved")  # torchrun ends all processes as soon as one has left
            print(f"stopped at step {run.step}; resume with --checkpoint {run_dir / 'last.pth'}")
            return stop.exit_code
    save_last()  # once more: the disk was full, or this is a finished run under a new name
    if run.latest_db > run.best_db:
        save_best()
    print(f"the run is in {run_dir}")
    return 0


def set_up(
    args: argparse.Namespace, hp: HParams, world: World, device: torch.device
) -> tuple[Run, bool]:
    """Make the run that is asked for, print it, and tell whether it goes on where one stopped."""
    import torch

    from learning.run import Run
    from model import load_checkpoint, restore_model

    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    shares = args.share or []
    if checkpoint:
        asked = parse_settings(args.settings)
        _, hp = restore_model(args.checkpoint, checkpoint, asked)  # another network is refused
        hp, saved = replace(hp, **asked), checkpoint.get("resume", {}).get("shares", [])
        shares = shares or (saved if len(saved) == len(args.data) else [])
    if hp.batch_size % world.size:
        raise InputError(
            f"batch_size is {hp.batch_size}, which {world.size} processes cannot share evenly "
            f"(--set batch_size={-(-hp.batch_size // world.size) * world.size})"
        )
    songs = dataset.open_songs(args.data, hp)
    if args.all_songs:
        songs = [replace(s, song=replace(s.song, split="train")) for s in songs]
    others = dataset.open_songs(args.validate_on, hp) if args.validate_on else None
    learn, valid = dataset.hold_out(songs, hp, others)
    print_songs(hp, learn, valid)
    check_shares(shares, args.data, learn)
    n_bytes = sum(song.spectrogram.nbytes for song in learn)
    fits = device.type == "cuda" and 2 * n_bytes < torch.cuda.mem_get_info(device)[0]
    where = "in the GPU's memory" if fits else "read from disk ahead of the steps"
    print(f"dataset: {n_bytes / 1e9:.2f} GB, {where}")
    run = Run(hp, dataset.Feed(learn, hp, device, resident=fits), valid, world, shares)
    goes_on = checkpoint is not None and resume(run, checkpoint, args)
    n_weights = sum(weight.numel() for weight in run.model.parameters())
    epochs = hp.steps / dataset.count_batches(learn, hp, 0) if hp.steps else hp.epochs
    print(
        f"{hp.model_type}, width {hp.width}: {n_weights / 1e6:.2f} million weights; "
        f"{run.n_steps} steps, {epochs:.3g} epochs"
    )
    return run, goes_on


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, nargs="+", help="folders that build_dataset.py made")
    text = "how much of an epoch each folder gets (default: as much as it is long)"
    add("--share", type=cli.positive_number, nargs="+", metavar="X", help=text)
    add("--name", help="the run's folder is runs/<name> (the model type)")
    add("--checkpoint", type=Path, help="resume from this last.pth, with the settings it holds")
    add("--adapt", action="store_true", help="keep only the weights where data or settings differ")
    text = "score on the songs of these datasets (not those learnt from), and hold out none"
    add("--validate-on", type=Path, nargs="+", default=[], metavar="DATA", help=text)
    add("--all-songs", action="store_true", help="learn from test splits, too: not for scores")
    add("--overwrite", action="store_true", help="replace the run of this name")
    cli.add_device_option(parser)
    return parser


def run_folder(args: argparse.Namespace) -> Path:
    """Choose where the run is written; a finished or interrupted run is not overwritten unasked."""
    if args.checkpoint:
        cli.refuse_missing(args.checkpoint)
    if args.adapt and not args.checkpoint:
        raise UsageError("--adapt goes with --checkpoint")
    if named := parse_settings(args.settings).keys() & {*MASK_SETTINGS, "stereo"}:
        raise UsageError(f"--set {min(named)}: is for separating (the network is trained without)")
    if args.name is not None and (args.name in ("", "..") or Path(args.name).name != args.name):
        raise UsageError(f"--name {args.name!r}: a name, not a path (runs/<name> is made)")
    if args.adapt and not args.name and args.checkpoint.name != "last.pth":
        raise UsageError(f"--adapt: {args.checkpoint} is no run's last.pth (--name the new run)")
    if args.checkpoint and not args.name:
        return args.checkpoint.parent  # whether it may be written there, the checkpoint tells
    folder = Path("runs") / (args.name or cli.settings_of(args).model_type)
    refuse_overwriting(folder, args)
    return folder


def refuse_overwriting(folder: Path, args: argparse.Namespace) -> None:
    """Raise InputError if a folder holds a run that nobody said to overwrite."""
    paths = folder / "last.pth", folder / "best.pth"
    if any(map(os.path.exists, paths)) and not args.overwrite:  # false, too, for too long a name
        raise InputError(
            f"{folder}: holds a run (--name another one, --overwrite it, "
            f"or resume it with --checkpoint {folder / 'last.pth'})"
        )


def begin_folder(run: Run, folder: Path, args: argparse.Namespace, save_last: Any) -> None:
    """Begin a new run in a folder; nothing of an older one must pass for it."""
    run.best_db = -math.inf  # the best.pth of another folder is not this run's
    refuse_overwriting(folder, args)
    if args.overwrite:
        save_last()
        if not run.world.rank:
            for path in [folder / "best.pth", *folder.glob("events.out.tfevents.*")]:
                path.unlink(missing_ok=True)


def resume(run: Run, checkpoint: dict[str, Any], args: argparse.Namespace) -> bool:
    """Go on where the checkpoint stopped; false if the run differs and starts from its weights."""
    import model

    differing = run.differences(checkpoint)
    if differing and not args.adapt:
        text = "; ".join(differing.values())
        raise InputError(f"{args.checkpoint}: {text} (give what it was trained with, or --adapt)")
    if differing.keys() <= {"processes"}:
        run.restore(checkpoint)
        return True
    run.start_from(checkpoint)
    learnt = set(model.learnt_songs(checkpoint).values())
    n_known = sum(model.song_key(song.song.id) in learnt for song in run.valid)
    if n_known and not run.world.rank:
        cli.warn(
            f"{args.checkpoint}: has learnt from {n_known} of the {len(run.valid)} songs to "
            "validate on, by their names; their scores flatter it (hold others out with "
            "--validate-on)"
        )
    print(f"adapting {args.checkpoint}: {'; '.join(differing.values())}")
    return False


def check_shares(shares: list[float], folders: list[Path], learn: list[OpenSong]) -> None:
    """Print each dataset's share; InputError if there is nothing to learn from one."""
    if not shares:
        return
    if len(shares) != len(folders):
        raise InputError(f"{len(shares)} shares for {len(folders)} folders (see --share)")
    for index, folder in enumerate(folders):
        if not any(song.dataset == index for song in learn):
            raise InputError(f"{folder}: no song to learn from, so it can have no --share")
    each = (f"{x / sum(shares):.0%} {f}" for x, f in zip(shares, folders, strict=True))
    print(f"of every epoch: {', '.join(each)}")


def print_songs(hp: HParams, learn: list[OpenSong], valid: list[OpenSong]) -> None:
    """Print what is trained on what."""
    for what, songs in (("learn from", learn), ("validate on", valid)):
        n_frames = sum(song.song.n_frames for song in songs)
        minutes = n_frames * hp.hop_length / hp.sample_rate / 60
        n_singers = len({song.song.singer for song in songs})
        n_taught = sum(song.song.taught for song in songs)
        taught = f", {n_taught} songs labelled by a teacher" * bool(n_taught)
        print(
            f"{what} {len(songs)} songs of {n_singers} singers or bands, {minutes:.1f} min, "
            f"{n_frames // hp.stft_stride} slices{taught}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
