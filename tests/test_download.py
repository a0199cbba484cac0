"""datasets/download.py against a server on this machine, broken connections and bad archives."""

import gzip
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import download
from conftest import ROOT, names_in, tree

SCRIPT = ROOT / "datasets" / "download.py"
TAR, ZIP = "/pix2pix/datasets/facades.tar.gz", "/cyclegan/datasets/grumpifycat.zip"
PAIRS = {f"facades/train/{i}.jpg": os.urandom(3000) for i in range(20)}  # gzip cannot shrink them
SIDES = {f"grumpifycat/train{side}/{i}.PNG": os.urandom(500) for side in "AB" for i in "12"}

IGNORES = "ignores Range"  # a mood of the server
TWIN = "/cyclegan/datasets/maps.zip"  # of the paired maps; it gets a name of its own
TWO_MAPS = {"maps_unpaired/trainA/1.jpg": b"x", "maps_unpaired/trainB/1.jpg": b"y"}


class Handler(BaseHTTPRequestHandler):
    """Serves server.files by their path, with Range. server.moods: one answer per request."""

    def do_GET(self):
        server, requested = self.server, self.headers.get("Range")
        server.log.append((self.path, requested))
        mood = server.moods.pop(0) if server.moods else ""
        if isinstance(mood, int):
            return self.send_error(mood)
        if self.path not in server.files:
            return self.send_error(404)
        body = server.files[self.path]
        start = int(requested[6:-1]) if requested and mood != IGNORES else None
        if start is not None and start >= len(body):
            return self.send_error(416)
        self.send_response(200 if start is None else 206)
        body = body[start or 0 :]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mood in ("breaks", "stalls") else body)
        if mood == "stalls":
            server.stalled.wait(10)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {TAR: tar(PAIRS), ZIP: zipped(SIDES), TWIN: zipped(TWO_MAPS)}
    server.moods, server.log = [], []
    server.stalled = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def test_settings(monkeypatch):
    monkeypatch.setattr(download, "SHA256", {})
    monkeypatch.setattr(download, "RETRY_DELAYS", (0, 0))
    monkeypatch.setattr(download, "TIMEOUT", 0.5)


def tar(files, members=()):
    """A tar.gz as bytes: files as name -> content, and further TarInfo members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


def special(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def run(server, root, *flags, name="facades"):
    download.main([name, "--root", str(root), "--base-url", server.url, *flags])


def error_of(capsys, function, *args, **kwargs):
    """The one line that a failing call writes to standard error; its exit status must be 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        function(*args, **kwargs)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("download.py: error: ")
    return line


def check_set(root, files):
    """root holds these files and nothing else: no part and no temporary folder is left."""
    assert tree(root) == files
    assert names_in(root) == sorted({name.split("/")[0] for name in files})


@pytest.mark.parametrize("name, path, files", [
    ("facades", TAR, PAIRS), ("grumpifycat", ZIP, SIDES), ("maps_unpaired", TWIN, TWO_MAPS),
])  # fmt: skip
def test_an_archive_is_downloaded_and_unpacked(server, tmp_path, capsys, name, path, files):
    run(server, tmp_path / "new" / "root", name=name)
    check_set(tmp_path / "new" / "root", files)
    body, out = server.files[path], capsys.readouterr().out
    assert server.log == [(path, None)]
    assert hashlib.sha256(body).hexdigest() in out and f"{len(body):,} bytes" in out


@pytest.mark.parametrize("top", ["", "./", "other/", "./facades/"])
def test_the_top_folder_may_have_any_name_or_none_and_hard_links_are_files(server, tmp_path, top):
    link = special(f"{top}val/2.jpg", tarfile.LNKTYPE, f"{top}train/1.jpg")
    server.files[TAR] = tar({f"{top}train/1.jpg": b"pair"}, [link])
    run(server, tmp_path)
    check_set(tmp_path, {"facades/train/1.jpg": b"pair", "facades/val/2.jpg": b"pair"})


