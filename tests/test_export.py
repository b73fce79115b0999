"""The exported graph: the same masks as torch, at once and from frame to frame."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import audio
import model as networks
from hparams import UNTUNED_MASK
from tools import export

PRETRAINED = Path(__file__).parents[1] / "pretrained"
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.torture
@pytest.mark.parametrize("name", ["resnet18", "resnet18_small"])
def test_onnxruntime_gives_the_masks_of_torch(tmp_path, name):
    path = PRETRAINED / f"{name}.pth"
    assert export.main([str(path), str(tmp_path / "m.onnx")]) == 0
    live = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < (5e6 if name == "resnet18" else 2.5e6)

    checkpoint = networks.load_checkpoint(path)
    network, hp = networks.restore_model(path, checkpoint)
    noise = 0.1 * torch.randn(3, 39 * hp.hop_length)  # 40 frames of three channels
    spec = audio.stft(noise, audio.grid_at(hp.sample_rate, hp))
    seen = audio.features(spec, checkpoint["curve_db"], hp.mixture_power, hp)
    silence = torch.zeros(3, hp.n_bins, hp.stft_frames - 1)
    seen = torch.cat([silence, seen], -1)[:, None]
    expected = networks.for_inference(network)(seen).sigmoid().numpy()
    seen = seen.numpy()
    pasts, first = live.get_inputs()[1:], hp.stft_frames - 1
    for step in (hp.mask_frames, seen.shape[-1]):
        past = {entry.name: np.zeros((3, *entry.shape[1:]), np.float32) for entry in pasts}
        columns = []
        for block in np.split(seen, range(first, seen.shape[-1], step), -1):
            mask, *following = live.run(None, {"features": block, **past})
            past = dict(zip(past, following, strict=True))
            columns.append(mask)
        np.testing.assert_allclose(np.concatenate(columns[1:], -1), expected, atol=1e-3)

    facts = live.get_modelmeta().custom_metadata_map
    assert json.loads(facts["mask_settings"]) == {**UNTUNED_MASK, **checkpoint["mask_settings"]}
    assert json.loads(facts["hparams"])["stft_frames"] == hp.stft_frames
    assert json.loads(facts["licence"]) == checkpoint["licence"]
    np.testing.assert_allclose(json.loads(facts["curve_db"]), checkpoint["curve_db"], atol=1e-4)
