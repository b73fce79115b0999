"""The page's separator makes the masks and vocals that Python makes."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hparams import hparams
from separation import Separator
from tools import export

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web"
pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(
        not (shutil.which("node") and (WEB / "node_modules").is_dir()),
        reason="needs node and the page's packages (make web)",
    ),
]
pytest.importorskip("onnxscript")


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """The small network as the page loads it."""
    path = tmp_path_factory.mktemp("web") / "model.onnx"
    export.main([str(ROOT / "pretrained/resnet18_small.pth"), str(path)])
    return path.with_suffix(".live.onnx")


def in_node(model: Path, wav: np.ndarray, rate: int, folder: Path):
    """Separate (n_channels, n_samples) as the page does; masks, vocals and seconds."""
    wav.astype("f4").tofile(folder / "in.f32")
    command = ["node", "tests/web/separate.mjs", model, folder / "in.f32", rate, len(wav)]
    run = subprocess.run(
        [*map(str, command), str(folder / "out")], cwd=ROOT, check=True, capture_output=True
    )
    mask = np.fromfile(folder / "out.mask", np.uint8).reshape(-1, 513)
    vocals = np.fromfile(folder / "out.vocals", np.float32).reshape(wav.shape)
    return mask / 255, vocals, json.loads(run.stdout)


def songs(data_folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Three songs, 12 s each, and odd recordings: another rate, mono, five channels, soft."""
    found = {}
    for name in ("Caesium", "Lithium", "Potassium"):
        stems = [
            soundfile.read(path, start=44100 * 30, stop=44100 * 42, dtype="float32")
            for path in sorted((data_folder / "dsd100" / name).glob("*.ogg"))
        ]
        found[name] = sum(wav.T for wav, _ in stems), 44100
    wav = found["Caesium"][0][:, :150_001]
    found["48 kHz"], found["mono, soft"] = (wav[:, :90_000], 48000), (wav[:1] * 1e-3, 44100)
    found["five channels"] = np.concatenate([wav, wav[:, ::-1], wav[:1] / 2])[:, :60_000], 22050
    found["low rate"], found["short"] = (wav[:, :30_000], 16000), (wav[:, :300], 44100)
    return found


def test_masks_and_vocals_are_those_of_python(data_folder, tmp_path, exported):
    exact = replace(hparams, precision="float32")
    separator = Separator.load(ROOT / "pretrained/resnet18_small.pth", settings=exact)
    for name, (wav, rate) in songs(data_folder).items():
        mask, vocals, _ = in_node(exported, wav, rate, tmp_path)
        expected = separator.song_mask(wav, rate)  # (n_masks, n_bins, n_frames)
        mask = mask.reshape(len(expected), -1, 513).swapaxes(1, 2)
        off = np.abs(mask - expected.numpy())
        assert (off > 2e-3).mean() < 1e-3, name  # a level that rounding to 8 bits decides
        assert off.max() < 4e-3, name
        reference, _ = separator.separate(wav, rate)
        difference = np.square(vocals - reference).sum() / np.square(reference).sum()
        assert 10 * np.log10(difference + 1e-20) < -50, name
