"""An objective, compiled by torch: fused kernels, and CUDA graphs where they are asked for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.compiled import missing_compiler
from models.grid import remembered_grid
from utils.errors import UserError

Objective = Callable[[Tensor, Tensor], dict[str, Tensor]]

_MODES = {"default": "default", "graphs": "reduce-overhead"}


def compiled(objective: nn.Module, mode: str, device: torch.device) -> Objective | None:
    """What to call in place of `objective`, which stays the owner of its parameters.

    Compilation happens at the first call, and again for other image sizes.

    Args:
        objective: takes (lr, hr), returns losses by name.
        mode: the config's `compile`: "none", "capture" (see `engine.captured`), "default" or
            "graphs".
        device: where it computes.

    Returns:
        takes and returns what `objective` does; None where nothing is to be compiled.

    Raises:
        UserError: CUDA graphs on a device that has none; at the first call: there is no compiler.
    """
    if mode in ("graphs", "capture") and device.type != "cuda":
        raise UserError(
            f"config: `compile: {mode}` is for CUDA GPUs: on `{device.type}` take `none` or "
            f"`default`"
        )
    if mode in ("none", "capture"):
        return None
    torch.compiler.assume_constant_result(remembered_grid)
    run = torch.compile(objective, mode=_MODES[mode])

    def call(lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """`objective`, compiled; UserError where there is no working compiler."""
        torch.compiler.cudagraph_mark_step_begin()
        try:
            losses = run(lr, hr)
        except RuntimeError as error:
            reason = missing_compiler(error)
            if reason is None:
                raise
            raise UserError(
                f"config: `compile: {mode}` needs a working compiler ({reason}): "
                f"install g++ (and, for a GPU, triton), or leave `compile` out"
            ) from error
        # The next step of a CUDA graph writes over what this one returned.
        return {name: value.clone() for name, value in losses.items()}

    return call
