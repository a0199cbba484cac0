"""Download one of the authors' image sets and unpack it beside this file.

The sets of pix2pix (https://arxiv.org/abs/1611.07004), CycleGAN (https://arxiv.org/abs/1703.10593)
and CUT (https://arxiv.org/abs/2007.15651), from the address where their authors keep them.

    python datasets/download.py --list
    python datasets/download.py facades

What came of a broken download is kept in a .part file, and the same command goes on from there.
A set appears under its name only when it is whole.
"""

import argparse
import difflib
import gzip
import hashlib
import json
import re
import shutil
import stat
import sys
import tarfile
import time
import zipfile
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

BASE_URL = "http://efrosgans.eecs.berkeley.edu"
CHUNK = 1 << 18  # bytes read at a time
TIMEOUT = 30  # seconds of silence that break an attempt off
RETRIES = 5  # attempts in a row that come no further than one before
RETRY_DELAY = 2.0  # seconds before the first of them, doubled for each further one
PASSING_STATUS = {408, 429, 500, 502, 503, 504}  # worth another attempt; 404 and its like are not
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
LAYOUTS = {  # the folders that must hold images, and who reads them
    "paired": (["train"], "pix2pix"),
    "unpaired": (["trainA", "trainB"], "cycleGAN and CUT"),
    "photos": (["*"], "translate.py"),
}

# Numbers of training images are the authors'.
DATASETS = {
    "facades": ("paired", "400 facades and their label maps (CMP)"),
    "maps": ("paired", "1,096 aerial photos and maps"),
    "edges2shoes": ("paired", "50k shoes and their edges (UT Zappos50K)"),
    "edges2handbags": ("paired", "137k handbags and their edges"),
    "cityscapes": ("paired", "2,975 street scenes; the server may hold a licence notice instead"),
    "night2day": ("paired", "outdoor scenes by night and by day"),
    "apple2orange": ("unpaired", "996 apples, 1,020 oranges; 78 MB"),
    "summer2winter_yosemite": ("unpaired", "1,273 summer and 854 winter views; 133 MB"),
    "horse2zebra": ("unpaired", "939 horses, 1,177 zebras; 117 MB"),
    "monet2photo": ("unpaired", "1,074 paintings, 6,853 photos; 305 MB"),
    "cezanne2photo": ("unpaired", "584 paintings, 6,853 photos; 280 MB"),
    "ukiyoe2photo": ("unpaired", "1,433 prints, 6,853 photos; 293 MB"),
    "vangogh2photo": ("unpaired", "401 paintings, 6,853 photos; 307 MB"),
    "iphone2dslr_flower": ("unpaired", "1,813 phone and 3,316 DSLR photos of flowers; 340 MB"),
    "grumpifycat": ("unpaired", "cats and Grumpy Cat"),
    "facades_unpaired": ("unpaired", "400 facades and their label maps (CMP); 35 MB"),
    "maps_unpaired": ("unpaired", "1,096 aerial photos and maps; 1.5 GB"),
    "cityscapes_unpaired": ("unpaired", "as cityscapes"),
    "ae_photos": ("photos", "photos to apply a model to, none to train on"),
}

# As TensorFlow Datasets recorded them for the same archives at their former address (its
# url_checksums/cycle_gan.txt). cityscapes is left out: its archive seems to be another one by now.
SHA256 = {
    "apple2orange": "845a191e9af8926408ea597001cd03a452e3300a1f44a79fe329b3d59f6e3eb8",
    "summer2winter_yosemite": "167fe1726807a9d22bd106b4a6c0bd7953b688af924ac1bf967439c4961e49f9",
    "horse2zebra": "a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1",
    "monet2photo": "88f91b00fc228f97c9411fbf1880ec1d119c98f1722e4cfcfaa2fb35fac05b04",
    "cezanne2photo": "3a6c10ca21f9485862f1cbd707744b9dc258954a04631271d23a3605eeb63cff",
    "ukiyoe2photo": "02a2a2fb5ecf425ca1bf86aca7304377da64a2a1d3b86df54eb65e4068bf3b08",
    "vangogh2photo": "362c3473e70be0944bda08d49d660eafdc2854df55d697835b8186d1d79caaff",
    "iphone2dslr_flower": "8fcb5e374d631b107e1d961b8c4cd0a186aa2a4ff3e279923f4c426128de7113",
    "facades_unpaired": "9a31ebf3a31b9b5cd195dd5bf62e9308e00cb94604d1019e3889ac84248695c0",
    "maps_unpaired": "639534f69dbf9f36bef8d6292a7698006361221f83f0285d7c9ca78afe6e8a9e",
}


