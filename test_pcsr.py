"""Evaluate a PCSR model of any phase."""

import argparse
from pathlib import Path

from engine.budget import OriginalCost
from engine.evaluate_cli import Request, Subject, is_pcsr, main, make_parser
from engine.inference_words import add_routing_words, routing_from, warn_of_idle_original
from engine.loading import load_pcsr
from engine.restore import PcsrRestorer
from engine.sweep_cli import Sweep, add_sweep_words
from utils.cli import positive_float, run
from utils.config import Config, load_config
from utils.errors import UserError


def prepare(request: Request) -> Subject:
    """The model with its weights, at the scale and with the routing asked for."""
    args, config = request.args, request.config
    if not is_pcsr(config):
        raise UserError(f"config {config.name} is not a PCSR config: use test.py")
    if args.scale < 1:
        raise UserError(f"--scale {args.scale:g}: super-resolution starts at 1")
    model = load_pcsr(request.weights, request.device, config)
    original = original_cost(args, config)
    routing = routing_from(args, len(model.upsamplers), original)
    restorer = PcsrRestorer(
        model,
        routing,
        refinement=not args.no_refinement,
        pixel_batch_size=args.pixel_batch_size,
        engine=args.engine,
        precision=args.precision,
        compiled=args.compile,
        patches=request.patches,
    )
    sweep = Sweep.from_words(args, restorer, original, f"{config.name} x{args.scale:g}")
    return Subject(
        model,
        restorer,
        args.scale,
        upsamplers=len(model.upsamplers),
        routing="swept" if sweep else routing.describe(),
        refinement=not args.no_refinement,
        sweep=sweep,
    )


def original_cost(args: argparse.Namespace, config: Config) -> OriginalCost:
    """The original network that a budget, or a sweep, is compared with."""
    backbone = config.model["args"]["encoder_spec"]["name"]
    if args.original_config is None:
        return OriginalCost(backbone)
    if not args.sweep:
        warn_of_idle_original(args)
    return OriginalCost.of_config(backbone, load_config(args.original_config))


if __name__ == "__main__":
    parser = make_parser(
        "Evaluate a PCSR model: PSNR, SSIM, FLOPs, time and each upsampler's share per image and "
        "on average. A checkpoint of phase 0 has one upsampler and needs no routing words.",
        "python test_pcsr.py --config configs/carn-pcsr-phase1.yaml --hr_data load/Set5/HR "
        "--per_image --crop --k 0",
    )
    parser.add_argument(
        "--scale",
        type=positive_float,
        default=4.0,
        metavar="NUMBER",
        help="Any real number from 1 on.",
    )
    add_routing_words(parser)
    add_sweep_words(parser)
    parser.add_argument(
        "--original_config",
        type=Path,
        metavar="YAML",
        help="Config of the original network that a share is meant of. Default: the published one "
        "of PCSR's backbone at this scale. Its weights are not needed.",
    )
    run(lambda: main(parser, prepare))
