"""What routing is for, as a target: nearly all-heavy's quality at 60 % of the original's cost."""

from benchmarks.results.speed import TIMED_SET
from benchmarks.results.subjects import LABELS, ROUTINGS
from benchmarks.results.tables import (
    difference,
    loss,
    measured_subjects,
    percent,
    share_of_original,
    share_of_time,
    table,
)

NAME = "carn"
# RGB PSNR under the network's own all-heavy output.
MOST_LOSS_DB = {"Set5": 0.08, "BSD100": 0.03}
# Of the original's executed FLOPs, and of the optimised original's time.
MOST_SHARE = 0.60

_KEYS = ("adm", *(key for key in ROUTINGS if key.startswith("way")))
_TEXT = """## Whether CARN reaches the target

Target: ADM or a budget, at most {losses} under all-heavy, at no
more than {share:.0f} % of the original's executed FLOPs and {share:.0f} % of the optimised
original's time. {verdict}

{figures}"""


def target_text() -> str:
    """The verdict and what it rests on; empty where CARN was not measured."""
    subject = next((each for each in measured_subjects() if each.name == NAME), None)
    if subject is None:
        return ""
    titles = ["routing"]
    for name in MOST_LOSS_DB:
        titles += [f"{name}: under all-heavy", f"{name}: FLOPs"]
    titles += [f"{TIMED_SET}: time", "reached"]
    lines, met = [], []
    for key in _KEYS:
        losses = {name: loss(subject, name, key) for name in MOST_LOSS_DB}
        flops = {name: share_of_original(subject, name, key) for name in MOST_LOSS_DB}
        time = share_of_time(subject, key)
        is_met = all(
            value is not None and value <= most
            for value, most in [
                *((losses[name], most) for name, most in MOST_LOSS_DB.items()),
                *((share, MOST_SHARE) for share in (*flops.values(), time)),
            ]
        )
        word = LABELS[key].removeprefix("PCSR, ")
        if is_met:
            met.append(word)
        cells = [word]
        for name in MOST_LOSS_DB:
            cells += [f"{difference(losses[name])} dB", percent(flops[name])]
        lines.append([*cells, percent(time), "yes" if is_met else "no"])
    most = " and ".join(f"{most:.2f} dB on {name}" for name, most in MOST_LOSS_DB.items())
    verdict = f"Reached by {', '.join(met)}." if met else "Reached by none of them."
    return _TEXT.format(
        losses=most, share=100 * MOST_SHARE, verdict=verdict, figures=table(titles, lines, left=1)
    )
