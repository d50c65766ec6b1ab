"""Make training pairs from a trained network: LR pictures, and what it makes of them.

``python -m engine.teach --config configs/srresnet-x4.yaml --weights save/srresnet-x4/release.pth \
--hr_data load/photos --output load/taught``

A network that learns from another one's pictures instead of the photographs themselves
(distillation, Hinton et al. 2015) has much the same aim with less noise: a photograph has details
that no network can know from LR, and the teacher's picture has about the mean of what they can be.
The pairs are read by `paired-image-folders`.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from datasets.resize import imresize_uint8
from datasets.wrappers import crop_to_scale
from engine.evaluate_cli import is_pcsr
from engine.evaluation import Restore
from engine.inference_words import add_weights_word
from engine.loading import load_original, load_pcsr, weights_of
from engine.memory import memory_named
from engine.picture_files import prepare_folder, result_stems
from engine.restore import OriginalRestorer, PcsrRestorer
from engine.self_ensemble import TURNS, SelfEnsemble, Turns
from models.routing import FixedRouting
from utils.allocator import keep_freed_blocks
from utils.atomic import remove_leftovers, write_text
from utils.cli import (
    EXIT_USER_ERROR,
    Parser,
    add_config_words,
    add_device_words,
    check_device_words,
    natural_int,
    positive_int,
    run,
)
from utils.config import Config, load_config
from utils.device import pick_device
from utils.errors import UserError
from utils.images import Picture, list_images, read_rgb, to_array, to_tensor, write_picture
from utils.lock import locked
from utils.log import set_up

# What a folder of pairs was made with and from.
ABOUT_NAME = "taught.json"
LR_FOLDER, SR_FOLDER = "lr", "sr"
_PCSR_SCALE = 4


class Teacher:
    """A network whose pictures others learn from.

    Args:
        restore: runs it.
        scale: HR pixels per LR pixel, a whole number.
        turns: over how many copies of an image the mean is taken, see `SelfEnsemble`.
        device: where it runs.
    """

    def __init__(self, restore: Restore, scale: int, turns: Turns, device: torch.device) -> None:
        self.scale = scale
        self._restore = SelfEnsemble(restore, turns)
        self._device = device

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

    Where it is depends on `seed`, `name` and the picture's size alone.
    """
    if side is None:
        return hr
    digest = hashlib.sha256(os.fsencode(name)).digest()
    generator = np.random.default_rng([seed, *digest])
    top, left = (int(generator.integers(max(0, n - side) + 1)) for n in hr.shape[:2])
    return hr[top : top + side, left : left + side]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Make training pairs from a trained network: LR pictures, and what the network "
        "makes of them, for another network to learn from. Stopped, the same command goes on.",
        example="python -m engine.teach --config configs/srresnet-x4.yaml "
        "--weights save/srresnet-x4/release.pth --hr_data load/photos --output load/taught",
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
        "--seed", type=natural_int, default=1, metavar="N", help="For what is drawn at random."
    )
    add_device_words(parser)
    return parser.parse_args()


def main() -> int:
    """Parse the command line, make the pairs that are not there, and say so."""
    args = parse_arguments()
    check_device_words(args)
    set_up(main=True)
    keep_freed_blocks()
    config = load_config(args.config, args.overrides)
    weights = weights_of(config, args.weights)
    teacher, network = _load(args, config, weights)
    paths = chosen(list_images(args.hr_data.expanduser()), args.pictures, args.seed)
    output = args.output.expanduser()
    with locked(output):
        _claim(output, _about(args, network, teacher.scale, paths))
        for folder in (LR_FOLDER, SR_FOLDER):
            prepare_folder(output / folder, "--output")
        print(f"teacher: {config.name} from {weights}", flush=True)
        side = None if args.window is None else args.window * teacher.scale
        before, failures = _make(teacher, paths, output, side, args.seed)
    made = len(paths) - len(failures)
    print(f"{output}: {made} pairs" + (f", {before} of them from before" if before else ""))
    for reason in failures.values():
        print(f"not used: {reason}", file=sys.stderr)
    return EXIT_USER_ERROR if failures else 0


