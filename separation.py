"""From a song to its vocals: block by block, in constant memory, at the song's own rate.

    samples ──▶ STFT ──▶ features ──▶ network ──▶ mask ──× STFT──▶ inverse ──▶ vocals

One unit of work is `block_frames` frames, counted from the start of the song, always of the same
shape; how the samples arrive changes nothing. The network looks `context` (12) frames ahead, so a
unit's mask columns lie that much behind its frames:

    frames of unit k          │◀─ 24 remembered ─▶│ kN ……………………… kN + N - 1 │
    mask columns, vocals            kN - 12 ……………………… kN + N - 13 │
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import audio
import model as networks
import soundio
from hparams import MASK_SETTINGS, RANGES, TRAINED, HParams, InputError, hparams

READ_SAMPLES = 1 << 16  # samples read at a time; has no influence on the result
MAX_CHANNELS = 1024  # as in libsndfile; more is an array that needs transposing


class Separator:
    """A trained network, ready to separate.

    It takes over the `model` it is given, whose batch norms are folded in place.

    Attributes
    ----------
    hp : HParams
        Audio and network settings, as trained.
    mask_settings : dict
        ``mask_at_eval``, ``eval_mask_threshold``, ``noise_gate`` in force.
    device : torch.device
    """

    def __init__(
        self,
        model: torch.nn.Module,
        hp: HParams,
        curve_db: torch.Tensor,
        mask_settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.model = networks.for_inference(model).to(device)
        self.hp, self.device, self.mask_settings = hp, device, mask_settings
        self.curve_db = curve_db.to(device)

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        settings: HParams = hparams,
        explicit: dict[str, Any] | None = None,
    ) -> Separator:
        """Load a checkpoint.

        Parameters
        ----------
        path : Path or str
        device : torch.device or str
        settings : HParams
            Its mask settings, where they are not None, go before those tuned for the checkpoint.
        explicit : dict, optional
            Settings that the user named: refused where training fixed another value.

        Raises
        ------
        InputError
            If the checkpoint is missing or damaged, or contradicts `explicit`.
        """
        checkpoint = networks.load_checkpoint(Path(path))
        model, hp = networks.restore_model(Path(path), checkpoint)
        for name, value in (explicit or {}).items():
            if name in TRAINED and getattr(hp, name) != value:
                raise InputError(f"{path}: trained with {name}={getattr(hp, name)}, not {value}")
        for name in ("curve_db", "mask_settings"):
            if name not in checkpoint:
                raise InputError(f"{path}: holds no {name} (use one that train.py wrote)")
        chosen = {name: getattr(settings, name) for name in MASK_SETTINGS}
        mask_settings = {
            name: checkpoint["mask_settings"][name] if value is None else value
            for name, value in chosen.items()
        }
        hp = replace(hp, block_frames=settings.block_frames)
        return cls(model, hp, checkpoint["curve_db"], mask_settings, torch.device(device))

    def stream(self, sample_rate: int, n_channels: int) -> Stream:
        """Start on a song of which the samples arrive bit by bit."""
        return Stream(self, sample_rate, n_channels)

    def separate(
        self, wav: np.ndarray | torch.Tensor, sample_rate: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Separate a waveform that is in memory.

        Parameters
        ----------
        wav : np.ndarray or torch.Tensor, shape=(n_samples,) or (n_channels, n_samples)
            Full scale 1; not modified.
        sample_rate : int
            [Hz], 4000 to 384000.

        Returns
        -------
        vocals, accompaniment : np.ndarray, float32
            Shaped like `wav`; they add up to it.

        Raises
        ------
        InputError
            If `wav` is of another shape, or `sample_rate` out of range.
        """
        wav = _copy(wav)
        if wav.ndim not in (1, 2):
            raise InputError(f"a waveform of shape {tuple(wav.shape)}: (n_channels, n_samples)?")
        n_channels = len(wav) if wav.ndim == 2 else 1
        stream = self.stream(sample_rate, n_channels)
        parts = [stream.push(wav.reshape(n_channels, wav.shape[-1])), stream.finish()]
        vocals = torch.cat(parts, -1).reshape(wav.shape)
        return vocals.numpy(), (wav - vocals).numpy()

    @torch.inference_mode()
    def mask(self, features: torch.Tensor) -> torch.Tensor:
        """Return the network's answer in 256 levels.

        Parameters
        ----------
        features : torch.Tensor, shape=(n_bins, n_columns + stft_frames - 1)

        Returns
        -------
        torch.Tensor, shape=(n_bins, n_columns), in [0, 1]
        """
        return audio.quantize_mask(self.model(features[None, None])[0].sigmoid())


