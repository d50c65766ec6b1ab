"""The fused kernels against plain torch on a GPU: are they right, and how much faster are they?

Both engines get the same features. Each part is timed by events on the device, in turn.

Axes: h w LR, H W output.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    # Called by its path, Python looks for modules beside this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.cases import BACKBONES, SCALE, ShareRouting, Source, picture
from benchmarks.measure import product_peak, round_robin
from benchmarks.report import format_table
from engine.inference_words import add_json_word
from models import kernels
from models.fast import FastEngine
from models.grid import PixelGrid
from models.inference import Engine
from models.pcsr import PCSR
from models.routing import FixedRouting, Routing, classes_by_histogram
from utils.atomic import write_text
from utils.cli import Parser, add_device_words, check_device_words, positive_int, run
from utils.device import pick_device, resolve_precision
from utils.errors import UserError
from utils.machine import describe

PRECISIONS = ("fp32", "bf16", "fp16")
ROUTINGS: dict[str, Routing] = {
    "all light": FixedRouting(0),
    "30 % heavy": ShareRouting(0.3),
    "all heavy": FixedRouting(-1),
}
# How far a part may be from plain torch in fp32, relative to what it computes.
LIMITS = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.005}
# Of ADM's classes: a histogram's bin goes to one side as a whole.
MOST_DIFFERENT = 1e-4
TRIED_BLOCKS = (32, 64, 128, 256)
TRIED_WARPS = (4, 8)


@dataclass(frozen=True)
class Part:
    """One part of the inference, on both engines.

    Attributes:
        backbone, precision, part: what.
        fused_ms, plain_ms: median times on the device.
        fused_error, plain_error: relative distances from plain torch in fp32.
        flops: executed by the fused engine.
        peak_flops_per_s: of the best product of two matrices in this precision.
    """

    backbone: str
    precision: str
    part: str
    fused_ms: float
    plain_ms: float
    fused_error: float
    plain_error: float
    flops: int
    peak_flops_per_s: float

    @property
    def is_right(self) -> bool:
        """Whether the kernels' error is within its limit (not where it is NaN)."""
        return self.fused_error <= LIMITS[self.precision]

    def cells(self) -> list[str]:
        """For the table."""
        of_peak = self.flops / (self.fused_ms / 1e3) / self.peak_flops_per_s
        return [
            *(self.backbone, self.precision, self.part),
            *(f"{self.fused_ms:.3f}", f"{self.plain_ms:.3f}"),
            f"{self.plain_ms / self.fused_ms:.1f}",
            f"{self.flops / 1e9:.1f}",
            f"{of_peak:.0%}",
            *(f"{self.fused_error:.1e}", f"{self.plain_error:.1e}"),
            "yes" if self.is_right else "NO",
        ]


TITLES = (
    *("backbone", "precision", "part", "fused ms", "plain ms", "ratio"),
    *("GFLOP", "of peak", "error", "plain error", "right"),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Compare the fused kernels with plain torch on a GPU: the error of classifier "
        "and upsamplers, relative to plain torch in fp32, and their time on the device; and ADM's "
        "classes and time, the host's included. Ends with code 1 where a kernel is wrong, and "
        "with 2 where there is no GPU.",
        example="python -m benchmarks.kernels --json results/benchmarks/kernels.json",
    )
    parser.add_argument(
        "--backbone", nargs="+", choices=BACKBONES, default=BACKBONES[:3], help="Which models."
    )
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="Of the products."
    )
    parser.add_argument(
        "--lr_size",
        nargs=2,
        type=positive_int,
        default=(540, 960),
        metavar=("HEIGHT", "WIDTH"),
        help="LR pixels.",
    )
    parser.add_argument("--rounds", type=positive_int, default=15, metavar="N", help="Per part.")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="Also time every upsampler with other numbers of pixels per program and of warps.",
    )
    add_json_word(parser)
    add_device_words(parser)
    args = parser.parse_args()
    check_device_words(args)
    return args


@torch.inference_mode()
def main() -> int:
    """Compare, print a table, write the file; 1 where something is wrong."""
    args = parse_arguments()
    device = pick_device(args.device, args.gpu)
    if device.type == "cpu":
        raise UserError("there is no GPU here, and the kernels are for one: nothing was measured")
    reason = kernels.why_unavailable(device)
    if reason is not None:
        raise UserError(f"the kernels do not run on `{device}`, nothing was measured: {reason}")
    torch.accelerator.set_device_index(device.index or 0)
    facts = describe(device)
    print(f"{facts['device_name']}, torch {facts['torch']}, LR {args.lr_size[0]}x{args.lr_size[1]}")
    parts: list[Part] = []
    adm_is_right = True
    for precision in dict.fromkeys(args.precision):
        peak = product_peak(device, resolve_precision(precision, device))
        for backbone in dict.fromkeys(args.backbone):
            bench = KernelBench(backbone, precision, tuple(args.lr_size), device, args.rounds)
            parts += bench.parts(peak)
            line, is_right = bench.adaptive()
            print(line)
            adm_is_right &= is_right
            if args.tune:
                bench.tune()
    print(format_table(TITLES, [part.cells() for part in parts]))
    if args.json is not None:
        rows = [{**dataclasses.asdict(part), "machine": facts} for part in parts]
        write_text(args.json, json.dumps(rows, indent=2) + "\n")
    return 0 if adm_is_right and all(part.is_right for part in parts) else 1


