"""The one place that chooses a device."""

from collections.abc import Callable, Mapping

import torch

from utils.errors import UserError

# Where torch's optimisers have a step that is one kernel.
FUSED_DEVICES = ("cpu", "cuda")


def pick_device(name: str = "auto", gpu: str | None = None) -> torch.device:
    """The device to work on.

    Args:
        name: "auto" (the best there is), "cpu", "cuda", "cuda:N" or "mps".
        gpu: index of a GPU, the older word for ``cuda:N``; of "0,1" the first counts here
            (several GPUs are several processes: see dist.sh). None where it was not given.

    Raises:
        UserError: an unknown word, or a device that this machine does not have.
    """
    if gpu is not None:
        name = f"cuda:{gpu.split(',')[0].strip()}"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device `{name}`: choose auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        return _checked_cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device `mps` asked for, but this machine has none: use --device cpu")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device `{name}`: choose auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic to infer in.

    Args:
        name: "fp32", "bf16", "fp16", or "auto": bf16 where the device has matrix units for it,
            else fp32.

    Raises:
        UserError: another name.
    """
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        return torch.bfloat16 if _has_bf16_units(device) else torch.float32
    if name not in known:
        raise UserError(f"precision `{name}`: choose fp32, bf16, fp16 or auto")
    return known[name]


def _has_bf16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question is about the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of torch do not tell.
    capabilities: Callable[[], Mapping[str, object]] = getattr(
        torch.cpu, "get_capabilities", lambda: {}
    )
    return device.type == "cpu" and bool(capabilities().get("amx_bf16"))


def _checked_cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        built = "no CUDA GPU is visible" if torch.version.cuda else "this torch has no CUDA build"
        raise UserError(f"device `{device}` asked for, but {built}: use --device cpu or auto")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(
            f"device `{device}` asked for, but there are {torch.cuda.device_count()} GPUs "
            f"(0 to {torch.cuda.device_count() - 1})"
        )
    return torch.device("cuda", index)
