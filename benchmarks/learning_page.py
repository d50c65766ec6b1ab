"""The page that benchmarks/learning.py writes."""

from collections.abc import Sequence
from typing import Any

from benchmarks.learning_cases import PUBLISHED
from benchmarks.learning_measure import CLASSIFIER, DISTANCE, ORACLE, SHARES

_ROUTING = """## Phase 1: losses

{run}. All runs start from the same backbone and heavy upsampler, those of
`{weights}` (SHA-256 begins with {sha}), and the same seed, and see the same batches.
PSNR (dB, RGB, refinement on) where each image's first 10, 25 and 50 % of pixels by the classifier's
order are heavy; at k = 0; and with ADM. The gap is that from the published loss to an oracle that
takes the pixels whose error falls most (with the published light upsampler), at 10 % heavy pixels.

"Light by heavy": the light upsampler learns the heavy one's output, not HR. "Gain by heavy": the
classifier learns the distance between both outputs, not the fall of the error against HR.

Where k = 0 makes every pixel heavy, the run was too short for the margins to find their level: the
orders can be compared, k = 0 and ADM cannot. What counts is iterations times learning rate.
"""
_ORDERS = """### What a classifier could reach

The same light and heavy outputs, with pixels taken in other orders. As far as the heavy output is
the mean of what HR can be, the error falls on average by the squared distance between both outputs,
and no order that is made of the features can be expected to do better than by that distance. The
oracle's lead over it is noise of single pixels, which only HR tells.
"""
_PHASE0 = """## Phase 0: warm-up, EMA, larger patches

{run}, from scratch. PSNR (dB, RGB) of the heavy upsampler everywhere.

The learning rate ends near zero, where the weights hardly move any more: that leaves an average of
them (EMA) little to gain at the end of a run.
"""
_OPTIMIZERS = """## Optimisers: {config}

{run}, from scratch, each with a
cosine to the end. PSNR (dB, RGB){where}. Rates are the config's, a half and twice that (Adam), and
one, two and four times that (SOAP, else with its defaults).
"""
_LOSSES = """## Pixel losses: {config}

{run}, from scratch, {optimizer} from {lr:g}, each
with a cosine to the end. PSNR (dB, RGB){where}.

L1 aims at the median of what HR can be, L2 at its mean, which is what PSNR rewards. L2's gradient
is led by the few pixels with large errors. PSNR stands for minus the mean of
the images' PSNR: the errors of an image count relative to all of its own.
"""
# Parts that are kept for each config begin so.
_OPTIMIZERS_KEY = "optimizers/"


def key_of(part: str, optimizer_config: str) -> str:
    """Under which key a part's figures are kept; for optimisers, one for each config (its path)."""
    return f"{_OPTIMIZERS_KEY}{optimizer_config}" if part == "optimizers" else part


def page(content: dict[str, Any]) -> str:
    """Markdown of what was measured, by part."""
    parts = ["# Options of training, measured on short runs\n"]
    if "routing" in content:
        parts.append(_routing(content["routing"]))
    if "phase0" in content:
        parts.append(_phase0(content["phase0"]))
    parts += [_optimizers(part) for key, part in content.items() if _is_of_optimizers(key)]
    if "losses" in content:
        parts.append(_losses(content["losses"]))
    return "\n".join(parts)


def _run(part: dict[str, Any]) -> str:
    machine, commit = part["machine"], part["commit"]
    at = "" if commit is None else f" at {commit}"
    return (
        f"`{part['command']}`{at} on {machine['device_name']}, "
        f"{machine['torch_threads']} thread(s), torch {machine['torch']}: `{part['config']}`, "
        f"{part['iterations']} iterations, batch {part['batch_size']}, {part['precision']}, "
        f"seed {part['seed']}"
    )


def _routing(part: dict[str, Any]) -> str:
    rows = part["rows"]
    about = part["weights"]
    sections = [_ROUTING.format(run=_run(part), weights=about["weights"], sha=about["sha256"][:8])]
    for name in _sets(rows):
        published = next(row[name] for row in rows if row["variant"] == PUBLISHED)
        sections.append(f"{name} (all-heavy {published['heavy']:.3f} dB):\n")
        titles = ["loss", *(f"{share:.0%}" for share in SHARES)]
        titles += ["all-light", "k = 0", "ADM", "gap closed"]
        lines = [[row["variant"], *_cells(row[name], published)] for row in rows]
        sections.append(_table(titles, lines))
    sections.append(_ORDERS)
    for row in rows:
        if DISTANCE in row[_sets(rows)[0]]["orders"]:
            sections += [f"{row['variant']}:\n", _orders(row, _sets(rows))]
    return "\n".join(sections)


def _cells(figures: dict[str, Any], published: dict[str, Any]) -> list[str]:
    start, end = (published["orders"][order][0] for order in (CLASSIFIER, ORACLE))
    own = figures["orders"][CLASSIFIER]
    marks = [f"{psnr:.3f} ({share:.1%})" for share, psnr in (figures["k0"], figures["adm"])]
    closed = (own[0] - start) / (end - start)
    return [*(f"{psnr:.3f}" for psnr in own), f"{figures['light']:.3f}", *marks, f"{closed:.0%}"]


def _orders(row: dict[str, Any], names: Sequence[str]) -> str:
    titles = ["order", *(f"{name}, {share:.0%}" for name in names for share in SHARES)]
    lines = [
        [order, *(f"{psnr:.3f}" for name in names for psnr in row[name]["orders"][order])]
        for order in row[names[0]]["orders"]
    ]
    return _table(titles, lines)


def _phase0(part: dict[str, Any]) -> str:
    return _PHASE0.format(run=_run(part)) + "\n" + _table(*_runs("option", part))


def _is_of_optimizers(key: str) -> bool:
    return key.startswith(_OPTIMIZERS_KEY)


def _optimizers(part: dict[str, Any]) -> str:
    speeds = [f"{row['iterations_per_s']:.2f}" for row in part["rows"]]
    titles, lines = _runs("optimizer", part)
    lines = [[*line, speed] for line, speed in zip(lines, speeds, strict=True)]
    return _words(_OPTIMIZERS, part) + _table([*titles, "iterations/s"], lines)


def _losses(part: dict[str, Any]) -> str:
    spec = part["optimizer"]
    words = _words(_LOSSES, part, optimizer=spec["name"], lr=spec["args"]["lr"])
    return words + _table(*_runs("loss", part))


def _words(template: str, part: dict[str, Any], **more: Any) -> str:
    where = " of the heavy upsampler everywhere" if part["is_pcsr"] else ""
    return template.format(run=_run(part), config=part["config"], where=where, **more) + "\n"


def _runs(title: str, part: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table's titles and lines: what each run reached on each set."""
    names = _sets(part["rows"])
    lines = [[row["variant"], *(f"{row[name]:.3f}" for name in names)] for row in part["rows"]]
    return [title, *names], lines


def _sets(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [key for key in rows[0] if key not in ("variant", "iterations_per_s")]


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in titles[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, rule, *lines))
