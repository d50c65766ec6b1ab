"""What a training says of itself when it begins."""

import logging

from torch import nn

from engine.pixel_loss import PixelLoss
from engine.start import Start
from utils.config import Config
from utils.distributed import World
from utils.machine import describe

logger = logging.getLogger(__name__)


def announce(
    config: Config, model: nn.Module, world: World, start: Start, pixel_loss: PixelLoss
) -> None:
    """Log what is trained, from where to where, and which of the config's words come to nothing."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    machine = describe(world.device)
    cpu = f" ({machine['cpu_capability']})" if world.device.type == "cpu" else ""
    logger.info(
        "%s on %s x %d, %s, seed %d, %s%s: %.2fK parameters, %.2fK trained, iterations %d to %d",
        config.name,
        world.device,
        world.size,
        config.precision,
        start.seed,
        machine["device_name"],
        cpu,
        total / 1e3,
        trained / 1e3,
        start.iteration,
        config.iter_max,
    )
    late = [step for step in config.revive if step >= config.iter_max]
    if late:
        logger.warning("`revive`: %s not reached", ", ".join(map(str, late)))
    if config.warmup > config.iter_max:
        logger.warning(
            "`warmup: %d` is longer than the run: the learning rate never gets as high as the "
            "schedule's",
            config.warmup,
        )
    for stage in pixel_loss.stages:
        if stage.start >= config.iter_max:
            logger.warning(
                "`%s: %d` is not reached: pixels are never compared by %s",
                stage.key,
                stage.start,
                stage.name,
            )
