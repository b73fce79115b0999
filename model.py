"""The networks, and checkpoints that carry everything needed to listen with them.

Every network maps features of n + stft_frames - 1 frames to n columns of 513 logits and gives each
column exactly what a separate slice of stft_frames frames would give: convolutions are *valid*
along time and padded along frequency only, and nothing strides or pools along time. With
mask_frames = 2 all this is true of pairs of frames, which `fold` lays over each other.

    (n, 1, n_bins, n_columns + stft_frames - 1) ──▶ (n, n_bins, n_columns)

Given a `past`, a network remembers the last frames of every layer: the first call is as above, and
each later one goes on with n_columns further frames and computes nothing twice.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import unicodedata
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import cli
from hparams import TRAINED, HParams, InputError, from_dict

FORMAT = "vocal-mask checkpoint 1"
# What dilations of 1, 1, 2, 2, 4, 4, 8, 8, 1, 2, 4 and 8 look further back than those of 1.
FURTHER_BACK = (0, 0, 1, 1, 3, 3, 7, 7, 0, 1, 3, 7)
Past = dict[nn.Module, torch.Tensor]  # per layer the last frames that it saw


def time_reach(n_convolutions: int, lookahead: int, lookback: int) -> list[tuple[int, int]]:
    """Spread what a network sees in time over a chain of convolutions.

    Returns how many frames each consumes before and after: (0, 0) is one wide in time, (1, 1) three
    wide, (3, 1) three wide and dilated by 2. They sum to `lookback` and `lookahead`, whose
    difference is even. What is seen ahead is spread evenly; further looks back come in dilations
    that double, so that no frame between is left out, and cost nothing.
    """
    n_looks = (lookback + lookahead) // 2  # what is seen is twice the sum of all dilations
    dilations = _spread(max(lookahead, min(len(FURTHER_BACK), n_looks)), n_convolutions)
    wide = [i for i, dilation in enumerate(dilations) if dilation]
    weights = [FURTHER_BACK[i % len(FURTHER_BACK)] for i in range(len(wide))]
    weights = weights if any(weights) else [1] * len(wide)
    further = _spread(n_looks - sum(dilations), sum(weights))
    consumed, begin = [(0, 0)] * n_convolutions, 0
    for i, after, weight in zip(wide, _spread(lookahead, len(wide)), weights, strict=True):
        dilation = dilations[i] + sum(further[begin : begin + weight])
        consumed[i], begin = (2 * dilation - after, after), begin + weight
    return consumed


def _spread(n: int, n_places: int) -> list[int]:
    """Share `n` as evenly as whole numbers can."""
    steps = [i * n // max(1, n_places) for i in range(n_places + 1)]
    return [high - low for low, high in itertools.pairwise(steps)]


def fold(x: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Lay neighbouring frames over each other: (n, 1, n_bins, T) to (n, n_frames, n_bins, …)."""
    if n_frames == 1:
        return x
    x = F.pad(x, (0, -x.shape[-1] % n_frames))
    return x.squeeze(1).unflatten(-1, (-1, n_frames)).movedim(-1, 1)


def unfold(logits: torch.Tensor, n_frames: int, x: torch.Tensor) -> torch.Tensor:
    """Give neighbouring frames of `x`, which was folded, the same column of logits."""
    if n_frames == 1:
        return logits
    logits = logits.repeat_interleave(n_frames, -1)
    return logits[..., : logits.shape[-1] - -x.shape[-1] % n_frames]