def test_list_names_every_dataset_and_who_reads_it_and_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import download; download.main(['--list'])"
    command, options = [sys.executable, "-c", code], {"cwd": SCRIPT.parent, "text": True}
    done = subprocess.run(command, **options, capture_output=True, check=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines.keys() == download.DATASETS.keys() >= {"facades", "night2day", "horse2zebra"}
    assert re.search(r"\bpaired .* pix2pix", lines["facades"])
    assert re.search(r"\bunpaired .* cycleGAN and CUT", lines["facades_unpaired"])


def test_a_further_run_resumes_where_one_gave_up(server, tmp_path, capsys):
    server.moods, body = ["breaks", 503, 503], server.files[TAR]
    error = error_of(capsys, run, server, tmp_path)
    assert "503" in error and "same command again to resume" in error
    assert (tmp_path / "facades.tar.gz.part").read_bytes() == body[: len(body) // 2]
    server.log.clear()
    run(server, tmp_path)
    assert server.log == [(TAR, f"bytes={len(body) // 2}-")]
    check_set(tmp_path, PAIRS)


@pytest.mark.parametrize("moods", [
    ["breaks"], ["breaks", IGNORES], [500, 503], [429, "breaks"], ["stalls"],
])  # fmt: skip
def test_passing_trouble_is_overcome_by_resuming_at_the_byte(server, tmp_path, moods):
    half = f"bytes={len(server.files[TAR]) // 2}-"
    server.moods = list(moods)
    run(server, tmp_path)
    starts = [half if mood in ("breaks", "stalls") else None for mood in moods if mood != IGNORES]
    assert server.log == [(TAR, start) for start in (None, *starts)]
    check_set(tmp_path, PAIRS)


@pytest.mark.parametrize("start", [b"\0" * 9000, None])
def test_a_part_of_another_file_is_removed(server, tmp_path, capsys, start):
    """And the next run starts again."""
    changed = tar({name: os.urandom(3000) for name in PAIRS})
    (tmp_path / "facades.tar.gz.part").write_bytes(start or changed[:40_000])
    assert "unusable archive" in error_of(capsys, run, server, tmp_path)
    assert names_in(tmp_path) == []
    run(server, tmp_path)
    check_set(tmp_path, PAIRS)


def test_a_missing_file_is_one_line_and_no_retry(server, tmp_path, capsys):
    del server.files[TAR]
    error = error_of(capsys, run, server, tmp_path)
    assert "404" in error and server.url + TAR in error and "--base-url" in error
    assert len(server.log) == 1
    assert names_in(tmp_path) == []


def test_ctrl_c_keeps_the_part(server, tmp_path):
    server.moods = ["stalls"]
    flags = ["facades", "--root", tmp_path, "--base-url", server.url]
    # A test run started with & ignores Ctrl-C, and its children would inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, SCRIPT, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    part, half = tmp_path / "facades.tar.gz.part", len(server.files[TAR]) // 2
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err == "download.py: interrupted; run the same command again to resume\n"
    kept = part.stat().st_size
    assert 0 < kept <= half
    run(server, tmp_path)
    assert server.log[1] == (TAR, f"bytes={kept}-")
    check_set(tmp_path, PAIRS)


def test_sha256_is_checked(server, tmp_path, capsys, monkeypatch):
    found = hashlib.sha256(server.files[TAR]).hexdigest()
    monkeypatch.setitem(download.SHA256, "facades", "0" * 64)
    assert f"--sha256 {found}" in error_of(capsys, run, server, tmp_path)
    assert names_in(tmp_path) == []
    run(server, tmp_path, "--sha256", found)
    check_set(tmp_path, PAIRS)


BOMB = {"facades/train/1.jpg": bytes(2**21)}
OUTSIDE = ["../evil.jpg", "facades/../../evil.jpg", "/tmp/evil.jpg"]
BAD_TARS = {
    **{name: tar(PAIRS | {name: b"evil"}) for name in OUTSIDE[:2]},
    "symbolic link outside": tar(PAIRS, [special("facades/a", tarfile.SYMTYPE, "/tmp")]),
    "symbolic link inside": tar(PAIRS, [special("facades/a", tarfile.SYMTYPE, "train")]),
    "hard link outside": tar(PAIRS, [special("facades/a.jpg", tarfile.LNKTYPE, "../secret")]),
    "fifo": tar(PAIRS, [special("facades/a\x1b[2J", tarfile.FIFOTYPE)]),
    "cut short": tar(PAIRS)[:-900],
    "without gzip's checksum": tar(PAIRS)[:-8] + bytes(8),
    "tar cut short inside": gzip.compress(gzip.decompress(tar(PAIRS))[:40_000]),
    "no archive": b"<html>Please log in</html>",
    "no images": tar({"facades/train/1.txt": b"text"}),
    "a notice": tar({"LICENCE\x1b[31m.txt": b"ask for it"}),
    "a bomb": tar(BOMB),
}
BAD_ZIPS = {
    "cut short": zipped(SIDES)[:-30],
    "a byte changed": zipped(SIDES).replace(SIDES["grumpifycat/trainA/1.PNG"][9:99], bytes(90)),
    "one side only": zipped({"grumpifycat/trainA/1.jpg": b"x"}),
    "a bomb": zipped(BOMB),
}
BAD = [("facades", TAR, *item) for item in BAD_TARS.items()]
BAD += [("grumpifycat", ZIP, *item) for item in BAD_ZIPS.items()]
WORDS = {"a bomb": "10 times", "a notice": "LICENCE", "fifo": "a link or a device"}


@pytest.mark.parametrize("name, path, kind, archive", BAD, ids=[f"{b[0]} {b[2]}" for b in BAD])
def test_a_bad_archive_is_refused(server, tmp_path, capsys, name, path, kind, archive):
    root = tmp_path / "root"
    (tmp_path / "secret").write_text("secret")
    server.files[path] = archive
    error = error_of(capsys, run, server, root, name=name)
    assert "unusable archive" in error and WORDS.get(kind, "") in error
    assert error.isprintable()
    assert names_in(root) == []
    assert names_in(tmp_path) == ["root", "secret"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_zip_cannot_reach_outside(server, tmp_path, name):
    server.files[ZIP] = zipped(SIDES | {name: b"evil"})
    run(server, tmp_path / "root", name="grumpifycat")
    assert names_in(tmp_path) == ["root"] and names_in(tmp_path / "root") == ["grumpifycat"]
    assert not Path("/tmp/evil.jpg").exists()


def old_set(root):
    (root / "facades" / "train").mkdir(parents=True)
    (root / "facades" / "train" / "old.jpg").write_bytes(b"old")
    return {"facades/train/old.jpg": b"old"}


def test_an_existing_dataset_is_replaced_only_with_overwrite(server, tmp_path, capsys):
    old = old_set(tmp_path)
    assert "--overwrite" in error_of(capsys, run, server, tmp_path)
    assert server.log == []
    check_set(tmp_path, old)
    run(server, tmp_path, "--overwrite")
    check_set(tmp_path, PAIRS)


def test_the_old_dataset_survives_a_failing_move(server, tmp_path, capsys, monkeypatch):
    old, rename = old_set(tmp_path), Path.rename

    def broken(path, target):
        if "new" in path.parts:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    assert "Input/output error" in error_of(capsys, run, server, tmp_path, "--overwrite")
    (tmp_path / "facades.tar.gz.part").unlink()
    check_set(tmp_path, old)


def test_a_full_disk_while_unpacking_keeps_the_archive(server, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", full)
        error = error_of(capsys, run, server, tmp_path)
    assert "No space left" in error and "resume" in error
    assert names_in(tmp_path) == ["facades.tar.gz.part"]
    run(server, tmp_path)  # nothing is downloaded again
    assert server.log[1:] == [(TAR, f"bytes={len(server.files[TAR])}-")]
    check_set(tmp_path, PAIRS)


@pytest.mark.parametrize("flags, expected", [
    ("facade", "did you mean facades?"), ("", "--list"), ("facades --sha256 abc", "64"),
    ("facades --base-url host", "expected http://"), ("facades --base http://host", "--base"),
])  # fmt: skip
def test_bad_flags_are_one_line(capsys, flags, expected):
    assert expected in error_of(capsys, download.main, flags.split())
