"""What the figures teach: results/LESSONS.md. Every number in it comes from results/figures."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise

from benchmarks.results.speed import EVERY
from benchmarks.results.subjects import (
    LABELS,
    ROUTINGS,
    SETS,
    Subject,
)
from benchmarks.results.tables import (
    NONE,
    decibels,
    difference,
    giga,
    loss,
    machine_of,
    measured_subjects,
    percent,
    row_of,
    share_of_original,
    share_of_time,
    table,
)
from benchmarks.results.target import target_text
from benchmarks.results.trainings import patches_seen
from utils.errors import UserError

# A picture's best all-round judge: a hundred photographs.
JUDGE = SETS[-1]
# Nobody sees less.
TOLERANCE_DB = 0.03
# More than times of the same differ by.
_CLEARLY = 1.05
_WIDTH = 100
_PARTS = tuple(key for key in ROUTINGS if key.startswith("way"))
PAYS = "pays"
_WORDS = {"k0": "--k 0", "adm": "--adaptive", "heavy": "--upsampler heavy"}

_TEXT = """# What the figures teach

Written by `make results` from the figures in [figures/](figures): numbers and verdicts follow the
weights that are released. All of it is x4 on {judge}; tables of all sets are on the
[results page](README.md). FLOPs and PSNR are means over all images of {judge}, times over every
{every}th of them.

## Where routing pixels pays

The fastest routing that pays and stays within {tolerance} dB of the same network all-heavy; where
none pays, the fastest that does the latter:

{verdicts}

{machines}

"Pays" means: cheaper than the original network, in executed FLOPs and on the clock, and at most
{tolerance} dB below it. The clock is that of the original after the graph optimisations that PCSR's
engine has (folded batch norms, channels-last, the backbone by the same CPU kernels), not of its
slower published form. Networks were not trained for equally long (patches seen: iterations times
batch; `+`: beside those of the weights it began with, which the [model card](../save/README.md)
names): "costs quality" where PCSR saw fewer than its original speaks of the training, too.

{target}

## What decides it

1. **What is left to save.** Routing touches the upsampler only; backbone and classifier run
   everywhere. All-light is the floor, all-heavy nearly the ceiling: a mixture that is almost
   all-heavy costs slightly more, as the lightest upsampler runs on every strip of rows where a
   single pixel needs it.

{ranges}

2. **Which FLOPs are counted.** {fsrcnn}
3. **FLOPs are not time.** Pixels that are gathered, multiplied by small matrices and put back take
   another time per multiply-add than convolutions over a whole image. Share of the original's
   FLOPs, and of the optimised original's time, at the same routing:

{clock}

{slower}

4. **Where the pixels are.** The classifier's order of pixels is the same for `k`, ADM and budgets;
   they differ in where each image stops. A budget stops every image at the same cost, which is
   what a deadline needs. `k = 0` lets a hard image take more and an easy one less; at the same mean
   FLOPs (between the two nearest budgets) its PSNR differs from a budget's by {spread}.
   With {gains_of}, the last quarter of the way to all-heavy gives {last_quarter} dB, the first
   {first_quarter} dB.
5. **Refinement.** All of it is with refinement, which is on by default: a pixel beside one of a
   heavier upsampler becomes the mean of its 3x3 neighbours. It smooths borders, and blurs where
   heavy pixels lie scattered, as they do at small budgets. What switching it off
   (`--no_refinement`) gains, in dB:

{refinement}

## What to use

The fastest of the measured routings that pays (where no time was measured: that with the fewest
FLOPs) and stays within {tolerance} dB of all-heavy:

