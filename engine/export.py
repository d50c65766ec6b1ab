"""Write a network as an ONNX file, for runtimes without PyTorch.

``python -m engine.export --config configs/carn-pcsr-phase1.yaml --output results/tmp/carn.onnx``

The file takes images of any size and number. A PCSR network has its routing in it: the trade-off k
is an input beside the image, and the class of every pixel an output beside the SR image.
"""

import argparse
import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.inference_words import add_weights_word, output_file, upsampler_index
from engine.loading import load_model
from models.backbones.base import SRNetwork
from models.onnx_graph import RoutedGraph, UniformGraph
from models.pcsr import PCSR
from utils.atomic import replace_file
from utils.checkpoint import find_weights
from utils.cli import Parser, add_config_words, positive_int, run
from utils.config import load_config
from utils.errors import UserError
from utils.flops import PcsrCost

OPSET = 18
_NEEDED = ("onnx", "onnxscript")
_RUNTIME = "onnxruntime"
# Sizes (B, h, w) that a file is tried on: none is the one that it was made with.
_TRIED = ((1, 17, 23), (2, 9, 6))
_EXAMPLE = (2, 12, 10)
# What float32 arithmetic in another order may change, in images of range 1, and in a probability
# so near a threshold that the class changes.
_TOLERANCE = 1e-4
_CLASSES_TOLERANCE = 1e-3
_PCSR_SCALE = 4


@dataclass(frozen=True)
class Exported:
    """What goes into a file.

    Attributes:
        graph: takes the inputs.
        inputs, outputs: their names.
        scale: output pixels per LR pixel.
        about: what else there is to say of it; kept in the file.
    """

    graph: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scale: int
    about: dict[str, str]

    @property
    def is_routed(self) -> bool:
        """Whether it has an input k."""
        return len(self.inputs) == 2

    def arguments(self, batch: int, h: int, w: int, k: float = 0.0) -> tuple[Tensor, ...]:
        """Inputs of a size; the same at each call."""
        lr = torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(h))
        return (lr, torch.tensor([k])) if self.is_routed else (lr,)


def of_original(model: SRNetwork) -> Exported:
    """An original network: `lr` (B, 3, h, w) to `sr` (B, 3, scale h, scale w)."""
    return Exported(model, ("lr",), ("sr",), model.scale, {})


def of_pcsr(
    model: PCSR, scale: int, index: int | None = None, *, refinement: bool = True
) -> Exported:
    """A PCSR network at an integer scale.

    Args:
        index: the upsampler of all pixels; None to route them, where there is a choice.
        refinement: of routed pixels.
    """
    if index is None and len(model.upsamplers) > 1:
        # Relative costs depend on the scale only, where that is an integer.
        log_costs = PcsrCost.of(model).log_costs((1, 1), (scale, scale))
        graph = RoutedGraph(model, scale, log_costs, refinement=refinement)
        words = {"refinement": str(refinement).lower(), "log_costs": repr(list(log_costs))}
        return Exported(graph, ("lr", "k"), ("sr", "classes"), scale, words)
    index = range(len(model.upsamplers))[-1 if index is None else index]
    return Exported(
        UniformGraph(model, scale, index), ("lr",), ("sr",), scale, {"upsampler": str(index)}
    )


