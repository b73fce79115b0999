"""Damaged sound files: told, or all of the sound; never a crash, a hang or a shorter sound.

VOCAL_MASK_FUZZ=4000 python -m pytest -m torture tests/torture/test_fuzz.py
"""

from __future__ import annotations

import collections
import functools
import io
import multiprocessing
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import test_decoding

from hparams import InputError
from sound.reading import Reader

RATE, N_SAMPLES = 44100, 50_000
CONTAINERS = ("wav", "rf64", "flac", "ogg", "mp3", "aiff", "m4a")
HEADERS = {"wav": 44, "rf64": 104, "aiff": 54}  # bytes; what follows are samples
GOOD = ("refused", "warned", "whole", "longer", "another format")
MOST_SECONDS = 20.0  # a file, before it counts as a hang


@functools.cache
def encode(container: str) -> bytes:
    """Write a second of tones and noise."""
    rng, times = np.random.default_rng(0), np.arange(N_SAMPLES)[:, None] / RATE
    wav = 0.3 * np.sin(2 * np.pi * np.array([440, 660]) * times) + 0.01 * rng.normal(
        size=(N_SAMPLES, 2)
    )
    buffer = io.BytesIO()
    if container != "m4a":
        soundfile.write(buffer, wav, RATE, format=container)
        return buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = test_decoding.encode(Path(folder, "a.m4a"), [wav.T.astype(np.float32)])
        return path.read_bytes()


def damage(content: bytes, container: str, rng: np.random.Generator) -> bytes:
    """Change a header, or take, repeat, insert or exchange bytes of what follows."""
    at, n = (int(x) for x in (rng.integers(0, len(content)), 2 ** rng.uniform(0, 12)))
    kinds = ["header", "header", "cut", "hole", "twice", "behind"]
    if container not in HEADERS:  # nothing tells that a sample of PCM is another one
        kinds += ["noise", "bit"]
    match rng.choice(kinds):
        case "header":
            changed = bytearray(content)
            for i in rng.integers(0, HEADERS.get(container, 120), rng.integers(1, 5)):
                changed[i] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
            return bytes(changed)
        case "cut":
            return content[:at]
        case "hole":
            return content[:at] + content[at + n :]
        case "twice":
            return content[: at + n] + content[at:]
        case "behind":
            return content + rng.bytes(n)
        case "noise":
            return content[:at] + rng.bytes(n) + content[at + n :]
    changed = bytearray(content)
    changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def outcome(path: Path, container: str) -> str:
    """Read a file; say how that ended."""
    whole = decode(container, path.with_name(f"whole.{container}"))
    try:
        with Reader(path) as reader:
            codes = np.concatenate(list(reader.blocks(5000)), axis=1)
            told, info = reader.warnings, reader.info
    except InputError:
        return "refused"
    if told:
        return "warned"
    if (info.sample_rate, info.n_channels, info.sample_format.bits) != (RATE, 2, 16):
        return "another format"
    if codes.shape[1] < whole.shape[1] - 1152 * (container in ("mp3", "m4a")):
        return "SHORTER"
    n = min(codes.shape[1], whole.shape[1])
    if container in ("mp3", "m4a", "ogg") or np.array_equal(codes[:, :n], whole[:, :n]):
        return "longer" if codes.shape[1] > whole.shape[1] else "whole"
    return "ANOTHER SOUND"


@functools.cache
def decode(container: str, path: Path) -> np.ndarray:
    path.write_bytes(encode(container))
    with Reader(path) as reader:
        return np.concatenate(list(reader.blocks(5000)), axis=1)


def work(pipe: multiprocessing.connection.Connection) -> None:
    """Read files as they are named, in a process that may crash."""
    warnings.simplefilter("ignore")
    while True:
        pipe.send(outcome(*pipe.recv()))


def run(folder: Path, n_files: int, seed: int = 0) -> dict[str, collections.Counter]:
    """Damage and read files; returns how those of each container ended, and keeps the bad ones."""
    context = multiprocessing.get_context("spawn")
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in CONTAINERS}
    worker = None
    for i in range(n_files):
        container, rng = CONTAINERS[i % len(CONTAINERS)], np.random.default_rng([seed, i])
        path = folder / f"{i}.{container}"
        path.write_bytes(damage(encode(container), container, rng))
        if worker is None:
            pipe, other = context.Pipe()
            worker = context.Process(target=work, args=(other,), daemon=True)
            worker.start()
            other.close()
        pipe.send((path, container))
        try:
            end = pipe.recv() if pipe.poll(MOST_SECONDS) else "HANG"
        except EOFError:
            end = "CRASH"
        if end in ("HANG", "CRASH"):
            worker.kill()
            worker = None
        counts[container][end] += 1
        if end in GOOD:
            path.unlink()
    if worker is not None:
        worker.kill()
    return counts


@pytest.mark.torture
def test_damage_is_told_or_all_of_the_sound_comes_out(tmp_path):
    counts = run(tmp_path, int(os.environ.get("VOCAL_MASK_FUZZ", 600)))
    for container, ends in counts.items():
        assert set(ends) <= set(GOOD), f"see {tmp_path} for the {container} files"
        assert ends["refused"] > 5 < ends["whole"] + ends["warned"], (container, ends)
