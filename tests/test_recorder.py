"""What a run leaves to be seen: scalars and pictures for tensorboard, and a summary."""

import errno
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from torch.utils.data import Dataset

import models
from engine.events import Events
from engine.recorder import Recorder
from engine.restore import Restored
from engine.validation import ValidationRow, validate
from engine.validation_picture import SIDE_PX, panels
from tests.training import ONE, model_spec
from utils.colour import class_colours
from utils.metrics import quantise
from utils.run_metrics import METRICS_NAME, read_rows


def events(folder: Path) -> list[Event]:
    """All events that tensorboard would read: each is a length, a checksum, it, and another one."""
    found = []
    for path in folder.glob("events.out.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def record(folder: Path, start: int, psnrs: dict[int, float], validated_on: str = "RGB") -> str:
    """Iterations `start` to 4 with a validation after some; the summary."""
    picture = np.zeros((8, 20, 3), np.uint8)
    options = {"start": start, "end": 4, "batch_size": 2}
    with Recorder(folder, **options, validated_on=validated_on) as recorder:  # type: ignore[arg-type]
        for done in range(start + 1, 5):
            losses = {"loss": torch.tensor(1.0 * done), "grad_norm": torch.tensor(0.5)}
            recorder.add(losses, lr=1e-3, data_s=0.0)
            recorder.flush(done)
            if done in psnrs:
                row = ValidationRow("k0", psnrs[done], 1.0, 0.25, picture)
                recorder.validation(done, [(4.0, [row])])
        return recorder.summary()


def test_scalars_pictures_and_summary_of_a_resumed_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    record(tmp_path, 0, {1: 30.0, 3: 40.0})
    values = [value for event in events(tmp_path) for value in event.summary.value]
    scalars = {value.tag for value in values if value.HasField("simple_value")}
    names = ("loss", "grad_norm", "lr", "iterations_per_s", "images_per_s", "data_share")
    assert scalars >= {f"train/{name}" for name in names}
    assert scalars >= {f"valid_x4_k0/{name}" for name in ("psnr", "heavy_share")}
    sizes = [(v.image.height, v.image.width) for v in values if v.HasField("image")]
    assert sizes == [(8, 20)] * 2

    summary = record(tmp_path, 2, {4: 29.5})
    # The validation after iteration 3 was of the part that was dropped.
    assert (
        summary == "validation x4 k0: best 30.000 dB at iteration 1, last 29.500 dB at iteration 4"
    )
    assert summary in caplog.messages
    # Figures of another validation say nothing of this one's.
    summary = record(tmp_path, 2, {4: 20.0}, validated_on="luma")
    assert summary == (
        "validation x4 k0: best 20.000 dB at iteration 4, last 20.000 dB at iteration 4"
    )


def test_heavy_pixels_are_told_where_there_is_a_choice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [ValidationRow(name, 30.0, 1.0, share) for name, share in (("sr", 1.0), ("k0", 0.25))]
    with Recorder(tmp_path, start=0, end=4, batch_size=2, validated_on="") as recorder:
        recorder.validation(1, [(4.0, rows)])
    said = [line.partition(" dB, ")[2] for line in caplog.messages]
    assert said == ["1.00 GFLOPs (paper)", "1.00 GFLOPs (paper), 25.0 % heavy"]


def test_a_last_row_without_its_end_is_not_spoilt_by_the_next(tmp_path: Path) -> None:
    record(tmp_path, 0, {1: 30.0})
    path = tmp_path / METRICS_NAME
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    record(tmp_path, 4, {})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"iteration": 5, "kind": "train"}\n')
    rows, broken = read_rows(path)
    assert ([row["iteration"] for row in rows], broken) == ([1, 1, 2, 3, 4, 5], 0)


