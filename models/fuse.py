"""Networks prepared for inference: batch norm folded, convolutions channels-last."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Network = TypeVar("Network", bound=nn.Module)


def fused_copy(network: Network) -> Network:
    """A copy of `network` for inference, equal up to rounding; `network` is left as it is."""
    fused = copy.deepcopy(network).eval().requires_grad_(False)
    fold_batch_norm(fused)
    return fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batch_norm(module: nn.Module) -> None:
    """Fold every batch norm that follows a convolution in an ``nn.Sequential``, in place."""
    for child in module.modules():
        if not isinstance(child, nn.Sequential):
            continue
        for index in range(len(child) - 1):
            conv, norm = child[index], child[index + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                child[index] = fuse_conv_bn_eval(conv, norm)
                child[index + 1] = nn.Identity()
