import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two threads add up in another order, and wait long for each other where a core is busy.
os.environ["OMP_NUM_THREADS"] = "1"
# What is equal to the last bit is so on a CPU; VOCAL_MASK_GPU=0 runs tests/test_cuda.py, too.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("VOCAL_MASK_GPU", "")

import build_dataset
import dataset
from demo import synthesis

# Where a script starts the tests in the background, SIGINT arrives ignored, here and in children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# museval reads data sets with musdb, which does not import without ffmpeg; its scores need neither.
sys.modules.setdefault("musdb", types.ModuleType("musdb"))


@pytest.fixture(scope="session")
def toy_tree(tmp_path_factory) -> Path:
    """A DSD100 tree of synthesised songs: 3 Dev and 1 Test, 4 s of 22.05 kHz stereo each."""
    root = tmp_path_factory.mktemp("toy") / "dsd100"
    synthesis.write_dsd100(root, n_train=3, n_test=1, seconds=4, sample_rate=22050, seed=0)
    return root


@pytest.fixture(scope="session")
def toy_dataset(toy_tree) -> Path:
    """The toy songs as a dataset."""
    folder = toy_tree.parent / "dataset"
    assert build_dataset.main([str(toy_tree), str(folder), "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="session")
def songs() -> list[dataset.OpenSong]:
    """Three short songs in memory."""
    from test_run import song_of_noise

    return [song_of_noise(name, seed) for seed, name in enumerate("abc")]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path, request) -> Iterator[Path]:
    """A disk of 400 kB, or of the size that a test asks for."""
    folder, size = tmp_path / "disk", getattr(request, "param", "400k")
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real music, where the environment names it."""
    if "VOCAL_MASK_DATA" not in os.environ:
        pytest.skip("VOCAL_MASK_DATA is not set")
    return Path(os.environ["VOCAL_MASK_DATA"])
