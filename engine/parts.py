"""Folders as tar files of a bounded size, to be carried to another machine, and back again.

A manifest beside the parts lists them, each before it appears, with its checksum. Packing and
unpacking can be interrupted at any time and run again: what is there is verified and kept, and
nothing that is there is ever overwritten.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from utils.atomic import keep_as, remove_leftovers, replace_file, write_text
from utils.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = 1
MB = 10**6


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
    files = _files_of(folders, output)
    plan = _plan(files, part_mb)
    listed = _listed_parts(output, plan)
    for name in (MANIFEST_NAME, *(part.name for part in plan)):
        remove_leftovers(output / name)
    record = partial(_write_manifest, output, listed, plan)
    for part in plan:
        path = output / part.name
        if part.name in listed and path.is_file():
            _verify(output, listed[part.name])
            if not _holds(path, files, part):
                raise UserError(f"{path} holds files in an older state: pack into an empty folder")
        elif path.exists():
            raise UserError(f"{path} is there already and not in its manifest: remove it")
        else:
            listed[part.name] = part
            _write(part, path, files, record)
    record()
    return [listed[part.name] for part in plan]


def unpack(source: Path, output: Path, aside: Path | None = None) -> tuple[int, int]:
    """Verify all parts in `source`, and only then write their files below `output`.

    Args:
        aside: a new folder, for the files in `output` whose content is another than in the parts;
            they are moved to the same path below it. None: such files are an error.

    Returns:
        how many files were written, and how many were there already.

    Raises:
        UserError: no manifest, parts that are missing or damaged, names that lead out of
            `output`, or something in the way; nothing is written then.
    """
    parts = _complete_parts(source)
    differing = [path for part in parts for path in _differing(source, part, output)]
    if differing and aside is None:
        raise UserError(
            f"{output} has other content already in {len(differing)} of the files, first of all "
            f"{differing[0]}: move them away, or let --replace move them to before-<time>"
        )
    written = there = 0
    for part in parts:
        for inside, data in _entries(source / part.name, output):
            if _has(output / inside, data):
                there += 1
                continue
            if not written:
                remove_leftovers(output / inside)  # An interrupted run ended at this file.
            _put(output / inside, data, aside and aside / inside)
            written += 1
    return written, there


def _files_of(folders: Sequence[Path], output: Path) -> dict[str, Path]:
    """Files by name in the parts, sorted; without hidden ones, and `output` if it is below."""
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
        own = output.resolve() if folder.resolve() in output.resolve().parents else None
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if own is not None and own in path.resolve().parents:
                continue
            if any(part.startswith(".") for part in relative.parts):
                continue
            if path.is_symlink() and not path.is_file():
                what = "a folder, which is to be packed itself" if path.is_dir() else "nothing"
                raise UserError(f"{path} is a link to {what}: remove the link")
            if path.is_file():
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


def _write(part: Part, path: Path, files: dict[str, Path], record: Callable[[], None]) -> None:
    """Write a part and note its size and checksum; `record` is called before it is at `path`."""
    with replace_file(path, first=record) as temporary:
        with tarfile.open(temporary, "w") as tar:
            for name in part.files:
                with files[name].open("rb") as file:
                    tar.addfile(_header(name, files[name]), file)
        part.bytes, part.sha256 = temporary.stat().st_size, _sha256(temporary)


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


def _entries(path: Path, output: Path) -> Iterator[tuple[Path, bytes]]:
    """The files of one part: path within `output`, and content."""
    root = output.resolve()
    with _opened(path) as tar:
        for member in tar:
            target = output / member.name
            # Not tarfile's filters: the first releases of Python 3.11 have none.
            if not target.resolve().is_relative_to(root):
                raise UserError(f"{path}: {member.name} leads out of {output}")
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise UserError(f"{path}: {member.name} is no plain file")
            yield (target.parent.resolve() / target.name).relative_to(root), content.read()


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.TarError as error:
        raise UserError(f"{path} is no tar file: {error}") from error


def _differing(source: Path, part: Part, output: Path) -> Iterator[Path]:
    """Verify a part; its files that are in `output` with other content."""
    _verify(source, part)
    for inside, data in _entries(source / part.name, output):
        target = output / inside
        found = next(each for each in (target, *target.parents) if each.exists())
        if found.is_dir() == (found == target):
            raise UserError(f"{found} is in the way of {inside} in {part.name}: move it away")
        if found == target and not _has(target, data):
            yield target


def _has(target: Path, data: bytes) -> bool:
    """Whether a file is there and has this content."""
    return target.is_file() and target.stat().st_size == len(data) and target.read_bytes() == data


def _put(target: Path, data: bytes, kept: Path | None) -> None:
    """Write a file; one that is there gets the name `kept`."""
    first = None
    if target.exists():
        if kept is None or kept.exists():
            raise UserError(f"{target} has changed since it was checked: unpack again")
        kept.parent.mkdir(parents=True, exist_ok=True)
        # It has both names until the new file is there: at no moment is there none.
        first = partial(keep_as, target, kept)
    with replace_file(target, sync=first is not None, first=first) as temporary:
        temporary.write_bytes(data)


def _verify(folder: Path, part: Part) -> None:
    if _sha256(folder / part.name) != part.sha256:
        raise UserError(
            f"{folder / part.name} is damaged: its checksum is not that of {MANIFEST_NAME}: "
            f"remove it, and pack or copy it again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, listed: Mapping[str, Part], plan: Sequence[Part]) -> None:
    parts = [asdict(listed[part.name]) for part in plan if part.name in listed]
    content = {"format": FORMAT, "planned_parts": len(plan), "parts": parts}
    write_text(folder / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")


def _listed_parts(folder: Path, plan: Sequence[Part]) -> dict[str, Part]:
    """The parts of `plan` that the manifest tells of, by name: there, or still to be written."""
    listed = {}
    planned = {part.name: part.files for part in plan}
    for part in _manifest(folder)[0]:
        if planned.get(part.name) == part.files:
            listed[part.name] = part
        elif (folder / part.name).exists():
            raise UserError(
                f"{folder / part.name} holds other files than would be packed now: "
                f"pack into an empty folder"
            )
    return listed


def _complete_parts(folder: Path) -> list[Part]:
    """All parts of a folder."""
    parts, planned = _manifest(folder)
    if not parts:
        raise UserError(f"no {MANIFEST_NAME} in {folder}: name the folder that the parts are in")
    missing = [part.name for part in parts if not (folder / part.name).is_file()]
    if missing or planned != len(parts):
        what = ", ".join(missing) or "parts that were never packed (pack again to finish)"
        raise UserError(f"{folder}: missing {what}")
    return parts


def _manifest(folder: Path) -> tuple[list[Part], int]:
    """The parts that a folder's manifest tells of, and how many are planned; none without one."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return [], 0
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of format {FORMAT}")
    try:
        return [Part(**part) for part in content["parts"]], content["planned_parts"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest of parts") from error
