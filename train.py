"""Train an original super-resolution network."""

from engine.train_cli import main, make_parser
from utils.cli import run
from utils.config import Config
from utils.errors import UserError


def check(config: Config) -> None:
    """Refuse PCSR configs."""
    if config.phase is not None or str(config.model.get("name")).startswith("pcsr"):
        raise UserError(f"config {config.name} is a PCSR config: use train_pcsr.py")


if __name__ == "__main__":
    parser = make_parser(
        "Train an original super-resolution network (FSRCNN, CARN, SRResNet, RCAN). Running the "
        "same command again continues where the run stands.",
        "python train.py --config configs/tiny-x4.yaml",
    )
    run(lambda: main(parser, check))