def write(exported: Exported, path: Path) -> float | None:
    """Write the file, whole or not at all; one that is there is replaced.

    Returns:
        :func:`difference` of it.

    Raises:
        UserError: a package that writes ONNX is missing; onnxruntime makes other pictures of it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX files need more packages: pip install {' '.join(_NEEDED)}")
    dynamic = torch.export.Dim.DYNAMIC
    shapes = [{0: dynamic, 2: dynamic, 3: dynamic}, {}][: len(exported.inputs)]
    graph = exported.graph.eval()
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph,
            exported.arguments(*_EXAMPLE),
            dynamo=True,
            dynamic_shapes=tuple(shapes),
            input_names=exported.inputs,
            output_names=exported.outputs,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    about = {"scale": str(exported.scale), **exported.about}
    program.model.metadata_props.update(about)
    with replace_file(path) as temporary:
        program.save(temporary, external_data=False)
        return difference(exported, temporary)


def difference(exported: Exported, path: Path) -> float | None:
    """The largest difference of what onnxruntime makes of a file from what PyTorch makes.

    Returns:
        of images in the range 1; None where onnxruntime is not installed.

    Raises:
        UserError: they differ by more than rounding.
    """
    if importlib.util.find_spec(_RUNTIME) is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # All pixels light, all heavy: no class hangs on a rounding.
    trials = [(size, k) for size in _TRIED for k in ((1e9, -1e9) if exported.is_routed else (0.0,))]
    largest = 0.0
    for size, k in trials:
        ours, theirs = _both(exported, session, exported.arguments(*size, k))
        largest = max(largest, float(np.abs(ours[0] - theirs[0]).max()))
    wrong = not largest <= _TOLERANCE
    if exported.is_routed:
        ours, theirs = _both(exported, session, exported.arguments(*_TRIED[0]))
        wrong |= bool((ours[1] != theirs[1]).mean() > _CLASSES_TOLERANCE)
    if wrong:
        raise UserError("the ONNX file gives other pictures under onnxruntime than PyTorch does")
    return largest


def _both(exported: Exported, session: Any, arguments: Sequence[Tensor]) -> list[list[np.ndarray]]:
    with torch.no_grad():
        outputs = exported.graph(*arguments)
    ours = [x.numpy() for x in (outputs if exported.is_routed else (outputs,))]
    named = {n: x.numpy() for n, x in zip(exported.inputs, arguments, strict=True)}
    return [ours, session.run(list(exported.outputs), named)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that nobody asked for, and of its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Write a network as an ONNX file. It takes `lr` (B, 3, h, w), float RGB in "
        "[0, 1] of any size, and gives `sr` (B, 3, scale h, scale w), to be clamped to [0, 1]. A "
        "PCSR network also takes `k` (1,), the trade-off that --k is elsewhere, and gives "
        "`classes` (B, scale h, scale w) uint8, each pixel's upsampler, 0 the lightest. Needs the "
        "packages onnx and onnxscript; where onnxruntime is installed, too, the file is compared "
        "with PyTorch.",
        example="python -m engine.export --config configs/carn-pcsr-phase1.yaml "
        "--output results/tmp/carn-pcsr.onnx",
    )
    add_config_words(parser)
    add_weights_word(parser)
    parser.add_argument(
        "--output", required=True, type=_onnx_file, metavar="ONNX", help="The file to write."
    )
    parser.add_argument(
        "--scale",
        type=positive_int,
        metavar="N",
        help=f"Of a PCSR network: a whole number. Default: {_PCSR_SCALE}.",
    )
    parser.add_argument(
        "--upsampler",
        type=upsampler_index,
        metavar="heavy|light|INDEX",
        help="Of a PCSR network: every pixel by one upsampler, without routing.",
    )
    parser.add_argument(
        "--no_refinement",
        action="store_true",
        help="Do not smooth the borders between regions that different upsamplers made.",
    )
    return parser.parse_args()


def main() -> None:
    """Parse the command line, write the file, and compare."""
    args = parse_arguments()
    config = load_config(args.config, args.overrides)
    weights = args.weights or find_weights(Path("save") / config.name)
    model = load_model(weights, torch.device("cpu"), config)
    exported = _exported(model, args)
    exported.about.update(config=config.name, backbone=_backbone(config.model))
    differs = write(exported, args.output)
    told = (
        f"not compared with PyTorch: {_RUNTIME} is not installed"
        if differs is None
        else f"{_RUNTIME} differs from PyTorch by {differs:.1e} at most"
    )
    shown = ", ".join(exported.inputs), ", ".join(exported.outputs)
    print(
        f"{args.output}: {config.name} from {weights}, x{exported.scale}, {shown[0]} -> "
        f"{shown[1]}, {args.output.stat().st_size / 1e6:.2f} MB; {told}"
    )


def _exported(model: nn.Module, args: argparse.Namespace) -> Exported:
    if isinstance(model, PCSR):
        if args.upsampler is not None and args.upsampler >= len(model.upsamplers):
            count = len(model.upsamplers)
            raise UserError(f"--upsampler {args.upsampler}: the model has {count}, counted from 0")
        scale = args.scale or _PCSR_SCALE
        return of_pcsr(model, scale, args.upsampler, refinement=not args.no_refinement)
    if not isinstance(model, SRNetwork) or model.no_upsampling:
        raise UserError("only PCSR models and original super-resolution networks can be exported")
    if args.scale not in (None, model.scale):
        raise UserError(f"--scale {args.scale}: the network is for x{model.scale}")
    if args.upsampler is not None:
        raise UserError("--upsampler: an original network has none to choose from")
    return of_original(model)


def _backbone(spec: dict[str, Any]) -> str:
    return str(spec["args"].get("encoder_spec", spec)["name"])


def _onnx_file(text: str) -> Path:
    path = output_file(text)
    if path.suffix.lower() != ".onnx":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .onnx, not `{text}`")
    return path


if __name__ == "__main__":
    run(main)
