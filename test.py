"""Evaluate an original super-resolution network."""

from engine.evaluate_cli import Request, Subject, is_pcsr, main, make_parser
from engine.loading import load_original
from engine.restore import OriginalRestorer
from utils.cli import run
from utils.errors import UserError


def prepare(request: Request) -> Subject:
    """The network with its weights, at its own scale."""
    if is_pcsr(request.config):
        raise UserError(f"config {request.config.name} is a PCSR config: use test_pcsr.py")
    model = load_original(request.weights, request.device, request.config)
    restorer = OriginalRestorer(model, request.patches)
    return Subject(model, restorer, float(restorer.scale))


if __name__ == "__main__":
    parser = make_parser(
        "Evaluate an original super-resolution network: PSNR, SSIM, FLOPs and time per image and "
        "on average.",
        "python test.py --config configs/carn-x4.yaml --hr_data load/Set5/HR --per_image --crop",
    )
    run(lambda: main(parser, prepare))
