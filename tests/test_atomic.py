"""Files that appear whole or not at all, and what is no file."""

import os
import stat
from pathlib import Path

import pytest

from utils.atomic import is_device, remove_leftovers, replace_file, write_text
from utils.errors import UserError

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@needs_pipes
def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "figures\n")
        assert os.read(reader, 100) == b"figures\n"
    finally:
        os.close(reader)
    with pytest.raises(UserError, match="is a device or a pipe"), replace_file(pipe):
        raise AssertionError("nothing is to be written")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [pipe] == list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev")
def test_what_is_a_device(tmp_path: Path) -> None:
    # /dev/stdout is a link, to a file where output goes to one.
    for name in ("/dev/null", "/dev/stdout", "/dev/fd/1"):
        assert is_device(Path(name)) == Path(name).exists()
    file = tmp_path / "file"
    assert not is_device(file)
    file.touch()
    for path in (file, tmp_path, tmp_path / "new" / "file"):
        assert not is_device(path)


@pytest.mark.parametrize("stem", ["a" * 250, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 120, "a[1]*?"])
def test_files_of_long_and_odd_names_are_written_and_cleaned_up_after(
    stem: str, tmp_path: Path
) -> None:
    path, other = tmp_path / f"{stem}.pth", tmp_path / f".{stem[:-1]}.1-2.tmp.pth"[-200:]
    other.touch()
    write_text(path, "whole\n")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
    with pytest.raises(KeyboardInterrupt), replace_file(path) as temporary:
        leftover = temporary
        raise KeyboardInterrupt
    leftover.write_text("a part")
    remove_leftovers(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
    assert path.read_text() == "whole\n"
