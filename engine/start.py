"""Where a training run starts: anew, from given weights, or at a checkpoint."""

import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints import all_paths, load_newest
from utils.checkpoint import LAST_NAME, check_same_model, find_weights, load_checkpoint
from utils.config import Config
from utils.errors import UserError
from utils.run_metrics import METRICS_NAME, has_validation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """What the command line decides.

    Attributes:
        save_dir: folder of the run.
        resume: "auto" (continue where `save_dir` stands), "never", or a checkpoint's path.
        init: the weights to start from; None for the config's.
        started_again: by the launcher, after a process died.
    """

    save_dir: Path
    resume: str = "auto"
    init: str | None = None
    started_again: bool = False


@dataclass(frozen=True)
class Start:
    """The state that a run starts with.

    Attributes:
        iteration: iterations done.
        seed: of weights and samples.
        path: where `checkpoint` is from; None where there is none.
        checkpoint: the run's own, to continue it; or, at iteration 0, whose weights to begin with.
        resumes: which of the two.
    """

    iteration: int
    seed: int
    path: Path | None = None
    checkpoint: dict[str, Any] | None = None
    resumes: bool = False

    def is_of(self, folder: Path) -> bool:
        """Whether it goes on with the run in `folder`."""
        if not self.resumes or self.path is None:
            return False
        # Of the name: what it is a link to may lie anywhere.
        return self.path.parent.resolve() == folder.resolve()


def find_start(config: Config, options: TrainOptions) -> Start:
    """Decide where to start, and read the checkpoint for it.

    Where the newest checkpoint is damaged, an older one is taken, with a warning. Nothing is
    written; see `engine.run_folder` for what an earlier run left.

    Raises:
        UserError: a checkpoint that is missing, damaged, of another model, or holds no more than
            weights; phase 1 without phase 0's weights.
    """
    found = _checkpoint_to_resume(options)
    if found is not None:
        if options.init is not None and not options.started_again:
            _log.warning(
                "--init %s plays no part: the run goes on from %s (--resume never starts anew)",
                options.init,
                found[0],
            )
        return _resumed(config, *found)
    seed = secrets.randbits(31) if config.seed is None else config.seed
    path = _weights_to_begin_with(config, options)
    if path is None:
        return Start(0, seed)
    checkpoint = load_checkpoint(path)
    check_same_model(config.model, checkpoint["model"], path)
    return Start(0, seed, path, checkpoint)


def is_complete(config: Config, options: TrainOptions, start: Start) -> bool:
    """Whether the run has ended: all iterations, the last checkpoint and the last validation."""
    if start.path is None or start.path.name != LAST_NAME or not start.is_of(options.save_dir):
        return False
    return is_at_end(config, options.save_dir, start.iteration)


def is_at_end(config: Config, folder: Path, iteration: int) -> bool:
    """Whether a run in `folder`, which has come to `iteration`, has its last validation, too."""
    if not 0 < config.iter_max <= iteration:
        return False
    if config.valid_dataset is None or iteration > config.iter_max:
        return True
    return has_validation(folder / METRICS_NAME, iteration)


def _weights_to_begin_with(config: Config, options: TrainOptions) -> Path | None:
    """``--init`` or the config's `init`; else phase 0's for phase 1, and none for others.

    Raises:
        UserError: phase 1, and there are none.
    """
    named = options.init or config.init
    if named is not None:
        return Path(named).expanduser()
    return phase0_weights(config, options) if config.phase == 1 else None


def phase0_weights(config: Config, options: TrainOptions) -> Path:
    """The weights of the phase 0 config that goes with a phase 1 config.

    Raises:
        UserError: there are none.
    """
    name = config.name.replace("phase1", "phase0")
    if name == config.name:
        raise UserError(
            f"phase 1 starts from phase 0's weights: name them with --init, as the name of the "
            f"config, {config.name}, does not tell that of its phase 0"
        )
    beside = options.save_dir.with_name(name)
    for folder in (beside, Path("save") / name):
        try:
            return find_weights(folder)
        except UserError:
            continue
    raise UserError(
        f"phase 1 starts from phase 0's weights, and {beside} has none: train phase 0 first, "
        f"or name a checkpoint with --init"
    )


def _checkpoint_to_resume(options: TrainOptions) -> tuple[Path, dict[str, Any]] | None:
    if options.resume == "never":
        return None
    if options.resume != "auto":
        path = Path(options.resume).expanduser()
        return path, load_checkpoint(path)
    # Where only older ones are left, the newest of them is taken, as if the last were damaged.
    return load_newest(options.save_dir / LAST_NAME) if all_paths(options.save_dir) else None


def _resumed(config: Config, path: Path, checkpoint: dict[str, Any]) -> Start:
    iteration = checkpoint.get("iter")
    parts = [checkpoint.get(key) for key in ("optimizer", "lr_scheduler")]
    complete = all(isinstance(part, dict) and "sd" in part for part in parts)
    if not complete or not isinstance(iteration, int) or "name" not in checkpoint["model"]:
        raise UserError(
            f"checkpoint {path} holds weights only, so training cannot resume from it; start anew "
            f"with --resume never"
        )
    check_same_model(config.model, checkpoint["model"], path)
    if config.model["name"] != checkpoint["model"]["name"]:
        raise UserError(
            f"checkpoint {path} holds `{checkpoint['model']['name']}`, the config trains "
            f"`{config.model['name']}`: start anew with --resume never"
        )
    seed = checkpoint.get("seed") if config.seed is None else config.seed
    if not isinstance(seed, int):
        seed = secrets.randbits(31)
    return Start(iteration, seed, path, checkpoint, resumes=True)
