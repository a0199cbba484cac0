"""Download one of the authors' datasets and unpack it next to this file.

The datasets of pix2pix (https://arxiv.org/abs/1611.07004), CycleGAN (https://arxiv.org/abs/1703.10593)
and CUT (https://arxiv.org/abs/2007.15651), from their authors' server.

    python datasets/download.py --list
    python datasets/download.py facades

An interrupted download stays in a .part file; the same command resumes it. A dataset appears under
its name only when it is complete.
"""

import argparse
import difflib
import gzip
import hashlib
import re
import tarfile
import tempfile
import time
import zipfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

# torchvision's download_url cannot resume, has no timeout and checks no sha256; hence this script.
BASE_URL = "http://efrosgans.eecs.berkeley.edu"
CHUNK = 1 << 18  # bytes read at a time
TIMEOUT = 30  # seconds without data after which an attempt ends
RETRY_DELAYS = (2, 4, 8, 16, 32)  # seconds
TRANSIENT = {408, 429, 500, 502, 503, 504}  # HTTP statuses worth a retry
EXPANSION = 10  # an archive may unpack to this many times its size: images hardly compress
RESUME = "run the same command again to resume"
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
LAYOUTS = {  # the folders that must hold images, and who reads them
    "paired": (["train"], "pix2pix"),
    "unpaired": (["trainA", "trainB"], "cycleGAN and CUT"),
    "photos": (["*"], "translate.py"),
}
DATASETS = {  # numbers of training images, as the authors give them
    "facades": ("paired", "400 facades and their label maps (CMP)"),
    "maps": ("paired", "1,096 aerial photos and maps"),
    "edges2shoes": ("paired", "50k shoes and their edges (UT Zappos50K)"),
    "edges2handbags": ("paired", "137k handbags and their edges"),
    "cityscapes": ("paired", "2,975 street scenes; the server may hold a license notice instead"),
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

# From TensorFlow Datasets (url_checksums/cycle_gan.txt), for the same archives at their former
# address. cityscapes is left out: its archive seems to have changed since.
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


class UserError(Exception):
    """A problem that the user can fix. One line: what was found, what was expected, what to do."""


def fetch(url, part):
    """One attempt to download url to part, from the byte where part ends. OSError, HTTPException.

    If the server's file has changed in between, the archive's checksums tell.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "download.py"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # nothing follows the bytes of part, so it is whole
            return
        raise
    with response:
        have = have if response.status == 206 else 0  # 200: the whole file, from its first byte
        size = None if response.length is None else have + response.length
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(total=size, initial=have, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read1(CHUNK):
                bar.update(file.write(chunk))
    if size is not None and part.stat().st_size != size:
        raise ConnectionError(f"broke off at {part.stat().st_size:,} of {size:,} bytes")


def download(url, part):
    """Download url to part, with retries after broken connections. UserError if it cannot be."""
    for delay in (*RETRY_DELAYS, None):
        try:
            return fetch(url, part)
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            if isinstance(error, HTTPError) and error.code not in TRANSIENT:
                raise UserError(f"{url}: {error}; if it has moved, use --base-url") from error
            if delay is None:
                raise UserError(f"{url}: {error}; {RESUME}") from error
            print(f"{error}; retry in {delay} s", flush=True)
        time.sleep(delay)


def verify(part, expected):
    """Print the archive's size and sha256. UserError if it is not the expected one (None: any)."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{part.stat().st_size:,} bytes, sha256 {found}{' as expected' * (found == expected)}")
    if expected not in (None, found):
        part.unlink()
        wrong = f"sha256 is {found}, expected {expected}; the file was removed"
        raise UserError(f"{wrong}: run again, or accept this version with --sha256 {found}")


def unpack(archive, folder):
    """Unpack a .zip.part or .tar.gz.part. Python's zipfile and filter="data" keep it in `folder`.

    UserError if it holds a link or a device, or unpacks to more than EXPANSION times its size.
    """
    left = EXPANSION * archive.stat().st_size + 2**20  # bytes
    with zipfile.ZipFile(archive) if ".zip" in archive.suffixes else tarfile.open(archive) as file:
        is_zip = isinstance(file, zipfile.ZipFile)
        for member in tqdm(file.infolist() if is_zip else file, "unpacking", disable=None):
            left -= member.file_size if is_zip else member.size
            if left < 0:
                raise UserError(f"it unpacks to more than {EXPANSION} times its size")
            if is_zip:
                file.extract(member, folder)
            elif member.isfile() or member.isdir() or member.islnk():
                file.extract(member, folder, filter="data")
            else:
                raise UserError(f"{member.name} is a link or a device; expected images")
        while not is_zip and file.fileobj.read(CHUNK):  # to the end, where gzip's checksum is
            pass


def find_dataset(folder, layout):
    """The folder itself, or the one inside it, that holds the layout's images."""
    inside = sorted(folder.iterdir())
    for place in [folder, *inside]:
        splits = [place.glob(f"{part}/*") for part in LAYOUTS[layout][0]]
        if all(any(file.suffix.lower() in IMAGES for file in split) for split in splits):
            return place
    found = [path.name for path in inside[:9]]
    raise UserError(f"expected images in {' and '.join(LAYOUTS[layout][0])}, found {found}")


def install(part, layout, target):
    """Unpack part aside and move the dataset to target; an old one goes when the new one is whole.

    Raises: OSError if the disk is full or not writable; part is then kept.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as aside:
        new, old = Path(aside, "new"), Path(aside, "old")
        try:
            new.mkdir()
            unpack(part, new)
            found = find_dataset(new, layout)
        except Exception as error:  # a damaged or hostile archive raises nearly anything
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise
            part.unlink()
            raise UserError(f"unusable archive: {error}; it was removed") from error
        try:
            if target.exists():
                target.rename(old)
            found.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
    part.unlink()


class Parser(argparse.ArgumentParser):
    """Reports an error as one line of printable characters."""

    def error(self, message):
        text = "".join(c if c.isprintable() else " " for c in str(message))
        self.exit(2, f"download.py: error: {' '.join(text.split())}\n")


def parse_args(argv=None):
    parser = Parser("download.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    flag, here = parser.add_argument, Path(__file__).resolve().parent
    flag("name", nargs="?", help="the dataset, as in --list")
    flag("--list", action="store_true", help="list the datasets")
    flag("--root", type=Path, default=here, help="folder for the dataset [datasets/]")
    flag("--overwrite", action="store_true", help="replace an existing dataset [stop]")
    flag("--base-url", default=BASE_URL, help="another server [%(default)s]")
    flag("--sha256", help="checksum to expect [the known one, if any]")
    args = parser.parse_args(argv)
    if not args.list and args.name not in DATASETS:
        near = difflib.get_close_matches(args.name or "", DATASETS, n=1, cutoff=0)
        parser.error(f"unknown dataset {args.name!r}; did you mean {near[0]}? --list shows all")
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url: expected http://... or https://..., found {args.base_url!r}")
    if args.sha256 and not re.fullmatch("[0-9a-f]{64}", args.sha256):
        parser.error(f"--sha256: expected 64 digits of 0-9a-f, found {args.sha256!r}")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    if args.list:
        for name, (layout, about) in DATASETS.items():
            print(f"{name:23} {layout:9}for {LAYOUTS[layout][1]:17}{about}")
        return
    layout, target = DATASETS[args.name][0], (args.root / args.name).resolve()
    folder, suffix = ("pix2pix", ".tar.gz") if layout == "paired" else ("cyclegan", ".zip")
    archive = args.name.removesuffix("_unpaired") + suffix
    url = f"{args.base_url.rstrip('/')}/{folder}/datasets/{archive}"
    part = args.root / f"{args.name}{suffix}.part"
    try:
        if target.exists() and not args.overwrite:
            raise UserError(f"{target} exists; --overwrite downloads it again and replaces it")
        args.root.mkdir(parents=True, exist_ok=True)
        print(f"{url} -> {target}", flush=True)
        download(url, part)
        verify(part, args.sha256 or SHA256.get(args.name))
        install(part, layout, target)
    except KeyboardInterrupt:
        parser.exit(130, f"download.py: interrupted; {RESUME}\n")
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        parser.error(error if isinstance(error, UserError) else f"{error}; {RESUME}")
    print(f"{target}: {layout}, for {LAYOUTS[layout][1]}")


if __name__ == "__main__":
    main()
