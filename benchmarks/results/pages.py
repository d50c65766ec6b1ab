"""Renders results/README.md, LESSONS.md, the curves, and the tables of other pages.

A page that people write holds a rendered part between two comments: what is between is replaced.
"""

import re
from pathlib import Path

from benchmarks.results import curves, pictures
from benchmarks.results.lessons import lessons_text
from benchmarks.results.quality import BICUBIC_PATH
from benchmarks.results.speed import EVERY, IMAGE_ROUNDS, TIMED_SET
from benchmarks.results.subjects import (
    CONVENTIONS,
    RESULTS,
    ROOT,
    SETS,
    Subject,
    read_json,
)
from benchmarks.results.tables import (
    measured_subjects,
    quality_table,
    speed_table,
    weights_table,
)
from benchmarks.results.trainings import training_table
from utils.atomic import write_text
from utils.errors import UserError

README = ROOT / "README.md"
CARD = ROOT / "save" / "README.md"

_HEAD = """# Results

All tables, curves and pictures on this page are measured with the weights in [save/](../save) and
rendered by one command; `render` alone makes the pages anew from the JSON files in
[figures/](figures):

```bash
make results DATA=load/benchmark                              # measure and render
make results DATA=load/benchmark MODELS=carn SETS=Set5        # a part
python -m benchmarks.results render
```

What they teach is on a page of its own: [LESSONS.md](LESSONS.md).

Conventions: {conventions}; SSIM of Y, 11x11 Gaussian. GFLOPs: 2 per multiply-add; *paper* as
published tables count them, *executed* as run by the compiled CPU kernels (plain torch pads its
layers, and executes more), and the share of the original is of executed ones.
A budget "25 % of the way" lies a quarter of the way from all-light to all-heavy, in executed
FLOPs, for every image alike. Rows of official weights are measured with the published checkpoints,
which are not in this repository (`make results OFFICIAL=DIR` measures them again). Refinement is
on; *unrefined* is the RGB PSNR without it. Times and memory differ between runs (memory by up to a
quarter), all else comes out the same.
"""

_SPEED = """Medians of {rounds} rounds in turn on one picture, LR {width}x{height} to
{out_width}x{out_height}, fp32, on {machine} ({cores} cores, {capability}, {ram:.0f} GiB), threads:
{threads}, torch {torch}. The picture is [chelsea](../examples/LICENSE.md), shrunk and mirrored to
fill the size: a soft one, of which `k = 0` finds fewer pixels heavy than of the benchmark's.
*Of the optimised* is the time over that of the original network after the same graph optimisations
as PCSR's fast engine. Memory is the peak of a process that does nothing else, libraries included;
it depends on whether an image is routed as a whole (ADM, budgets) or not, and was measured once for
each. The last two columns are the mean over every {every}th image of {timed_set} (medians of
{image_rounds} rounds); FLOPs are of the picture.
"""


def render() -> list[Path]:
    """Write all pages and curves. Returns their paths."""
    pages = texts()
    for path, text in pages.items():
        # Pages that people write stay untouched where nothing is new.
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    drawn = [subject for subject in measured_subjects() if curves.has_curves(subject)]
    for subject in drawn:
        curves.draw_curves(subject)
    return [*pages, *(curves.path_of(subject) for subject in drawn)]


def texts() -> dict[Path, str]:
    """The text of each page."""
    if not BICUBIC_PATH.is_file():
        raise UserError(f"nothing to render: {BICUBIC_PATH.parent} is empty, so measure first")
    pages = {RESULTS / "README.md": results_text(), RESULTS / "LESSONS.md": lessons_text()}
    for path, parts in {
        README: {"weights": weights_table()},
        CARD: {"weights": weights_table(), "training": training_table()},
    }.items():
        text = path.read_text(encoding="utf-8")
        for name, part in parts.items():
            text = replaced(text, name, part)
        pages[path] = text
    return pages


def replaced(text: str, name: str, part: str) -> str:
    """`text` with `part` between the comments of this name; as it is where it has none."""
    begin, end = f"<!-- {name}: written by make results -->", f"<!-- end of {name} -->"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    return re.sub(pattern, lambda _: f"{begin}\n{part}\n{end}", text, flags=re.DOTALL)


def results_text() -> str:
    """results/README.md."""
    parts = [_HEAD.format(conventions=f"PSNR of {CONVENTIONS.describe()}")]
    measured = read_json(BICUBIC_PATH)["sets"]
    for name in SETS:
        if name in measured:
            parts.append(f"## {name}, {measured[name]['images']} images\n\n{quality_table(name)}\n")
    timed = [subject for subject in measured_subjects() if subject.speed_path.is_file()]
    if timed:
        parts.append(_speed_text(timed))
    drawn = [subject for subject in measured_subjects() if curves.has_curves(subject)]
    if drawn:
        links = [_picture(curves.path_of(each), f"{each.title}: curves") for each in drawn]
        parts.append("\n".join(["## Quality over compute and over time\n", *links]))
    shown = [each for each in measured_subjects() if pictures.path_of(each).is_file()]
    if shown:
        links = [_picture(pictures.path_of(each), f"{each.title}: crops") for each in shown]
        licences = (
            "Photographs: [chelsea](../examples/LICENSE.md), "
            "[the others](../datasets/tiny/LICENSE.md).\n"
        )
        parts.append("\n".join(["## Side by side\n", licences, *links]))
    return "\n".join(parts)


def _speed_text(subjects: list[Subject]) -> str:
    heads = [_speed_head(subject) for subject in subjects]
    titles = [f"### {subject.title}\n" for subject in subjects]
    if len(set(heads)) == 1:
        titles[0] = f"{heads[0]}\n{titles[0]}"
    else:
        # Measured on different machines, or otherwise.
        titles = [f"{title}\n{head}" for title, head in zip(titles, heads, strict=True)]
    tables = [
        f"{title}\n{speed_table(subject)}\n"
        for title, subject in zip(titles, subjects, strict=True)
    ]
    return "\n".join(["## Cost, time and memory\n", *tables])


def _speed_head(subject: Subject) -> str:
    content = read_json(subject.speed_path)
    machine, picture = content["machine"], content["picture"]
    return _SPEED.format(
        rounds=picture["rounds"],
        width=picture["lr_width"],
        height=picture["lr_height"],
        out_width=4 * picture["lr_width"],
        out_height=4 * picture["lr_height"],
        machine=machine["device_name"],
        cores=machine["usable_cores"],
        capability=machine["cpu_capability"],
        ram=machine["ram_bytes"] / 2**30,
        threads=machine["torch_threads"],
        torch=machine["torch"],
        every=EVERY,
        timed_set=TIMED_SET,
        image_rounds=IMAGE_ROUNDS,
    )


def _picture(path: Path, words: str) -> str:
    return f"![{words}]({path.name})\n"
