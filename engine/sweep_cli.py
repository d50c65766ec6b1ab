"""test_pcsr.py --sweep."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.budget import OriginalCost
from engine.evaluation import errors_named
from engine.report import followed
from engine.restore import PcsrRestorer
from engine.samples import EvaluationSet
from engine.sharing import shared_out
from engine.sweep import Point, PointFigures, points_for, sweep_image
from engine.sweep_report import print_table, to_json, write_plot
from utils.distributed import World
from utils.errors import UserError
from utils.images import is_one_of, list_images
from utils.output_words import png_file
from utils.plotting import check_plotting

# What a sweep decides itself, or has no use for.
_EXCLUDED = ("k", "adaptive", "upsampler", "budget", "bicubic", "all_psnr", "self_ensemble")


def add_sweep_words(parser: argparse.ArgumentParser) -> None:
    """``--sweep`` and what goes with it."""
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="Instead of one routing, the whole curve of PSNR over FLOPs and time, from all-light "
        "to all-heavy, in one pass over the images; beside it that of an oracle which knows HR: "
        "how much a better classifier could gain.",
    )
    parser.add_argument(
        "--sweep_time",
        action="store_true",
        help="With --sweep: measure the time of each point by running it. Otherwise it is "
        "estimated from what the parts took.",
    )
    parser.add_argument(
        "--plot",
        type=png_file,
        metavar="PNG",
        help="With --sweep: draw the curves to this file (needs matplotlib).",
    )


@dataclass(frozen=True)
class Sweep:
    """A sweep over a set of images.

    Attributes:
        restorer: the model; its own routing plays no part.
        original: the network whose FLOPs those of PCSR are compared with.
        title: of the plot.
        is_timed: measure the time of each point.
        plot: file for the plot, or None.
    """

    restorer: PcsrRestorer
    original: OriginalCost
    title: str
    is_timed: bool
    plot: Path | None

    @classmethod
    def from_words(
        cls,
        args: argparse.Namespace,
        restorer: PcsrRestorer,
        original: OriginalCost,
        title: str,
    ) -> "Sweep | None":
        """What the words ask for; None for no sweep.

        Raises:
            UserError: words that do not go together, or a model with nothing to choose.
        """
        if not args.sweep:
            if args.sweep_time or args.plot is not None:
                raise UserError("--sweep_time and --plot go with --sweep")
            return None
        for word in _EXCLUDED:
            value = getattr(args, word)
            if value is not None and value is not False:
                raise UserError(f"--{word} does not go with --sweep")
        if len(restorer.model.upsamplers) < 2:
            raise UserError("--sweep: the model has one upsampler, so there is nothing to choose")
        if args.plot is not None:
            check_plotting("--plot")
            folders = [folder for folder in (args.hr_data, args.lr_data) if folder is not None]
            if is_one_of(args.plot, [path for folder in folders for path in list_images(folder)]):
                raise UserError(f"--plot {args.plot} is an input and would be lost")
        return cls(restorer, original, title, args.sweep_time, args.plot)

    def __call__(
        self, images: EvaluationSet, world: World, write: Callable[[str], None]
    ) -> dict[str, Any]:
        """Sweep all images, print the table, draw the plot; the figures as JSON content.

        The images are shared out over the ranks; all of them get the figures, rank 0 draws.
        """
        points = points_for(len(self.restorer.model.upsamplers))

        def swept(index: int) -> tuple[float, list[PointFigures]]:
            return self._image(images, index, points, world.device)

        self.restorer.warm_up(torch.zeros(3, 32, 32, device=world.device), (128, 128))
        shared = shared_out(swept, images.hr_pixels, world)
        results = list(followed(shared, len(images), world))
        originals = [original for original, _ in results]
        figures = [of_image for _, of_image in results]
        means = [PointFigures.mean(of_point) for of_point in zip(*figures, strict=True)]
        original_flops = sum(originals) / len(originals)
        print_table(points, means, original_flops, is_timed=self.is_timed, write=write)
        if self.plot is not None and world.is_main:
            write_plot(
                self.plot,
                points,
                means,
                original_flops,
                title=f"{self.title}: mean of {len(images)} images",
                is_timed=self.is_timed,
            )
            write(f"plot: {self.plot}")
        return to_json(points, images.names, figures, originals, is_timed=self.is_timed)

    def _image(
        self, images: EvaluationSet, index: int, points: Sequence[Point], device: torch.device
    ) -> tuple[float, list[PointFigures]]:
        """The original's executed FLOPs on an image, and the figures of all points."""
        sample = images[index]
        with errors_named(sample.name, device):
            lr_size = (sample.lr.shape[-2], sample.lr.shape[-1])
            image = self.restorer.image_cost(lr_size, sample.size)
            original = image.patches * self.original.executed(image.lr_size, image.size)
            figures = sweep_image(
                self.restorer,
                sample,
                points,
                device,
                images.conventions,
                is_timed=self.is_timed,
            )
        return original, figures
