"""The command-line words of everything that runs a PCSR model: test_pcsr.py and the demo."""

import argparse
import logging
from pathlib import Path

from engine.budget import Budget, BudgetPlan, OriginalCost
from engine.engines import ENGINES
from models.reference import PIXEL_BATCH_SIZE
from models.routing import AdaptiveRouting, FixedRouting, KRouting, Routing, check_adaptive
from utils.cli import finite_float, positive_int
from utils.errors import UserError
from utils.output_words import json_file

_log = logging.getLogger(__name__)

_HEAVIEST = -1


def add_weights_word(parser: argparse.ArgumentParser) -> None:
    """``--weights``."""
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="Checkpoint of the model, .pth or .safetensors. Default: iter_last.pth in "
        "save/<config name>/, else release.pth there.",
    )


def add_json_word(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument(
        "--json",
        type=json_file,
        metavar="PATH",
        help="Also write every number to this file.",
    )


def add_routing_words(parser: argparse.ArgumentParser) -> None:
    """Which upsampler each pixel gets, and what happens to it then; see :func:`routing_from`."""
    parser.add_argument(
        "--k",
        type=finite_float,
        metavar="NUMBER",
        help="Trade-off: each pixel gets the upsampler with the largest probability / cost^k. "
        "0, the default, takes the most probable one; the larger, the cheaper; below 0 the better.",
    )
    parser.add_argument(
        "--adaptive",
        action="store_true",
        help="Find the threshold between easy and hard pixels for each image; --k is then ignored.",
    )
    parser.add_argument(
        "--upsampler",
        type=upsampler_index,
        metavar="heavy|light|INDEX",
        help="Send every pixel to one upsampler (INDEX counts from 0, the lightest); --k is then "
        "ignored.",
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="SHARE|GFLOPS|TIME",
        help="What an image may cost: 0.6 of the FLOPs that the original network executes on it, "
        "60G or 500M executed FLOPs, 250ms or 0.25s on this device. The pixels that want it most "
        "get the heavier upsampler until the budget is used up.",
    )
    parser.add_argument(
        "--no_refinement",
        action="store_true",
        help="Do not smooth the borders between regions that different upsamplers made.",
    )
    parser.add_argument(
        "--pixel_batch_size",
        type=positive_int,
        default=PIXEL_BATCH_SIZE,
        metavar="N",
        help="At most this many pixels go through an upsampler at once, in the reference engine "
        "and in plain torch: fewer take less memory. Compiled kernels need no such limit.",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="fast",
        help="fast, or reference: the straightforward computation, slower, the same picture.",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "auto"),
        default="fp32",
        help="Arithmetic of the network. auto: bf16 where the device has matrix units for it, else "
        "fp32. Half precision moves PSNR by hundredths of a dB at most.",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="The backbone by torch.compile, on whole images: for GPUs, and many images of one "
        "size. On a CPU it takes 1.1 to 1.4 times as long as without (CARN), after 15 s.",
    )


def add_self_ensemble_word(parser: argparse.ArgumentParser) -> None:
    """``--self_ensemble``."""
    parser.add_argument(
        "--self_ensemble",
        action="store_true",
        help="Mean over the 8 flipped and turned copies of each image: better, at 8 times the "
        "cost. Each copy is routed, and has its budget, on its own.",
    )


def routing_from(
    args: argparse.Namespace, upsamplers: int, original: OriginalCost
) -> Routing | BudgetPlan:
    """The routing that the words of :func:`add_routing_words` ask for.

    Args:
        upsamplers: how many the model has. A model of one (phase 0) uses it, whatever the words
            (a warning says so), but can keep to no budget.
        original: what a budget may be a share of.

    Raises:
        UserError: words that exclude each other, that are for another number of upsamplers, or
            name one that the model does not have.
    """
    check_exclusive(args)
    check_upsampler(args.upsampler, upsamplers)
    if upsamplers == 1:
        if args.budget is not None:
            raise UserError("--budget: the model has one upsampler, so there is nothing to choose")
        given = {"k": args.k is not None, "adaptive": args.adaptive}
        for word, is_given in {**given, "no_refinement": args.no_refinement}.items():
            if is_given:
                _log.warning("--%s changes nothing: the model has one upsampler", word)
        return FixedRouting(_HEAVIEST)
    if args.upsampler is not None:
        return FixedRouting(args.upsampler)
    if args.budget is not None:
        return BudgetPlan(args.budget, original)
    if args.adaptive:
        check_adaptive(upsamplers)
        return AdaptiveRouting()
    return KRouting(args.k or 0.0)


def warn_of_idle_original(args: argparse.Namespace) -> None:
    """Say where ``--original_config`` is named and no budget is a share of it."""
    is_share = args.budget is not None and args.budget.unit == "share"
    if args.original_config is not None and not is_share:
        _log.warning("--original_config changes nothing: no share of the original is asked for")


def check_upsampler(index: int | None, upsamplers: int) -> None:
    """Refuse the ``--upsampler`` that a model of so many does not have."""
    if index is not None and index >= upsamplers:
        raise UserError(f"--upsampler {index}: the model has {upsamplers}, counted from 0")


def check_exclusive(args: argparse.Namespace) -> None:
    """Refuse two routings at once; only --k may stand beside --adaptive or --upsampler."""
    words = {"upsampler": args.upsampler, "adaptive": args.adaptive or None, "budget": args.budget}
    given = [f"--{word}" for word, value in words.items() if value is not None]
    if args.budget is not None and args.k is not None:
        given.append("--k")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} contradict each other")


def upsampler_index(text: str) -> int:
    """`type=` of an option that takes heavy, light or an index."""
    if text in ("heavy", "light"):
        return _HEAVIEST if text == "heavy" else 0
    if text.isascii() and text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"expected heavy, light or an index from 0, not `{text}`")


def _budget(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
