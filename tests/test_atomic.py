"""Files that appear whole or not at all, and what is no file."""

import os
import stat
from pathlib import Path

import pytest

from utils.atomic import is_device, replace_file, write_text
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
