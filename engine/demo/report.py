"""The figures of a demo run as text."""

import math

from engine.evaluation import Figures


def comparison_table(original: Figures | None, pcsr: Figures) -> str:
    """Both models' figures as aligned lines, FLOPs in G and relative to the original's."""
    titles = f"{'PSNR':>10}{'SSIM':>8}{'FLOPs (paper)':>20}{'FLOPs (executed)':>20}{'time':>11}"
    lines = [" " * 8 + titles]
    for name, figures in (("original", original), ("PCSR", pcsr)):
        if figures is not None:
            lines.append(f"{name:8}{_row(figures, original)}")
    return "\n".join(lines)


def describe_shares(shares: list[float]) -> str:
    """Which part of the pixels each upsampler computed; nothing to say of a single one."""
    if len(shares) == 2:
        return f"hard pixels: {shares[1]:.1%}"
    if len(shares) > 2:
        return "pixels light to heavy: " + ", ".join(f"{share:.1%}" for share in shares)
    return "one upsampler for all pixels"


def _row(figures: Figures, original: Figures | None) -> str:
    paper = _giga(figures.flops_paper, original.flops_paper if original else None)
    executed = _giga(figures.flops_executed, original.flops_executed if original else None)
    ssim = "-" if math.isnan(figures.ssim) else f"{figures.ssim:.4f}"
    return f"{figures.psnr:>7.2f} dB{ssim:>8}{paper:>20}{executed:>20}{figures.time_s:>9.2f} s"


def _giga(flops: float, reference: float | None) -> str:
    text = f"{flops / 1e9:.2f}G"
    return text if reference is None else f"{text} ({flops / reference:.1%})"
