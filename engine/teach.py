"""Make training pairs from a trained network: LR pictures, and what it makes of them.

``python -m engine.teach --config configs/soap/srresnet-x4.yaml --hr_data load/photos \
--output local/taught``

A network that learns from another one's pictures instead of the photographs themselves
(distillation, Hinton et al. 2015) has the same aim with less noise: a photograph has details that
no network can know from LR, and the teacher's picture, like the best a network can do, is their
mean. The pairs are read by `paired-image-folders`.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from datasets.resize import imresize_uint8
from datasets.wrappers import crop_to_scale
from engine.demo.files import prepare_folder, result_stems
from engine.inference_words import add_weights_word
from engine.loading import load_model
from engine.restore import OriginalRestorer, PcsrRestorer
from engine.self_ensemble import TURNS, SelfEnsemble, Turns
from models.backbones.base import SRNetwork
from models.pcsr import PCSR
from models.routing import FixedRouting
from utils.allocator import keep_freed_blocks
from utils.atomic import write_text
from utils.checkpoint import find_weights
from utils.cli import (
    Parser,
    add_config_words,
    add_device_words,
    check_device_words,
    positive_int,
    run,
)
from utils.config import load_config
from utils.device import pick_device
from utils.errors import UserError
from utils.images import Picture, list_images, read_rgb, to_array, to_tensor, write_picture
from utils.log import set_up

# What a folder of pairs was made with and from.
ABOUT_NAME = "taught.json"
LR_FOLDER, SR_FOLDER = "lr", "sr"
_PCSR_SCALE = 4


class Teacher:
    """A network whose pictures others learn from.

    Args:
        model: an original network, or a PCSR model, of which the heaviest upsampler is taken.
        scale: HR pixels per LR pixel, a whole number; an original network has its own.
        turns: over how many copies of an image the mean is taken, see `SelfEnsemble`.

    Raises:
        UserError: a scale that an original network does not have.
    """

    def __init__(self, model: torch.nn.Module, scale: int | None, turns: Turns) -> None:
        if isinstance(model, PCSR):
            self.scale = scale or _PCSR_SCALE
            self._restore = SelfEnsemble(PcsrRestorer(model, FixedRouting(-1)), turns)
        else:
            assert isinstance(model, SRNetwork)
            original = OriginalRestorer(model)
            self.scale = original.scale
            if scale not in (None, self.scale):
                raise UserError(f"--scale {scale}: this network's scale is {self.scale}")
            self._restore = SelfEnsemble(lambda lr, size: original(lr), turns)
        self._device = next(model.parameters()).device

    def pair(self, hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """LR (h, w, 3) and the network's picture of it (scale h, scale w, 3), both uint8.

        LR is MATLAB's bicubic of `hr`, (scale h, scale w, 3) uint8, rounded as files are.
        """
        height, width = hr.shape[:2]
        lr = imresize_uint8(hr, size=(height // self.scale, width // self.scale))
        sr = self._restore(to_tensor(lr).to(self._device), (height, width)).sr
        return lr, to_array(sr)


def chosen(paths: Sequence[Path], count: int | None, seed: int) -> list[Path]:
    """`count` of the pictures, drawn at random; all, in their order, without a count."""
    if count is None or count >= len(paths):
        return list(paths)
    drawn = np.random.default_rng(seed).permutation(len(paths))[:count]
    return [paths[index] for index in sorted(drawn)]


def window(hr: np.ndarray, side: int | None, seed: int, name: str) -> np.ndarray:
    """A square of `side` pixels (less where the picture has less) somewhere in `hr` (H, W, 3).

    Where it is depends on `seed` and `name` alone.
    """
    if side is None:
        return hr
    digest = hashlib.sha256(name.encode()).digest()
    generator = np.random.default_rng([seed, *digest])
    top, left = (int(generator.integers(max(0, n - side) + 1)) for n in hr.shape[:2])
    return hr[top : top + side, left : left + side]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Make training pairs from a trained network: LR pictures, and what the network "
        "makes of them, for another network to learn from. Stopped, the same command goes on.",
        example="python -m engine.teach --config configs/soap/srresnet-x4.yaml "
        "--weights save/srresnet-x4/release.pth --hr_data load/photos --output local/taught",
    )
    add_config_words(parser)
    add_weights_word(parser)
    parser.add_argument(
        "--hr_data",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder of photographs. LR is made from them by bicubic, rounded to 8 bits.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"Folder for the pairs: {LR_FOLDER}/ and {SR_FOLDER}/, PNG, of equal names. In a "
        "config: `paired-image-folders` with these as root_path_lr and root_path_hr.",
    )
    parser.add_argument(
        "--turns",
        type=int,
        choices=TURNS,
        default=8,
        help="Mean over so many flipped and turned copies of each image.",
    )
    parser.add_argument(
        "--scale",
        type=positive_int,
        metavar="N",
        help=f"HR pixels per LR pixel. Default: an original network's own, {_PCSR_SCALE} for PCSR.",
    )
    parser.add_argument(
        "--pictures",
        type=positive_int,
        metavar="N",
        help="So many of the pictures, drawn at random. Default: all.",
    )
    parser.add_argument(
        "--window",
        type=positive_int,
        metavar="N",
        help="Of each picture only a square of N x N LR pixels, at a place drawn at random. "
        "Default: the whole picture.",
    )
    parser.add_argument(
        "--seed", type=positive_int, default=1, metavar="N", help="For what is drawn at random."
    )
    add_device_words(parser)
    return parser.parse_args()


def main() -> None:
    """Parse the command line, make the pairs that are not there, and say so."""
    args = parse_arguments()
    check_device_words(args)
    set_up(main=True)
    keep_freed_blocks()
    config = load_config(args.config, args.overrides)
    weights = args.weights or find_weights(Path("save") / config.name)
    model = load_model(weights, pick_device(args.device, args.gpu), config)
    teacher = Teacher(model, args.scale, args.turns)
    paths = chosen(list_images(args.hr_data), args.pictures, args.seed)
    stems = result_stems(paths)
    for folder in (args.output, args.output / LR_FOLDER, args.output / SR_FOLDER):
        prepare_folder(folder, "--output")
    _claim(args.output, _about(args, weights, teacher))
    side = None if args.window is None else args.window * teacher.scale
    made = 0
    for path in tqdm(paths, unit="picture", disable=None):
        lr_path, sr_path = (
            args.output / folder / f"{stems[path]}.png" for folder in (LR_FOLDER, SR_FOLDER)
        )
        if lr_path.exists() and sr_path.exists():
            continue
        hr, _ = crop_to_scale(
            window(read_rgb(path), side, args.seed, path.name), teacher.scale, path
        )
        for target, rgb in zip((lr_path, sr_path), teacher.pair(hr), strict=True):
            write_picture(target, Picture(rgb))
        made += 1
    there = len(paths) - made
    print(f"{args.output}: {len(paths)} pairs" + (f", {there} of them from before" * bool(there)))


def _about(args: argparse.Namespace, weights: Path, teacher: Teacher) -> dict[str, Any]:
    """What decides about the pairs' pixels."""
    return {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "hr_data": str(args.hr_data),
        "scale": teacher.scale,
        "turns": args.turns,
        "pictures": args.pictures,
        "window": args.window,
        "seed": args.seed,
    }


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Note what the pairs are made with.

    Raises:
        UserError: the folder's are made with something else, or it holds other files.
    """
    path = folder / ABOUT_NAME
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: name another --output") from error
        if before != about:
            keys = [key for key in about if about[key] != before.get(key)]
            raise UserError(
                f"the pairs in {folder} were made with other {', '.join(keys)}: name another "
                "--output"
            )
        return
    if any(any((folder / name).iterdir()) for name in (LR_FOLDER, SR_FOLDER)):
        raise UserError(f"{folder} holds pictures that are not from here: name another --output")
    write_text(path, json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
