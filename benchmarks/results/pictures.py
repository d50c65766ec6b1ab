"""Crops of three photographs side by side: HR, bicubic, original, PCSR, and who did what.

The photographs are in the repository; the released weights were trained on others.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.results.subjects import CONVENTIONS, RESULTS, ROOT, SCALE, Subject, identities
from datasets.resize import imresize
from engine.demo.compare import crop_centre
from engine.loading import load_original, load_pcsr
from engine.restore import OriginalRestorer, PcsrRestorer
from models.routing import KRouting
from utils.atomic import replace_file
from utils.colour import blend_classes
from utils.images import read_rgb, to_tensor
from utils.metrics import psnr, quantise

_OPACITY = 0.5
_DPI = 110
# Key of the PNG's text: which weights drew it.
_WEIGHTS = "Weights"


@dataclass(frozen=True)
class Crop:
    """A part of a photograph.

    Attributes:
        path: in the repository.
        title: of its row.
        top, left, side: of what is shown, in HR pixels.
    """

    path: str
    title: str
    top: int
    left: int
    side: int


CROPS = (
    Crop("examples/chelsea.png", "chelsea", 60, 130, 144),
    Crop("datasets/tiny/train/astronaut_x0_y0.png", "astronaut", 24, 108, 144),
    Crop("datasets/tiny/train/rocket_x180_y171.png", "rocket", 104, 76, 144),
)


def path_of(subject: Subject) -> Path:
    """Where a subject's crops are."""
    return RESULTS / f"crops-{subject.name}.png"


def drawn_with(path: Path) -> dict[str, Any]:
    """The identities of the weights that drew a file of crops; empty where it does not say."""
    with Image.open(path) as image:
        return json.loads(image.info.get(_WEIGHTS, "{}"))


def draw_crops(
    subject: Subject, weights: tuple[Path | None, Path | None], device: torch.device
) -> None:
    """Write the crops; without an original network's weights its column stays out."""
    from matplotlib.figure import Figure

    original_path, pcsr_path = weights
    assert pcsr_path is not None
    original = (
        None if original_path is None else OriginalRestorer(load_original(original_path, device))
    )
    pcsr = PcsrRestorer(load_pcsr(pcsr_path, device), KRouting(0.0))
    rows = [_row(crop, original, pcsr, device) for crop in CROPS]
    columns = list(rows[0])
    figure = Figure(figsize=(2.6 * len(columns), 2.85 * len(rows) + 0.3), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, crop, row in zip(panels, CROPS, rows, strict=True):
        for axes, (name, (image, words)) in zip(line, row.items(), strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{name}\n{words}" if words else name, fontsize=10)
        line[0].set_ylabel(crop.title, fontsize=11)
    figure.suptitle(f"{subject.title}, x{SCALE}, k = 0; figures (RGB) are of the whole photograph")
    about = {_WEIGHTS: json.dumps(identities(weights))}
    with replace_file(path_of(subject)) as temporary:
        figure.savefig(temporary, dpi=_DPI, metadata=about)


def _row(
    crop: Crop, original: OriginalRestorer | None, pcsr: PcsrRestorer, device: torch.device
) -> dict[str, tuple[NDArray[np.uint8], str]]:
    """Picture and words of each column."""
    hr, lr_size = crop_centre(read_rgb(ROOT / crop.path), CONVENTIONS)
    size = (hr.shape[0], hr.shape[1])
    lr = imresize(to_tensor(hr), size=lr_size).to(device)
    restored = pcsr(lr, size)
    assert restored.classes is not None
    pictures = {"bicubic": quantise(imresize(lr, size=size))}
    if original is not None:
        pictures["original"] = quantise(original(lr).sr)
    pictures["PCSR"] = quantise(restored.sr)
    classes = restored.classes.cpu().numpy()
    coloured = blend_classes(pictures["PCSR"], classes, len(restored.shares), _OPACITY)
    area = np.s_[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    border_px = CONVENTIONS.border_px
    row: dict[str, tuple[NDArray[np.uint8], str]] = {"HR": (hr[area], "")}
    for name, sr in pictures.items():
        quality = psnr(sr, hr, psnr_type="rgb", border_px=border_px)
        row[name] = (sr[area], f"{quality:.2f} dB")
    row["red: heavy upsampler"] = (coloured[area], f"{restored.shares[-1]:.0%} of the pixels")
    return row
