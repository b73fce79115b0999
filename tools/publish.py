"""Say what a checkpoint holds, or make one ready to be given away.

What only a resumed training needs is left out, and the weights are rounded to half precision, but
for those of one dimension; where the network comes from and on what terms it may be used is written
into it, and every program that loads it can say so.

    python -m tools.publish pretrained/resnet18.pth
    python -m tools.publish runs/resnet18/best.pth mine.pth --licence "CC BY 4.0" --source DSD100
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cli
from hparams import InputError, UsageError


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Print or publish one checkpoint."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .pth file that train.py wrote")
    add("output", type=Path, nargs="?", help="the .pth to write; without it nothing is written")
    add("--licence", help="terms on which the network may be used (those that it came with)")
    text = "music it has learnt from, beside what it names already; may be given several times"
    add("--source", action="append", default=[], help=text)
    args = parser.parse_args(argv)
    if args.output is None and (args.licence is not None or args.source):
        raise UsageError("--licence and --source go into an output: name the .pth to write")
    if args.settings:
        raise UsageError("--set: a network is published as it is (evaluate.py tune changes it)")
    if args.output and args.output.suffix.lower() != ".pth":
        raise UsageError(f"{args.output}: a network's name ends in .pth")
    cli.refuse_missing(args.checkpoint)
    if args.output and args.output.exists():
        raise InputError(f"{args.output}: is already there (choose another name)")

    import model  # here: wrong arguments are told before torch is loaded

    checkpoint = model.load_checkpoint(args.checkpoint)
    network, hp = model.restore_model(args.checkpoint, checkpoint)
    if args.output:
        before = str(checkpoint.get("licence", ""))
        licence = before if args.licence is None else args.licence
        if not licence.strip():
            raise UsageError("--licence is missing: nobody may use a network without terms")
        if before not in ("", licence):
            cli.warn(f"{args.checkpoint}: came as {before!r}; its sources' terms still hold")
        sources = [*checkpoint.get("sources", ()), *args.source]
        checkpoint |= {"licence": licence, "sources": list(dict.fromkeys(sources))}
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.data = weight.data.half()
        own = ("weights", "hparams", "resume")  # the network and hp themselves; what training needs
        extra = {name: value for name, value in checkpoint.items() if name not in own}
        model.save_checkpoint(args.output, network, hp, **extra)
    for line in describe(checkpoint, model.operations_per_column(hp)):
        print(cli.printable(line))
    if args.output:
        print(f"{cli.printable(args.output)}: {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


def describe(checkpoint: dict[str, Any], operations: int) -> list[str]:
    """Put what a checkpoint says of itself into lines."""
    hp = checkpoint["hparams"]
    n_weights = sum(weight.numel() for weight in checkpoint["weights"].values())
    gflop = operations * hp["sample_rate"] / hp["hop_length"] / 1e9
    before = checkpoint.get("learnt_before", ())
    lines = [
        f"network: {hp['model_type']}, width {hp['width']}, {n_weights / 1e6:.2f} million weights, "
        f"{gflop:.2f} GFLOP a second of music",
        f"sees: {hp['stft_frames']} frames of {hp['n_fft']} samples at {hp['sample_rate']} Hz",
        f"learnt: {checkpoint.get('step', '?')} steps on {len(checkpoint.get('data', []))} songs"
        + (f"; from {len(before)} before that" if before else ""),
    ]
    for title, name in (("held-out songs", "scores"), ("mask", "mask_settings")):
        values = checkpoint.get(name, {}).items()
        texts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values)
        lines.append(f"{title}: {', '.join(texts) or 'unknown'}")
    lines += [f"source: {source}" for source in checkpoint.get("sources", [])]
    return [*lines, f"licence: {checkpoint.get('licence', 'not said')}"]


if __name__ == "__main__":
    sys.exit(main())
