"""Parts that carry files: what they hold and refuse, and that a kill at any step is mended."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.parts import MANIFEST_NAME, pack, unpack
from engine.train_queue import main
from tests.training import make_pictures
from utils.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def is_killed(step: int, folder: Path, work: Callable[[], object]) -> bool:
    """Do `work` in a process that is killed before its file operation `step` in `folder`.

    Returns whether it came to that.
    """
    child = os.fork()
    if child == 0:
        seen = itertools.count()

        def kill(event: str, args: tuple[Any, ...]) -> None:
            name = args[0] if args and isinstance(args[0], (str, Path)) else ""
            if str(name).startswith(str(folder)) and next(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(kill)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Twelve pictures, one of them in a folder below."""
    folder = make_pictures(tmp_path / "photos", count=12)
    (folder / "more").mkdir()
    (folder / "11.png").rename(folder / "more" / "11.png")
    return folder


def test_parts_hold_what_was_packed(pictures, tmp_path) -> None:
    parts = pack([pictures], tmp_path / "parts", 0.03)
    assert len(parts) > 2
    assert all(part.bytes <= 30_000 for part in parts)
    assert unpack(tmp_path / "parts", tmp_path / "there") == (12, 0)
    for path in pictures.rglob("*.png"):
        copy = tmp_path / "there" / "photos" / path.relative_to(pictures)
        assert copy.read_bytes() == path.read_bytes()
    assert unpack(tmp_path / "parts", tmp_path / "there") == (0, 12)


def test_parts_below_what_is_packed_are_not_packed(pictures, tmp_path) -> None:
    whole = pack([pictures], pictures / "parts", 0.03)
    assert pack([pictures], pictures / "parts", 0.03) == whole
    assert unpack(pictures / "parts", tmp_path / "there") == (12, 0)
    # What is above says nothing of what is packed.
    pack([pictures / "more"], pictures, 0.03)
    assert unpack(pictures, tmp_path / "one") == (1, 0)


def test_links_are_packed_or_named(pictures, tmp_path) -> None:
    (pictures / "again.png").symlink_to(pictures / "0.png")
    pack([pictures], tmp_path / "parts", 1.0)
    unpack(tmp_path / "parts", tmp_path / "out")
    assert contents(tmp_path / "out" / "photos") == contents(pictures)
    for target, what in (
        ("nowhere", "nothing"),
        ("photos/more", "a folder, which is to be packed itself"),
    ):
        link = pictures / "link"
        link.symlink_to(tmp_path / target)
        with pytest.raises(UserError, match=f"{link} is a link to {what}: remove the link"):
            pack([pictures], tmp_path / "others", 1.0)
        link.unlink()


def test_packing_goes_on_where_it_ended(pictures, tmp_path) -> None:
    output = tmp_path / "parts"
    whole = pack([pictures], output, 0.03)
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    manifest["parts"] = manifest["parts"][:1]
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    for part in whole[1:]:
        (output / part.name).unlink()
    with pytest.raises(UserError, match="never packed"):
        unpack(output, tmp_path / "there")
    first = (output / whole[0].name).stat().st_mtime_ns
    assert pack([pictures], output, 0.03) == whole
    assert (output / whole[0].name).stat().st_mtime_ns == first


def test_what_is_there_is_not_overwritten(pictures, tmp_path) -> None:
    pack([pictures], tmp_path / "parts", 0.03)
    there = tmp_path / "there" / "photos"
    there.mkdir(parents=True)
    (there / "7.png").write_text("mine")
    (there / "9.png").write_text("mine")
    before = contents(there)
    expected = r"other content already in 2 of the files, .*7\.png: move them away, or .*--replace"
    with pytest.raises(UserError, match=expected):
        unpack(tmp_path / "parts", tmp_path / "there")
    assert contents(there) == before
    (pictures / "new.png").write_bytes(b"new")
    with pytest.raises(UserError, match="holds other files"):
        pack([pictures], tmp_path / "parts", 0.03)


def test_parts_of_an_older_state_are_not_taken_for_the_new_one(pictures, tmp_path) -> None:
    pack([pictures], tmp_path / "parts", 1)
    content = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(content[::-1])
    with pytest.raises(UserError, match="older state"):
        pack([pictures], tmp_path / "parts", 1)


def test_wrong_parts_are_refused(pictures, tmp_path) -> None:
    with pytest.raises(UserError, match="raise --part-mb"):
        pack([pictures], tmp_path / "parts", 0.001)
    (part,) = pack([pictures], tmp_path / "parts", 1)
    path = tmp_path / "parts" / part.name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        unpack(tmp_path / "parts", tmp_path / "there")
    path.unlink()
    with pytest.raises(UserError, match=f"missing {part.name}"):
        unpack(tmp_path / "parts", tmp_path / "there")


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "{}/out.txt", "link/out.txt"])
def test_names_that_lead_out_are_refused(name, pictures, tmp_path) -> None:
    output, there = tmp_path / "parts", tmp_path / "there"
    there.mkdir()
    (there / "link").symlink_to(tmp_path)
    (part,) = pack([pictures], output, 1)
    path = output / part.name
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(name.format(tmp_path)))
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    manifest["parts"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"out\.txt leads out of"):
        unpack(output, there)
    assert not (tmp_path / "out.txt").exists()