{advice}
"""


def lessons_text() -> str:
    """The page."""
    subjects = [each for each in measured_subjects() if row_of(each, JUDGE, "heavy")]
    if not subjects:
        raise UserError(f"nothing was measured on {JUDGE} yet: measure it first")
    carn = next((each for each in subjects if each.name == "carn"), subjects[0])
    return _TEXT.format(
        judge=JUDGE,
        tolerance=TOLERANCE_DB,
        every=EVERY,
        verdicts=_verdicts(subjects),
        machines=_machines(subjects),
        target=target_text(),
        ranges=_indented(_ranges(subjects)),
        fsrcnn=_counted(subjects),
        clock=_indented(_clock(subjects)),
        slower=_indented(_slower(subjects)),
        spread=_spread(subjects),
        gains_of=carn.title,
        first_quarter=_gain(carn, "light", "way25"),
        last_quarter=_gain(carn, "way75", "heavy"),
        refinement=_indented(_refinement(subjects)),
        advice=_advice(subjects),
    )


def fastest(subject: Subject) -> str:
    """The fastest routing that stays within the tolerance of all-heavy."""
    return _good(subject, ROUTINGS)[0]


def recommended(subject: Subject) -> str:
    """The fastest routing of those within the tolerance that pays; else the fastest of them."""
    good = _good(subject, ROUTINGS)
    return next((key for key in good if _pays(subject, key)), good[0])


def _good(subject: Subject, keys: Iterable[str]) -> list[str]:
    """Routings within the tolerance of all-heavy, the fastest first; without times, by FLOPs."""
    losses = {key: loss(subject, JUDGE, key) for key in keys}
    good = [key for key, lost in losses.items() if lost is not None and lost <= TOLERANCE_DB]
    costs = {key: share_of_time(subject, key) for key in good}
    if None in costs.values():
        costs = {key: share_of_original(subject, JUDGE, key) for key in good}
    return sorted(good, key=lambda key: costs[key] or 0.0)


def _verdicts(subjects: Sequence[Subject]) -> str:
    titles = ["weights", "original", "all-heavy", "routing", "PSNR RGB", "of the original's FLOPs"]
    titles += ["of the optimised original's time", "patches seen: original", "PCSR", "verdict"]
    lines = []
    for subject in subjects:
        key = recommended(subject)
        quality = [
            row_of(subject, JUDGE, each).get("psnr_rgb") for each in ("original", "heavy", key)
        ]
        lines.append(
            [
                subject.title,
                decibels(quality[0]),
                decibels(quality[1]),
                LABELS[key].removeprefix("PCSR, "),
                decibels(quality[2]),
                percent(share_of_original(subject, JUDGE, key)),
                percent(share_of_time(subject, key)),
                *_patches_seen(subject),
                _verdict(subject, key),
            ]
        )
    return table(titles, lines, left=1)


def _verdict(subject: Subject, key: str) -> str:
    if _costs_quality(subject, key):
        return "costs quality"
    time = share_of_time(subject, key)
    if time is None:
        words = PAYS if _saves_flops(subject, key) else "does not pay"
        return f"{words} in FLOPs, time not measured"
    if _saves_flops(subject, key):
        return PAYS if time < 1 else "pays in FLOPs, not on the clock"
    return "pays on the clock only" if time < 1 else "does not pay"


def _costs_quality(subject: Subject, key: str) -> bool:
    """Whether a routing is worse than the original network, beyond the tolerance."""
    original, chosen = (row_of(subject, JUDGE, each).get("psnr_rgb") for each in ("original", key))
    return original is not None and chosen is not None and chosen < original - TOLERANCE_DB


def _pays(subject: Subject, key: str) -> bool:
    """Whether a routing is worth it; in FLOPs alone, where no time was measured."""
    time = share_of_time(subject, key) or 0.0
    return _saves_flops(subject, key) and time < 1 and not _costs_quality(subject, key)


def _saves_flops(subject: Subject, key: str) -> bool:
    share = share_of_original(subject, JUDGE, key)
    return share is not None and share < 1


def _ranges(subjects: Sequence[Subject]) -> str:
    titles = ["weights", "all-light", "all-heavy", "all-light loses"]
    lines = [
        [
            subject.title,
            *(percent(share_of_original(subject, JUDGE, key)) for key in ("light", "heavy")),
            f"{difference(loss(subject, JUDGE, 'light'))} dB",
        ]
        for subject in subjects
    ]
    return table(titles, lines, left=1)


def _clock(subjects: Sequence[Subject]) -> str:
    keys = ("light", "k0", "adm", "heavy")
    lines = [
        [
            subject.title,
            *(
                f"{percent(share_of_original(subject, JUDGE, key))} / "
                f"{percent(share_of_time(subject, key))}"
                for key in keys
            ),
        ]
        for subject in subjects
        if share_of_time(subject, "heavy") is not None
    ]
    titles = ["weights", *(LABELS[key].removeprefix("PCSR, ") for key in keys)]
    return table(titles, lines, left=1)


def _machines(subjects: Sequence[Subject]) -> str:
    """Whose times are of which CPU: shares of time can be compared on one and the same."""
    titles: dict[str, list[str]] = {}
    for subject in subjects:
        if share_of_time(subject, "heavy") is not None:
            titles.setdefault(machine_of(subject), []).append(subject.title)
    if len(titles) < 2:
        return f"Times are of {''.join(titles)}." if titles else "No times were measured."
    each = "; ".join(f"{' and '.join(names)}: {machine}" for machine, names in titles.items())
    text = f"Times are of different CPUs, and compare where the CPU is the same. {each}."
    return textwrap.fill(text, _WIDTH)


def _slower(subjects: Sequence[Subject]) -> str:
    """Which routings take longer than no routing at all, although they execute less."""
    found: dict[str, list[str]] = {}
    for subject in subjects:
        flops = {key: share_of_original(subject, JUDGE, key) or 0.0 for key in ROUTINGS}
        heavy_s = share_of_time(subject, "heavy") or math.inf
        for key in ROUTINGS:
            is_slower = (share_of_time(subject, key) or 0.0) > _CLEARLY * heavy_s
            if is_slower and flops[key] < flops["heavy"]:
                found.setdefault(subject.title, []).append(LABELS[key].removeprefix("PCSR, "))
    if not found:
        return "No routing takes clearly longer than all-heavy."
    each = "; ".join(f"{', '.join(labels)} of {title}" for title, labels in found.items())
    text = (
        f"Some routings execute less than all-heavy and take clearly longer all the same: {each}. "
        "There all-heavy is both better and faster: choosing the pixels takes longer than they do."
    )
    return textwrap.fill(text, _WIDTH - 3)


def _counted(subjects: Sequence[Subject]) -> str:
    by_name = {subject.name: subject for subject in subjects}
    if "fsrcnn" not in by_name:
        return "See the table of FLOPs in both conventions."
    published = by_name["fsrcnn"]
    one, heavy = (row_of(published, JUDGE, key) for key in ("original", "heavy"))
    times = heavy["flops_executed"] / one["flops_executed"]
    text = (
        f"Published tables count FSRCNN's transposed convolution at its output size,\n"
        f"   16 times too dear: {giga(one['flops_paper'])} G a picture where "
        f"{giga(one['flops_executed'])} G run. Its PCSR was sized to the first number\n"
        f"   and executes {giga(heavy['flops_executed'])} G all-heavy, {times:.1f} times what it "
        f"was to save on."
    )
    return f"{text} {_reshaped(by_name['fsrcnn-small'])}" if "fsrcnn-small" in by_name else text


def _reshaped(small: Subject) -> str:
    key = recommended(small)
    original, chosen = (row_of(small, JUDGE, each).get("psnr_rgb") for each in ("original", key))
    return (
        f"Sized by executed FLOPs\n"
        f"   (heavy upsampler 31-23, light 15) it takes "
        f"{percent(share_of_original(small, JUDGE, 'heavy'))} of FSRCNN all-heavy and\n"
        f"   {percent(share_of_original(small, JUDGE, key))} at "
        f"{LABELS[key].removeprefix('PCSR, ')}: {decibels(chosen)} dB where FSRCNN has "
        f"{decibels(original)} dB."
    )


def _patches_seen(subject: Subject) -> list[str]:
    """By original and by PCSR's phase 0, in millions; the official ones' are not known."""
    phase0 = subject.pcsr.replace("phase1", "phase0")
    if subject.is_official:
        return [NONE, NONE]
    return [patches_seen(config) for config in (subject.original, phase0)]


def _refinement(subjects: Sequence[Subject]) -> str:
    keys = [key for key in ("k0", "adm", *_PARTS) if key in ROUTINGS]
    lines = []
    for subject in subjects:
        rows = [row_of(subject, JUDGE, key) for key in keys]
        gains = [
            row["psnr_rgb_unrefined"] - row["psnr_rgb"] if "psnr_rgb_unrefined" in row else None
            for row in rows
        ]
        lines.append([subject.title, *(NONE if gain is None else f"{gain:+.3f}" for gain in gains)])
    titles = ["weights", *(LABELS[key].removeprefix("PCSR, ") for key in keys)]
    return table(titles, lines, left=1)


def _spread(subjects: Sequence[Subject]) -> str:
    gains = [gain for subject in subjects if (gain := _gain_of_k(subject)) is not None]
    if not gains:
        return NONE
    ends = dict.fromkeys(f"{gain:+z.3f}" for gain in (min(gains), max(gains)))
    return f"{' to '.join(ends)} dB"


def _gain_of_k(subject: Subject) -> float | None:
    """How much better k = 0 is than a budget of its mean FLOPs, between those measured."""
    k0 = row_of(subject, JUDGE, "k0")
    keys = ["light", *sorted(_PARTS, key=lambda key: int(key.removeprefix("way"))), "heavy"]
    for below, above in pairwise(row_of(subject, JUDGE, key) for key in keys):
        start, end = below["flops_executed"], above["flops_executed"]
        if start <= k0["flops_executed"] <= end:
            part = (k0["flops_executed"] - start) / (end - start)
            between = below["psnr_rgb"] + part * (above["psnr_rgb"] - below["psnr_rgb"])
            return k0["psnr_rgb"] - between
    return None


def _gain(subject: Subject, start: str, end: str) -> str:
    return difference(
        row_of(subject, JUDGE, end)["psnr_rgb"] - row_of(subject, JUDGE, start)["psnr_rgb"]
    )


def _advice(subjects: Sequence[Subject]) -> str:
    titles = ["weights", "nothing else known", "a cost that every image must keep"]
    lines = [
        [
            subject.title,
            _advised(subject, ("k0", "adm", "heavy")) or "the original: nothing qualifies",
            _advised(subject, _PARTS) or "the original: no budget qualifies",
        ]
        for subject in subjects
    ]
    return table(titles, lines, left=3)


def _advised(subject: Subject, keys: Sequence[str]) -> str | None:
    """The fastest of these routings that is worth it, as words of test_pcsr.py."""
    for key in _good(subject, keys):
        share, time = share_of_original(subject, JUDGE, key), share_of_time(subject, key)
        if share is None or not _pays(subject, key):
            continue
        # Rounded up: a budget below this one was not measured.
        words = _WORDS.get(key, f"--budget {math.ceil(100 * share) / 100:.2f}")
        more = " or more" if key in _PARTS else ""
        of_time = "time not measured" if time is None else f"{percent(time)} of the time"
        return f"`{words}`{more}: {percent(share)} of the FLOPs, {of_time}"
    return None


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.splitlines())
