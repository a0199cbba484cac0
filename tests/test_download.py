"""datasets/download.py against a server on this machine, broken connections and bad archives."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import signal
import stat
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

SCRIPT = Path(__file__).resolve().parents[1] / "datasets" / "download.py"
TAR, ZIP = "/pix2pix/datasets/facades.tar.gz", "/cyclegan/datasets/grumpifycat.zip"
PAIRS = {f"facades/train/{i}.jpg": os.urandom(3000) for i in range(20)}  # gzip cannot shrink them
SIDES = {
    f"grumpifycat/{side}/{i}.PNG": os.urandom(500) for side in ("trainA", "trainB") for i in "12"
}

spec = importlib.util.spec_from_file_location("download", SCRIPT)
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)


class Handler(BaseHTTPRequestHandler):
    """Serves server.files by their path, with Range, If-Range and ETag as RFC 9110 has them.

    `server.moods` says how each request in turn is answered; where it is used up, faithfully.
    """

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.log.append((self.path, asked, self.headers.get("If-Range")))
        mood = server.moods.pop(0) if server.moods else ""
        if isinstance(mood, int):
            return self.send_error(mood)
        if self.path not in server.files:
            return self.send_error(404)
        body = server.files[self.path]
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        fresh = self.headers.get("If-Range") in (None, etag) or mood == "ignores If-Range"
        start = int(asked[6:-1]) if asked and fresh and mood != "ignores Range" else None
        if start is not None and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200 if start is None else 206)
        if start is not None:
            start += 7 * (mood == "sends another range")
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        body = body[start or 0 :]
        if mood != "announces no length":
            self.send_header("Content-Length", str(len(body) + 9 * (mood == "announces too much")))
        if mood != "names no version":
            self.send_header("ETag", ("W/" if mood == "weak ETag" else "") + etag)
        if mood in ("date only", "weak ETag"):
            self.send_header("Last-Modified", "Mon, 02 Jan 2017 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mood in server.BREAKS else body)
        if mood == "stalls":
            server.stalled.wait(10)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.BREAKS = {"breaks", "stalls", "names no version", "weak ETag"}
    server.files, server.moods, server.log = {TAR: tar(PAIRS), ZIP: zipped(SIDES)}, [], []
    server.stalled = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download, "RETRY_DELAY", 0)
    monkeypatch.setattr(download, "RETRIES", 2)
    monkeypatch.setattr(download, "TIMEOUT", 5)


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


def zipped(files, modes=()):
    """A zip as bytes; `modes` gives some names a Unix file type, as for symbolic links."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = dict(modes).get(name, 0) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def run(server, root, *flags, name="facades"):
    download.main([name, "--root", str(root), "--base-url", server.url, *flags])


