"""Cut images into overlapping sub-images, which load faster than whole photographs."""

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
from utils.cli import run
from utils.errors import UserError
from utils.images import read_rgb, read_size


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        description="Cut every image of a folder into overlapping square sub-images (8-bit RGB "
        "PNG, named NAME_s001.png and so on, row by row).",
        example="python datasets/scripts/extract_subimages.py --input data/DIV2K_augmented "
        "--output data/DIV2K_sub",
        images="images",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder for sub-images.")
    parser.add_argument("--size", type=int, default=128, help="Side of a sub-image in pixels.")
    parser.add_argument("--step", type=int, default=64, help="Distance of neighbours in pixels.")
    parser.add_argument(
        "--threshold",
        type=int,
        default=48,
        help="Where more pixels than this are left over at the right or lower border, one more "
        "row or column of sub-images is cut, flush with the border.",
    )
    return parser.parse_args()


def starts(length: int, size: int, step: int, threshold: int) -> list[int]:
    """Where sub-images start along an axis of `length` pixels, at least `size`."""
    found = list(range(0, length - size + 1, step))
    if length - (found[-1] + size) > threshold:
        found.append(length - size)
    return found


def extract(
    path: Path, output: Path, size: int, step: int, threshold: int, overwrite: bool
) -> Outcome:
    """Write the sub-images of one image that are not there yet."""
    height, width = read_size(path)
    if min(height, width) < size:
        raise UserError(f"image {path} is {width}x{height}, smaller than {size}x{size}")
    corners = [
        (top, left)
        for top in starts(height, size, step, threshold)
        for left in starts(width, size, step, threshold)
    ]
    targets = {
        output / f"{path.stem}_s{number:03d}.png": corner
        for number, corner in enumerate(corners, start=1)
    }
    wanted = missing(list(targets), overwrite)
    if wanted:
        rgb = read_rgb(path)
        crops = (
            rgb[top : top + size, left : left + size]
            for top, left in (targets[target] for target in wanted)
        )
        write_outputs(zip(wanted, crops, strict=True))
    return Outcome(len(wanted), len(targets) - len(wanted))


def main() -> int:
    """Cut all images. Returns the exit code: 2 where an image failed."""
    args = parse_arguments()
    if min(args.size, args.step) < 1 or args.threshold < 0:
        raise UserError("--size and --step must be 1 or more, --threshold 0 or more")
    paths = input_images(args.input)
    settings = {"size": args.size, "step": args.step, "threshold": args.threshold}
    output = claim_output(args.output, args.input, {"script": "extract_subimages", **settings})
    job = functools.partial(extract, output=output, overwrite=args.overwrite, **settings)
    report = process_images(paths, job, args.workers, "sub-images")
    print(report)
    return report.exit_code


if __name__ == "__main__":
    run(main)
