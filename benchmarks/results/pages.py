"""Renders results/README.md, LESSONS.md, the curves, and the tables of other pages.

A page that people write holds a rendered part between two comments: what is between is replaced.
"""

import re
from itertools import pairwise
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
    SUBJECTS,
    Subject,
    read_json,
)
from benchmarks.results.tables import (
    NONE,
    measured_subjects,
    quality_table,
    speed_table,
    table,
    weights_table,
)
from utils.atomic import write_text
from utils.config import Config, load_config
from utils.errors import UserError
from utils.run_metrics import METRICS_NAME, read_rows

README = ROOT / "README.md"
CARD = ROOT / "save" / "README.md"
# Device, processes and iterations, in the log line that a run starts with.
_STARTED = re.compile(
    r"^\d{4}\S* \S+ \S+ on (\S+) x (\d+), .* iterations (\d+) to (\d+)$", re.MULTILINE
)

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
layers, and executes up to a fifth more), and the share of the original is of executed ones.
A budget "25 % of the way" lies a quarter of the way from all-light to all-heavy, in executed
FLOPs, for every image alike. Rows of official weights are measured with the published checkpoints,
which are not in this repository (`make results OFFICIAL=DIR` measures them again).
"""

_SPEED = """Medians of {rounds} rounds in turn on one picture, LR {width}x{height} to
{out_width}x{out_height}, fp32, on {machine}, threads: {threads}, torch {torch}. *Of the
optimised* is the time over that of the original network after the same graph optimisations as
PCSR's fast engine. Memory is the peak of a process that does nothing else, libraries included. The
last two columns are the mean over every {every}th image of {timed_set} (medians of {image_rounds}
rounds); FLOPs are of the picture.
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


def training_table() -> str:
    """How the released weights were trained, from what is beside them."""
    titles = ["config", "iterations", "batch", "LR patch", "learning rate", "routing loss"]
    titles += ["precision", "device", "hours", "validation"]
    names = [
        name
        for subject in SUBJECTS
        for name in (
            subject.original,
            subject.pcsr.replace("phase1", "phase0"),
            subject.pcsr,
        )
    ]
    lines = [
        _training_line(name)
        for name in dict.fromkeys(names)
        if (ROOT / "save" / name / "release.config.yaml").is_file()
    ]
    return table(titles, lines, left=1)


def _training_line(name: str) -> list[str]:
    folder = ROOT / "save" / name
    config = load_config(folder / "release.config.yaml")
    rows, _ = read_rows(folder / f"release.{METRICS_NAME}")
    trained = [row for row in rows if row["kind"] == "train"]
    # Once: valid_x4_sr.
    valid = [row for row in rows if row["kind"].startswith("valid")]
    last = [row["psnr"] for row in valid if row["iteration"] == valid[-1]["iteration"]]
    starts = [0, *(row["iteration"] for row in trained)]
    seconds = sum(
        (last - first) / row["iterations_per_s"]
        for (first, last), row in zip(pairwise(starts), trained, strict=True)
    )
    assert config.train_dataset is not None and config.optimizer is not None
    log = (folder / "release.log.txt").read_text(encoding="utf-8")
    starts_logged = list(_STARTED.finditer(log))
    # A start at the end trains nothing: it only validates.
    places = sorted({(match[1], match[2]) for match in starts_logged if match[3] != match[4]})
    return [
        f"`{name}`",
        str(trained[-1]["iteration"] if trained else 0),
        str(config.train_dataset.batch_size),
        str(config.train_dataset.wrapper["args"].get("inp_size", NONE)),
        _rates(config),
        _routing_loss(config),
        config.precision,
        ", ".join(f"{device} x {count}" for device, count in places) or NONE,
        f"{seconds / 3600:.2f}",
        f"{last[0]:.2f} dB" if last else NONE,
    ]


def _rates(config: Config) -> str:
    """The learning rate that each cosine starts from, and where."""
    assert config.optimizer is not None and config.lr_scheduler is not None
    first, args = config.optimizer["args"]["lr"], config.lr_scheduler["args"]
    restarts = zip(args.get("restarts", ()), args.get("weights", ()), strict=False)
    # A restart at the very end restarts nothing.
    later = [f"{first * w:g} from {at}" for at, w in restarts if at < config.iter_max]
    return ", ".join([f"{first:g}", *later])


def _routing_loss(config: Config) -> str:
    """That of phase 1, with its arguments."""
    if config.phase != 1:
        return NONE
    if config.routing_loss is None:
        return "published"
    args = config.routing_loss.get("args", {})
    return ", ".join([config.routing_loss["name"], *(f"{k} {v}" for k, v in args.items())])


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
        threads=machine["torch_threads"],
        torch=machine["torch"],
        every=EVERY,
        timed_set=TIMED_SET,
        image_rounds=IMAGE_ROUNDS,
    )


def _picture(path: Path, words: str) -> str:
    return f"![{words}]({path.name})\n"
