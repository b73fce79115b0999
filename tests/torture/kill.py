"""Kill a script at random times: what is there is whole, nothing is lost, a rerun finishes.

Whole is what a run that nobody killed wrote, byte by byte. Of checkpoints, each loads, they never
fall behind an earlier step, and in the end they hold the same weights.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import build_dataset
import model
from demo import synthesis

ROOT = Path(__file__).parents[2]
NETWORK = ROOT / "pretrained" / "resnet18_small.pth"
SMALL = {"width": 2, "model_type": "convnet", "epochs": 8, "chunk_slices": 32, "valid_seconds": 2}


def prepare(kind: str, folder: Path) -> tuple[Path, list[object]]:
    """Make what a script needs; returns the folder it writes into, and its command."""
    music, data = folder / "music", folder / "data"
    synthesis.write_dsd100(music, n_train=6, n_test=2, seconds=4, sample_rate=22050, seed=0)
    if kind == "build":
        return data, [ROOT / "build_dataset.py", music, data, "--workers=2"]
    if kind == "generate":
        options = ["--background", "--report", "--output-dir", folder / "out"]
        return folder / "out", [ROOT / "generate.py", NETWORK, music / "Mixtures", *options]
    assert build_dataset.main([str(music), str(data), "--workers=1"]) == 0
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    return folder / "runs" / "convnet", [ROOT / "train.py", data, *settings]


def state(folder: Path) -> dict[str, bytes | tuple[int, dict[str, bytes]]]:
    """Return what stands under every final name: bytes, or a checkpoint's step and weights."""
    found = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        if path.name[0] == "." or "tfevents" in path.name:
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pth":
            checkpoint = model.load_checkpoint(path)
            weights = {key: x.numpy().tobytes() for key, x in checkpoint["weights"].items()}
            found[name] = checkpoint["step"], weights
        else:
            found[name] = path.read_bytes()
    return found


def assert_nothing_is_lost(before: dict, now: dict, whole: dict, kind: str) -> None:
    """Compare two states with each other, and with that of a run that nobody killed."""
    if kind == "train":
        assert before.get("last.pth", (0,))[0] <= now.get("last.pth", (0,))[0]
    else:
        assert before.keys() <= now.keys()
        assert [name for name in now if now[name] != whole.get(name)] == []


def parts(folder: Path) -> set[Path]:
    """Return the temporary files that are there."""
    return {*folder.rglob(".*.tmp-*")}


def await_file(process: subprocess.Popen, folder: Path) -> float:
    """Wait for the first new file, before which libraries are loaded; returns the time."""
    before = {*folder.rglob("*")}
    while process.poll() is None and {*folder.rglob("*")} <= before:
        time.sleep(0.001)
    return time.monotonic()


def kill_in_time(process: subprocess.Popen, seconds: float, folder: Path, in_a_file: bool) -> bool:
    """Kill a process after so long, or at the next file it writes; false if it ended before."""
    end, before = await_file(process, folder) + seconds, parts(folder)
    while time.monotonic() < end or (in_a_file and parts(folder) <= before):
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    process.kill()
    process.wait()
    return True


def run(kind: str, home: Path, n_kills: int) -> int:
    """Kill a script so many times; returns how often something was finished by then."""
    rng, before, n_killed, n_with_something = random.Random(0), {}, 0, 0
    folder, words = prepare(kind, home)

    def start() -> subprocess.Popen:
        goes_on = kind == "train" and (folder / "last.pth").exists()
        more = ["--checkpoint", folder / "last.pth"] if goes_on else []
        command = [sys.executable, *map(str, [*words, *more])]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}  # two would wait for each other
        return subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, env=alone)

    process = start()
    began = await_file(process, folder)
    assert process.wait() == 0
    longest, whole = time.monotonic() - began, state(folder)
    shutil.rmtree(folder)
    while True:
        in_a_file = n_killed % 2 == 1  # early, so that a file is still to come
        process, seconds = start(), rng.uniform(0, longest / 4 if in_a_file else longest)
        if n_killed < n_kills and kill_in_time(process, seconds, folder, in_a_file):
            now = state(folder)
            assert_nothing_is_lost(before, now, whole, kind)
            n_killed += 1
            n_with_something += bool(now)
            before = now
            continue
        assert process.wait() == 0
        now = state(folder)
        assert kind == "generate" or not parts(folder)  # there, an hour later
        assert all(now[name] == whole[name] for name in whole)
        if n_killed == n_kills:
            return n_with_something
        shutil.rmtree(folder)
        before = {}
