"""Files are found or downloaded whole, and nothing else is ever taken for them."""

import gzip
import hashlib
import io
import lzma
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from vlae import files
from vlae.files import Remote, check, download, find, members, reading, unpack

BLOB = bytes(range(256)) * 40
MD5 = "md5:" + hashlib.md5(BLOB).hexdigest()


class Site(ThreadingHTTPServer):
    """Serves /good.bin, /other.bin (wrong content), /cut.bin (connection lost halfway), /busy.bin (503 twice), and
    /slow.bin, which pauses `halfway` until it may `go_on`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.halfway, self.go_on = Event(), Event()

    def __call__(self, *names: str) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{self.server_port}/{name}" for name in names)


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        busy = self.path == "/busy.bin" and self.server.asked.count(self.path) < 3
        if self.path == "/none.bin" or busy:
            return self.send_error(503 if busy else 404)
        content = b"<html>" if self.path == "/other.bin" else BLOB
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        if self.path == "/slow.bin":
            self.server.halfway.set()
            self.server.go_on.wait()
        if self.path != "/cut.bin":
            with suppress(ConnectionError):  # the other side was killed
                self.wfile.write(content[half:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(hurried: None) -> Iterator[Site]:
    with Site() as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def left(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize("first", ["none.bin", "other.bin", "cut.bin"])
def test_the_next_site_is_asked(tmp_path: Path, site: Site, first: str) -> None:
    path = download(tmp_path, Remote("set", "file.bin", site(first, "good.bin"), MD5))
    assert path == tmp_path / "set" / "file.bin"
    assert path.read_bytes() == BLOB
    assert path.stat().st_mode & 0o777 == 0o644  # others may read it
    assert left(tmp_path) == ["set", "set/file.bin"]
    asked = len(site.asked)
    assert download(tmp_path, Remote("set", "file.bin", site("good.bin"), MD5)) == path
    assert len(site.asked) == asked  # it is there already


def test_a_busy_site_is_asked_again(tmp_path: Path, site: Site) -> None:
    download(tmp_path, Remote("set", "file.bin", site("busy.bin"), MD5))
    assert site.asked == ["/busy.bin"] * 3


@pytest.mark.parametrize("checksum", [MD5, "git:" + hashlib.sha1(b"blob 10240\0" + BLOB).hexdigest()])
def test_nothing_is_left_of_a_failure(tmp_path: Path, site: Site, checksum: str) -> None:
    urls = (*site("none.bin", "other.bin", "cut.bin"), "http://127.0.0.1:9/file.bin")
    with pytest.raises(FileNotFoundError) as error:
        download(tmp_path, Remote("set", "file.bin", urls, checksum))
    assert left(tmp_path) == ["set"]
    said = str(error.value)
    assert all(url in said for url in urls)
    words = ("file.bin", str(tmp_path / "set"), "404", "another file, by its checksum", "ConnectionError", "data.root")
    assert all(word in said for word in words)


def start(root: Path, url: str) -> subprocess.Popen[bytes]:
    """A process that downloads."""
    call = f"download(Path({str(root)!r}), Remote('set', 'file.bin', ({url!r},), {MD5!r}))"
    code = f"from pathlib import Path; from vlae.files import Remote, download; {call}"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, site: Site) -> None:
    process = start(tmp_path, *site("slow.bin"))
    assert site.halfway.wait(60)
    process.kill()
    process.wait()
    site.go_on.set()
    assert any(".file.bin.part/" in name for name in left(tmp_path))
    assert "set/file.bin" not in left(tmp_path)
    download(tmp_path, Remote("set", "file.bin", site("good.bin"), MD5))
    assert left(tmp_path) == ["set", "set/file.bin"]


def test_one_process_downloads_and_the_others_wait(tmp_path: Path, site: Site) -> None:
    processes = [start(tmp_path, *site("slow.bin")) for _ in range(3)]
    assert site.halfway.wait(60)
    site.go_on.set()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert site.asked == ["/slow.bin"]
    assert (tmp_path / "set" / "file.bin").read_bytes() == BLOB


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, site: Site) -> None:
    (tmp_path / "set").write_text("a file where the folder should be")
    with pytest.raises(FileNotFoundError, match=r"no file\.bin below .*FileExistsError.*VLAE_DATA_DIR"):
        download(tmp_path, Remote("set", "file.bin", site("good.bin"), MD5))


def test_found_files_are_not_downloaded(tmp_path: Path) -> None:
    remote = Remote("set", "file.bin", ("http://127.0.0.1:9/file.bin",), MD5)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_bytes(BLOB)
    assert find(tmp_path, ("", "a", "b"), ("one", "two"), remote) == tmp_path / "b" / "two"
    (tmp_path / "b" / "one").write_bytes(BLOB)
    assert find(tmp_path, ("", "a", "b"), ("one", "two"), remote) == tmp_path / "b" / "one"
    (tmp_path / "two").write_bytes(BLOB)
    assert find(tmp_path, ("", "a", "b"), ("one", "two"), remote) == tmp_path / "two"


@pytest.mark.parametrize(
    ("checksum", "content"),
    [
        ("md5:5d41402abc4b2a76b9719d911017c592", b"hello"),
        ("sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", b"hello"),
        ("git:b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", b"hello"),  # git hash-object
        (None, b"anything"),
    ],
)
def test_checksums(checksum: str | None, content: bytes) -> None:
    check(content, checksum)
    if checksum:
        with pytest.raises(ValueError, match=checksum.partition(":")[2]):
            check(content + b"!", checksum)


MEMBERS = {"top/a.bin": BLOB, "top/b/c.txt": b"text"}


def pack(path: Path) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in MEMBERS.items():
                archive.writestr(name, content)
    elif ".tar" in path.name:
        with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as tar:  # type: ignore[call-overload]
            for name, content in MEMBERS.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            for kind, name, link in (
                (tarfile.SYMTYPE, "link", "/etc/hostname"),
                (tarfile.FIFOTYPE, "pipe", ""),
                (tarfile.DIRTYPE, "../outside", ""),
            ):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, link
                tar.addfile(entry)
    else:
        for name, content in MEMBERS.items():
            file = path.parent / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


@pytest.mark.parametrize("name", ["top", "x.zip", "x.tar", "x.tar.gz", "x.tar.xz", "x.tar.bz2"])
def test_archives_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    """Links, pipes and folders are passed over, and nothing is written."""
    path = tmp_path / name
    pack(path)
    before = left(tmp_path.parent)
    assert dict(members(path)) == MEMBERS
    assert left(tmp_path.parent) == before


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tar.xz"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.9])
def test_a_cut_archive_is_refused_by_name(tmp_path: Path, name: str, keep: float) -> None:
    path, remote = tmp_path / name, Remote("set", name, ("http://there/x",), None)
    pack(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{path} is damaged or another file .*http://there/x"), reading(path, remote):
        list(members(path))


@pytest.mark.parametrize("name", ["x", "x.gz", "x.xz", "x.zip", "x.tar.xz"])
def test_a_bomb_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LIMIT", 1000)
    path = tmp_path / name
    if "." in name and name not in ("x.gz", "x.xz"):
        pack(path)
        unpacked = members
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(BLOB))
        unpacked = unpack  # type: ignore[assignment]
    with pytest.raises(ValueError, match="unpacks to more than 1,000 bytes"):
        list(unpacked(path))