def _last(x: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Return the last frames of `x`, alone in memory if it is much longer."""
    frames = x[..., x.shape[-1] - n_frames :]
    return frames.clone() if x.shape[-1] > 2 * n_frames else frames


def with_past(x: torch.Tensor, n_frames: int, past: Past | None, layer: nn.Module) -> torch.Tensor:
    """Put the last `n_frames` of the calls before in front of what `layer` is about to consume."""
    if past is None or n_frames == 0:
        return x
    if layer in past:
        x = torch.cat([past[layer], x], -1)
    past[layer] = _last(x, n_frames)
    return x


def delayed(
    x: torch.Tensor, consumed: tuple[int, int], past: Past | None, layer: nn.Module
) -> torch.Tensor:
    """Drop the frames that the convolutions beside `x` consume before and after.

    With a `past` only the first call drops those before; those after come back in the next one.
    """
    before, after = consumed
    if past is not None and layer in past:
        x, before = torch.cat([past[layer], x], -1) if after else x, 0
    end = x.shape[-1] - after
    if past is not None:
        past[layer] = _last(x, after)
    return x[..., before:end]


class ConvNorm(nn.Module):
    """A convolution, same along frequency and valid along time, and its batch norm."""

    def __init__(
        self, n_in: int, n_out: int, size: int, consumed: tuple[int, int], stride: int = 1
    ) -> None:
        super().__init__()
        self.consumed = sum(consumed)
        dilation = self.consumed // 2
        shape = {"stride": (stride, 1), "padding": (size // 2, 0), "dilation": (1, dilation or 1)}
        self.conv = nn.Conv2d(n_in, n_out, (size, 3 if dilation else 1), **shape, bias=False)
        self.norm = nn.BatchNorm2d(n_out)

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        """Map (n, n_in, bins, frames) to (n, n_out, bins / stride, frames - consumed)."""
        x = with_past(x, self.consumed, past, self)
        return self.norm(self.conv(x))


class BasicBlock(nn.Module):
    """Two 3-wide convolutions and a skip that is cropped by what they consume in time."""

    def __init__(self, n_in: int, n_out: int, reach: list[tuple[int, int]], stride: int) -> None:
        super().__init__()
        self.consumed = _total(reach)
        self.first = ConvNorm(n_in, n_out, 3, reach[0], stride)
        self.second = ConvNorm(n_out, n_out, 3, reach[1])
        changes = stride > 1 or n_in != n_out
        self.skip = ConvNorm(n_in, n_out, 1, (0, 0), stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        """Map (n, n_in, bins, frames) to (n, n_out, bins / stride, frames - consumed)."""
        same = delayed(x, self.consumed, past, self)
        return self.second(self.first(x, past).relu_(), past).add_(self.skip(same)).relu_()


class ResNet18(nn.Module):
    """ResNet18 whose 17 convolutions share the view in time; frequency shrinks from 513 to 33.

    After He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016. As time
    is never strided, channels that double per stage would leave most operations to the last one;
    1, 1.5, 2 and 3 times the width spread them evenly over the four. The last layer sees the whole
    frequency axis: what the blocks found at 33 bins, and the detail of the stem's 257.
    """

    def __init__(self, hp: HParams) -> None:
        super().__init__()
        w, self.n_shared = hp.width, hp.mask_frames
        reach = time_reach(17, hp.lookahead // self.n_shared, hp.lookback // self.n_shared)
        self.stem = ConvNorm(self.n_shared, w, 7, reach[0], stride=2)
        widths = [w, w, w, w * 3 // 2, w * 3 // 2, 2 * w, 2 * w, 3 * w, 3 * w]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        self.blocks = nn.ModuleList(
            BasicBlock(widths[i], widths[i + 1], reach[1 + 2 * i : 3 + 2 * i], strides[i])
            for i in range(8)
        )
        quarter = max(1, w // 4)
        self.consumed = _total(reach[1:])  # by the blocks
        self.detail = ConvNorm(w, quarter, 1, (0, 0))
        self.reduce = ConvNorm(3 * w, w, 1, (0, 0))
        n_seen = w * math.ceil(hp.n_bins / 16) + quarter * math.ceil(hp.n_bins / 2)
        self.head = nn.Linear(n_seen, hp.n_bins)

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        """Map features to logits, see the module's docstring."""
        features = x
        x = self.stem(fold(x, self.n_shared), past).relu_()
        detail = self.detail(delayed(x, self.consumed, past, self)).relu_()
        for block in self.blocks:
            x = block(x, past)
        x = self.reduce(x).relu_()  # (n, width, n_bins / 16, n_columns)
        logits = self.head(torch.cat([_rows(x), _rows(detail)], -1)).mT
        return unfold(logits, self.n_shared, features)


def _total(reach: list[tuple[int, int]]) -> tuple[int, int]:
    """Sum what a chain of convolutions consumes before and after."""
    return sum(before for before, _ in reach), sum(after for _, after in reach)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Turn (n, channels, bins, n_columns) into a row for each column: (n, n_columns, …)."""
    return x.permute(0, 3, 2, 1).flatten(2)


class ConvNet(nn.Module):
    """Four convolutions, pooling along frequency, two fully-connected layers.

    The first of those is a convolution over all the time that the others left.
    """

    def __init__(self, hp: HParams) -> None:
        super().__init__()
        w, self.n_shared = hp.width, hp.mask_frames
        used = min(4, hp.lookahead // self.n_shared)
        reach = time_reach(4, used, used)
        half = max(1, w // 2)
        self.first = ConvNorm(self.n_shared, w, 3, reach[0])
        self.second = ConvNorm(w, half, 3, reach[1])
        self.third = ConvNorm(half, 2 * w, 3, reach[2])
        self.fourth = ConvNorm(2 * w, half, 3, reach[3])
        self.pool = nn.MaxPool2d((3, 1), ceil_mode=True)
        pooled = math.ceil(math.ceil(hp.n_bins / 3) / 3)
        wide = (hp.stft_frames - 1) // self.n_shared + 1 - 2 * used
        self.fifth = nn.Conv2d(half, 4 * w, (pooled, wide))
        self.head = nn.Linear(4 * w, hp.n_bins)

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        """Map features to logits, see the module's docstring."""
        features = x
        x = self.second(self.first(fold(x, self.n_shared), past).relu_(), past).relu_()
        x = self.pool(x)  # (n, width / 2, 171, frames - 4)
        x = self.fourth(self.third(x, past).relu_(), past).relu_()
        x = self.pool(x)  # (n, width / 2, 57, frames - 8)
        x = with_past(x, self.fifth.kernel_size[1] - 1, past, self.fifth)
        x = self.fifth(x).relu_()  # (n, 4 width, 1, n_columns)
        return unfold(self.head(x.squeeze(2).mT).mT, self.n_shared, features)


MODELS = {"resnet18": ResNet18, "convnet": ConvNet}


def build_model(hp: HParams) -> nn.Module:
    """Make the network that ``model_type`` names, untrained, channels last."""
    return MODELS[hp.model_type](hp).to(memory_format=torch.channels_last)


def for_inference(model: nn.Module) -> nn.Module:
    """Fold every batch norm into its convolution and stop tracking gradients, in place."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvNorm) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def is_narrow(hp: HParams, device: torch.device, for_inference: bool = False) -> bool:
    """Return whether ``precision`` means bfloat16 here; on a CPU "auto" does only to separate."""
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_it = for_inference and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return hp.precision == "bfloat16" or (hp.precision == "auto" and has_it)


def operations_per_column(hp: HParams) -> int:
    """Count the multiplications and additions that one more column takes in a dense pass."""
    from torch.utils.flop_counter import FlopCounterMode

    past: Past = {}
    with torch.device("meta"):  # nothing is computed
        model = build_model(hp).eval()
        model(torch.zeros(1, 1, hp.n_bins, hp.stft_frames - 1 + hp.mask_frames), past)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, hp.n_bins, hp.mask_frames), past)
    return counter.get_total_flops() // hp.mask_frames


def save_checkpoint(path: Path, model: nn.Module, hp: HParams, **extra: Any) -> None:
    """Write the weights of a model, as `build_model` made it, with their hparams, atomically.

    `extra` are plain dicts, lists, numbers, strings and tensors: ``curve_db``, ``mask_settings``,
    the datasets' identity, scores, optimizer and so on.
    """
    contents = {"format": FORMAT, "weights": model.state_dict(), "hparams": asdict(hp), **extra}
    buffer = io.BytesIO()  # torch would turn a full disk into an error of its own
    torch.save(contents, buffer)
    cli.replace_atomically(Path(path), lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` was given, to the CPU; ``hparams`` is a dict.

    InputError if the file is missing, not a checkpoint of this project, damaged, or holds weights
    that are not finite.
    """
    cli.refuse_missing(path)
    n_bytes = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            # A few bytes can claim to be gigabytes, here and as weights; torch.load does not
            # compare the checksums, and believes an environment variable where it is not told.
            if sum(x.file_size for x in archive.infolist()) > n_bytes or archive.testzip():
                raise ValueError
        contents = torch.load(path, map_location="cpu", weights_only=True)
        is_ours = contents.pop("format") == FORMAT and isinstance(contents["hparams"], dict)
        weights = contents["weights"].values()
        if not is_ours or sum(weight.nbytes for weight in weights) > n_bytes:
            raise ValueError
        is_finite = all(weight.isfinite().all() for weight in weights)
    except Exception as error:  # damage raises six different types
        what = "not a checkpoint of this version, or damaged"
        raise InputError(f"{path}: {what} (use another one)") from error
    if not is_finite:
        raise InputError(f"{path}: holds weights that are not finite (use another one)")
    return contents


def learnt_songs(checkpoint: dict[str, Any]) -> dict[str, str]:
    """List all songs that a checkpoint has ever learnt from.

    By what identifies a built song, as `dataset.identity` writes it, the `song_key` of its name.
    """
    built = [*checkpoint.get("learnt_before", ()), *checkpoint.get("data", ())]
    return {song: song_key(song.rpartition(" ")[0]) for song in built}


def song_key(name: str) -> str:
    """Return what a song's names have in common: copies of a data set spell "A Song" as "a_song".

    At another speed it is the same song: ``build_dataset.py --speed 1.15`` makes "A Song x1.15".
    """
    name = re.sub(r" x[0-9.]+$", "", unicodedata.normalize("NFC", name))
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


def restore_model(
    path: Path, checkpoint: dict[str, Any], settings: dict[str, Any] | None = None
) -> tuple[nn.Module, HParams]:
    """Build the network of a loaded checkpoint, weights included.

    InputError if the weights do not fit the network that the checkpoint's hparams describe, or if
    it was trained with another value of one of `settings`.
    """
    try:
        hp = from_dict(checkpoint["hparams"])
        with torch.device("meta"):  # shapes without memory: settings may ask for any amount
            model = build_model(hp)
        # A copy, as torch notes `assign` in the state dict, and would assign at its next use, too.
        model.load_state_dict(dict(checkpoint["weights"]), assign=True)
    except (InputError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: weights or settings of no network: {reason}") from error
    for name, value in (settings or {}).items():
        if name in TRAINED and getattr(hp, name) != value:
            raise InputError(f"{path}: trained with {name}={getattr(hp, name)}, not {value}")
    # What is published holds its large weights in half precision.
    return model.float().to(memory_format=torch.channels_last), hp
