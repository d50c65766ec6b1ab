"""How near to a budget in milliseconds images come, on the wall clock.

Targets lie between what all-light and all-heavy are predicted to take. As a user would, each
restorer measures for itself what its image takes, once, and then runs it.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    # Called by its path, Python looks for modules beside this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.cases import BACKBONES, SCALE, Networks, Size, Source, picture, shown
from benchmarks.measure import round_robin
from benchmarks.report import format_table
from engine.budget import Budget, BudgetPlan, OriginalCost
from engine.inference_words import add_json_word
from engine.restore import PcsrRestorer
from engine.timing import measure_times
from models.pcsr import PCSR
from utils.atomic import write_text
from utils.cli import Parser, add_device_words, check_device_words, positive_int, run
from utils.device import pick_device
from utils.errors import UserError
from utils.log import set_up
from utils.machine import describe

# Of the way from all-light to all-heavy.
POSITIONS = (0.2, 0.4, 0.6, 0.8)
LIMIT = 0.10
TITLES = ("backbone", "LR", "budget ms", "median ms", "off", "most over", "heavy %")


@dataclass(frozen=True)
class Row:
    """One budget on one image.

    Attributes:
        backbone, lr_height, lr_width, weights: what was run.
        budget_s: the target.
        times_s: from LR to SR, in turn with the other budgets.
        heavy_share: of the pixels, in the last round.
        machine: see `utils.machine.describe`.
    """

    backbone: str
    lr_height: int
    lr_width: int
    weights: str | None
    budget_s: float
    times_s: list[float]
    heavy_share: float
    machine: dict[str, Any]

    @property
    def deviation(self) -> float:
        """Mean distance from the budget, as a share of it."""
        return statistics.fmean(abs(each / self.budget_s - 1) for each in self.times_s)

    def cells(self) -> list[str]:
        """For the table."""
        return [
            *(self.backbone, f"{self.lr_width}x{self.lr_height}", f"{1e3 * self.budget_s:.0f}"),
            f"{1e3 * statistics.median(self.times_s):.0f}",
            f"{self.deviation:.1%}",
            f"{max(self.times_s) / self.budget_s - 1:+.1%}",
            f"{100 * self.heavy_share:.1f}",
        ]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Run images with budgets in milliseconds, and tell how far from them the "
        "wall clock was. Ends with code 1 where that is more than 10 % on average.",
        example="python -m benchmarks.budgets --backbone carn fsrcnn --threads 2",
    )
    parser.add_argument(
        "--backbone", nargs="+", choices=BACKBONES, default=["carn", "fsrcnn"], help="Which models."
    )
    parser.add_argument(
        "--lr_size",
        nargs=2,
        type=positive_int,
        default=(276, 420),
        metavar=("HEIGHT", "WIDTH"),
        help="LR pixels.",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="Checkpoints of PCSR networks, at most one for each backbone. Default: save/.",
    )
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="Per budget.")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="Threads of a CPU.")
    add_json_word(parser)
    add_device_words(parser)
    args = parser.parse_args()
    check_device_words(args)
    return args


def main() -> int:
    """Measure, print a table, write the file; 1 where the budgets were missed by too much."""
    args = parse_arguments()
    set_up()
    device = pick_device(args.device, args.gpu)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for backbone in args.backbone:
        source = Source.find(backbone, args.weights, [])
        rows += measure(source, device, tuple(args.lr_size), args.rounds)
    print(format_table(TITLES, [row.cells() for row in rows]))
    if args.json is not None:
        content = [dataclasses.asdict(row) for row in rows]
        write_text(args.json, json.dumps(content, indent=2, allow_nan=False) + "\n")
    average = statistics.fmean(row.deviation for row in rows)
    print(f"off by {average:.1%} on average (at most {LIMIT:.0%} is wanted)")
    return 0 if average <= LIMIT else 1


@torch.inference_mode()
def measure(source: Source, device: torch.device, lr_size: Size, rounds: int) -> list[Row]:
    """Rows of one backbone; all budgets run in turn."""
    model = Networks(source, device).pcsr
    if len(model.upsamplers) < 2:
        raise UserError(f"{source.pcsr}: with one upsampler there is nothing to choose")
    lr = picture(lr_size).to(device)
    size = (SCALE * lr_size[0], SCALE * lr_size[1])
    restorer = PcsrRestorer(model)
    restorer.warm_up(lr, size)
    times = measure_times(restorer, lr, size)
    budgets = [times.least_s + p * (times.most_s - times.least_s) for p in POSITIONS]
    runs = {budget: _Run(model, source.backbone, budget, lr, size) for budget in budgets}
    measured = round_robin({budget: each.time_s for budget, each in runs.items()}, rounds)
    facts = describe(device)
    return [
        Row(
            *(source.backbone, *lr_size, shown(source.pcsr), budget, measured[budget]),
            *(each.heavy_share, facts),
        )
        for budget, each in runs.items()
    ]


class _Run:
    """One budget on one image; it has measured and run once when it is made."""

    def __init__(self, model: PCSR, backbone: str, budget_s: float, lr: Tensor, size: Size) -> None:
        plan = BudgetPlan(Budget(budget_s, "seconds"), OriginalCost(backbone))
        self._restorer = PcsrRestorer(model, plan)
        self._lr, self._size = lr, size
        self.heavy_share = 0.0
        self.time_s()

    def time_s(self) -> float:
        """Seconds from LR to SR."""
        restored = self._restorer(self._lr, self._size)
        self.heavy_share = restored.shares[-1]
        return restored.time_s


if __name__ == "__main__":
    run(main)