class ArchiveError(Exception):
    """What came is no archive of an image set, or one that must not be unpacked."""


def fail(message):
    """End with one line on standard error and exit status 2."""
    print("download.py: error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def address(name):
    """Where the set's archive lies below the base address."""
    if DATASETS[name][0] == "paired":
        return f"pix2pix/datasets/{name}.tar.gz"
    return f"cyclegan/datasets/{name.removesuffix('_unpaired')}.zip"


def note_of(part):
    """The small file beside part that says where its bytes came from and of which version."""
    return part.with_name(part.name + ".json")


def discard(part):
    part.unlink(missing_ok=True)
    note_of(part).unlink(missing_ok=True)


def begin_anew(part):
    discard(part)
    raise ConnectionError("the server's file is not the one that was begun; beginning anew")


def resumable(url, part):
    """(bytes that part already holds, their version), or (0, None) where they cannot be trusted."""
    try:
        note, have = json.loads(note_of(part).read_text()), part.stat().st_size
        if note["url"] == url and note["version"] and have:
            return have, note["version"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, None


def kept(url, part):
    if resumable(url, part)[0]:
        return f"what came is kept in {part}: the same command goes on from there"
    return "nothing is kept that a further run could go on from"


def version_of(headers):
    """What If-Range takes: a strong ETag, else the date; None where the server gives neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def fetch(url, part):
    """One attempt to bring url into part, going on from the bytes that are there.

    Raises: URLError, HTTPException, ConnectionError, TimeoutError where the network failed.
    """
    have, version = resumable(url, part)
    headers = {"User-Agent": "download.py"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":
            begin_anew(part)
        return  # nothing follows the bytes that are there: they are the whole file
    with response:
        if response.status == 206:
            fits = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not fits or version_of(response.headers) not in (None, version):
                begin_anew(part)
        else:
            have = 0  # the whole file: the server ignores Range, or If-Range showed it a change
        size = None if response.length is None else have + response.length
        with part.open("ab" if have else "wb") as file:
            if not have:  # the old bytes are gone by now, so the new note cannot describe them
                note = {"url": url, "version": version_of(response.headers)}
                note_of(part).write_text(json.dumps(note))
            with tqdm(total=size, initial=have, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := read(response):
                    bar.update(file.write(chunk))
    if size is not None and part.stat().st_size != size:
        raise ConnectionError(f"broke off at {part.stat().st_size:,} of {size:,} bytes")


def read(response):
    """The next bytes. What breaks on the wire is a ConnectionError, to tell it from a full disk."""
    try:
        return response.read1(CHUNK)  # read would drop what it waits with when the wire breaks
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"broke off: {error}") from error


def download(url, part):
    """Bring url into part, in as many attempts as it takes while they come further."""
    furthest, tries = 0, 0
    while True:
        try:
            return fetch(url, part)
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            reason = error.reason if type(error) is URLError else error
            reason = str(reason) or type(error).__name__
            if isinstance(error, HTTPError) and error.code not in PASSING_STATUS:
                fail(f"{url}: {reason}; if the set has moved, give its place with --base-url")
        size = part.stat().st_size if part.exists() else 0
        furthest, tries = max(size, furthest), 1 if size > furthest else tries + 1
        if tries > RETRIES:
            fail(f"{url}: {reason}; gave up after {RETRIES} retries; {kept(url, part)}")
        delay = RETRY_DELAY * 2 ** (tries - 1)
        print(f"{reason}; retry {tries} of {RETRIES} in {delay:g} s", flush=True)
        time.sleep(delay)


def verify(part, expected):
    """Print the archive's size and sha256; end where it is not the expected one (None: any)."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{part.stat().st_size:,} bytes, sha256 {found}{' as known' * (found == expected)}")
    if expected not in (None, found):
        discard(part)
        fail(f"sha256 is {found}, expected {expected}: damaged or another version, and removed; "
             f"run again, or take this one with --sha256 {found}")  # fmt: skip


def check_member(name, plain):
    """Refuse an archive's member that could reach outside; plain: it is a file or a folder."""
    path = PureWindowsPath(name)  # splits at / and \ alike, and knows drives
    if path.anchor or ".." in path.parts:
        raise ArchiveError(f"{name!r} points outside the folder")
    if not plain:
        raise ArchiveError(f"{name!r} is a link or a device, where only images belong")


def unpack(archive, into):
    """Unpack a .zip.part or .tar.gz.part into a folder; nothing of it may reach outside."""
    if ".zip" in archive.suffixes:
        with zipfile.ZipFile(archive) as file:
            for member in tqdm(file.infolist(), desc="unpacking", unit=" files", disable=None):
                kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the packer was no Unix
                check_member(member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                file.extract(member, into)
        return
    with tarfile.open(archive, "r:gz") as file:
        for member in tqdm(file, desc="unpacking", unit=" files", disable=None):
            # A hard link to another member is as good as a file. A symbolic link is refused even
            # when it points inside: without one, every path leads where its text says.
            check_member(member.name, member.isfile() or member.isdir() or member.islnk())
            check_member(member.linkname, True)
            file.extract(member, into, filter="data")
        while file.fileobj.read(CHUNK):  # on to the end, where gzip's checksum stands
            pass


def find_set(folder, layout):
    """The folder itself or the one inside it, whatever its name, that holds the layout's images."""
    inside = sorted(folder.iterdir())
    for place in [folder, *inside]:
        splits = [place.glob(f"{part}/*") for part in LAYOUTS[layout][0]]
        if all(any(file.suffix.lower() in IMAGES for file in split) for split in splits):
            return place
    found = ", ".join(path.name for path in inside[:9]) or "nothing"
    raise ArchiveError(f"expected images in {' and '.join(LAYOUTS[layout][0])}, found {found}")


def install(part, layout, target):
    """Unpack part aside and move the set to target; what was there goes once the new one is whole.

    Raises: OSError where the disk is full or may not be written; part is then kept.
    """
    aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)  # a killed run may have left one
    try:
        aside.mkdir()
        unpack(part, aside)
        new = find_set(aside, layout)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
    except Exception as error:  # a damaged or hostile archive raises nearly anything
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        discard(part)
        fail(f"unusable archive: {error}; it was removed, and {target} was not touched")
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    discard(part)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        "download.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail  # one line, without the usage above it
    here = Path(__file__).resolve().parent
    parser.add_argument("name", nargs="?", help="the set, as --list names it")
    parser.add_argument("--list", action="store_true", help="name the sets and end")
    parser.add_argument("--root", type=Path, default=here, help="folder for the set [this file's]")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that is there")
    parser.add_argument("--base-url", default=BASE_URL, help="another address [%(default)s]")
    parser.add_argument("--sha256", help="what the archive must have [the known one, where any]")
    args = parser.parse_args(argv)
    if args.list:
        return args
    if args.name is None:
        fail("expected the name of a set, found none; --list shows them")
    if args.name not in DATASETS:
        nearest = difflib.get_close_matches(args.name, DATASETS, n=1, cutoff=0)[0]
        fail(f"unknown set {args.name!r}, did you mean {nearest}? --list shows them all")
    if not args.base_url.startswith(("http://", "https://")):
        fail(f"--base-url: expected http://... or https://..., found {args.base_url!r}")
    if args.sha256 and not re.fullmatch("[0-9a-f]{64}", args.sha256):
        fail(f"--sha256: expected 64 digits of 0-9a-f, found {args.sha256!r}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        for name, (layout, about) in DATASETS.items():
            print(f"{name:23} {layout:9}for {LAYOUTS[layout][1]:17}{about}")
        return
    url = f"{args.base_url.rstrip('/')}/{address(args.name)}"
    layout, target = DATASETS[args.name][0], (args.root / args.name).resolve()
    part = args.root / f"{args.name}{'.tar.gz' if layout == 'paired' else '.zip'}.part"
    try:
        if target.exists() and not args.overwrite:
            fail(f"{target} is there already; to download it anew and replace it, --overwrite")
        args.root.mkdir(parents=True, exist_ok=True)
        print(f"{url} -> {target}", flush=True)
        download(url, part)
        verify(part, args.sha256 or SHA256.get(args.name))
        install(part, layout, target)
    except KeyboardInterrupt:
        print(f"download.py: interrupted; {kept(url, part)}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written
        fail(f"{error}; {kept(url, part)}")
    print(f"{target}: {layout}, for {LAYOUTS[layout][1]}")


if __name__ == "__main__":
    main()
