"""Shards behind URLs, from a server on this machine that can be told to misbehave."""

from __future__ import annotations

import json
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_tools.shards import build_shards
from minillm.data.remote_shards import fetch_shards, split_url
from minillm.data.sources import open_sources
from minillm.data.tokenizer import build_char_tokenizer
from minillm.utils.errors import UserError

TEXTS = [f"text number {n} " * 40 for n in range(60)]


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `server.faults` maps a file name to what goes wrong, `server.requests` counts."""

    def do_GET(self):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        self.server.requests[name] += 1
        fault, times = self.server.faults.get(name, ("", 0))
        if self.server.requests[name] > times:
            super().do_GET()
        elif fault == "cut":
            data = (self.server.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "cut without length":
            data = (self.server.folder / name).read_bytes()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault.startswith("redirect"):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("redirect to "))
            self.end_headers()
        else:
            self.send_error(int(fault))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "remote"
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    build_shards(tmp_path / "c.jsonl", folder, shard_size=32_000)
    build_char_tokenizer(TEXTS).save_pretrained(tmp_path / "tokenizer")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.folder, server.faults, server.requests = folder, {}, Counter()
    server.base = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(base, names, cache):
    return fetch_shards(base, names, cache, wait_s=0)


def shards_of(folder):
    return sorted(path.name for path in folder.glob("*.tar"))


@pytest.mark.parametrize(
    "url, expected",
    [
        ("http://h/a/b.tar", ("http://h/a/", "b.tar")),
        ("https://h:1/b.tar?key=1", ("https://h:1/?key=1", "b.tar")),
        ("http://h/a", ("http://h/a/", None)),
        ("http://h/a/", ("http://h/a/", None)),
        ("http://h/a/index.json", ("http://h/a/", None)),
        ("http://h", ("http://h/", None)),
    ],
)
def test_urls_are_taken_apart(url, expected):
    assert split_url(url) == expected


def test_a_folder_is_loaded_once_and_used(server, tmp_path):
    options = {"tokenizer_path": tmp_path / "tokenizer", "cache_dir": tmp_path / "cache"}
    (source,) = open_sources(server.base, **options)
    names = shards_of(server.folder)
    assert source.num_documents == 60 and len(names) == 3
    (again,) = open_sources(server.base + "index.json", **options)
    assert all(server.requests[name] == 1 for name in names) and again.num_tokens == source.num_tokens
    (local,) = open_sources(str(server.folder), **options)
    assert local.shards[0].path == source.shards[0].path  # the same content, so the same compiled shards


def test_braces_load_what_they_name(server, tmp_path):
    url = server.base + "text-{000000..000001}.tar?token=x"
    (source,) = open_sources(url, tokenizer_path=tmp_path / "tokenizer", cache_dir=tmp_path / "cache")
    assert server.requests["text-000002.tar"] == 0
    index = json.loads((server.folder / "index.json").read_text())
    assert source.num_documents == sum(shard["num_samples"] for shard in index["shards"][:2])


@pytest.mark.parametrize("fault", ["cut", "cut without length", "503", "429"])
def test_what_fails_once_is_tried_again(server, tmp_path, fault, capsys):
    server.faults["text-000001.tar"] = (fault, 2)
    folder = fetch(server.base, None, tmp_path / "cache")
    assert shards_of(folder) == shards_of(server.folder) and server.requests["text-000001.tar"] == 3
    assert (folder / "text-000001.tar").read_bytes() == (server.folder / "text-000001.tar").read_bytes()
    assert capsys.readouterr().err.count("trying again") == 2


@pytest.mark.parametrize("fault", ["cut", "cut without length", "500"])
def test_what_keeps_failing_is_an_error_and_leaves_no_part(server, tmp_path, fault):
    server.faults["text-000001.tar"] = (fault, 99)
    with pytest.raises(UserError, match="text-000001.tar could not be loaded in 4 attempts"):
        fetch(server.base, None, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*000001*"))


def test_content_that_is_not_the_indexs_is_refused(server, tmp_path):
    path = server.folder / "text-000002.tar"
    data = path.read_bytes()
    path.write_bytes(data[:600] + b"?" + data[601:])
    with pytest.raises(UserError, match="does not match the checksum"):
        fetch(server.base, None, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*000002*"))


def test_a_changed_remote_shard_is_loaded_again(server, tmp_path):
    folder = fetch(server.base, None, tmp_path / "cache")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text + "!"}) + "\n" for text in TEXTS))
    build_shards(tmp_path / "d.jsonl", tmp_path / "new", shard_size=32_000)
    for path in (tmp_path / "new").iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    assert fetch(server.base, None, tmp_path / "cache") == folder
    for name in [*shards_of(tmp_path / "new"), "index.json"]:
        assert json.loads((folder / "index.json").read_text()) == json.loads((tmp_path / "new/index.json").read_text())
        if name.endswith(".tar"):
            assert (folder / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_without_an_index_the_names_must_be_given(server, tmp_path):
    (server.folder / "index.json").unlink()
    with pytest.raises(UserError, match="has no index.json.*name them"):
        fetch(server.base, None, tmp_path / "cache")
    folder = fetch(server.base, ["text-000000.tar"], tmp_path / "cache")
    assert shards_of(folder) == ["text-000000.tar"]
    server.faults["text-000001.tar"] = ("cut", 99)  # Content-Length is all there is to go by
    with pytest.raises(UserError, match="it ended after|IncompleteRead"):
        fetch(server.base, ["text-000001.tar"], tmp_path / "cache")


def test_what_is_not_there(server, tmp_path):
    (server.folder / "text-000001.tar").unlink()
    with pytest.raises(UserError, match="text-000001.tar could not be loaded .*404"):
        fetch(server.base, None, tmp_path / "cache")
    assert server.requests["text-000001.tar"] == 1
    with pytest.raises(UserError, match="does not list other.tar"):
        fetch(server.base, ["other.tar"], tmp_path / "cache")


def test_no_server_but_everything_is_here(server, tmp_path, capsys):
    folder = fetch(server.base, None, tmp_path / "cache")
    server.faults["index.json"] = ("500", 99)
    assert fetch(server.base, None, tmp_path / "cache") == folder
    assert "going on with the shards in" in capsys.readouterr().err
    with pytest.raises(UserError, match="could not be loaded in 4 attempts"):
        fetch("http://127.0.0.1:1/", None, tmp_path / "cache")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x.tar"])
def test_redirects_do_not_leave_http(server, tmp_path, target):
    server.faults["text-000000.tar"] = (f"redirect to {target}", 99)
    with pytest.raises(UserError, match=f"text-000000.tar.*{target}"):
        fetch(server.base, None, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*000000*"))


def test_a_page_in_the_place_of_an_index_is_no_index(server, tmp_path, capsys):
    (server.folder / "index.json").write_text("<html>not found</html>")
    folder = fetch(server.base, ["text-000000.tar"], tmp_path / "cache")
    assert shards_of(folder) == ["text-000000.tar"] and not (folder / "index.json").exists()
    assert "is not an index of shards" in capsys.readouterr().err
