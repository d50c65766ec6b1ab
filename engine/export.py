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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.evaluate_cli import is_pcsr
from engine.finite import check_finite
from engine.inference_words import (
    add_weights_word,
    check_upsampler,
    upsampler_index,
)
from engine.loading import load_original, load_pcsr, weights_of
from models.backbones.base import SRNetwork
from models.onnx_graph import RoutedGraph, UniformGraph
from models.pcsr import PCSR
from utils.atomic import replace_file
from utils.cli import Parser, add_config_words, one_line, positive_int, run
from utils.config import Config, load_config
from utils.errors import UserError
from utils.flops import PcsrCost
from utils.output_words import onnx_file

OPSET = 18
_NEEDED = ("onnx", "onnxscript")
_RUNTIME = "onnxruntime"
# Sizes (B, h, w) that a file is tried on: none is the one that it was made with.
_TRIED = ((1, 17, 23), (2, 9, 6))
_EXAMPLE = (2, 12, 10)
# What float32 arithmetic in another order may change: images, as a share of their largest value or
# of 1, and the classes of pixels whose two upsamplers are all but equally good, a share of them
# and one.
_TOLERANCE = 1e-4
_CLASSES_TOLERANCE = 1e-3
_PCSR_SCALE = 4
_MOST_SCALE = 64
# With these k all pixels are light, or heavy.
K_LIGHT, K_HEAVY = 1e9, -1e9


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
        UserError: a package that writes ONNX is missing; and see :func:`difference`.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX files need more packages: pip install {' '.join(_NEEDED)}")
    axes = {0: "batch", 2: "height", 3: "width"}
    shapes = [{axis: torch.export.Dim(name) for axis, name in axes.items()}, {}]
    graph = exported.graph.eval()
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph,
            exported.arguments(*_EXAMPLE),
            dynamo=True,
            dynamic_shapes=tuple(shapes[: len(exported.inputs)]),
            input_names=exported.inputs,
            output_names=exported.outputs,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    _strip(program.model)
    program.model.metadata_props.update({"scale": str(exported.scale), **exported.about})
    with replace_file(path) as temporary:
        program.save(temporary, external_data=False)
        return difference(exported, temporary)


def _strip(model: Any) -> None:
    """Take out where in which source each operation comes from: half of a small file."""
    for node in model.graph.all_nodes():
        for part in (node, *node.outputs):
            part.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def difference(exported: Exported, path: Path) -> float | None:
    """The largest difference of what onnxruntime makes of a file from what PyTorch makes.

    Returns:
        of images in the range 1; None where onnxruntime is not installed.

    Raises:
        UserError: they differ by more than rounding, or onnxruntime cannot run the file.
    """
    if importlib.util.find_spec(_RUNTIME) is None:
        return None
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        # All pixels light, all heavy, and both.
        ks = (K_LIGHT, K_HEAVY, 0.0) if exported.is_routed else (0.0,)
        return max(_trial(exported, session, size, k) for size in _TRIED for k in ks)
    except UserError:
        raise
    except Exception as error:  # onnxruntime's are of many kinds
        raise UserError(
            f"{_RUNTIME} cannot run the ONNX file, update or uninstall it: {one_line(error)}"
        ) from error


def _trial(exported: Exported, session: Any, size: tuple[int, int, int], k: float) -> float:
    """The largest difference on one input; see :func:`difference`."""
    arguments = exported.arguments(*size, k)
    with torch.no_grad():
        outputs = exported.graph(*arguments)
    ours: tuple[Tensor, ...] = outputs if exported.is_routed else (outputs,)
    named = {name: x.numpy() for name, x in zip(exported.inputs, arguments, strict=True)}
    theirs = [torch.from_numpy(x) for x in session.run(list(exported.outputs), named)]
    check_finite(ours[0])
    apart = (ours[0] - theirs[0]).abs() / ours[0].abs().max().clamp(min=1)
    wrong = False
    if exported.is_routed:
        _, classes = ours
        other = (classes != theirs[1]).float()
        wrong = bool(other.sum() > 1 + _CLASSES_TOLERANCE * other.numel())
        # Refinement looks at the neighbours, too.
        near_other = F.max_pool2d(other[:, None], 3, stride=1, padding=1)
        apart = apart.where(near_other == 0, 0.0)
    largest = float(apart.max())
    if wrong or not largest <= _TOLERANCE:
        raise UserError(f"{_RUNTIME} makes other pictures of the ONNX file than PyTorch does")
    return largest


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
        "PCSR network also takes `k` (1,) float, the trade-off that --k is elsewhere, one for all "
        "images, and gives `classes` (B, scale h, scale w) uint8, each pixel's upsampler, 0 the "
        "lightest. Images are worked on whole. Needs the packages onnx and onnxscript; where "
        "onnxruntime is installed, too, the file is compared with PyTorch.",
        example="python -m engine.export --config configs/carn-pcsr-phase1.yaml "
        "--output results/tmp/carn-pcsr.onnx",
    )
    add_config_words(parser)
    add_weights_word(parser)
    parser.add_argument(
        "--output", required=True, type=onnx_file, metavar="ONNX", help="The file to write."
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
    weights = weights_of(config, args.weights)
    load = _pcsr if is_pcsr(config) else _original
    exported = load(weights, config, args)
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


def _pcsr(weights: Path, config: Config, args: argparse.Namespace) -> Exported:
    scale = args.scale or _PCSR_SCALE
    if scale > _MOST_SCALE:
        raise UserError(f"--scale {scale}: {_MOST_SCALE} is the most that a file can have")
    model = load_pcsr(weights, torch.device("cpu"), config)
    check_upsampler(args.upsampler, len(model.upsamplers))
    return of_pcsr(model, scale, args.upsampler, refinement=not args.no_refinement)


def _original(weights: Path, config: Config, args: argparse.Namespace) -> Exported:
    if args.upsampler is not None:
        raise UserError("--upsampler: an original network has none to choose from")
    if args.no_refinement:
        raise UserError("--no_refinement: an original network has no borders to refine")
    model = load_original(weights, torch.device("cpu"), config)
    if args.scale not in (None, model.scale):
        raise UserError(f"--scale {args.scale}: the network is for x{model.scale}")
    return of_original(model)


def _backbone(spec: dict[str, Any]) -> str:
    return str((spec.get("args") or {}).get("encoder_spec", spec)["name"])


if __name__ == "__main__":
    run(main)