def test_packing_that_is_killed_at_any_step_is_finished_by_the_next(tmp_path) -> None:
    pictures = make_pictures(tmp_path / "photos", count=3)
    parts = pack([pictures], tmp_path / "straight", 0.015)
    assert len(parts) > 1
    straight = contents(tmp_path / "straight")
    again = partial(pack, [pictures], tmp_path / "again", 0.015)
    for step in itertools.count():
        output = tmp_path / f"killed-{step}"
        killed = is_killed(step, tmp_path, partial(pack, [pictures], output, 0.015))
        if not all((output / part.name).exists() for part in parts):
            with pytest.raises(UserError, match=r"missing part-|never packed|no manifest\.json"):
                unpack(output, tmp_path / "there")
        assert pack([pictures], output, 0.015) == parts
        assert contents(output) == straight, step
        is_killed(step, tmp_path, again)
        if not killed:
            break
    assert step > 10
    again()
    assert contents(tmp_path / "again") == straight


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_part_of_someone_else_is_not_overwritten(is_listed, pictures, tmp_path) -> None:
    output = tmp_path / "parts"
    parts = pack([pictures], output, 0.03)
    if not is_listed:
        (output / MANIFEST_NAME).unlink()
    (output / parts[0].name).write_text("mine")
    with pytest.raises(UserError, match="is damaged" if is_listed else "not in its manifest"):
        pack([pictures], output, 0.03)
    assert (output / parts[0].name).read_text() == "mine"


def untouched(path: Path) -> tuple[int, int]:
    """What changes where a file is written or replaced, but not where it is read."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def test_a_run_is_carried_back_to_where_it_came_from(tmp_path, monkeypatch, capsys) -> None:
    run, parts, here = tmp_path / "fsrcnn", str(tmp_path / "parts"), tmp_path / "save"
    run.mkdir()
    for name in ("config.yaml", "iter_last.pth", "release.pth"):
        (run / name).write_text(f"finished {name}")
    shutil.copytree(run, here / "fsrcnn")
    (here / "fsrcnn" / "release.pth").unlink()
    (here / "fsrcnn" / "iter_last.pth").write_text("stopped")
    same = untouched(here / "fsrcnn" / "config.yaml")
    pack([run], Path(parts), 1)
    words = ["train_queue", "unpack", "--input", parts, "--output", str(here)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match=r"in 1 of the files, .*iter_last\.pth: .*--replace"):
        main()
    monkeypatch.setattr("sys.argv", [*words, "--replace"])
    assert main() == 0
    assert contents(here / "fsrcnn") == contents(run)
    assert untouched(here / "fsrcnn" / "config.yaml") == same
    (kept,) = here.glob("before-*")
    assert contents(kept) == {"fsrcnn/iter_last.pth": b"stopped"}
    assert f"2 files written, 1 were there already\n{kept}: " in capsys.readouterr().out
    assert main() == 0
    assert list(here.glob("before-*")) == [kept]


def test_replacing_that_is_killed_at_any_step_is_finished_by_the_next(tmp_path) -> None:
    pictures = make_pictures(tmp_path / "photos", count=4)
    parts, start = tmp_path / "parts", tmp_path / "start"
    pack([pictures], parts, 0.015)
    shutil.copytree(pictures, start / "photos")
    (start / "photos" / "0.png").unlink()
    for name in ("1.png", "3.png"):
        (start / "photos" / name).write_text("mine")
    old, new = contents(start / "photos"), contents(pictures)
    for step in itertools.count():
        there = tmp_path / f"there-{step}"
        shutil.copytree(start, there)
        killed = is_killed(step, tmp_path, partial(unpack, parts, there, there / "before-1"))
        between = contents(there / "photos")
        assert all(between[name] in (old[name], new[name]) for name in old), step
        unpack(parts, there, there / "before-2")
        assert contents(there / "photos") == new, step
        kept = contents(there / "before-1" / "photos") | contents(there / "before-2" / "photos")
        assert {kept[name] for name in ("1.png", "3.png")} == {b"mine"}, step
        if not killed:
            break
    assert step > 10


@pytest.mark.parametrize("name", ["photos", "photos/7.png"])
def test_what_cannot_be_replaced_is_found_before_anything_is_written(
    name, pictures, tmp_path
) -> None:
    pack([pictures], tmp_path / "parts", 0.03)
    there = tmp_path / "there"
    (there / name).parent.mkdir(parents=True)
    (there / name).write_text("mine") if name == "photos" else (there / name).mkdir()
    before = contents(there)
    with pytest.raises(UserError, match=f"{name} is in the way"):
        unpack(tmp_path / "parts", there, there / "before")
    assert contents(there) == before


def test_the_end_of_a_part_counts(tmp_path) -> None:
    """A header and this file fill a record of 10 KiB but for 512 bytes, and the end takes 1024."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(9216))
    with pytest.raises(UserError, match="raise --part-mb"):
        pack([tmp_path / "a"], tmp_path / "parts", 0.01024)
    (part,) = pack([tmp_path / "a"], tmp_path / "parts", 0.02048)
    assert part.bytes == 20480
