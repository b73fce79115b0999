"""Draw what the network sees and answers: mixture, mask and vocals, one above the other.

The picture shows the bins of the network, 0 to 11 kHz from bottom to top, and time to the right;
bright is loud, or voice.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import commandline
from hparams import InputError, parse_settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from separation import Separator

EPILOG = """examples:
  python draw.py runs/demo/best.pth song.wav song.png
  python draw.py runs/demo/best.pth song.wav song.png --start 60 --seconds 4"""
PANEL = (960, 200)  # pixels of one panel: width, height
MARGIN = 18  # pixels above a panel, for its name


@commandline.script
def main(argv: list[str] | None = None) -> int:
    """Draw one excerpt of one song."""
    parser = commandline.make_parser(__doc__, EPILOG)
    parser.add_argument("checkpoint", type=Path, help="a .pth file that train.py wrote")
    parser.add_argument("audio", type=Path, help="a song")
    parser.add_argument("picture", type=Path, help="the .png to write")
    parser.add_argument("--start", type=float, default=0.0, help="seconds into the song (0)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length shown (%(default)s)")
    args = parser.parse_args(argv)
    settings = commandline.settings_of(args)
    if not (0 <= args.start < math.inf and 0 < args.seconds < math.inf):
        parser.error("--start must be 0 or more and --seconds more than 0")

    import outputs
    import soundio

    outputs.check_writable(args.picture)
    soundio.probe(args.audio)
    wav, sample_rate = _read(args.audio, args.start, args.seconds)

    from separation import Separator

    explicit = parse_settings(args.settings)
    separator = Separator.load(args.checkpoint, settings=settings, explicit=explicit)
    rows = _rows(separator, wav, sample_rate)
    picture = _stack(rows)
    outputs.replace_atomically(args.picture, lambda file: picture.save(file, format="png"))
    print(commandline.printable(args.picture))
    return 0


def _read(path: Path, start: float, seconds: float) -> tuple[np.ndarray, int]:
    """Read an excerpt as mono, (n_samples,), and its rate; InputError if there is none."""
    import numpy as np

    import soundio

    with soundio.Reader(path) as reader:
        rate = reader.info.sample_rate
        first, last = round(start * rate), round((start + seconds) * rate)
        blocks, position = [], 0
        for block in reader.float_blocks(rate):
            low, high = max(0, first - position), last - position
            blocks.append(block[:, low : max(low, high)].mean(0))
            position += block.shape[1]
            if position >= last:
                break
    wav = np.concatenate(blocks)
    if not wav.size:
        raise InputError(f"{path}: nothing left at {start:g} s (choose an earlier --start)")
    return wav, rate


def _rows(separator: Separator, wav: np.ndarray, sample_rate: int) -> dict[str, torch.Tensor]:
    """Compute the three panels, (n_bins, n_frames) in [0, 1] each."""
    import torch
    import torch.nn.functional as F

    import audio

    hp = separator.hp
    spec = audio.stft(torch.from_numpy(wav), audio.grid_at(sample_rate, hp))
    spec = audio.to_network_bins(spec, hp)
    seen = audio.features(spec, separator.curve_db, hp.mixture_power, hp)
    mask = separator.mask(F.pad(seen, (hp.context, hp.context)))
    applied = audio.vocals_mask(mask, **separator.mask_settings)
    vocals = audio.features(spec * applied, separator.curve_db, hp.mixture_power, hp)
    return {"mixture": seen, "mask: is this the voice?": mask, "vocals": vocals}


def _stack(rows: dict[str, torch.Tensor]) -> Image.Image:
    """Colour the panels and set them below each other with their names."""
    from PIL import Image, ImageDraw  # pillow comes with tensorboard

    import charts

    width, height = PANEL
    picture = Image.new("RGB", (width, len(rows) * (height + MARGIN)), "white")
    write = ImageDraw.Draw(picture)
    for i, (name, row) in enumerate(rows.items()):
        panel = Image.fromarray(charts.colours(row.flip(0).numpy()))
        top = i * (height + MARGIN)
        write.text((2, top + 3), name, fill="black")
        picture.paste(panel.resize(PANEL, Image.Resampling.BOX), (0, top + MARGIN))
    return picture


if __name__ == "__main__":
    sys.exit(main())