def error_of(capsys, function, *args, **kwargs):
    """The one line that a failing call writes to standard error; its exit status must be 2."""
    with pytest.raises(SystemExit) as end:
        function(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("download.py: error: ")
    return lines[0]


def names_in(root):
    return sorted(path.name for path in root.iterdir())


def check_set(root, files, name=None):
    """root holds these files and nothing else: no part, note or temporary folder is left."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == files
    assert names_in(root) == sorted({name.split("/")[0] for name in files})


# What should work


def test_tar_is_downloaded_and_unpacked(server, tmp_path, capsys):
    run(server, tmp_path / "new" / "root")
    check_set(tmp_path / "new" / "root", PAIRS)
    out = capsys.readouterr().out
    assert hashlib.sha256(server.files[TAR]).hexdigest() in out
    assert f"{len(server.files[TAR]):,} bytes" in out
    assert server.log == [(TAR, None, None)]


def test_zip_is_downloaded_and_unpacked(server, tmp_path):
    run(server, tmp_path, name="grumpifycat")
    check_set(tmp_path, SIDES)


def test_unpaired_twin_has_its_own_name(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SHA256", {})
    server.files["/cyclegan/datasets/facades.zip"] = zipped(
        {"facades/trainA/1.jpg": b"x", "facades/trainB/1.jpg": b"y"}
    )
    run(server, tmp_path, name="facades_unpaired")
    check_set(
        tmp_path, {"facades_unpaired/trainA/1.jpg": b"x", "facades_unpaired/trainB/1.jpg": b"y"}
    )


@pytest.mark.parametrize("top", ["", "./", "other/", "./facades/"])
def test_top_folder_may_have_any_name_or_none(server, tmp_path, top):
    server.files[TAR] = tar({f"{top}train/1.jpg": b"pair", f"{top}val/2.jpg": b"pair"})
    run(server, tmp_path)
    check_set(tmp_path, {"facades/train/1.jpg": b"pair", "facades/val/2.jpg": b"pair"})


def test_hard_link_within_the_set_is_a_file(server, tmp_path):
    link = special("facades/val/1.jpg", tarfile.LNKTYPE, "facades/train/1.jpg")
    server.files[TAR] = tar({"facades/train/1.jpg": b"pair"}, [link])
    run(server, tmp_path)
    check_set(tmp_path, {"facades/train/1.jpg": b"pair", "facades/val/1.jpg": b"pair"})


def test_unpacked_files_get_no_special_rights(server, tmp_path):
    member = special("facades/train/1.jpg", tarfile.REGTYPE)
    member.mode = 0o6777
    server.files[TAR] = tar({}, [member])
    run(server, tmp_path)
    mode = (tmp_path / "facades" / "train" / "1.jpg").stat().st_mode
    assert not mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH)


def test_list_names_every_set_and_who_reads_it(capsys):
    download.main(["--list"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == download.DATASETS.keys() >= {"facades", "night2day", "horse2zebra"}
    assert re.search(r"\bpaired .* pix2pix", lines["facades"])
    assert re.search(r"\bunpaired .* cycleGAN and CUT", lines["facades_unpaired"])


def test_addresses_are_the_authors():
    base = "http://efrosgans.eecs.berkeley.edu"
    assert base == download.BASE_URL
    assert download.address("maps") == "pix2pix/datasets/maps.tar.gz"
    assert download.address("maps_unpaired") == "cyclegan/datasets/maps.zip"
    assert download.address("vangogh2photo") == "cyclegan/datasets/vangogh2photo.zip"
    assert download.SHA256.keys() <= download.DATASETS.keys()
    assert all(re.fullmatch("[0-9a-f]{64}", known) for known in download.SHA256.values())


def test_progress_bar_counts_bytes_and_starts_where_the_part_ends(server, tmp_path, monkeypatch):
    bars = []

    class Bar(download.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "disable": False}))
            bars.append(self)

    monkeypatch.setattr(download, "tqdm", Bar)
    server.moods = ["breaks"]
    run(server, tmp_path)
    size = len(server.files[TAR])
    counted = [(bar.total, bar.initial, bar.n) for bar in bars if bar.unit == "B"]
    assert counted == [(size, 0, size // 2), (size, size // 2, size)]


# Broken connections


def test_broken_connection_goes_on_at_the_byte(server, tmp_path):
    server.moods = ["breaks"]
    run(server, tmp_path)
    etag = f'"{hashlib.md5(server.files[TAR]).hexdigest()}"'
    half = len(server.files[TAR]) // 2
    assert server.log == [(TAR, None, None), (TAR, f"bytes={half}-", etag)]
    check_set(tmp_path, PAIRS)


def test_a_further_run_goes_on_where_one_gave_up(server, tmp_path, capsys):
    server.moods = ["breaks", 503, 503]
    error = error_of(capsys, run, server, tmp_path)
    assert "503" in error and "2 retries" in error and "goes on from there" in error
    part, body = tmp_path / "facades.tar.gz.part", server.files[TAR]
    assert part.read_bytes() == body[: len(body) // 2]
    assert names_in(tmp_path) == ["facades.tar.gz.part", "facades.tar.gz.part.json"]
    server.log.clear()
    run(server, tmp_path)
    assert [asked for _, asked, _ in server.log] == [f"bytes={len(body) // 2}-"]
    check_set(tmp_path, PAIRS)


def test_retries_count_from_the_last_progress(server, tmp_path):
    server.moods = ["breaks"] * 6  # three times RETRIES, but each comes further
    run(server, tmp_path)
    assert len(server.log) == 7
    check_set(tmp_path, PAIRS)


def test_server_that_ignores_range_begins_at_zero(server, tmp_path):
    server.moods = ["breaks", "ignores Range"]
    run(server, tmp_path)
    assert len(server.log) == 2 and server.log[1][1]
    check_set(tmp_path, PAIRS)


def test_server_that_ignores_range_and_always_breaks_is_given_up(server, tmp_path, capsys):
    server.moods = ["breaks"] * 99
    server.files = {TAR: server.files[TAR]}
    original = Handler.do_GET

    def without_range(self):
        del self.headers["Range"]
        original(self)

    Handler.do_GET = without_range
    try:
        assert "broke off at" in error_of(capsys, run, server, tmp_path)
    finally:
        Handler.do_GET = original
    assert len(server.log) == 3
    assert not (tmp_path / "facades").exists()


def test_silent_server_times_out_and_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.moods = ["stalls"]
    start = time.monotonic()
    run(server, tmp_path)
    assert time.monotonic() - start < 5
    assert server.log[1][1] == f"bytes={len(server.files[TAR]) // 2}-"
    check_set(tmp_path, PAIRS)


def change(server):
    """Another file of the same length stands on the server from now on."""
    changed = {name: content[::-1] for name, content in PAIRS.items()}
    server.files[TAR] = tar(changed)
    return changed


@pytest.mark.parametrize("mood", ["", "ignores If-Range", "sends another range"])
def test_changed_file_begins_anew(server, tmp_path, capsys, mood):
    server.moods = ["breaks", 500, 500]
    error_of(capsys, run, server, tmp_path)
    changed = change(server) if mood != "sends another range" else PAIRS
    server.moods = [mood]
    run(server, tmp_path)
    check_set(tmp_path, changed)


def test_file_that_shrank_begins_anew(server, tmp_path):
    # The server ignores If-Range, and nothing follows the bytes that are there: 416.
    short = {"facades/train/1.jpg": b"pair"}
    part, url = tmp_path / "facades.tar.gz.part", server.url + TAR
    part.write_bytes(server.files[TAR])
    download.note_of(part).write_text(json.dumps({"url": url, "version": '"old"'}))
    server.files[TAR] = tar(short)
    server.moods = ["ignores If-Range"]
    run(server, tmp_path)
    assert [asked is None for _, asked, _ in server.log] == [False, True]
    check_set(tmp_path, short)


def test_part_that_is_whole_already_is_not_fetched_again(server, tmp_path):
    part, body = tmp_path / "facades.tar.gz.part", server.files[TAR]
    part.write_bytes(body)
    note = {"url": server.url + TAR, "version": f'"{hashlib.md5(body).hexdigest()}"'}
    download.note_of(part).write_text(json.dumps(note))
    run(server, tmp_path)
    assert [asked for _, asked, _ in server.log] == [f"bytes={len(body)}-"]
    check_set(tmp_path, PAIRS)


@pytest.mark.parametrize("note", [None, "", "[]", '{"url": "elsewhere", "version": "1"}', "{}"])
def test_part_of_unknown_origin_is_not_trusted(server, tmp_path, note):
    part = tmp_path / "facades.tar.gz.part"
    part.write_bytes(b"not what it seems")
    if note is not None:
        download.note_of(part).write_text(note)
    run(server, tmp_path)
    assert server.log == [(TAR, None, None)]
    check_set(tmp_path, PAIRS)


def test_without_a_version_there_is_no_resumption(server, tmp_path):
    server.moods = ["names no version"]
    run(server, tmp_path)
    assert server.log == [(TAR, None, None)] * 2
    check_set(tmp_path, PAIRS)


def test_weak_etag_gives_way_to_the_date(server, tmp_path):
    server.moods = ["weak ETag", "ignores If-Range"]
    run(server, tmp_path)
    assert server.log[1][2] == "Mon, 02 Jan 2017 00:00:00 GMT"
    check_set(tmp_path, PAIRS)


def test_no_content_length_is_fine(server, tmp_path):
    server.moods = ["announces no length"]
    run(server, tmp_path)
    check_set(tmp_path, PAIRS)


def test_content_length_beyond_the_file_is_asked_about_again(server, tmp_path, capsys):
    server.moods = ["announces too much"]
    run(server, tmp_path)
    assert "broke off at" in capsys.readouterr().out
    assert len(server.log) == 2
    check_set(tmp_path, PAIRS)


def test_missing_file_is_one_line_and_no_retry(server, tmp_path, capsys):
    del server.files[TAR]
    error = error_of(capsys, run, server, tmp_path)
    assert "404" in error and server.url + TAR in error and "--base-url" in error
    assert len(server.log) == 1
    assert names_in(tmp_path) == []


def test_no_server_is_one_line(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    assert "refused" in error_of(capsys, run, server, tmp_path)


def test_passing_trouble_is_retried(server, tmp_path):
    server.moods = [500, 503]
    run(server, tmp_path)
    assert len(server.log) == 3
    check_set(tmp_path, PAIRS)


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
    assert err.count("\n") == 1 and err.startswith("download.py: interrupted; what came is kept in")
    kept = part.stat().st_size
    assert 0 < kept <= half
    run(server, tmp_path)
    assert server.log[1][1] == f"bytes={kept}-"
    check_set(tmp_path, PAIRS)


# Damaged and hostile archives: one line, and nothing at the final place or outside it


def test_sha256_is_checked(server, tmp_path, capsys):
    found = hashlib.sha256(server.files[TAR]).hexdigest()
    error = error_of(capsys, run, server, tmp_path, "--sha256", "0" * 64)
    assert f"--sha256 {found}" in error
    assert names_in(tmp_path) == []
    run(server, tmp_path, "--sha256", found)
    check_set(tmp_path, PAIRS)


def test_known_sha256_is_checked_unless_another_is_given(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(download.SHA256, "facades", "0" * 64)
    assert "sha256" in error_of(capsys, run, server, tmp_path)
    run(server, tmp_path, "--sha256", hashlib.sha256(server.files[TAR]).hexdigest())
    check_set(tmp_path, PAIRS)


OUTSIDE = ["../evil.jpg", "facades/../../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"]
BAD_TARS = {
    **{name: tar(PAIRS | {name: b"evil"}) for name in OUTSIDE},
    "symbolic link outside": tar(PAIRS, [special("facades/a", tarfile.SYMTYPE, "/tmp")]),
    "symbolic link inside": tar(PAIRS, [special("facades/a", tarfile.SYMTYPE, "train")]),
    "hard link outside": tar(PAIRS, [special("facades/a.jpg", tarfile.LNKTYPE, "../secret")]),
    "absolute hard link": tar(PAIRS, [special("facades/a.jpg", tarfile.LNKTYPE, "/etc/passwd")]),
    "hard link to nothing": tar(PAIRS, [special("facades/a.jpg", tarfile.LNKTYPE, "gone")]),
    "device": tar(PAIRS, [special("facades/a", tarfile.CHRTYPE)]),
    "fifo": tar(PAIRS, [special("facades/a", tarfile.FIFOTYPE)]),
    "cut short": tar(PAIRS)[:-900],
    "without gzip's checksum": tar(PAIRS)[:-8] + bytes(8),
    "tar cut short inside": gzip.compress(gzip.decompress(tar(PAIRS))[:40_000]),
    "no archive": b"<html>Please log in</html>",
    "empty": b"",
    "a zip": zipped(SIDES),
    "no train folder": tar({"facades/val/1.jpg": b"pair"}),
    "no images": tar({"facades/train/1.txt": b"text"}),
    "nothing in it": tar({}),
    "a notice": tar({"LICENCE.txt": b"ask for it"}),
}


@pytest.mark.parametrize("kind", BAD_TARS)
def test_bad_tar_is_refused(server, tmp_path, capsys, kind):
    root = tmp_path / "root"
    (tmp_path / "secret").write_text("secret")
    server.files[TAR] = BAD_TARS[kind]
    error = error_of(capsys, run, server, root)
    assert "unusable archive" in error
    if kind in [*OUTSIDE, "hard link outside", "absolute hard link"]:
        assert "points outside" in error
    assert kind != "a notice" or "found LICENCE.txt" in error
    assert names_in(root) == []
    assert names_in(tmp_path) == ["root", "secret"]
    assert not Path("/tmp/evil.jpg").exists()


BAD_ZIPS = {
    **{name: zipped(SIDES | {name: b"evil"}) for name in OUTSIDE},
    "symbolic link": zipped(SIDES | {"a": b"/tmp"}, [("a", stat.S_IFLNK | 0o777)]),
    "device": zipped(SIDES | {"a": b""}, [("a", stat.S_IFCHR | 0o666)]),
    "cut short": zipped(SIDES)[:-30],
    "a byte changed": zipped(SIDES).replace(SIDES["grumpifycat/trainA/1.PNG"][9:99], bytes(90)),
    "encrypted": zipped(SIDES).replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"),
    "no archive": b"<html>Please log in</html>",
    "one side only": zipped({"grumpifycat/trainA/1.jpg": b"x"}),
}


@pytest.mark.parametrize("kind", BAD_ZIPS)
def test_bad_zip_is_refused(server, tmp_path, capsys, kind):
    root = tmp_path / "root"
    assert BAD_ZIPS[kind] != zipped(SIDES)
    server.files[ZIP] = BAD_ZIPS[kind]
    error = error_of(capsys, run, server, root, name="grumpifycat")
    assert "unusable archive" in error
    assert kind not in OUTSIDE or "points outside" in error
    assert names_in(root) == []
    assert names_in(tmp_path) == ["root"]
    assert not Path("/tmp/evil.jpg").exists()


# The final place


def old_set(root):
    (root / "facades" / "train").mkdir(parents=True)
    (root / "facades" / "train" / "old.jpg").write_bytes(b"old")
    return {"facades/train/old.jpg": b"old"}


def test_existing_set_is_kept_without_overwrite(server, tmp_path, capsys):
    old = old_set(tmp_path)
    assert "--overwrite" in error_of(capsys, run, server, tmp_path)
    assert server.log == []
    check_set(tmp_path, old)


def test_overwrite_replaces_the_whole_set(server, tmp_path):
    old_set(tmp_path)
    run(server, tmp_path, "--overwrite")
    check_set(tmp_path, PAIRS)


def test_overwrite_keeps_the_old_set_if_the_new_one_is_bad(server, tmp_path, capsys):
    old = old_set(tmp_path)
    server.files[TAR] = tar(PAIRS)[:-900]
    assert "not touched" in error_of(capsys, run, server, tmp_path, "--overwrite")
    check_set(tmp_path, old)


def test_old_set_comes_back_if_the_new_one_cannot_be_moved(server, tmp_path, capsys, monkeypatch):
    old, rename = old_set(tmp_path), Path.rename

    def broken(path, target):
        if ".facades.new" in str(path):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    assert "Input/output error" in error_of(capsys, run, server, tmp_path, "--overwrite")
    assert (tmp_path / "facades/train/old.jpg").read_bytes() == b"old"
    for path in tmp_path.glob("*.part*"):
        path.unlink()
    check_set(tmp_path, old)


def test_overwrite_through_a_link_keeps_the_link(server, tmp_path):
    root, disk = tmp_path / "root", tmp_path / "disk"
    old_set(disk)
    root.mkdir()
    (root / "facades").symlink_to(disk / "facades")
    run(server, root, "--overwrite")
    assert (root / "facades").is_symlink()
    check_set(disk, PAIRS)


def test_leftovers_of_a_killed_run_do_no_harm(server, tmp_path):
    for left in (".facades.new", ".facades.old"):
        (tmp_path / left / "train").mkdir(parents=True)
        (tmp_path / left / "train" / "left.jpg").write_bytes(b"left")
    old_set(tmp_path)
    run(server, tmp_path, "--overwrite")
    check_set(tmp_path, PAIRS)


def test_full_disk_while_unpacking_keeps_the_archive(server, tmp_path, capsys, monkeypatch):
    def full(member, into, **kwargs):
        (into / "half.jpg").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", lambda self, *args, **kw: full(*args, **kw))
        error = error_of(capsys, run, server, tmp_path)
    assert "No space left" in error and "goes on from there" in error
    assert names_in(tmp_path) == ["facades.tar.gz.part", "facades.tar.gz.part.json"]
    run(server, tmp_path)
    assert server.log[-1][1] == f"bytes={len(server.files[TAR])}-"
    check_set(tmp_path, PAIRS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_while_downloading_is_one_line(server, tmp_path, capsys):
    (tmp_path / "facades.tar.gz.part").symlink_to("/dev/full")
    assert "No space left" in error_of(capsys, run, server, tmp_path)
    assert len(server.log) == 1
    assert not (tmp_path / "facades").exists()


# Flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["facade"], "did you mean facades?"),
        (["zebra2horse"], "did you mean horse2zebra?"),
        ([], "--list"),
        (["facades", "--base-url", "ftp://host"], "ftp://host"),
        (["facades", "--sha256", "abc"], "64"),
        (["facades", "--base", "http://host"], "--base"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, expected):
    assert expected in error_of(capsys, download.main, flags)


def test_as_a_command(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "facade"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert result.stderr == (
        "download.py: error: unknown set 'facade', did you mean facades? --list shows them all\n"
    )
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--overwrite" in shown.stdout