class Stream:
    """The state of one song that is being separated: what later units need of earlier ones."""

    def __init__(self, separator: Separator, sample_rate: int, n_channels: int) -> None:
        low, high = RANGES["sample_rate"]
        if not low <= sample_rate <= high:
            raise InputError(f"sample rate {sample_rate} Hz is not between {low} and {high} Hz")
        if not 1 <= n_channels <= MAX_CHANNELS:
            raise InputError(f"{n_channels} channels: (n_channels, n_samples)?")
        self.separator, hp, device = separator, separator.hp, separator.device
        self.grid = grid = audio.grid_at(sample_rate, hp)
        self.n_pushed = self.n_returned = self.n_units = 0
        self.is_finished = False
        # Samples that wait for their unit: it begins half a window before its first frame's centre.
        self.waiting = [torch.zeros(n_channels, grid.n_fft // 2)]
        self.n_waiting = grid.n_fft // 2
        self.step = hp.block_frames * grid.hop_length  # samples from one unit to the next
        self.unit_samples = self.step - grid.hop_length + grid.n_fft
        # What the first unit remembers is silence.
        self.features = torch.zeros(hp.n_bins, 2 * hp.context, device=device)
        self.spec = torch.zeros(n_channels, grid.n_bins, hp.context, device=device) + 0j
        self.carry = torch.zeros(n_channels, grid.n_fft - grid.hop_length, device=device)
        # Finished samples that lie before the song: the mask's delay and half a window.
        self.n_early = hp.context * grid.hop_length + grid.n_fft // 2

    def push(self, wav: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Take samples; return the vocals that they finish, on the CPU.

        Parameters
        ----------
        wav : np.ndarray or torch.Tensor, shape=(n_channels, n)

        Returns
        -------
        torch.Tensor, shape=(n_channels, m)
            The vocals that follow those returned so far; `m` may be 0.
        """
        assert not self.is_finished, "the song has been finished; start another stream"
        assert wav.ndim == 2, "push (n_channels, n), also where n_channels is 1"
        assert len(wav) == len(self.carry), f"{len(wav)} channels in a song of {len(self.carry)}"
        wav = _copy(wav)  # the caller may fill the same array again
        self.n_pushed += wav.shape[-1]
        self.waiting.append(wav)
        self.n_waiting += wav.shape[-1]
        if self.n_waiting < self.unit_samples:
            return wav.new_zeros(len(wav), 0)
        n_units = 1 + (self.n_waiting - self.unit_samples) // self.step
        return self._run(n_units, n_frames=None)

    def finish(self) -> torch.Tensor:
        """Return the vocals that are left; all together are as long as what was pushed."""
        assert not self.is_finished, "the song has been finished already"
        self.is_finished = True
        n_left = self.n_pushed - self.n_returned
        n_units = -(-(self.n_early + n_left) // self.step)
        silence = torch.zeros(len(self.carry), n_units * self.step + self.grid.n_fft)
        self.waiting.append(silence)
        return self._run(n_units, n_frames=self.grid.n_frames(self.n_pushed))[:, :n_left]

    def _run(self, n_units: int, n_frames: int | None) -> torch.Tensor:
        """Work off `n_units` units; `n_frames` is the song's, None while it goes on."""
        samples = torch.cat(self.waiting, -1)
        starts = range(0, n_units * self.step, self.step)
        units = [self._unit(samples[:, i : i + self.unit_samples], n_frames) for i in starts]
        self.waiting = [samples[:, n_units * self.step :].clone()]
        self.n_waiting = self.waiting[0].shape[-1]
        finished = torch.cat(units, -1) if units else samples[:, :0]
        n_dropped = min(self.n_early, finished.shape[-1])
        self.n_early -= n_dropped
        self.n_returned += finished.shape[-1] - n_dropped
        return finished[:, n_dropped:]

    @torch.inference_mode()
    def _unit(self, samples: torch.Tensor, n_frames: int | None) -> torch.Tensor:
        """Map (n_channels, unit_samples) to (n_channels, step) samples of finished vocals."""
        separator, hp, grid = self.separator, self.separator.hp, self.grid
        block, first = hp.block_frames, self.n_units * hp.block_frames
        n_frames = first + block if n_frames is None else n_frames
        spec = audio.frames_to_spec(samples.to(separator.device), grid)
        spec[..., max(0, n_frames - first) :] = 0  # after the song there is silence, as before it

        seen = audio.to_network_bins(spec, hp).mean(0)
        seen = audio.features(seen, separator.curve_db, hp.mixture_power, hp)
        seen = torch.cat([self.features, seen], -1)  # (hp.n_bins, 2 context + block)
        mask = audio.vocals_mask(separator.mask(seen), **separator.mask_settings)

        spec = torch.cat([self.spec, spec], -1)  # (n_channels, n_bins, context + block)
        masked = spec[..., :block] * audio.extend_mask(mask, grid.n_bins)
        wav = audio.spec_to_frames(masked, grid)
        wav[:, : self.carry.shape[-1]] += self.carry

        self.features, self.spec, self.carry = (
            seen[:, block:],
            spec[..., block:],
            wav[:, self.step :],
        )
        self.n_units += 1
        return (wav[:, : self.step] / self._envelope(first - hp.context, n_frames)).cpu()

    def _envelope(self, first: int, n_frames: int) -> torch.Tensor:
        """Sum the squared windows over the hops that frames `first` … finish."""
        n_before = self.grid.n_fft // self.grid.hop_length - 1  # earlier frames reach in
        frames = torch.arange(
            first - n_before, first + self.separator.hp.block_frames, device=self.carry.device
        )
        present = ((frames >= 0) & (frames < n_frames)).float()
        start = n_before * self.grid.hop_length
        # Inside a song at least 0.25; the clamp only keeps what is dropped from dividing by zero.
        return audio.envelope(present, self.grid)[start : start + self.step].clamp(min=0.1)


def _copy(wav: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Copy an array of any layout, or a tensor from any device, to float32 on the CPU."""
    if torch.is_tensor(wav):
        return wav.detach().to("cpu", torch.float32, copy=True)
    return torch.from_numpy(np.array(wav, dtype=np.float32))


def separate_file(
    separator: Separator,
    reader: soundio.Reader,
    write: Callable[[np.ndarray, np.ndarray], None],
) -> int:
    """Separate an open sound file into vocals and accompaniment that add up to it.

    Parameters
    ----------
    separator : Separator
    reader : soundio.Reader
    write : callable
        Called with the codes of vocals and of accompaniment, each (n_channels, n), block by block.
        In integer formats their sum is the file's codes, sample by sample.

    Returns
    -------
    int
        Samples of the vocals that had to be limited for the sum to fit.
    """
    info = reader.info
    stream = separator.stream(info.sample_rate, info.n_channels)
    waiting = np.zeros((info.n_channels, 0), dtype=np.int32)
    n_limited = 0

    def give(vocals: torch.Tensor) -> None:
        nonlocal waiting, n_limited
        mixture, waiting = np.split(waiting, [vocals.shape[-1]], axis=1)
        codes = soundio.to_codes(vocals.numpy(), info.sample_format)
        codes, n = soundio.limit_to_remainder(codes, mixture, info.sample_format)
        write(codes, mixture - codes)
        n_limited += n

    for codes in reader.blocks(READ_SAMPLES):
        waiting = np.concatenate([waiting, codes], axis=1) if waiting.size else codes
        give(stream.push(soundio.to_float(codes, info.sample_format)))
    give(stream.finish())
    return n_limited
