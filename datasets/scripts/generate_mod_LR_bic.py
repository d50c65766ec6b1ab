"""Make the LR images of a folder of HR images by MATLAB's bicubic."""

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
from datasets.wrappers import crop_to_scale
from utils.cli import run
from utils.errors import UserError
from utils.images import read_rgb


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        description="Crop each HR image from the top left to a multiple of the scale and make its "
        "LR image by MATLAB's bicubic. Both are written as 8-bit RGB PNG under the name of the HR "
        "image.",
        example="python datasets/scripts/generate_mod_LR_bic.py --input data/DIV2K_sub "
        "--output_hr data/DIV2K_train/HR --output_lr data/DIV2K_train/LR_x4 --scale 4",
        images="HR images",
    )
    parser.add_argument("--output_lr", required=True, metavar="DIR", help="Folder for LR images.")
    parser.add_argument(
        "--output_hr",
        metavar="DIR",
        help="Folder for the cropped HR images; without it they are not written.",
    )
    add_lr_words(parser)
    return parser.parse_args()


def generate(
    path: Path, output_hr: Path | None, output_lr: Path, scale: int, lr_mode: str, overwrite: bool
) -> Outcome:
    """Write the LR image, and the cropped HR image, of one HR image, where they are missing."""
    folders = [folder for folder in (output_hr, output_lr) if folder]
    targets = [folder / f"{path.stem}.png" for folder in folders]
    wanted = missing(targets, overwrite)
    if wanted:
        hr, size = crop_to_scale(read_rgb(path), scale, path)
        write_outputs(
            (target, hr if target.parent == output_hr else lr_image(hr, size, lr_mode))
            for target in wanted
        )
    return Outcome(len(wanted), len(targets) - len(wanted))


def main() -> int:
    """Make the LR images. Returns the exit code: 2 where an image failed."""
    args = parse_arguments()
    paths = input_images(args.input)
    if args.output_hr and Path(args.output_hr).resolve() == Path(args.output_lr).resolve():
        raise UserError("--output_hr and --output_lr must be two folders")
    settings = {"script": "generate_mod_LR_bic", "scale": args.scale}
    output_lr = claim_output(args.output_lr, args.input, {**settings, "lr_mode": args.lr_mode})
    output_hr = claim_output(args.output_hr, args.input, settings) if args.output_hr else None
    job = functools.partial(
        generate,
        output_hr=output_hr,
        output_lr=output_lr,
        scale=args.scale,
        lr_mode=args.lr_mode,
        overwrite=args.overwrite,
    )
    report = process_images(paths, job, args.workers, "LR images")
    print(report)
    return report.exit_code


if __name__ == "__main__":
    run(main)
