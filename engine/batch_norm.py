"""Batch norm over the whole batch, whichever threads and processes it is spread over.

Axes: B batch, C channels, h w LR.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.microbatches import is_first, sum_over_batch


class _Normalise(torch.autograd.Function):
    """Batch norm over all micro-batches, in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalise a micro-batch by the statistics of the whole batch.

        Args:
            x: (B, C, h, w) of any float dtype.
            weight, bias: (C,), in float32 or wider.
            eps: is added to the variance.

        Returns:
            the output like `x`; in float64 the batch's mean and variance (biased), (C,), and the
            number of values that they are of, (C,): not differentiable.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own_mean = wide.mean((0, 2, 3))
        own_var = (wide - own_mean[:, None, None]).square_().mean((0, 2, 3))
        own_count = x.numel() // x.shape[1]
        # float64: the difference of the two terms loses digits where the mean is large.
        moment = own_var.double() + own_mean.double().square()
        stats = torch.stack([torch.ones_like(moment), own_mean.double(), moment]) * own_count
        count, mean, moment = sum_over_batch(stats).unbind()
        mean = mean / count
        var = (moment / count - mean.square()).clamp_(min=0)
        inv_std = torch.rsqrt(var + eps).to(wide.dtype)
        centre = mean.to(wide.dtype)
        ctx.save_for_backward(wide, weight, centre, inv_std, count)
        scale = weight * inv_std
        shift = bias - centre * scale
        out = wide * scale[:, None, None] + shift[:, None, None]
        return out.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:  # type: ignore[override]
        """Gradients of `x`, `weight` and `bias`: these of the micro-batch alone."""
        wide, weight, centre, inv_std, count = ctx.saved_tensors
        grad_out = grad.to(wide.dtype)
        normal = (wide - centre[:, None, None]).mul_(inv_std[:, None, None])
        own = torch.stack([grad_out.sum((0, 2, 3)), (grad_out * normal).sum((0, 2, 3))])
        both = (sum_over_batch(own.double()) / count).to(wide.dtype)
        grad_x = grad_out - both[0, :, None, None] - normal.mul_(both[1, :, None, None])
        grad_x.mul_((weight * inv_std)[:, None, None])
        return grad_x.to(grad.dtype), own[1], own[0], None


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the whole batch, on any device.

    (torch's SyncBatchNorm works on GPUs only.) In eval mode it is ``nn.BatchNorm2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same; in training, updates the running statistics once a batch."""
        if not self.training:
            return super().forward(x)
        out, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if is_first():
            self._track(mean, var * count / (count - 1).clamp(min=1))
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replace every ``BatchNorm2d`` below `module` by :class:`BatchNorm`, in place."""
    for name, child in module.named_children():
        if type(child) is not nn.BatchNorm2d:
            synchronise_batch_norm(child)
            continue
        synced = BatchNorm(child.num_features, child.eps, child.momentum)
        # The same tensors: optimisers and checkpoints may hold them already.
        synced.weight, synced.bias = child.weight, child.bias
        for key, buffer in child.named_buffers():
            setattr(synced, key, buffer)
        setattr(module, name, synced.train(child.training))


def uses_batch_statistics(module: nn.Module) -> bool:
    """True where `module`, in its present mode, normalises by the batch that it is given."""
    return any(isinstance(m, nn.BatchNorm2d) and m.training for m in module.modules())
