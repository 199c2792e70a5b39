"""Public data sets by name, from a server of our own."""

import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from difftori.data import download
from difftori.data.download import CACHE, PublicSet, find_demos
from difftori.errors import DataError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Publish an archive of these entries under the name `tiny`; the folder that data sets go to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "www").mkdir()
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))

    def publish(entries: dict[str, str] | bytes, link: str | None = None) -> Path:
        archive = tmp_path / "www" / "tiny.zip"
        if isinstance(entries, bytes):
            archive.write_bytes(entries)
        else:
            with zipfile.ZipFile(archive, "w") as file:
                for name, content in entries.items():
                    file.writestr(name, content)
                if link is not None:
                    info = zipfile.ZipInfo(link)
                    info.external_attr = 0o120777 << 16
                    file.writestr(info, "/etc/passwd")
        url = f"http://127.0.0.1:{server.server_port}/tiny.zip"
        monkeypatch.setitem(download.PUBLIC, "tiny", PublicSet(url, "all/tiny.zarr", "a test"))
        return tmp_path / "cache"

    yield publish
    server.shutdown()
    server.server_close()


def test_it_is_fetched_once(serve):
    folder = serve({"all/tiny.zarr/.zgroup": "{}", "all/tiny.zarr/data/x/0": "7", "all/other": "no"})
    said: list[str] = []
    path = find_demos("tiny", said.append)
    assert path == folder / "tiny.zarr"
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == {".zgroup", "data/x/0"}
    assert find_demos("tiny", said.append) == path
    assert len(said) == 1
    assert [file.name for file in folder.iterdir()] == ["tiny.zarr"]


def test_what_is_there_is_what_is_meant(serve, tmp_path, monkeypatch):
    serve(b"")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_demos("tiny") == Path("tiny")
    assert find_demos("nothing/here") == Path("nothing/here")


@pytest.mark.parametrize(
    ("entries", "link", "words"),
    [
        (b"no archive", None, "cannot be downloaded.*pass the folder to --demos"),
        ({"elsewhere/x": "1"}, None, "contains no all/tiny.zarr"),
        ({"all/tiny.zarr/../../../x": "1"}, None, "leads out of the archive"),
        ({"all/tiny.zarr/x": "1"}, "all/tiny.zarr/y", "leads out of the archive"),
    ],
)
def test_a_bad_archive_leaves_nothing(serve, entries, link, words):
    folder = serve(entries, link)
    with pytest.raises(DataError, match=words):
        find_demos("tiny")
    assert list(folder.iterdir()) == []


def test_without_a_network_it_says_how_to_do_without(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setitem(download.PUBLIC, "tiny", PublicSet("http://127.0.0.1:9/x.zip", "x", "a test"))
    with pytest.raises(DataError, match="download and unpack it yourself"):
        find_demos("tiny")
