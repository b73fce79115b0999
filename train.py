"""Train a network on datasets that build_dataset.py made.

A run writes runs/<name>/last.pth after every epoch and on Ctrl-C, best.pth whenever the held-out
songs sound better than before, and TensorBoard logs beside them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import commandline
import soundio
from hparams import MASK_SETTINGS, HParams, InputError, from_dict, parse_settings

if TYPE_CHECKING:
    import dataset
    import training

EPILOG = """examples:
  python train.py data/dsd100
  python train.py data/mir1k data/backings --name mixed --set width=16 --set epochs=20
  python train.py data/dsd100 --checkpoint runs/resnet18/last.pth    # go on from there
  tensorboard --logdir runs                                          # watch it"""


@commandline.script
def main(argv: list[str] | None = None) -> int:
    """Train, validate and save, epoch after epoch."""
    parser = make_parser()
    args = parser.parse_args(argv)
    hp, run_dir = commandline.settings_of(args), run_folder(args)
    for folder in [*args.data, *args.validate_on]:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder (build_dataset.py makes datasets)")
    soundio.check_writable(run_dir / "last.pth")

    import dataset  # here, so that --help and wrong paths answer before torch is loaded
    import model
    import training

    device = commandline.device_of(args, parser)
    checkpoint = model.load_checkpoint(args.checkpoint) if args.checkpoint else None
    if checkpoint:
        hp = resumed_settings(args, checkpoint)
    songs = dataset.open_songs(args.data, hp)
    if args.validate_on:
        others = dataset.open_songs(args.validate_on, hp)
        learn, valid = dataset.validate_elsewhere(songs, others)
    else:
        learn, valid = dataset.hold_out(songs, hp)
    run = training.Run(hp, learn, device)
    if checkpoint:
        run.restore(args.checkpoint, checkpoint)
    describe(run, valid)
    bounds = training.bounds(run, valid)
    print("held-out vocals, SI-SDR: " + ", ".join(f"{k} {v:.2f} dB" for k, v in bounds.items()))

    if not (checkpoint and args.checkpoint.parent.resolve() == run_dir.resolve()):
        run.best_db = -math.inf  # the best.pth of another folder is not this run's
        if args.overwrite:
            remove_run(run_dir)
    log = training.Log(run_dir, commandline.warn)
    slices_per_step = hp.batch_size * hp.chunk_slices
    with commandline.Stop() as stop:
        while run.epoch < hp.epochs:
            started, epoch = time.perf_counter(), run.epoch
            n_slices = sum(song.song.n_frames for song in learn) // hp.stft_stride
            first_step = run.step
            with commandline.progress(n_slices, " slices") as bar:
                loss = training.train_epoch(
                    run, bar.update, log.scalars, stop, run_dir / "last.pth"
                )
            if stop():
                break  # also after the last step: the resumed run begins with the validation
            scores = run.scores = training.validate(run, valid)
            better = max(scores["soft"], scores["binary"])
            if math.isnan(better):  # no held-out voice to hear, in any epoch
                better = -scores["loss"]
            run.mask_settings["mask_at_eval"] = scores["binary"] > scores["soft"]
            if better > run.best_db:
                run.best_db = better
                run.save(run_dir / "best.pth", whole=False)
            run.epoch, run.batch = run.epoch + 1, 0
            run.save(run_dir / "last.pth")
            rate = (run.step - first_step) * slices_per_step / (time.perf_counter() - started)
            print(
                f"epoch {epoch + 1:3d}  train {loss:.4f}  valid {scores['loss']:.4f}  "
                f"SI-SDR soft {scores['soft']:6.2f} dB  binary {scores['binary']:6.2f} dB  "
                f"{rate:.0f} slices/s",
                flush=True,
            )
            log.scalars(
                {f"valid/{name}": score for name, score in (scores | bounds).items()}, run.step
            )
            log.song(*training.picture_and_sound(run, valid[0]), hp, run.step)
        log.close()
        if stop():
            run.save(run_dir / "last.pth")
            print(f"stopped at step {run.step}; resume with --checkpoint {run_dir / 'last.pth'}")
            return stop.exit_code
    print(f"best.pth and last.pth are in {run_dir}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = commandline.make_parser(__doc__, EPILOG)
    parser.add_argument("data", type=Path, nargs="+", help="folders that build_dataset.py made")
    parser.add_argument("--name", help="the run's folder is runs/<name> (the model type)")
    parser.add_argument(
        "--checkpoint", type=Path, help="resume from this last.pth, with the settings it holds"
    )
    parser.add_argument(
        "--validate-on",
        type=Path,
        nargs="+",
        default=[],
        metavar="DATA",
        help="score on the songs of these datasets (not those learnt from), and hold out none",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run of this name")
    commandline.add_device_option(parser)
    return parser


def run_folder(args: argparse.Namespace) -> Path:
    """Choose where the run is written; a finished or interrupted run is not overwritten unasked."""
    if args.checkpoint and not args.checkpoint.is_file():
        raise InputError(f"{args.checkpoint}: no such checkpoint")
    if args.checkpoint and not args.name:
        return args.checkpoint.parent
    folder = Path("runs") / (args.name or commandline.settings_of(args).model_type)
    holds_run = any((folder / name).exists() for name in ("last.pth", "best.pth"))
    if holds_run and not args.overwrite:
        raise InputError(
            f"{folder}: holds a run (--name another one, --overwrite it, "
            f"or resume it with --checkpoint {folder / 'last.pth'})"
        )
    return folder


def remove_run(folder: Path) -> None:
    """Remove what an older run left, so that its best.pth and curves do not pass for the new."""
    for path in [folder / "best.pth", folder / "last.pth", *folder.glob("events.out.tfevents.*")]:
        path.unlink(missing_ok=True)


def resumed_settings(args: argparse.Namespace, checkpoint: dict[str, Any]) -> HParams:
    """Take the settings of the run that goes on; one that contradicts them is refused."""
    hp = from_dict(checkpoint["hparams"])
    for name, value in parse_settings(args.settings).items():
        if name not in MASK_SETTINGS and getattr(hp, name) != value:
            raise InputError(f"{args.checkpoint}: its {name} is {getattr(hp, name)}, not {value}")
    return hp


def describe(run: training.Run, valid: list[dataset.OpenSong]) -> None:
    """Print what is trained on what."""
    n_weights = sum(weight.numel() for weight in run.model.parameters())
    for what, songs in (("learn from", run.songs), ("validate on", valid)):
        n_frames = sum(song.song.n_frames for song in songs)
        minutes = n_frames * run.hp.hop_length / run.hp.sample_rate / 60
        n_singers = len({song.song.singer for song in songs})
        print(
            f"{what} {len(songs)} songs of {n_singers} singers or bands, "
            f"{minutes:.1f} min, {n_frames // run.hp.stft_stride} slices"
        )
    print(
        f"{run.hp.model_type}, width {run.hp.width}: {n_weights / 1e6:.2f} million weights; "
        f"{run.hp.epochs} epochs, {run.n_steps} steps"
    )


if __name__ == "__main__":
    sys.exit(main())
