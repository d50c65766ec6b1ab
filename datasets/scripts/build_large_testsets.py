"""Make the test sets Test2K, Test4K and Test8K from a folder of 8K photographs."""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.preparation import (
    Outcome,
    add_lr_words,
    claim_output,
    input_images,
    lr_image,
    make_parser,
    missing,
    process_images,
    write_outputs,
)
from datasets.resize import imresize_uint8
from datasets.wrappers import crop_to_scale
from utils.cli import run
from utils.errors import UserError
from utils.images import read_rgb, read_size

# A set's HR images are the photographs at this fraction of their size.
FRACTIONS = {"Test2K": 1 / 4, "Test4K": 1 / 2, "Test8K": 1.0}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        description="Make test sets of 2K, 4K and 8K images from 8K photographs: each is reduced "
        "by MATLAB's bicubic to a quarter, a half or none of its size and cropped from the top "
        "left to a multiple of the scale. OUTPUT/Test2K/HR and OUTPUT/Test2K/LR_x4 (and so on) "
        "get PNG files under the photograph's name. A worker needs about 2 GB.",
        example="python datasets/scripts/build_large_testsets.py --input data/DIV8K "
        "--output data/test --sets Test2K Test4K --workers 4",
        images="8K photographs",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder for the sets.")
    parser.add_argument(
        "--sets",
        nargs="+",
        default=list(FRACTIONS),
        choices=list(FRACTIONS),
        metavar="SET",
        help="Which sets to make: Test2K, Test4K, Test8K.",
    )
    parser.add_argument(
        "--min_long_side",
        type=int,
        default=5760,
        metavar="PIXELS",
        help="Photographs whose longer side has fewer pixels are refused: they are not 8K.",
    )
    add_lr_words(parser)
    return parser.parse_args()


def build(
    path: Path,
    folders: dict[str, tuple[Path, Path]],
    scale: int,
    lr_mode: str,
    min_long_side: int,
    overwrite: bool,
) -> Outcome:
    """Write the HR and LR images of one photograph that are missing; `folders` are (HR, LR)."""
    targets = {name: [f / f"{path.stem}.png" for f in pair] for name, pair in folders.items()}
    wanted = {name: missing(pair, overwrite) for name, pair in targets.items()}
    written = sum(len(paths) for paths in wanted.values())
    if written:
        height, width = read_size(path)
        if max(height, width) < min_long_side:
            raise UserError(
                f"image {path} is {width}x{height}: no 8K photograph (see --min_long_side)"
            )
        photograph = read_rgb(path)
        for name in (name for name, paths in wanted.items() if paths):
            fraction = FRACTIONS[name]
            hr = photograph if fraction == 1 else imresize_uint8(photograph, fraction)
            hr, size = crop_to_scale(hr, scale, path)
            write_outputs(
                (target, hr if target == targets[name][0] else lr_image(hr, size, lr_mode))
                for target in wanted[name]
            )
    return Outcome(written, 2 * len(targets) - written)


def main() -> int:
    """Make the test sets. Returns the exit code: 2 where an image failed."""
    args = parse_arguments()
    paths = input_images(args.input)
    settings = {"script": "build_large_testsets", "scale": args.scale}
    folders = {}
    for name in args.sets:
        root = Path(args.output) / name
        hr = claim_output(root / "HR", args.input, settings)
        lr_settings = {**settings, "lr_mode": args.lr_mode}
        folders[name] = (hr, claim_output(root / f"LR_x{args.scale}", args.input, lr_settings))
    job = functools.partial(
        build,
        folders=folders,
        scale=args.scale,
        lr_mode=args.lr_mode,
        min_long_side=args.min_long_side,
        overwrite=args.overwrite,
    )
    report = process_images(paths, job, args.workers, "test sets")
    print(report)
    return report.exit_code


if __name__ == "__main__":
    run(main)
