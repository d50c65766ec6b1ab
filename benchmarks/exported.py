"""Time and memory of networks as ONNX files, under onnxruntime on a CPU: PCSR against its original.

``python -m benchmarks.exported --backbone carn --threads 2``
"""

import functools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import BACKBONES, SCALE, Size, Source, lr_size, picture
from benchmarks.measure import round_robin
from engine import export
from utils.cli import Parser, positive_int, run
from utils.errors import UserError
from utils.machine import describe, peak_memory_bytes

# What k stands for each routing.
ROUTINGS = {"k0": 0.0, "k1": 1.0, "heavy": export.K_HEAVY, "light": export.K_LIGHT}
ORIGINAL = "original"


def session_of(path: Path, threads: int) -> Any:
    """An onnxruntime session.

    Raises:
        UserError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def inputs_of(case: str, size: Size) -> dict[str, np.ndarray]:
    """The bundled photograph at LR (h, w), and k where the case has one."""
    inputs = {"lr": picture(size)[None].numpy()}
    if case != ORIGINAL:
        inputs["k"] = np.array([ROUTINGS[case]], np.float32)
    return inputs


def memory_of(case: str, path: Path, size: Size, threads: int) -> int | None:
    """By how many bytes one run raises the peak memory of the process that it is called in."""
    session, inputs = session_of(path, threads), inputs_of(case, size)
    before = peak_memory_bytes(torch.device("cpu"))
    session.run(None, inputs)
    after = peak_memory_bytes(torch.device("cpu"))
    return None if before is None or after is None else after - before


def main() -> None:
    """Parse the command line, export, measure, and print the table."""
    parser = Parser(
        description="Measure PCSR and its original network as ONNX files at x4, under "
        "onnxruntime on the CPU: all in turn, medians; and the memory of one run.",
        example="python -m benchmarks.exported --backbone carn --threads 2",
    )
    parser.add_argument("--backbone", choices=BACKBONES, default="carn", help="Whose networks.")
    parser.add_argument(
        "--size", type=lr_size, default="420x276", metavar="WIDTHxHEIGHT", help="LR size."
    )
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="After one.")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=torch.get_num_threads(),
        metavar="N",
        help="Threads.",
    )
    args = parser.parse_args()
    source = Source.find(args.backbone, [], [])
    cpu = torch.device("cpu")
    print(f"{source.describe()}\n{describe(cpu)['device_name']}, {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in (ORIGINAL, "pcsr")}
        export.write(export.of_original(source.load_original(cpu)), files[ORIGINAL])
        export.write(export.of_pcsr(source.load_pcsr(cpu), SCALE), files["pcsr"])
        measure({case: files.get(case, files["pcsr"]) for case in (ORIGINAL, *ROUTINGS)}, args)


def measure(paths: dict[str, Path], args: Any) -> None:
    """Measure the cases' files and print a table."""
    sessions = {path: session_of(path, args.threads) for path in set(paths.values())}
    inputs = {case: inputs_of(case, args.size) for case in paths}

    def timed(case: str) -> float:
        start = time.perf_counter()
        sessions[paths[case]].run(None, inputs[case])
        return time.perf_counter() - start

    times = round_robin({case: functools.partial(timed, case) for case in paths}, args.rounds + 1)
    medians = {case: statistics.median(each[1:]) for case, each in times.items()}
    h, w = args.size
    context = multiprocessing.get_context("spawn")
    print(f"LR {w}x{h}\ncase      time s  /original  bytes/output pixel  heavy %")
    for case, path in paths.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            memory = pool.submit(memory_of, case, path, args.size, args.threads).result()
        per_pixel = "-" if memory is None else f"{memory / (SCALE**2 * h * w):.0f}"
        heavy = "-"
        if case != ORIGINAL:
            _, classes = sessions[path].run(None, inputs[case])
            heavy = f"{100 * (classes > 0).mean():.1f}"
        ratio = medians[case] / medians[ORIGINAL]
        print(f"{case:8}  {medians[case]:6.3f}  {ratio:9.2f}  {per_pixel:>18}  {heavy:>7}")


if __name__ == "__main__":
    run(main)
