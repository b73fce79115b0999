"""Separate songs: write the vocals of every file, and with --background the rest.

Outputs have the input's sample rate, channels and length; vocals plus accompaniment are the input.

    python generate.py runs/demo/best.pth song.wav
    python generate.py runs/demo/best.pth *.flac --background --output-dir stems
    torchrun --nproc-per-node 2 generate.py runs/demo/best.pth *.flac
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import commandline
import distributed
from hparams import InputError, parse_settings

if TYPE_CHECKING:
    import numpy as np

    from separation import Separator

EPILOG = """what you hear:
  --set mask_at_eval=true        binary mask: cleaner pauses, harsher consonants
  --set eval_mask_threshold=0.6  binary: drier, less of the band and of the voice
  --set noise_gate=0.2           soft: fewer remains between the words, thinner voice

examples:
  python generate.py runs/demo/best.pth song.wav
  python generate.py runs/demo/best.pth song.wav --background --set mask_at_eval=true"""


@commandline.script
def main(argv: list[str] | None = None) -> int:
    """Separate every file; one that fails does not stop the rest."""
    parser = commandline.make_parser(__doc__, EPILOG)
    parser.add_argument("checkpoint", type=Path, help="a .pth file that train.py wrote")
    parser.add_argument("audio", type=Path, nargs="+", help="songs: wav, flac, ogg, mp3, aiff …")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("generated"), help="made if missing (%(default)s)"
    )
    parser.add_argument(
        "--background", action="store_true", help="also write <name>_accompaniment.wav"
    )
    parser.add_argument(
        "--allow-truncated", action="store_true", help="take files shorter than they promise"
    )
    parser.add_argument(
        "--fix-nonfinite", action="store_true", help="take NaN and infinite samples as silence"
    )
    commandline.add_device_option(parser)
    args = parser.parse_args(argv)
    settings = commandline.settings_of(args)
    world = distributed.world()
    plan = _plan(args, commandline.complain if not world.rank else lambda _: None)
    n_failed = 0 if world.rank else len(args.audio) - len(plan)
    if not plan:
        return 1
    if not os.path.isfile(args.checkpoint):
        raise InputError(f"{args.checkpoint}: no such checkpoint")

    from separation import Separator  # here: a wrong path is told before torch is loaded

    device = commandline.device_of(args, parser, world.local_rank)
    explicit = parse_settings(args.settings)
    separator = Separator.load(args.checkpoint, device, settings, explicit)
    with distributed.joined(world):  # torchrun ends all where one ends badly: they leave together
        for path, outputs in world.share(plan):
            n_failed += not _attempt(separator, path, outputs, args)
        n_failed = sum(world.gather(n_failed))
    if n_failed and not world.rank:
        commandline.warn(f"{n_failed} of {len(args.audio)} files failed")
    return int(n_failed > 0)


def _plan(
    args: argparse.Namespace, complain: Callable[[object], None]
) -> list[tuple[Path, list[Path]]]:
    """Pair every readable file with its outputs; complain about the others."""
    import soundio

    suffixes = ["_vocals.wav", "_accompaniment.wav"][: 1 + args.background]
    jobs, taken = [], {}
    for path in args.audio:
        try:
            info = soundio.probe(path, args.allow_truncated)
            outputs = [soundio.output_path(args.output_dir, path, suffix) for suffix in suffixes]
            soundio.check_outputs(outputs, info, args.audio)
            if outputs[0] in taken:
                raise InputError(
                    f"{path}: {taken[outputs[0]]} already becomes {outputs[0]} "
                    "(separate them in two runs with different --output-dir)"
                )
        except InputError as error:
            complain(error)
            continue
        taken[outputs[0]] = path
        jobs.append((path, outputs))
    return jobs


def _attempt(
    separator: Separator, path: Path, outputs: list[Path], args: argparse.Namespace
) -> bool:
    """Separate one file and say how it went; nothing appears before all of it is written."""
    import soundio
    from separation import separate_file

    started = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(
                soundio.Reader(path, args.allow_truncated, args.fix_nonfinite)
            )
            files = stack.enter_context(soundio.OutputFiles(outputs, reader.info))
            bar = stack.enter_context(commandline.progress(round(reader.info.seconds, 1), " s"))

            def write(*signals: np.ndarray) -> None:
                for i in range(len(outputs)):
                    files.write(i, signals[i])
                bar.update(signals[0].shape[1] / reader.info.sample_rate)

            n_limited = separate_file(separator, reader, write)
    except InputError as error:
        commandline.complain(error)
        return False
    for warning in reader.info.warnings:
        commandline.warn(f"{path}: {warning}")
    if reader.n_fixed:
        commandline.warn(f"{path}: {reader.n_fixed} non-finite samples taken as silence")
    if n_limited:
        commandline.warn(f"{path}: {n_limited} samples of the vocals limited so that the sum fits")
    seconds, took = reader.info.seconds, time.perf_counter() - started
    print(
        f"{commandline.printable(', '.join(map(str, outputs)))}: {seconds:.1f} s in {took:.1f} s, "
        f"real-time factor {took / seconds:.3f} ({seconds / took:.0f} × real time)"
    )
    return True


if __name__ == "__main__":
    sys.exit(main())
