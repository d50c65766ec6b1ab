"""Operations whose plain form is slow on a CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F


def affine_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """``x @ weight + bias`` into `out`: (Q, O) of (Q, D), (D, O) and (O,).

    In float32 the bias is added afterwards: `addmm` first copies it to every row, which takes as
    long as a product of width 52 (measured). In half precision adding a row is slower than that.
    """
    if x.dtype == torch.float32:
        torch.mm(x, weight, out=out).add_(bias)
    else:
        torch.addmm(bias, x, weight, out=out)


def sums_of_rows(table_RD: Tensor, index_QN: Tensor) -> Tensor:
    """(Q, D): for each q the sum of the rows ``index_QN[q]`` of a float32 table."""
    if table_RD.device.type == "cpu":
        # One pass, and on all threads: index_select and add_ take twice as long (measured).
        return F.embedding_bag(index_QN, table_RD, mode="sum")
    return table_RD[index_QN].sum(dim=1)