def _make(
    teacher: Teacher, paths: Sequence[Path], output: Path, side: int | None, seed: int
) -> tuple[int, dict[Path, str]]:
    """Make the pairs that are not there; how many were, and why others cannot be made."""
    before, failures = 0, {}
    for path, stem in tqdm(result_stems(paths).items(), unit="picture", disable=None):
        lr_path, sr_path = (output / folder / f"{stem}.png" for folder in (LR_FOLDER, SR_FOLDER))
        if lr_path.exists() and sr_path.exists():
            before += 1
            continue
        try:
            with memory_named(f"image {path}: not enough memory; a smaller --window takes less"):
                part = window(read_rgb(path), side, seed, path.name)
                hr, _ = crop_to_scale(part, teacher.scale, path)
                pair = teacher.pair(hr)
        except UserError as error:
            failures[path] = str(error)
            continue
        for target, rgb in zip((lr_path, sr_path), pair, strict=True):
            remove_leftovers(target)
            write_picture(target, Picture(rgb))
    return before, failures


def _load(
    args: argparse.Namespace, config: Config, weights: Path
) -> tuple[Teacher, torch.nn.Module]:
    """The teacher, and its network.

    Raises:
        UserError: weights of another model, or a scale that an original network does not have.
    """
    device = pick_device(args.device, args.gpu)
    if is_pcsr(config):
        pcsr = load_pcsr(weights, device, config)
        restorer = PcsrRestorer(pcsr, FixedRouting(-1))
        return Teacher(restorer, args.scale or _PCSR_SCALE, args.turns, device), pcsr
    network = load_original(weights, device, config)
    if args.scale not in (None, network.scale):
        raise UserError(f"--scale {args.scale}: this network's scale is {network.scale}")
    return Teacher(OriginalRestorer(network), network.scale, args.turns, device), network


def _about(
    args: argparse.Namespace, network: torch.nn.Module, scale: int, paths: Sequence[Path]
) -> dict[str, Any]:
    """What decides about the pairs' pixels."""
    digest = hashlib.sha256(str(network).encode())
    for name, values in (*network.named_parameters(), *network.named_buffers()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return {
        "network": digest.hexdigest(),
        "scale": scale,
        "turns": args.turns,
        "window": args.window,
        "seed": args.seed,
        "pictures": {path.name: _bytes_of(path) for path in paths},
    }


def _bytes_of(path: Path) -> int:
    """Of a link to nothing 0: it is told when its turn comes, and keeps no others."""
    return path.stat().st_size if path.exists() else 0


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Note what the pairs are made with.

    Raises:
        UserError: the folder's are made with something else, or it holds other files.
    """
    path = folder / ABOUT_NAME
    if path.is_file():
        _check_same(path, about)
        return
    for name in (LR_FOLDER, SR_FOLDER):
        if (folder / name).is_dir() and not _is_empty(folder / name):
            raise UserError(
                f"{folder / name} holds files that are not from here: name another --output"
            )
    prepare_folder(folder, "--output")
    write_text(path, json.dumps(about, indent=1) + "\n")


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing but what the system keeps there (.DS_Store and the like)."""
    return all(path.name.startswith(".") for path in folder.iterdir())


def _check_same(path: Path, about: dict[str, Any]) -> None:
    """Refuse pairs that were made with something else than `about`, as the note at `path` says."""
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
        pictures = dict(before.get("pictures", {}))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: name another --output") from error
    keys = sorted(key for key in {*before, *about} if before.get(key) != about.get(key))
    if not keys:
        return
    what = ", ".join(keys)
    if keys == ["pictures"]:
        names = {*pictures, *about["pictures"]}
        differ = [n for n in names if pictures.get(n) != about["pictures"].get(n)]
        what = f"pictures ({min(differ)} for one)"
    raise UserError(
        f"the pairs in {path.parent} were made with other {what}: name another --output"
    )


if __name__ == "__main__":
    run(main)
