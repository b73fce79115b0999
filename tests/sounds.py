"""Sounds, sound files, and the view of the network that is easiest to understand."""

import os
import struct
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.nn.functional import pad

from hparams import HParams
from sound.reading import AudioInfo, Reader, SampleFormat, code_range

RATE = 44100
INT_FORMATS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
FORMATS = {**INT_FORMATS, "FLOAT": None, "DOUBLE": None}


def noise(n_samples: int, n_channels: int = 2, seed: int = 0) -> np.ndarray:
    """Make (n_samples, n_channels) in soundfile's order."""
    return 0.3 * np.random.default_rng(seed).uniform(-1, 1, (n_samples, n_channels))


def some_codes(subtype: str, shape: tuple[int, int] = (2, 50_000)) -> np.ndarray:
    rng = np.random.default_rng(0)
    if subtype in INT_FORMATS:
        low, high = code_range(INT_FORMATS[subtype])
        codes = rng.integers(low, high, shape, np.int64, endpoint=True)
        codes[:, :2] = low, high
        return codes.astype(np.int32)
    return rng.normal(size=shape).astype(np.float32 if subtype == "FLOAT" else np.float64)


def wav_bytes(data: bytes, tag: int = 1, bits: int = 16, n_channels: int = 1, **change) -> bytes:
    """Build a WAV by hand; `change` puts other numbers into its header."""
    rate, size = change.get("rate", RATE), change.get("size", len(data))
    width = bits // 8 * n_channels
    fmt = struct.pack("<HHIIHH", tag, n_channels, rate, (rate * width) & 0xFFFFFFFF, width, bits)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + change.get("before", b"")
    chunks += b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_wav(path: Path, wav: np.ndarray | float = 0.1, rate: int = 8000) -> Path:
    """Write floats, (n_samples, n_channels) as soundfile; 0.1 s where only a level is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = np.full(rate // 10, wav) if np.ndim(wav) == 0 else wav
    soundfile.write(path, wav, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def read_codes(path: Path, n_samples: int = 1000, **options) -> np.ndarray:
    with Reader(path, **options) as reader:
        return np.concatenate(list(reader.blocks(n_samples)), axis=1)


def like(path: Path, subtype: str = "PCM_16", n_channels: int = 1, n_samples: int = 1000):
    """Describe a sound as `probe` would."""
    return AudioInfo(
        path, RATE, n_channels, n_samples, SampleFormat(subtype, FORMATS[subtype]), "WAV"
    )


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def slices(features: torch.Tensor, hp: HParams) -> torch.Tensor:
    """Cut (n_bins, n_frames) into (n_frames, 1, n_bins, stft_frames), silence around the song."""
    padded = pad(features, (hp.lookback, hp.lookahead))
    return padded.unfold(-1, hp.stft_frames, 1).movedim(1, 0)[:, None]
