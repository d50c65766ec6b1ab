"""Make ``release.pth``, what inference needs and nothing more, from a run's last checkpoint.

``python -m utils.release save/carn-x4``
"""

import shutil
from pathlib import Path

from utils.atomic import replace_file
from utils.checkpoint import (
    LAST_NAME,
    RELEASE_NAME,
    load_checkpoint,
    save_checkpoint,
    weights_for_inference,
)
from utils.cli import Parser, run
from utils.errors import UserError

EVIDENCE = ("config.yaml", "log.txt", "metrics.jsonl")


def release(folder: Path) -> Path:
    """Write `folder`/release.pth: spec, weights and iteration of its iter_last.pth.

    Of averaged weights (`ema`), the averages are released.

    The run's config, log and metrics are kept beside it as ``release.*``, which training never
    touches.

    Raises:
        UserError: no checkpoint there, or it cannot be read.
    """
    last = load_checkpoint(folder / LAST_NAME)
    if "name" not in last["model"] or "iter" not in last:
        raise UserError(f"checkpoint {folder / LAST_NAME} is not that of a training run")
    # The weights last: where they are, the evidence is.
    for name in EVIDENCE:
        if (folder / name).is_file():
            with replace_file(folder / f"release.{name}") as temporary:
                shutil.copyfile(folder / name, temporary)
    path = folder / RELEASE_NAME
    model = {**last["model"], "sd": weights_for_inference(last)}
    save_checkpoint(path, {"model": model, "iter": last["iter"]})
    return path


def main() -> None:
    """Parse the command line and release each folder."""
    parser = Parser(
        description="Make release.pth, what inference needs, from a run's iter_last.pth.",
        example="python -m utils.release save/carn-x4",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="Folder of a run.")
    for folder in parser.parse_args().folders:
        path = release(folder)
        print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    run(main)