def test_a_full_disk_ends_tensorboard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its thread lives on: with more events than its queue takes, a run would hang else.

    From the first event on that the thread writes.
    """
    written = 0

    def write_event(*_: object) -> None:
        nonlocal written
        written += 1
        if written > 1:  # the first is written as the file is made
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", write_event)
    record(tmp_path, 0, {1: 30.0, 3: 40.0})
    assert len(read_rows(tmp_path / METRICS_NAME)[0]) == 6
    told = [line for line in caplog.messages if "tensorboard" in line]
    assert told == [
        "tensorboard gets no more of this run: its file cannot be written (No space left on device)"
    ]


def test_a_log_on_the_same_full_disk_does_not_end_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engine.events.logger.warning", full)
    events = Events(tmp_path, purge_step=1)
    worker = events._writer.file_writer.event_writer._worker
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    for step in range(30):  # more than the queue takes
        events.add_scalar("a", 1.0, step)
        worker.join(0.01)
        assert worker.is_alive()
    assert events._failed
    events.close()


def test_another_loss_begins_with_means_of_its_own(tmp_path: Path) -> None:
    with Recorder(tmp_path, start=0, end=3, batch_size=1, validated_on="") as recorder:
        for value in (100.0, -20.0, -22.0):
            if value == -20.0:
                recorder.restart()
            recorder.add({"loss": torch.tensor(value)}, lr=1e-3, data_s=0.0)
        recorder.flush(3)
    assert read_rows(tmp_path / METRICS_NAME)[0][-1]["loss"] == -21.0


def test_a_pause_between_two_lines_takes_nothing_from_the_iterations_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four iterations of 2 s, half of which are data's, with 100 s of something else among them."""
    now = 50.0
    monkeypatch.setattr("engine.recorder.time.monotonic", lambda: now)
    with Recorder(tmp_path, start=0, end=8, batch_size=3, validated_on="") as recorder:
        for step in range(4):
            now += 2
            recorder.add({}, lr=1e-3, data_s=1.0)
            if step == 2:
                with recorder.paused():
                    now += 100
        recorder.flush(4)
    (row,), _ = read_rows(tmp_path / METRICS_NAME)
    assert (row["iterations_per_s"], row["images_per_s"]) == (0.5, 1.5)
    assert row["data_share"] == 0.5


def test_panels_show_the_centre_of_lr_sr_and_classes() -> None:
    """A wide image: 30x100 at x4 is 120x400, of which 192 columns are shown."""
    generator = torch.Generator().manual_seed(0)
    lr, sr = (torch.rand(3, *size, generator=generator) for size in ((30, 100), (120, 400)))
    classes = torch.ones(120, 400, dtype=torch.uint8)
    restored = Restored(sr, classes, [0.0, 1.0], 0, 0, 0.0)
    picture = panels(lr, restored, with_classes=True)
    assert picture.shape == (120, 3 * SIDE_PX + 2 * 4, 3)
    columns = slice(104, 296)
    shown = quantise(sr)[:, columns]
    np.testing.assert_array_equal(picture[:, 196:388], shown)
    enlarged = quantise(lr).repeat(4, axis=0).repeat(4, axis=1)[:, columns]
    np.testing.assert_array_equal(picture[:, :192], enlarged)
    blended = (shown + class_colours(2)[1].astype(float)) / 2
    assert np.abs(picture[:, 392:] - blended).max() <= 0.5
    assert panels(lr, restored, with_classes=False).shape == (120, 2 * SIDE_PX + 4, 3)


class _Images(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"lr": torch.rand(3, 8, 8), "hr": torch.rand(3, 32, 32)}


@pytest.mark.parametrize(
    ("kind", "widths"),
    [("fsrcnn", {"sr": 68}), ("fsrcnn-phase1", {"k0": 104, "heavy": 68})],
)
def test_validation_pictures_the_first_image(kind: str, widths: dict[str, int]) -> None:
    model = models.make(model_spec(kind))
    ((_, rows),) = validate(model, [(4.0, _Images())], psnr_type="rgb", world=ONE)
    pictures = {row.name: row.picture for row in rows}
    shapes = {name: picture.shape for name, picture in pictures.items() if picture is not None}
    assert shapes == {name: (32, width, 3) for name, width in widths.items()}
