"""Evaluate an original super-resolution network."""

import argparse
from pathlib import Path

import torch

from engine.evaluate_cli import Subject, is_pcsr, main, make_parser
from engine.restore import OriginalRestorer, Patches, load_original
from utils.cli import run
from utils.config import Config
from utils.errors import UserError


def prepare(
    args: argparse.Namespace,
    config: Config,
    weights: Path,
    device: torch.device,
    patches: Patches | None,
) -> Subject:
    """The network with its weights, at its own scale."""
    if is_pcsr(config):
        raise UserError(f"config {config.name} is a PCSR config: use test_pcsr.py")
    model = load_original(weights, device, config)
    restorer = OriginalRestorer(model, patches)
    return Subject(model, lambda lr, size: restorer(lr), float(restorer.scale))


if __name__ == "__main__":
    parser = make_parser(
        "Evaluate an original super-resolution network: PSNR, SSIM, FLOPs and time per image and "
        "on average.",
        "python test.py --config configs/carn-x4.yaml --hr_data load/Set5/HR --per_image --crop",
    )
    run(lambda: main(parser, prepare))
