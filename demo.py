"""Hear the project work without downloading anything: make songs, train, separate a new one.

Synthesises a small DSD100 tree, builds the dataset, trains for a minute or two, separates a song
the network has never heard and says by how many dB the voice came out cleaner. Every step is one
of the project's own commands, shown as you would type it.

    python demo.py
    python demo.py --song "my song.mp3"
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import commandline
from hparams import InputError

HERE = Path(__file__).parent
TREE, DATASET, GENERATED = Path("demo/dsd100"), Path("demo/dataset"), Path("demo/generated")
RUN = Path("runs/demo")
SONGS = {"n_train": 20, "n_test": 1, "seconds": 24, "sample_rate": 22050, "seed": 0}
TRAINING = ["width=8", "batch_size=4", "epochs=5"]
NEEDED_DB = 3.0  # 5 is usual: less than this means that something is broken


@commandline.script
def main(argv: list[str] | None = None) -> int:
    """Tell the story from the first song to the last number."""
    parser = commandline.make_parser(__doc__, "examples:\n" + __doc__.split("\n\n")[-1])
    parser.add_argument("--song", type=Path, help="a recording of yours to separate at the end")
    args = parser.parse_args(argv)
    if args.song is not None:
        import soundio  # here and below: --help answers at once

        soundio.probe(args.song)
    commandline.settings_of(args)  # a misspelt one is told now, not after the dataset is built

    write_songs()
    run("build_dataset.py", TREE, DATASET)
    settings = as_options([*TRAINING, *args.settings])
    run("train.py", DATASET, "--name", RUN.name, "--overwrite", *settings)
    mixture = next(TREE.glob("Mixtures/Test/*/mixture.wav"))
    separate(RUN / "best.pth", mixture, GENERATED)
    gain_db = report(mixture, TREE / "Sources/Test" / mixture.parent.name / "vocals.wav")
    if args.song is not None:
        separate_song(args.song.absolute())  # absolute: it may begin with a dash
    if gain_db < NEEDED_DB:
        raise InputError(f"the voice gained {gain_db:.1f} dB; at least {NEEDED_DB:g} were expected")
    return 0


def write_songs() -> None:
    """Synthesise the songs, once."""
    if TREE.exists():
        print(f"{TREE}: the songs are there already", flush=True)
        return
    import synthesis

    print(f"Synthesising {SONGS['n_train']} songs to learn from and one to separate …", flush=True)
    synthesis.write_dsd100(TREE, **SONGS)


def separate(checkpoint: Path, song: Path, folder: Path) -> None:
    """Write the vocals and the accompaniment of a song."""
    run("generate.py", checkpoint, song, "--background", "--output-dir", folder)


def separate_song(song: Path) -> None:
    """Separate the user's recording with the best network there is."""
    if commandline.PRETRAINED.is_file():
        checkpoint = commandline.PRETRAINED
    else:
        checkpoint = RUN / "best.pth"
        print(
            f"\nThere is no {commandline.PRETRAINED}. A network that has heard a few minutes of "
            "synthesised songs will not do well on a real one; do not judge the method by it."
        )
    separate(checkpoint, song, GENERATED / "yours")  # it may be called mixture.wav, too


def report(mixture: Path, truth: Path) -> float:
    """Print the SI-SDR of the vocals before and after; returns the difference [dB]."""
    from soundfile import read

    from metrics import si_sdr

    vocals = GENERATED / "mixture_vocals.wav"
    reference = read(truth)[0].T
    before, after = si_sdr(read(mixture)[0].T, reference), si_sdr(read(vocals)[0].T, reference)
    print(f"\nSI-SDR of the vocals of “{mixture.parent.name}”, which was not trained on:")
    print(f"  the mixture as it is  {before:5.1f} dB")
    print(f"  separated             {after:5.1f} dB   ({after - before:+.1f} dB)")
    print("Listen to:")
    for file in (mixture, vocals, GENERATED / "mixture_accompaniment.wav", truth):
        print(f"  {file}")
    sys.stdout.flush()
    return after - before


def as_options(settings: list[str]) -> list[str]:
    """Turn settings into options: ``--set width=8 --set epochs=4``."""
    return [word for setting in settings for word in ("--set", setting)]


def run(script: str, *words: str | Path) -> None:
    """Print a command and run it.

    Raises
    ------
    InputError
        If it fails; it has told why itself.
    """
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    command = [python, os.path.relpath(HERE / script), *map(str, words)]
    print(f"\n$ {commandline.printable(shlex.join(command))}", flush=True)
    if subprocess.run(command, check=False).returncode:
        raise InputError(f"{script} failed; the demo ends here")


if __name__ == "__main__":
    sys.exit(main())
