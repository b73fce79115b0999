"""From a song to its vocals: block by block, in constant memory, at the song's own rate.

    samples ──▶ STFT ──▶ features ──▶ network ──▶ mask ──× STFT──▶ inverse ──▶ vocals

Recordings that are far softer or louder than music are moved to where it is before the network
sees them; the mask is applied to the recording as it came. A unit of work is N = `block_frames`
frames, counted from the start of the song: how samples arrive changes nothing. Live, it is what is
there. The network's layers remember what they saw before, so that no frame is computed twice. It
looks L = `lookahead` frames ahead, so a unit's mask columns lie that much behind:

    frames of unit k               │ kN ……………………… kN + N - 1 │
    mask columns, vocals      kN - L …………………… kN + N - L - 1 │
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import audio
import model as networks
from hparams import MASK_SETTINGS, RANGES, UNTUNED_MASK, HParams, InputError, hparams
from sound import reading
from sound.writing import Separated

READ_SAMPLES = 1 << 16  # samples read at a time; has no influence on the result
BLOCK_FRAMES = {"cpu": 256, "cuda": 2048}  # a CPU's cache wants few, a GPU many


class Separator:
    """A trained network, ready to separate; the `model` that it is given is its own from then on.

    Attributes
    ----------
    hp : HParams
        Audio and network settings, as trained.
    mask_settings : dict
        ``mask_at_eval``, ``eval_mask_threshold``, ``noise_gate``, ``mask_sharpness`` in force.
    stereo : str
        What gets a mask of its own: the "mean" of all channels, "mid-side" of two (of more: every
        one, as their mean may destroy a voice), or every one of the "channels".
    licence : str
        Terms that the checkpoint comes with; "" where it says nothing.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        hp: HParams,
        curve_db: torch.Tensor,
        mask_settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        is_narrow = networks.is_narrow(hp, device, for_inference=True)
        self.dtype = torch.bfloat16 if is_narrow else torch.float32
        self.model = networks.for_inference(model).to(device, self.dtype)
        self.hp, self.device, self.mask_settings = hp, device, mask_settings
        self.curve_db, self.stereo, self.licence = curve_db.to(device), "mid-side", ""
        self.block_frames = hp.block_frames or BLOCK_FRAMES[device.type]
        n_frames, self.silence = hp.stft_frames - 1 + hp.mask_frames, {}  # as layers remember it
        self.mask(torch.zeros(1, hp.n_bins, n_frames, device=device), self.silence)

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        settings: dict[str, Any] | None = None,
    ) -> Separator:
        """Load a checkpoint.

        `settings` go before hparams.py, and mask settings of both, where they are not None, before
        those tuned for the checkpoint. InputError if the checkpoint is missing or damaged, or was
        trained with another value of one of `settings`, or if there is no such device.
        """
        kind = str(device).partition(":")[0]
        if kind not in BLOCK_FRAMES or (kind == "cuda" and not torch.cuda.is_available()):
            raise InputError(f"device {device}: this torch has no such device (use cpu)")
        checkpoint = networks.load_checkpoint(Path(path))
        model, hp = networks.restore_model(Path(path), checkpoint, settings)
        if len(checkpoint.get("curve_db", ())) != hp.n_bins or "mask_settings" not in checkpoint:
            raise InputError(f"{path}: has no curve_db or mask_settings (use one of train.py)")
        asked = replace(hparams, **(settings or {}))
        mask_settings = {**UNTUNED_MASK, **checkpoint["mask_settings"]}
        for name in MASK_SETTINGS:
            if getattr(asked, name) is not None:
                mask_settings[name] = getattr(asked, name)
        hp = replace(hp, block_frames=asked.block_frames, precision=asked.precision)
        separator = cls(model, hp, checkpoint["curve_db"], mask_settings, torch.device(device))
        separator.stereo = asked.stereo or checkpoint.get("stereo", "mid-side")
        separator.licence = str(checkpoint.get("licence", ""))
        return separator

    def is_mid_side(self, n_channels: int) -> bool:
        """Whether a recording is separated as mid and side."""
        return self.stereo == "mid-side" and n_channels == 2

    def stream(self, sample_rate: int, n_channels: int, live: bool = False) -> Stream:
        """Start on a song of which the samples arrive bit by bit."""
        return Stream(self, sample_rate, n_channels, live)

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
            If `wav` is of another shape, not of floats or not finite, or `sample_rate` is out of
            range.
        """
        wav = _copy(wav)
        if wav.ndim not in (1, 2):
            raise InputError(f"a waveform of shape {tuple(wav.shape)}: (n_channels, n_samples)?")
        n_channels = len(wav) if wav.ndim == 2 else 1
        stream = self.stream(sample_rate, n_channels)
        parts = [stream.push(wav.reshape(n_channels, wav.shape[-1])), stream.finish()]
        vocals = torch.cat(parts, -1).reshape(wav.shape)
        return vocals.numpy(), (wav - vocals).numpy()

    def song_mask(self, wav: np.ndarray | torch.Tensor, sample_rate: int) -> torch.Tensor:
        """Return the mask of a whole waveform before `audio.vocals_mask`: (n_masks, n_bins, n).

        It is in [0, 1] and on the CPU; two masks are of mid and side where `is_mid_side`.
        """
        wav = _copy(wav)
        wav = wav.reshape(-1, wav.shape[-1])
        stream, masks = self.stream(sample_rate, len(wav)), []
        stream.on_mask = lambda mask: masks.append(mask.cpu())
        stream.push(wav)
        stream.finish()
        first = self.hp.lookahead
        return torch.cat(masks, -1)[..., first : first + stream.grid.n_frames(wav.shape[-1])]

    @torch.inference_mode()
    def mask(self, features: torch.Tensor, past: networks.Past) -> torch.Tensor:
        """Return the network's answer in 256 levels, (n_masks, n_bins, n_columns), in [0, 1].

        `features` are n_columns new frames, and in the first call with a `past`, the network's
        memory, stft_frames - 1 before them.
        """
        logits = self.model(features.to(self.dtype)[:, None], past).float()
        return audio.quantize_mask(logits.sigmoid())


class Stream:
    """The state of one song that is being separated: what later units need of earlier ones.

    A `live` stream works off every frame as soon as it is there, for the least delay: what comes
    out lies at most `delay` samples behind what went in; masks are those of a file to rounding.
    """

    def __init__(
        self, separator: Separator, sample_rate: int, n_channels: int, live: bool = False
    ) -> None:
        low, high = RANGES["sample_rate"]
        if not low <= sample_rate <= high:
            raise InputError(f"sample rate {sample_rate} Hz is not between {low} and {high} Hz")
        if not 1 <= n_channels <= reading.MAX_CHANNELS:
            raise InputError(f"{n_channels} channels: (n_channels, n_samples)?")
        self.separator, hp, device = separator, separator.hp, separator.device
        self.is_mid_side = separator.is_mid_side(n_channels)
        self.is_split = n_channels > 1 and separator.stereo != "mean"
        self.grid = grid = audio.grid_at(sample_rate, hp)
        # Many channels go through in shorter blocks, so that memory stays what it is.
        most = max(16, separator.block_frames // -(-n_channels // 4))
        self.block_frames = most // hp.mask_frames * hp.mask_frames
        self.least_frames = hp.mask_frames if live else self.block_frames  # worked off at once
        self.n_pushed = 0  # samples
        self.n_seen = 0  # frames
        self.peak_db = torch.full((1,), -math.inf, dtype=torch.float64, device=device)
        self.is_finished = False
        # Samples that wait for their unit: it begins half a window before its first frame's centre.
        self.waiting = [torch.zeros(n_channels, grid.n_fft // 2)]
        # What the first unit remembers is silence.
        n_masks = n_channels if self.is_split else 1
        self.past = {layer: torch.cat([x] * n_masks) for layer, x in separator.silence.items()}
        self.spec = torch.zeros(n_channels, hp.lookahead, grid.n_bins, device=device).mT + 0j
        self.carry = torch.zeros(n_channels, grid.n_fft - grid.hop_length, device=device)
        # Of what is finished, what lies before the song: the mask's delay and half a window.
        self.n_early = hp.lookahead * grid.hop_length + grid.n_fft // 2
        self.on_mask: Callable[[torch.Tensor], None] | None = None

    @property
    def delay(self) -> int:
        """Samples that the vocals lie behind what was pushed, at most, before `finish`."""
        hop = self.grid.hop_length
        return self.grid.n_fft + (self.separator.hp.lookahead + self.least_frames - 1) * hop

    def push(self, wav: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Take samples, (n_channels, n); return the vocals that they finish, (n_channels, m).

        They are on the CPU and follow those returned so far; m may be 0.
        """
        assert not self.is_finished, "the song has been finished; start another stream"
        if wav.ndim != 2 or len(wav) != len(self.carry):
            raise InputError(
                f"samples of shape {tuple(wav.shape)}: ({len(self.carry)}, n) expected"
            )
        wav = _copy(wav)  # the caller may fill the same array again
        wav = audio.mid_side(wav) if self.is_mid_side else wav
        self.n_pushed += wav.shape[-1]
        self.waiting.append(wav)
        n_there = 1 + (self.n_pushed - self.grid.n_fft // 2) // self.grid.hop_length  # of the song
        n_frames = n_there - self.n_seen
        return self._run(n_frames - n_frames % self.least_frames, n_song=None)

    def finish(self) -> torch.Tensor:
        """Return the vocals that are left; all together are as long as what was pushed."""
        assert not self.is_finished, "the song has been finished already"
        self.is_finished = True
        hop, hp = self.grid.hop_length, self.separator.hp
        n_left = self.n_early + self.n_pushed - self.n_seen * hop  # with what lies before the song
        n_frames = -(-n_left // (hop * hp.mask_frames)) * hp.mask_frames
        self.waiting.append(torch.zeros(len(self.carry), n_frames * hop + self.grid.n_fft))
        vocals = self._run(n_frames, n_song=self.grid.n_frames(self.n_pushed))
        return vocals[:, : min(n_left, self.n_pushed)]

    def _run(self, n_frames: int, n_song: int | None) -> torch.Tensor:
        """Work off `n_frames` more frames; the song has `n_song`, None while it goes on."""
        if n_frames <= 0:
            return torch.zeros(len(self.carry), 0)
        grid, most = self.grid, self.block_frames
        n_early = max(0, self.n_early - self.n_seen * grid.hop_length)
        samples = torch.cat(self.waiting, -1)
        units = []
        for start in range(0, n_frames, most):
            n = min(most, n_frames - start)
            begin = start * grid.hop_length
            seen = samples[:, begin : begin + (n - 1) * grid.hop_length + grid.n_fft]
            units.append(self._unit(seen, n, n_song))
        self.waiting = [samples[:, n_frames * grid.hop_length :].clone()]
        finished = torch.cat(units, -1)[:, n_early:]
        return audio.left_right(finished) if self.is_mid_side else finished

    @torch.inference_mode()
    def _unit(self, samples: torch.Tensor, n: int, n_song: int | None) -> torch.Tensor:
        """Map the samples of n frames to the n hops of vocals that they finish."""
        separator, hp, grid, first = self.separator, self.separator.hp, self.grid, self.n_seen
        n_song = first + n if n_song is None else n_song
        spec = audio.frames_to_spec(samples.to(separator.device), grid)
        spec[..., max(0, n_song - first) :] = 0  # after the song there is silence, as before it
        mask = separator.mask(self._features(spec), self.past)  # (n_masks, n_bins, n)
        if self.on_mask is not None:
            self.on_mask(mask)
        spec = torch.cat([self.spec.mT, spec.mT], -2).mT  # (n_channels, n_bins, lookahead + n)
        applied = audio.vocals_mask(mask, **separator.mask_settings)
        wav = audio.spec_to_frames(audio.apply_mask(spec[..., :n], applied), grid)
        wav[:, : self.carry.shape[-1]] += self.carry

        n_finished = n * grid.hop_length
        self.spec, self.carry = spec[..., n:], wav[:, n_finished:]
        self.n_seen += n
        return (wav[:, :n_finished] / self._envelope(first - hp.lookahead, n, n_song)).cpu()

    def _features(self, spec: torch.Tensor) -> torch.Tensor:
        """Map each channel, or their mean, to what the network sees: (n_masks, n_bins, n)."""
        hp, curve_db = self.separator.hp, self.separator.curve_db
        spec = audio.to_network_bins(spec, hp)
        spec = spec if self.is_split else audio.mono(spec)[None]
        level_db = audio.loudness_db(spec, curve_db)
        gain_db, self.peak_db = audio.level_gain_db(level_db, self.peak_db, self.n_seen, hp)
        spec = spec * (10 ** (gain_db / 20)).float()  # exactly 1 for ordinary recordings
        return audio.features(spec, curve_db, hp.mixture_power, hp)

    def _envelope(self, first: int, n: int, n_song: int) -> torch.Tensor:
        """Sum the squared windows over the hops that frames `first` … `first` + n - 1 finish."""
        n_before = self.grid.n_fft // self.grid.hop_length - 1  # earlier frames reach in
        frames = torch.arange(first - n_before, first + n, device=self.carry.device)
        present = ((frames >= 0) & (frames < n_song)).float()
        hop = self.grid.hop_length
        inside = audio.envelope(present, self.grid)[n_before * hop : (n_before + n) * hop]
        # Inside a song at least 0.25; the clamp only keeps what is dropped from dividing by zero.
        return inside.clamp(min=0.1)


def split(
    stream: Stream, blocks: Iterable[np.ndarray], sample_format: reading.SampleFormat
) -> Iterator[Separated]:
    """Separate the codes of a sound file into vocals and accompaniment that add up to them.

    Yields what each block of (n_channels, n) codes finishes; parts may be empty. In integer formats
    vocals + accompaniment is the mixture, sample by sample.
    """
    waiting: np.ndarray | None = None

    def part(vocals: torch.Tensor) -> Separated:
        nonlocal waiting
        mixture, waiting = waiting[:, : vocals.shape[-1]], waiting[:, vocals.shape[-1] :]
        codes = reading.to_codes(vocals.numpy(), sample_format)
        codes, n_limited = reading.limit_to_remainder(codes, mixture, sample_format)
        return Separated(mixture, codes, mixture - codes, n_limited)

    for codes in blocks:
        is_first = waiting is None or not waiting.size
        waiting = codes if is_first else np.concatenate([waiting, codes], axis=1)
        yield part(stream.push(reading.to_float(codes, sample_format)))
    if waiting is not None:
        yield part(stream.finish())


def _copy(wav: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Copy an array of any layout, or a tensor from any device, to float32 on the CPU."""
    is_tensor = torch.is_tensor(wav)
    wav = wav if is_tensor else np.asarray(wav)
    if not (wav.is_floating_point() if is_tensor else wav.dtype.kind == "f"):
        raise InputError(f"a waveform of {wav.dtype}: full scale is 1 (divide 16 bits by 32768)")
    if is_tensor:
        wav = wav.detach().to("cpu", torch.float32, copy=True)
    else:
        wav = torch.from_numpy(np.array(wav, dtype=np.float32))
    if wav.numel() and not wav.abs().max() <= reading.MAX_LEVEL:  # NaN is not, either
        raise InputError("a waveform that is not finite, or far beyond full scale, which is 1")
    return wav
