"""Public data sets by name: downloaded once from their authors' site into a cache folder."""

import os
import shutil
import stat
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import URLError

from difftori.data.formats._writing import whole_folder
from difftori.errors import DataError

CACHE = "DIFFTORI_DATA"
"""Environment variable for the cache folder; default: ~/.cache/difftori."""
_BLOCK = 2**20
_MOST = 8 * 2**30
"""Largest unpacked size of an archive, in bytes."""


@dataclass(frozen=True)
class PublicSet:
    """A published data set: the URL of a zip archive, the data set's folder inside it, and a description (`origin`)."""

    url: str
    folder: str
    origin: str


PUBLIC = {
    "pusht-human": PublicSet(
        "https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip",
        "pusht/pusht_cchi_v7_replay.zarr",
        "206 human demonstrations of Push-T (Chi et al., 2023)",
    )
}


def find_demos(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the path of a data set: `name` itself if that path exists, else the public data set of that name.

    A public data set that is not in the cache is downloaded; `say` is called with a line about it. A name that is neither
    is returned as a path. Raises DataError if the download fails, with instructions for a manual download.
    """
    path = Path(name)
    if path.exists() or name not in PUBLIC:
        return path
    known = PUBLIC[name]
    place = cache_folder() / PurePosixPath(known.folder).name
    if not place.exists():
        say(f"downloading {name}, {known.origin}, from {known.url} to {place}")
        download(known, place)
    return place


def cache_folder() -> Path:
    """Return the folder where public data sets are stored."""
    given = os.environ.get(CACHE)
    return Path(given) if given else Path.home() / ".cache" / "difftori"


def download(known: PublicSet, place: Path) -> None:
    """Download the archive and unpack its data set to `place`, atomically.

    Links, and files outside of the named folder, are not unpacked. Raises DataError if it fails.
    """
    archive = place.with_name(f"{place.name}.{os.getpid()}.zip.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(known.url, timeout=60) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file, _BLOCK)
        with whole_folder(place) as folder:
            _unpack(archive, PurePosixPath(known.folder), folder)
    except (URLError, OSError, HTTPException, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{known.url}: cannot be downloaded ({error}). Fix: download and unpack it yourself, and pass the folder to --demos"
        ) from error
    finally:
        archive.unlink(missing_ok=True)


def _unpack(archive: Path, wanted: PurePosixPath, folder: Path) -> None:
    with zipfile.ZipFile(archive) as source:
        entries = [entry for entry in source.infolist() if PurePosixPath(entry.filename).is_relative_to(wanted)]
        files = [entry for entry in entries if not entry.is_dir()]
        if not files:
            raise DataError(
                f"{archive}: contains no {wanted}; its authors may have changed it. Fix: pass another folder to --demos"
            )
        if sum(entry.file_size for entry in files) > _MOST:
            raise DataError(f"{archive}: unpacks to more than {_MOST} bytes. Fix: inspect it before you use it")
        for entry in files:
            inner = PurePosixPath(entry.filename).relative_to(wanted)
            if ".." in inner.parts or stat.S_ISLNK(entry.external_attr >> 16):
                raise DataError(f"{archive}: {entry.filename} leads out of the archive. Fix: do not use it")
            target = folder.joinpath(*inner.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open(entry) as content, target.open("wb") as file:
                shutil.copyfileobj(content, file, _BLOCK)
