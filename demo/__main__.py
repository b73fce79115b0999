"""Hear the project work without downloading anything: make songs, train, separate a new one.

Synthesises a small DSD100 tree, builds the dataset, trains for some minutes, separates a song
the network has never heard, and says by how many dB the voice came out cleaner. Every step is one
of the project's own commands, shown as you would type it.

    python -m demo
    python -m demo --song "my song.mp3"
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import cli
from hparams import InputError

HERE = Path(__file__).parent.parent
RUN = Path("runs/demo")
TREE, DATASET, GENERATED = RUN / "dsd100", RUN / "dataset", RUN / "generated"
SONGS = {"n_train": 40, "n_test": 1, "seconds": 12, "sample_rate": 22050, "seed": 0}
TRAINING = ["width=8", "batch_size=4", "epochs=3"]
NEEDED_DB = 8.0  # 16 is usual: less than this means that something is broken


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Tell the story from the first song to the last number."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--song", type=Path, help="a recording of yours to separate at the end")
    args = parser.parse_args(argv)
    if args.song is not None:
        from sound import reading  # here and below: --help answers at once

        reading.probe(args.song)
    cli.settings_of(args)  # a misspelt one is told now, not after the dataset is built

    if TREE.exists():
        print(f"{TREE}: the songs are there already", flush=True)
    else:
        from demo import synthesis

        print("Synthesising songs to learn from and one to separate …", flush=True)
        synthesis.write_dsd100(TREE, **SONGS)
    settings = [word for one in [*TRAINING, *args.settings] for word in ("--set", one)]
    run("build_dataset.py", TREE, DATASET, "--overwrite", *settings)
    run("train.py", DATASET, "--name", RUN.name, "--overwrite", *settings)
    mixture = next(TREE.glob("Mixtures/Test/*/mixture.wav"))
    run("generate.py", RUN / "best.pth", mixture, "--background", "--output-dir", GENERATED)
    gain_db = report(mixture, TREE / "Sources/Test" / mixture.parent.name / "vocals.wav")
    if args.song is not None:
        # Absolute: it may begin with a dash. A folder for it: it may be called mixture.wav, too.
        song, folder = args.song.absolute(), GENERATED / "yours"
        run("generate.py", cli.PRETRAINED, song, "--background", "--output-dir", folder)
    if gain_db < NEEDED_DB:
        raise InputError(f"the voice gained {gain_db:.1f} dB; at least {NEEDED_DB:g} were expected")
    return 0


def report(mixture: Path, truth: Path) -> float:
    """Print the SI-SDR of the vocals before and after; returns what training gained [dB]."""
    from soundfile import read

    from scoring.metrics import si_sdr

    reference, stems = read(truth)[0].T, ("vocals", "accompaniment")
    files = [mixture, *(GENERATED / f"mixture_{stem}.wav" for stem in stems), truth]
    before_db, after_db = (si_sdr(read(path)[0].T, reference) for path in files[:2])
    print(f"\nSI-SDR of the vocals of “{mixture.parent.name}”, which was not trained on:")
    print(f"  the mixture as it is   {before_db:5.1f} dB")
    print(f"  what was separated     {after_db:5.1f} dB   ({after_db - before_db:+.1f} dB)")
    print("Listen to:", *(f"  {file}" for file in files), sep="\n", flush=True)
    return after_db - before_db


def run(script: str, *words: str | Path) -> None:
    """Print a command and run it; InputError if it fails, which it has explained itself."""
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    command = [python, os.path.relpath(HERE / script), *map(str, words)]
    print(f"\n$ {cli.printable(shlex.join(command))}", flush=True)
    if subprocess.run(command, check=False).returncode:
        raise InputError(f"{script} failed; the demo ends here")


if __name__ == "__main__":
    sys.exit(main())
