"""The networks: a column for every frame, from its own 25 frames; checkpoints one can trust."""

import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import audio
import model as networks
from hparams import HParams, InputError

MASK_SETTINGS = {"mask_at_eval": True, "eval_mask_threshold": 0.3, "noise_gate": 0.1}


def lively(hp: HParams, seed: int = 0) -> nn.Module:
    """Build a network whose answers move as a trained one's do, and no statistic is 0 or 1."""
    torch.manual_seed(seed)
    model = networks.build_model(hp)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    x = torch.rand(2, 1, hp.n_bins, 24 + hp.stft_frames) * torch.rand(24 + hp.stft_frames)
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0.3, 0.3)
        model.train()(x)  # the statistics are now those of x
        for norm in norms:
            norm.momentum = 0.1
            norm.running_mean.mul_(torch.empty_like(norm.running_mean).uniform_(0.8, 1.2))
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2))
        logits = model.eval()(x)
        scale = 2 / logits.std(-1).mean().clamp(min=1e-3)
        model.head.bias.sub_(logits.mean((0, 2))).mul_(scale)
        model.head.weight.mul_(scale)
    return model


def music(hp: HParams, n_frames: int, seed: int = 0) -> torch.Tensor:
    """Make features (n_bins, n_frames) that change from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(n_frames, generator=generator)
    return torch.rand(hp.n_bins, n_frames, generator=generator) * loudness


def pad(features: torch.Tensor, hp: HParams) -> torch.Tensor:
    return torch.nn.functional.pad(features, (hp.lookback, hp.lookahead))[None, None]


@pytest.mark.parametrize("model_type", networks.MODELS)
@pytest.mark.parametrize(
    ("stft_frames", "lookahead", "mask_frames", "width"),
    [(1, None, 1, 8), (25, None, 1, 7), (81, None, 1, 4), (91, 12, 1, 8), (97, 10, 2, 8)],
)
def test_a_song_in_one_pass_gives_what_its_slices_give(
    model_type, stft_frames, lookahead, mask_frames, width
):
    hp = replace(HParams(), model_type=model_type, stft_frames=stft_frames, width=width)
    hp = replace(hp, stft_lookahead=lookahead, mask_frames=mask_frames)
    model, padded = lively(hp), pad(music(hp, 19), hp)
    with torch.inference_mode():
        dense = model(padded)[0].sigmoid()
        seen = (padded[..., i:][..., : stft_frames - 1 + mask_frames] for i in range(19))
        separate = torch.cat([model(x)[0].sigmoid() for x in [*seen][::mask_frames]], -1)
    assert dense.shape == (513, 19)
    assert (dense.amax(1) - dense.amin(1)).mean() > 0.1, "a constant would pass"
    np.testing.assert_allclose(dense, separate, rtol=0, atol=1e-5)


HP = HParams(model_type="convnet", width=4, seed=7)


@pytest.fixture
def contents() -> dict:
    """What a checkpoint of a small network holds."""
    about = {"hparams": asdict(HP), "curve_db": audio.weighting_curve_db(HP)}
    return {"weights": lively(HP).state_dict(), **about, "mask_settings": dict(MASK_SETTINGS)}


@pytest.fixture
def path(tmp_path, contents) -> Path:
    """A good checkpoint."""
    extra = {name: contents[name] for name in ("curve_db", "mask_settings")}
    networks.save_checkpoint(tmp_path / "net.pth", lively(HP), HP, **extra)
    return tmp_path / "net.pth"


def refusal(path: Path) -> str:
    """Load a bad checkpoint as generate.py does; return the one line that the user gets."""
    with pytest.raises(InputError) as error:
        networks.restore_model(path, networks.load_checkpoint(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert "weights_only" not in message
    return message


def test_what_is_no_checkpoint_is_refused(path, tmp_path, contents):
    whole, bad = path.read_bytes(), tmp_path / "bad.pth"
    cut_off = [whole[: int(share * len(whole))] for share in (0, 0.1, 0.5, 0.99)]
    for content in (*cut_off, b"la la la, an evening song\n" * 100, b"RIFF" + bytes(5000)):
        bad.write_bytes(content)
        assert "not a checkpoint of this version, or damaged" in refusal(bad)
    others = [lively(HP), contents["weights"], contents, torch.zeros(3)]
    for strange in (*others, {**contents, "format": "vocal-mask checkpoint 2"}):
        torch.save(strange, bad)
        assert "not a checkpoint" in refusal(bad)
    assert "is a directory" in refusal(tmp_path)
    for name in ("none.pth", "bad.pth/none.pth", "x" * 300):
        assert "no such checkpoint" in refusal(tmp_path / name)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore")  # torch's warning must not be what saves us
def test_a_checkpoint_runs_no_code(tmp_path, contents, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    evil = {"format": networks.FORMAT, **contents, "extra": Evil(marker)}
    for zipped in (True, False):
        torch.save(evil, path, _use_new_zipfile_serialization=zipped)
        assert "not a checkpoint of this version, or damaged" in refusal(path)
    path.write_bytes(pickle.dumps(Evil(marker)))
    assert "not a checkpoint of this version, or damaged" in refusal(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the poison works"


def test_weights_that_are_no_network_are_refused(path, contents):
    weights, settings = contents["weights"], contents["hparams"]
    endless = torch.zeros(1).expand(10**12)  # few bytes that claim to be gigabytes
    for changes, expected in (
        ({"weights": {**weights, "head.bias": weights["head.bias"] * np.nan}}, "not finite"),
        ({"weights": {**weights, "more": torch.ones(2)}}, "Unexpected key"),
        ({"weights": {**weights, "head.bias": torch.ones(2)}}, "size mismatch for head.bias"),
        ({"weights": {**weights, "head.bias": endless}}, "of this version, or damaged"),
        ({"weights": {"a": 1}}, "damaged"),
        ({"hparams": None}, "not a checkpoint"),
        ({"hparams": {**settings, "model_type": "resnet18"}}, "Missing key"),
        ({"hparams": {**settings, "width": 512, "stft_frames": 999}}, "size mismatch"),  # 120 GB
        ({"hparams": {**settings, "width": 10**9}}, "width is 1000000000"),
        ({"hparams": {**settings, "loudness": 11}}, "loudness"),
    ):
        torch.save({"format": networks.FORMAT, **contents, **changes}, path)
        assert expected in refusal(path)
