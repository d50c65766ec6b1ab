"""How near to a budget in milliseconds images come, on the wall clock.

Targets lie between what all-light and all-heavy take. As it is for a user, each target comes with a
short measurement of what the image will take, and then the image is run.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    # Called by its path, Python looks for modules beside this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.cases import BACKBONES, SCALE, Networks, Size, Source, lr_size, picture, shown
from benchmarks.measure import round_robin
from benchmarks.report import format_table
from engine.inference_words import add_json_word
from engine.restore import PcsrRestorer
from engine.timing import TimedRouting, measure_times
from models.routing import FixedRouting
from utils.allocator import keep_freed_blocks
from utils.atomic import write_text
from utils.cli import Parser, add_device_words, check_device_words, positive_int, run
from utils.device import pick_device
from utils.errors import UserError
from utils.log import set_up
from utils.machine import describe

# Of the way from all-light to all-heavy.
POSITIONS = (0.2, 0.4, 0.6, 0.8)
LIMIT = 0.10
END_ROUNDS = 4
TITLES = ("backbone", "LR", "budget ms", "median ms", "off", "most over", "heavy %")


@dataclass(frozen=True)
class BudgetRow:
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
        description="Run an image with budgets in milliseconds, and tell how far from them the "
        f"wall clock was. Ends with code 1 where that is more than {LIMIT:.0%} on average.",
        example="python -m benchmarks.budgets --backbone carn fsrcnn --threads 2",
    )
    parser.add_argument(
        "--backbone",
        nargs="+",
        choices=BACKBONES,
        default=["carn", "fsrcnn"],
        help="Models to run.",
    )
    parser.add_argument(
        "--size",
        type=lr_size,
        default="420x276",
        metavar="WIDTHxHEIGHT",
        help="LR size; 420x276 has 276 rows of 420 pixels.",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="Checkpoints of PCSR networks, at most one for each backbone. Default: save/.",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=7, metavar="N", help="Runs of each budget."
    )
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
    keep_freed_blocks()
    device = pick_device(args.device, args.gpu)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[BudgetRow] = []
    for backbone in args.backbone:
        source = Source.find(backbone, args.weights, [])
        rows += measure(source, device, args.size, args.rounds)
    print(format_table(TITLES, [row.cells() for row in rows]))
    if args.json is not None:
        content = [dataclasses.asdict(row) for row in rows]
        write_text(args.json, json.dumps(content, indent=2, allow_nan=False) + "\n")
    average = statistics.fmean(row.deviation for row in rows)
    print(f"off by {average:.1%} on average (at most {LIMIT:.0%} is wanted)")
    return 0 if average <= LIMIT else 1


@torch.inference_mode()
def measure(source: Source, device: torch.device, shape: Size, rounds: int) -> list[BudgetRow]:
    """Rows of one backbone on an LR image of `shape` (h, w); all budgets run in turn."""
    model = Networks(source, device).pcsr
    if len(model.upsamplers) < 2:
        raise UserError(f"{source.pcsr}: with one upsampler there is nothing to choose")
    lr = picture(shape).to(device)
    size = (SCALE * shape[0], SCALE * shape[1])
    restorer = PcsrRestorer(model)
    ends = round_robin(
        {index: _fixed(restorer, FixedRouting(index), lr, size) for index in (0, -1)}, END_ROUNDS
    )
    # The first round warms up.
    least_s, most_s = (statistics.median(times[1:]) for times in ends.values())
    budgets = [least_s + p * (most_s - least_s) for p in POSITIONS]
    runs = [_Run(restorer, budget, lr, size) for budget in budgets]
    measured = round_robin(dict(enumerate(each.time_s for each in runs)), rounds)
    facts = describe(device)
    return [
        BudgetRow(
            *(source.backbone, *shape, shown(source.pcsr), each.budget_s, measured[index]),
            *(each.heavy_share, facts),
        )
        for index, each in enumerate(runs)
    ]


def _fixed(
    restorer: PcsrRestorer, routing: FixedRouting, lr: Tensor, size: Size
) -> Callable[[], float]:
    def time_s() -> float:
        restorer.routing = routing
        return restorer(lr, size).time_s

    return time_s


class _Run:
    """One budget on one image, whose times are measured when this is made."""

    def __init__(self, restorer: PcsrRestorer, budget_s: float, lr: Tensor, size: Size) -> None:
        self.budget_s = budget_s
        self.heavy_share = 0.0
        self._restorer, self._lr, self._size = restorer, lr, size
        self._times = measure_times(restorer, lr, size)

    def time_s(self) -> float:
        """Seconds from LR to SR."""
        # Its clock starts here, as that of `--budget` does.
        self._restorer.routing = TimedRouting(self._times, self.budget_s, "budget")
        restored = self._restorer(self._lr, self._size)
        self.heavy_share = restored.shares[-1]
        return restored.time_s


if __name__ == "__main__":
    run(main)
