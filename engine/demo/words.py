"""The command-line words of demo.py."""

import argparse
import re
from pathlib import Path

from engine.demo.enlarge import MODEL_SCALE
from engine.demo.models import DEFAULT_CONFIG
from engine.inference_words import (
    add_json_word,
    add_routing_words,
    add_self_ensemble_word,
    add_weights_word,
)
from utils.cli import (
    Parser,
    add_config_words,
    add_device_words,
    check_device_words,
    finite_float,
    positive_float,
)
from utils.images import IMAGE_SUFFIXES

_DEFAULT_SCALE = 4.0
DEFAULT_OPACITY = 0.65


def make_parser() -> Parser:
    """Parser of demo.py."""
    parser = Parser(
        description="Super-resolve a picture or a folder of pictures. The picture is taken as HR: "
        "LR is made of it, and PCSR\nand the original network restore it, side by side. With "
        "--upscale the picture itself is enlarged.\nWithout --config and --weights the models are "
        f"those of {DEFAULT_CONFIG}.",
        example="python demo.py --img_path examples/chelsea.png --k 0 --out_dir results/demo\n"
        "  python demo.py --img_path photo.jpg --upscale --scale 2.5 --out_dir results/photo",
    )
    parser.add_argument(
        "--img_path", type=Path, required=True, metavar="PATH", help="A picture, or a folder."
    )
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=Path("results/demo"),
        metavar="DIR",
        help="Folder for the results. Earlier results of the same names are replaced; nothing is "
        "deleted.",
    )
    parser.add_argument(
        "--upscale",
        action="store_true",
        help="Enlarge the picture itself, instead of comparing models on a smaller version of it.",
    )
    _add_size_words(parser)
    parser.add_argument(
        "--opacity",
        type=_fraction,
        help="Opacity of the picture under the class colours (green easy, red hard). Default: "
        f"{DEFAULT_OPACITY}.",
    )
    add_routing_words(parser)
    add_self_ensemble_word(parser)
    _add_model_words(parser)
    add_json_word(parser)
    add_device_words(parser)
    return parser


def check_words(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse words that exclude each other."""
    check_device_words(args)
    if args.upscale:
        if args.original_weights is not None:
            parser.error("--original_weights goes without --upscale, which compares nothing")
        if args.opacity is not None and not args.class_map:
            parser.error("--opacity is that of the class map: with --upscale it takes --class_map")
        return
    for word in ("size", "format", "class_map"):
        if getattr(args, word):
            parser.error(f"--{word} goes with --upscale")
    if args.scale < 1:
        parser.error(f"--scale {args.scale:g}: without --upscale it starts at 1")


def _add_size_words(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--scale",
        type=positive_float,
        default=_DEFAULT_SCALE,
        metavar="NUMBER",
        help="Output per input pixels along a side: any number above 0 (from 1 on without "
        "--upscale).",
    )
    sizes.add_argument(
        "--size",
        type=_size,
        metavar="WxH",
        help="With --upscale: width and height of the result in pixels.",
    )
    parser.add_argument(
        "--format",
        choices=[suffix[1:] for suffix in IMAGE_SUFFIXES],
        help="With --upscale: format of the result. Default: that of the picture.",
    )
    parser.add_argument(
        "--class_map",
        action="store_true",
        help="With --upscale: also write which upsampler made which pixel, as colours over the "
        "result.",
    )


def _add_model_words(parser: argparse.ArgumentParser) -> None:
    add_config_words(parser, required=False)
    add_weights_word(parser)
    parser.add_argument(
        "--original_weights",
        type=Path,
        metavar="PATH",
        help="Without --upscale: checkpoint of the original network. Default: the weights in "
        "save/<PCSR's backbone>-x<scale>/; without any, PCSR runs alone.",
    )
    parser.add_argument(
        "--original_config",
        type=Path,
        metavar="YAML",
        help="Config of the original network. Default: its checkpoint says what it is.",
    )
    parser.add_argument(
        "--model_scale",
        type=_model_scale,
        default=MODEL_SCALE,
        metavar="NUMBER|any",
        help="Scale that the model was trained at. Other sizes are computed at it and resized by "
        "bicubic, which is much better than asking of the model what it never learned. `any`: it "
        "was trained at many scales, and computes every size itself.",
    )


def _size(text: str) -> tuple[int, int]:
    """`WxH` as (H, W)."""
    match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text, re.ASCII)
    if match is None or min(size := (int(match[2]), int(match[1]))) < 1:
        raise argparse.ArgumentTypeError(
            f"expected width x height in pixels, such as 1920x1080, not `{text}`"
        )
    return size


def _fraction(text: str) -> float:
    value = finite_float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not `{text}`")
    return value


def _model_scale(text: str) -> float | None:
    return None if text == "any" else positive_float(text)
