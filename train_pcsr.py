"""Train PCSR: phase 0 (backbone and heavy upsampler) or phase 1 (light upsampler, classifier)."""

from engine.train_cli import main, make_parser
from utils.cli import run
from utils.config import Config
from utils.errors import UserError


def check(config: Config) -> None:
    """Refuse configs of original networks."""
    if not str(config.model.get("name")).startswith("pcsr"):
        raise UserError(f"config {config.name} is not a PCSR config: use train.py")
    if config.phase is None:
        raise UserError("config: key `phase` is missing (0 or 1)")


if __name__ == "__main__":
    parser = make_parser(
        "Train PCSR. Phase 0 trains backbone and heavy upsampler; phase 1 freezes them and trains "
        "light upsampler and classifier. Running the same command again continues where the run "
        "stands.",
        "python train_pcsr.py --config configs/tiny-pcsr-phase0.yaml",
    )
    run(lambda: main(parser, check))
