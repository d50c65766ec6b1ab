"""Add smaller copies of each training image: more content per pixel, at more sizes."""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.preparation import (
    Outcome,
    claim_output,
    input_images,
    make_parser,
    missing,
    process_images,
    write_outputs,
)
from datasets.resize import imresize_uint8
from utils.cli import run
from utils.errors import UserError
from utils.images import read_rgb


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        description="Write each image of a folder at several sizes (8-bit RGB PNG, named "
        "NAME_0.9.png and so on; MATLAB's bicubic).",
        example="python datasets/scripts/data_augmentation.py --input data/DIV2K_train_HR "
        "--output data/DIV2K_augmented",
        images="HR images",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder for the results.")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0, 0.9, 0.8, 0.7, 0.6],
        metavar="S",
        help="Sizes relative to the image; 1 is the image itself.",
    )
    return parser.parse_args()


def augment(path: Path, output: Path, scales: list[float], overwrite: bool) -> Outcome:
    """Write the sizes of one image that are not there yet."""
    targets = {output / f"{path.stem}_{scale:g}.png": scale for scale in scales}
    wanted = missing(list(targets), overwrite)
    if wanted:
        rgb = read_rgb(path)
        resized = (
            rgb if targets[target] == 1 else imresize_uint8(rgb, targets[target])
            for target in wanted
        )
        write_outputs(zip(wanted, resized, strict=True))
    return Outcome(len(wanted), len(targets) - len(wanted))


def main() -> int:
    """Write the smaller copies. Returns the exit code: 2 where an image failed."""
    args = parse_arguments()
    if not all(0 < scale <= 1 for scale in args.scales):
        raise UserError("--scales must be above 0 and at most 1")
    paths = input_images(args.input)
    # Scales may be added later: their names keep them apart.
    output = claim_output(args.output, args.input, {"script": "data_augmentation"})
    job = functools.partial(augment, output=output, scales=args.scales, overwrite=args.overwrite)
    report = process_images(paths, job, args.workers, "augmentation")
    print(report)
    return report.exit_code


if __name__ == "__main__":
    run(main)
