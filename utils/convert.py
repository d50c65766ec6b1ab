"""Weights from one kind of file to another.

``python -m utils.convert save/carn-x4/release.pth --out results/tmp/carn-x4.safetensors``
"""

from pathlib import Path
from typing import Any

from utils.checkpoint import build_model, load_checkpoint, save_checkpoint
from utils.cli import Parser, run
from utils.output_words import add_new_weights_word


def for_inference(path: Path) -> dict[str, Any]:
    """What inference needs of a checkpoint: ``{"model": {"name", "args", "sd"}, "iter"}``.

    Averaged weights (`ema`) take the place of those that they are of.

    Raises:
        UserError: it cannot be read, is damaged, or holds no spec of its model.
    """
    checkpoint = load_checkpoint(path)
    state = build_model(checkpoint, path).state_dict()
    return {"model": {**checkpoint["model"], "sd": state}, "iter": checkpoint.get("iter", 0)}


def main() -> None:
    """Parse the command line and write the file."""
    parser = Parser(
        description="Write a checkpoint's weights as a .safetensors file, which holds tensors and "
        "cannot hold code, or one as a .pth file. --weights takes both everywhere.",
        example="python -m utils.convert save/carn-x4/release.pth "
        "--out results/tmp/carn-x4.safetensors",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="The file to read.")
    add_new_weights_word(parser)
    args = parser.parse_args()
    checkpoint = for_inference(args.weights)
    save_checkpoint(args.out, checkpoint)
    print(f"{args.out}: {checkpoint['model']['name']}, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
