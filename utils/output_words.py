"""`type=` of options that name a file to write: refused at once, not after all the work.

Named by mistake, a picture, weights or a config would be lost, so each takes its own suffix only.
"""

import argparse
from pathlib import Path

from utils.atomic import is_device, obstacle
from utils.images import IMAGE_SUFFIXES

_WEIGHTS = (".pth", ".safetensors")
_NOT_JSON = (*IMAGE_SUFFIXES, *_WEIGHTS, ".pt", ".onnx", ".yaml", ".yml")


def json_file(text: str) -> Path:
    """A file for JSON, or a device or a pipe."""
    if is_device(path := Path(text)):
        if not path.exists():
            raise argparse.ArgumentTypeError(f"there is no {text} to write to")
        return path
    path = _file(text)
    if path.suffix.lower() in _NOT_JSON:
        raise argparse.ArgumentTypeError(f"`{text}` is the name of another kind of file")
    return path


def png_file(text: str) -> Path:
    """A file for a plot."""
    return _file_with(text, ".png")


def onnx_file(text: str) -> Path:
    """A file for a network."""
    return _file_with(text, ".onnx")


def new_weights_file(text: str) -> Path:
    """A file for weights, that is not there yet."""
    path = _file_with(text, *_WEIGHTS)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{text} exists: name a new file")
    return path


def add_new_weights_word(parser: argparse.ArgumentParser) -> None:
    """``--out``."""
    parser.add_argument(
        "--out",
        required=True,
        type=new_weights_file,
        metavar="WEIGHTS",
        help="Checkpoint to write, a new file: .pth, or .safetensors.",
    )


def _file_with(text: str, *suffixes: str) -> Path:
    path = _file(text)
    if path.suffix.lower() not in suffixes:
        expected = " or ".join(suffixes)
        raise argparse.ArgumentTypeError(f"expected a name that ends in {expected}, not `{text}`")
    return path


def _file(text: str) -> Path:
    path = Path(text)
    if is_device(path):
        raise argparse.ArgumentTypeError(f"`{text}` is a device or a pipe: name a file")
    if text in ("", "-") or path.is_dir():
        raise argparse.ArgumentTypeError(f"`{text}` is no file name")
    if (there := obstacle(path.parent)) is not None:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {there} is not a writable folder")
    return path
