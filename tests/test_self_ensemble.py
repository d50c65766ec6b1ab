"""The mean over flipped and turned copies of an image."""

import pytest
import torch
from torch import Tensor

import models
from engine.evaluation import warm_up
from engine.restore import OriginalRestorer, Restored
from engine.self_ensemble import TURNS, SelfEnsemble
from tests.training import model_spec

SCALE = 3


def of_copies(image: Tensor) -> list[Tensor]:
    """An image (3, H, W) and its seven copies, each with what turns it back, by quarter turns."""
    return [
        torch.rot90(start, quarter, (-2, -1))
        for start in (image, image.flip(-1))
        for quarter in range(4)
    ]


def back(copies: list[Tensor]) -> list[Tensor]:
    """What :func:`of_copies` did, undone for each."""
    upright = [torch.rot90(copy, -index, (-2, -1)) for index, copy in enumerate(copies)]
    return upright[:4] + [copy.flip(-1) for copy in upright[4:]]


def stub(lr: Tensor, size: tuple[int, int]) -> Restored:
    """An enlargement that knows left from right and up from down."""
    assert lr.is_contiguous()
    sr = lr.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2)
    assert sr.shape[-2:] == size
    y, x = (torch.arange(n, dtype=sr.dtype) for n in size)
    ramp = 0.3 * y[:, None] + 0.01 * x**2
    share = float(lr[0, 0, 0])
    return Restored(sr + ramp, sr[0].byte(), [share, 1 - share], 10, 20, 0.5)


def test_the_mean_is_over_all_eight_copies() -> None:
    lr = torch.rand(3, 4, 7)
    result = SelfEnsemble(stub)(lr, (12, 21))
    copies = [
        stub(copy.contiguous(), (copy.shape[-2] * SCALE, copy.shape[-1] * SCALE)).sr
        for copy in of_copies(lr)
    ]
    torch.testing.assert_close(result.sr, torch.stack(back(copies)).mean(0))
    corners = [float(lr[0, y, x]) for y in (0, -1) for x in (0, -1)]
    assert result.shares == pytest.approx([sum(corners) / 4, 1 - sum(corners) / 4])
    assert (result.flops_paper, result.flops_executed, result.time_s) == (80, 160, 4.0)
    assert result.classes is not None and result.classes.shape == (12, 21)


def test_four_turns_are_the_flips_and_one_changes_nothing() -> None:
    lr = torch.rand(3, 4, 7)
    flips: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)]
    copies = [stub(lr.flip(axes).contiguous(), (12, 21)).sr.flip(axes) for axes in flips]
    torch.testing.assert_close(SelfEnsemble(stub, 4)(lr, (12, 21)).sr, torch.stack(copies).mean(0))
    assert torch.equal(SelfEnsemble(stub, 1)(lr, (12, 21)).sr, stub(lr, (12, 21)).sr)
    assert TURNS == (1, 4, 8)


def test_a_networks_ensemble_turns_with_the_image() -> None:
    torch.manual_seed(0)
    original = OriginalRestorer(models.make(model_spec("carn")).eval())  # type: ignore[arg-type]
    ensemble = SelfEnsemble(lambda lr, size: original(lr))
    lr = torch.rand(3, 5, 8)
    alone, together = original(lr).sr, ensemble(lr, (20, 32)).sr
    turned = torch.rot90(lr, 1, (-2, -1))
    assert abs(torch.rot90(original(turned).sr, -1, (-2, -1)) - alone).max() > 1e-3
    again = torch.rot90(ensemble(turned, (32, 20)).sr, -1, (-2, -1))
    torch.testing.assert_close(again, together, rtol=0, atol=1e-5)


def test_a_budget_is_warmed_up_as_without() -> None:
    """Not by itself on a corner, where it would warn of, or refuse, what suits the image."""

    class Restorer:
        def warm_up(self, lr: Tensor, size: tuple[int, int]) -> None:
            seen.append((lr.shape[-2:], size))

        def __call__(self, lr: Tensor, size: tuple[int, int]) -> Restored:
            raise AssertionError("run instead")

    seen: list[object] = []
    warm_up(SelfEnsemble(Restorer()), torch.rand(3, 4, 7), (12, 21))
    assert seen == [((4, 7), (12, 21))]
