"""Published files: found below a folder or downloaded into it, unpacked in memory, checked. Nothing is unpickled."""

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

LIMIT = 2**28  # bytes that a file may unpack to, several times the largest of ours: a bomb must not fill the memory


class Remote(NamedTuple):
    """A file as it is served: under `name` in the folder `folder` of the root, from the first of `urls` that has it."""

    folder: str
    name: str
    urls: tuple[str, ...]
    checksum: str | None = None


def wayback(url: str) -> str:
    """The Internet Archive's copy of a file, as it was served."""
    return f"https://web.archive.org/web/2022id_/{url}"


def find(root: Path, places: Iterable[str], names: Iterable[str], remote: Remote) -> Path:
    """The first of `names`, files or folders, in the first of `places` below `root`; else `remote`, downloaded."""
    names = tuple(names)
    candidates = (root / place / name for place in places for name in names)
    return next((path for path in candidates if path.exists()), None) or download(root, remote)


def download(root: Path, remote: Remote) -> Path:
    """The downloaded file, whole and checked; of several processes one downloads and the others wait.

    Raises:
        FileNotFoundError: if no site serves it or it cannot be stored: names the file, its place and its source.
    """
    import pooch  # here, as only a missing file needs it
    from filelock import FileLock

    folder, part = root / remote.folder, root / remote.folder / f".{remote.name}.part"
    path = folder / remote.name
    known = (remote.checksum or "").startswith("md5:")  # then pooch asks again for what came damaged
    failed: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if path.exists():
                return path
            for url in remote.urls:
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                registry = {remote.name: remote.checksum if known else None}
                site = pooch.create(part, "", registry=registry, urls={remote.name: url}, retry_if_failed=2)
                try:
                    file = Path(site.fetch(remote.name, progressbar=True))
                    check(file.read_bytes(), remote.checksum)
                    file.chmod(0o644)  # a temporary file is its owner's alone
                    os.replace(file, path)
                    return path
                except (OSError, ValueError) as error:  # requests raises OSErrors
                    status = getattr(getattr(error, "response", None), "status_code", "")
                    why = "another file, by its checksum" if isinstance(error, ValueError) else type(error).__name__
                    failed.append(f"{url}: {why} {status}".strip())
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        failed.append(f"{type(error).__name__}: {error}")
    raise FileNotFoundError(
        f"no {remote.name} below {root}, and it could not be downloaded ({'; '.join(failed)}); "
        f"get it from {remote.urls[0]}, put it into {folder}, or set data.root or VLAE_DATA_DIR"
    )


def check(content: bytes, checksum: str | None) -> None:
    """ValueError unless the content has that checksum, `md5:...`, `sha256:...` or `git:...` (a blob's id)."""
    if checksum is None:
        return
    kind, _, published = checksum.partition(":")
    head = b"blob %d\0" % len(content) if kind == "git" else b""
    have = hashlib.new({"git": "sha1"}.get(kind, kind), head + content, usedforsecurity=False).hexdigest()
    if have != published:
        raise ValueError(f"{kind} checksum {have}, the published one is {published}")


@contextmanager
def reading(path: Path, remote: Remote) -> Iterator[None]:
    """Whatever is wrong with a file becomes one ValueError that names it and its source."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a broken file provokes errors of every kind in what unpacks it
        found = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or another file ({found}); get it from {remote.urls[0]}") from error


def bounded(read: Callable[[int], bytes]) -> bytes:
    content = read(LIMIT + 1)
    if len(content) > LIMIT:
        raise ValueError(f"it unpacks to more than {LIMIT:,} bytes")
    return content


def unpack(path: Path) -> bytes:
    """The content of a file, plain, .gz or .xz."""
    if path.suffix in (".gz", ".xz"):
        with gzip.open(path) if path.suffix == ".gz" else lzma.open(path) as file:
            return bounded(file.read)
    with path.open("rb") as plain:
        return bounded(plain.read)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a folder, a .zip or a .tar of any packing, in no particular order."""
    if path.is_dir():
        for member in path.rglob("*"):
            if member.is_file():
                with member.open("rb") as plain:
                    yield member.relative_to(path.parent).as_posix(), bounded(plain.read)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as zipped:
            for name in zipped.namelist():
                with zipped.open(name) as file:
                    yield name, bounded(file.read)
    else:
        with tarfile.open(path) as tarred:
            for entry in tarred:
                if entry.isfile() and (opened := tarred.extractfile(entry)):
                    yield entry.name, bounded(opened.read)
