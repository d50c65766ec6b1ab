"""Folders as tar files of a bounded size, to be carried to another machine, and back again.

A manifest beside the parts tells which there are and the checksum of each. Packing and unpacking
can be interrupted at any time and run again: what is there is verified and kept, and nothing that
is there is ever overwritten.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.atomic import replace_file, write_text
from utils.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = 1
MB = 10**6
_CHUNK_BYTES = 2**20


@dataclass
class Part:
    """One tar file.

    Attributes:
        name: of the tar file.
        files: names in it.
        bytes, sha256: of the tar file; 0 and empty until it is written.
    """

    name: str
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""


def pack(folders: Sequence[Path], output: Path, part_mb: float) -> list[Part]:
    """Write the files of `folders`, below each folder's name, into parts in `output`.

    Equal files make equal parts, byte by byte, whenever and wherever they are packed.

    Args:
        part_mb: the most that a part may have, in 10^6 bytes. No file is split.

    Raises:
        UserError: no files, one that is too large for a part, two folders of one name, or parts
            of other files in `output`.
    """
    files = _files_of(folders)
    plan = _plan(files, part_mb)
    known = _known_parts(output)
    for part in known:
        if not any((part.name, part.files) == (each.name, each.files) for each in plan):
            raise UserError(
                f"{output / part.name} holds other files than would be packed now: "
                f"pack into an empty folder"
            )
    done: list[Part] = []
    for part in plan:
        path = output / part.name
        kept = next((each for each in known if each.name == part.name), None)
        if kept is not None and path.is_file():
            _verify(output, kept)
            if not _holds(path, files, part):
                raise UserError(
                    f"{path} holds an older state of its files: pack into an empty folder"
                )
        else:
            if path.exists():
                raise UserError(f"{path} is there already and not in its manifest: remove it")
            kept = _written(part, path, files)
        done.append(kept)
        _write_manifest(output, [*done, *(each for each in known if each.name > part.name)], plan)
    return done


def unpack(source: Path, output: Path) -> tuple[int, int]:
    """Verify the parts in `source` and write their files below `output`.

    Returns:
        how many files were written, and how many were there already.

    Raises:
        UserError: no manifest, parts that are missing or damaged, names that lead out of
            `output`, or a file of other content in the way.
    """
    parts = _known_parts(source)
    if not parts:
        raise UserError(f"no {MANIFEST_NAME} in {source}: name the folder that the parts are in")
    missing = [part.name for part in parts if not (source / part.name).is_file()]
    if missing or not _is_complete(source):
        what = ", ".join(missing) or "parts that were never packed (pack again to finish)"
        raise UserError(f"{source}: missing {what}")
    written = there = 0
    for part in parts:
        _verify(source, part)
        for is_new in _extract(source / part.name, output):
            written, there = written + is_new, there + (not is_new)
    return written, there


def _files_of(folders: Sequence[Path]) -> dict[str, Path]:
    """Files by their name in the parts, sorted; hidden ones stay out."""
    files: dict[str, Path] = {}
    seen: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        # As it was named: a link's name says more than that of the folder behind it.
        name = folder.name or folder.resolve().name
        if name in seen:
            raise UserError(f"{seen[name]} and {folder} have the same name: pack them apart")
        seen[name] = folder
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                files[f"{name}/{relative.as_posix()}"] = path
    if not files:
        raise UserError(f"no files in {', '.join(str(folder) for folder in folders)}")
    return dict(sorted(files.items()))


def _plan(files: dict[str, Path], part_mb: float) -> list[Part]:
    """Fill parts in the order of the names."""
    most = int(part_mb * MB)
    parts: list[Part] = []
    used = 0
    for name, path in files.items():
        size = _entry_bytes(name, path)
        if _tar_bytes(size) > most:
            raise UserError(
                f"{path} has {path.stat().st_size / MB:.2f} MB, too much for a part of "
                f"{part_mb:g} MB: raise --part-mb"
            )
        if not parts or _tar_bytes(used + size) > most:
            parts.append(Part(f"part-{len(parts) + 1:04d}.tar"))
            used = 0
        parts[-1].files.append(name)
        used += size
    return parts


def _written(part: Part, path: Path, files: dict[str, Path]) -> Part:
    with replace_file(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name in part.files:
            with files[name].open("rb") as file:
                tar.addfile(_header(name, files[name]), file)
    return Part(part.name, part.files, path.stat().st_size, _sha256(path))


def _holds(path: Path, files: dict[str, Path], part: Part) -> bool:
    """Whether a part's files are what the folders hold now."""
    with tarfile.open(path) as tar:
        for name in part.files:
            content = tar.extractfile(name)
            if content is None or content.read() != files[name].read_bytes():
                return False
    return True


def _header(name: str, path: Path) -> tarfile.TarInfo:
    """Without owner and times, which differ from machine to machine."""
    header = tarfile.TarInfo(name)
    header.size = path.stat().st_size
    return header


def _entry_bytes(name: str, path: Path) -> int:
    header = _header(name, path)
    content = -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return len(header.tobuf(tarfile.DEFAULT_FORMAT)) + content


def _tar_bytes(entries: int) -> int:
    """Size of a tar file: two empty blocks at the end, and whole records."""
    used = entries + 2 * tarfile.BLOCKSIZE
    return -(-used // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _extract(path: Path, output: Path) -> Iterator[bool]:
    """Write the files of one part; for each whether it was new."""
    with _opened(path) as tar:
        for member in tar:
            target = output / member.name
            # Not tarfile's filters: the first releases of Python 3.11 have none.
            if not target.resolve().is_relative_to(output.resolve()):
                raise UserError(f"{path}: {member.name} leads out of {output}")
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise UserError(f"{path}: {member.name} is no plain file")
            data = content.read()
            if target.exists():
                if not target.is_file() or target.read_bytes() != data:
                    raise UserError(f"{target} is there already, with other content: move it away")
                yield False
                continue
            with replace_file(target, sync=False) as temporary:
                temporary.write_bytes(data)
            yield True


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.TarError as error:
        raise UserError(f"{path} is no tar file: {error}") from error


def _verify(folder: Path, part: Part) -> None:
    if _sha256(folder / part.name) != part.sha256:
        raise UserError(
            f"{folder / part.name} is damaged: its checksum is not that of {MANIFEST_NAME}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write_manifest(folder: Path, parts: Sequence[Part], plan: Sequence[Part]) -> None:
    content = {
        "format": FORMAT,
        "planned_parts": len(plan),
        "parts": [asdict(part) for part in parts],
    }
    write_text(folder / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")


def _known_parts(folder: Path) -> list[Part]:
    """The parts that a folder's manifest tells of; none where there is no manifest."""
    try:
        return [Part(**part) for part in _manifest(folder).get("parts", [])]
    except TypeError as error:
        raise UserError(f"{folder / MANIFEST_NAME} is no manifest of parts") from error


def _is_complete(folder: Path) -> bool:
    content = _manifest(folder)
    return content.get("planned_parts") == len(content.get("parts", []))


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of format {FORMAT}")
    return content
