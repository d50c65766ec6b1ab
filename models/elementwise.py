"""Elementwise operations whose plain form is slow in half precision on a CPU."""

import torch
from torch import Tensor


def relu_(x: Tensor) -> Tensor:
    """ReLU in place, for any float dtype.

    A half-precision number is negative where its bits, read as an integer, are: the integer
    maximum needs no conversion (measured on a CPU: a fifth of the time).
    """
    if x.dtype == torch.float32:
        return x.relu_()
    x.view(torch.int16).clamp_min_(0)
    return x