class KernelBench:
    """Both engines with one model in one precision, on one picture."""

    def __init__(
        self,
        backbone: str,
        precision: str,
        lr_size: tuple[int, int],
        device: torch.device,
        rounds: int,
    ) -> None:
        from models.fused import FusedEngine

        self.backbone, self.precision, self.rounds = backbone, precision, rounds
        self.device = device
        self.model: PCSR = Source.find(backbone, [], []).load_pcsr(device)
        dtype = resolve_precision(precision, device)
        # Blocks that fill a GPU: the defaults are a CPU's.
        self.exact, self.plain = (
            FastEngine(self.model, block_px=2**18, chunk_px=2**20, dtype=each)
            for each in (torch.float32, dtype)
        )
        self.fused = FusedEngine(self.model, dtype=dtype)
        self.lr = picture(lr_size).to(device)[None]
        size = (SCALE * lr_size[0], SCALE * lr_size[1])
        self.grid = PixelGrid.build(lr_size, size, device)
        self.skip = self.grid.bilinear(self.lr)
        self.exact_feat = self.exact.encode(self.lr)
        self.feat = self.exact_feat.to(dtype)

    def parts(self, peak: float) -> list[Part]:
        """Classifier, and upsamplers for each routing."""
        expected = self._classify(self.exact)
        measured = [self._part("classifier", self._classify, expected, peak)]
        for name, routing in ROUTINGS.items():
            classes = routing.classes(expected[0], (-1.0, 0.0))

            def upsample(engine: Engine, classes: Tensor = classes) -> tuple[Tensor, int]:
                feat = self.exact_feat if engine is self.exact else self.feat
                out = engine.upsample(self.lr, feat, self.grid, classes)
                return out.sr - self.skip, out.flops

            measured.append(self._part(name, upsample, upsample(self.exact), peak))
        return measured

    def adaptive(self) -> tuple[str, bool]:
        """ADM by its kernel and by a histogram, on a line; and whether they agree."""
        from models.kernels.adaptive import adaptive_classes

        margins_BKHW = self._classify(self.fused)[0]
        ways: dict[str, Callable[[], Tensor]] = {
            "kernel": lambda: adaptive_classes(margins_BKHW[:, 0]),
            "histogram": lambda: classes_by_histogram(margins_BKHW),
        }
        ours, theirs = (way() for way in ways.values())

        def timed(way: Callable[[], Tensor]) -> float:
            with _Events(self.device) as events:
                way()
            return events.elapsed_ms

        calls = {name: lambda way=way: timed(way) for name, way in ways.items()}
        times = round_robin(calls, self.rounds)
        kernel_ms, histogram_ms = (statistics.median(times[name]) for name in ways)
        different = float((ours != theirs).double().mean())
        line = (
            f"{self.backbone} {self.precision}, ADM: {kernel_ms:.3f} ms, by a histogram "
            f"{histogram_ms:.3f} ms; {different:.4%} of the classes differ"
        )
        return line, different <= MOST_DIFFERENT

    def tune(self) -> None:
        """Print the time of each upsampler, everywhere, with other launch options."""
        from models.kernels.pixel_mlp import Skip, apply_mlp

        skip = Skip(self.lr, self.model.norm.std.flatten())
        out = torch.empty_like(self.skip)
        for index, mlp in enumerate(self.fused.upsampler_mlps):
            calls: dict[tuple[int, int], Callable[[], float]] = {}
            for block, warps in ((b, w) for b in TRIED_BLOCKS for w in TRIED_WARPS):
                options = {"BLOCK": block, "num_warps": warps}

                def call(mlp=mlp, options=options) -> float:  # type: ignore[no-untyped-def]
                    with _Events(self.device) as events:
                        apply_mlp(mlp, self.feat, self.grid, out, skip=skip, options=options)
                    return events.elapsed_ms

                try:
                    call()
                except Exception as error:
                    print(f"left out: {block} pixels, {warps} warps: {error}")
                    continue
                calls[block, warps] = call
            lines = [
                [str(block), str(warps), f"{statistics.median(times):.3f}"]
                for (block, warps), times in round_robin(calls, self.rounds).items()
            ]
            print(
                f"\n{self.backbone} {self.precision}, upsampler {index}, {mlp.hidden.sizes} units"
            )
            print(format_table(("pixels", "warps", "ms"), lines, left=0))

    def _classify(self, engine: Engine) -> tuple[Tensor, int]:
        return engine.classify(self.exact_feat if engine is self.exact else self.feat, self.grid)

    def _part(
        self,
        name: str,
        call: Callable[[Engine], tuple[Tensor, int]],
        expected: tuple[Tensor, int],
        peak: float,
    ) -> Part:
        errors = {}
        flops = 0
        for key, engine in self._engines():
            result, flops = call(engine)
            errors[key] = float((result - expected[0]).norm() / expected[0].norm())

        def timed(engine: Engine) -> float:
            with _Events(self.device) as events:
                call(engine)
            return events.elapsed_ms

        calls = {key: lambda engine=engine: timed(engine) for key, engine in self._engines()}
        times = round_robin(calls, self.rounds)
        fused_ms, plain_ms = (statistics.median(times[key]) for key in ("fused", "plain"))
        return Part(
            *(self.backbone, self.precision, name, fused_ms, plain_ms),
            *(errors["fused"], errors["plain"], flops, peak),
        )

    def _engines(self) -> Iterator[tuple[str, Engine]]:
        """The fused one last: its FLOPs are those of the table."""
        yield "plain", self.plain
        yield "fused", self.fused


class _Events:
    """Time of a block on the device."""

    def __init__(self, device: torch.device) -> None:
        self._start, self._end = (torch.Event(device, enable_timing=True) for _ in range(2))
        self.elapsed_ms = 0.0

    def __enter__(self) -> "_Events":
        self._start.record()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.record()
        self._end.synchronize()
        self.elapsed_ms = self._start.elapsed_time(self._end)


if __name__ == "__main__":
    run(main)
