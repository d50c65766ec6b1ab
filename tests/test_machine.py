"""Facts and measurements of the machine."""

import json
import mmap
import time

import pytest
import torch

from utils.machine import Timer, describe, peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")


def test_description_is_json() -> None:
    facts = json.loads(json.dumps(describe(CPU)))
    assert facts["torch_threads"] >= 1
    assert facts["torch"] == torch.__version__
    assert facts["device"] == "cpu"


def test_peak_memory_sees_a_large_tensor_once() -> None:
    if not reset_peak_memory(CPU):
        pytest.skip("this platform cannot reset the peak")
    before = peak_memory_bytes(CPU)
    assert before
    # From the system itself: the allocator may have as much left from another test.
    with mmap.mmap(-1, 64 * 2**20) as memory:
        memory.write(b"x" * len(memory))
    after = peak_memory_bytes(CPU)
    assert after and after - before > 48 * 2**20
    reset_peak_memory(CPU)
    again = peak_memory_bytes(CPU)
    assert again and again < after


def test_timer() -> None:
    with Timer(CPU) as timer:
        time.sleep(0.02)
    assert 0.02 <= timer.elapsed_s < 2
