"""`python -m data_tools.download` against a server on this machine: what arrives, how often, and what is said."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from data_tools.downloading import job as job_module
from data_tools.downloading import transfer as transfer_module
from data_tools.downloading.catalogue import Source
from data_tools.downloading.hubs import list_files
from data_tools.downloading.job import Job, limited, without_parts_of
from data_tools.downloading.progress import Progress, duration
from data_tools.downloading.transfer import RemoteFile, fetch_file, part_paths
from data_tools.downloading.web import Stopped, Web, retry_after_s
from minillm.utils.errors import UserError
from tests.data_tools.local_server import Fault, LocalServer, Page, run_tool, serving

ROOT = Path(__file__).parents[2]
BODY = random.Random(1).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in ("HF_TOKEN", "HF_ENDPOINT", "MODELSCOPE_DOMAIN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def fast_web(**options: object) -> Web:
    return Web(**{"wait_s": 0.01, "timeout_s": 5.0, **options})


def fetch(server: LocalServer, out: Path, web: Web | None = None, **known: object) -> object:
    remote = RemoteFile("f.bin", server.url("/f.bin"), **known)
    return fetch_file(web or fast_web(), remote, out / "f.bin", Progress([None]))


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_tool("data_tools.download", *arguments, **environment)


# -- one file ----------------------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(server, tmp_path):
    server.pages["/f.bin"] = Page(BODY)
    fetched = fetch(server, tmp_path, bytes=len(BODY), sha256=SHA)
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert (fetched.bytes, fetched.sha256, fetched.checked) == (len(BODY), SHA, "sha256")
    assert not part_paths(tmp_path / "f.bin")[0].exists()
    assert len(server.log) == 1


@pytest.mark.parametrize("fault", [Fault(cut_after=100_000), Fault(stall_after=100_000, stall_s=9)])
def test_a_cut_and_a_stall_cost_no_byte_twice(server, tmp_path, fault, capsys):
    server.pages["/f.bin"] = Page(BODY, faults=[fault, fault])
    fetch(server, tmp_path, fast_web(timeout_s=1.0))
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert server.sent("/f.bin") == len(BODY)
    assert [request.headers.get("Range") for request in server.log] == [None, "bytes=100000-", "bytes=200000-"]
    assert all(request.headers["If-Range"] == server.pages["/f.bin"].tag() for request in server.log[1:])
    said = capsys.readouterr().err
    assert ("sends nothing any more" if fault.stall_after else "cut") in said and "trying again" in said


def test_a_mirror_goes_on_with_what_another_began(server, tmp_path):
    server.pages["/f.bin"] = Page(BODY, faults=[Fault(cut_after=100_000)])
    with pytest.raises(UserError):
        fetch(server, tmp_path, fast_web(attempts=1), sha256=SHA)
    with serving() as mirror:
        mirror.pages["/f.bin"] = Page(BODY, etag='"another"')
        assert fetch(mirror, tmp_path, sha256=SHA).checked == "sha256"
        assert mirror.sent("/f.bin") == len(BODY) - 100_000 and (tmp_path / "f.bin").read_bytes() == BODY
    (tmp_path / "f.bin").unlink()
    server.pages["/f.bin"].faults.append(Fault(cut_after=100_000))
    with pytest.raises(UserError):
        fetch(server, tmp_path, fast_web(attempts=1))
    with serving() as mirror:  # without a checksum nothing says that it is the same file
        mirror.pages["/f.bin"] = Page(BODY[::-1])
        fetch(mirror, tmp_path)
        assert mirror.sent("/f.bin") == len(BODY) and (tmp_path / "f.bin").read_bytes() == BODY[::-1]


def test_a_server_that_ignores_ranges_starts_over(server, tmp_path, capsys):
    server.pages["/f.bin"] = Page(BODY, ranges=False, faults=[Fault(cut_after=100_000)])
    fetch(server, tmp_path, sha256=SHA)
    assert (tmp_path / "f.bin").read_bytes() == BODY
    assert "comes from its beginning" in capsys.readouterr().err


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changes_in_between_is_not_mixed(server, tmp_path, if_range):
    server.pages["/f.bin"] = Page(BODY, faults=[Fault(cut_after=100_000)] + [Fault(status=500)] * 3)
    with pytest.raises(UserError, match="in 2 attempts"):
        fetch(server, tmp_path, fast_web(attempts=2))
    server.pages["/f.bin"] = Page(BODY[::-1], if_range=if_range)
    fetch(server, tmp_path)
    assert (tmp_path / "f.bin").read_bytes() == BODY[::-1]


def test_without_validator_or_checksum_nothing_is_continued(server, tmp_path, capsys):
    server.pages["/f.bin"] = Page(BODY, etag=None, faults=[Fault(cut_after=100_000)])
    fetch(server, tmp_path)
    assert (tmp_path / "f.bin").read_bytes() == BODY and server.sent("/f.bin") == len(BODY) + 100_000
    assert "cannot be continued safely" in capsys.readouterr().err
    (tmp_path / "f.bin").unlink()
    server.pages["/f.bin"].faults.append(Fault(cut_after=100_000))
    server.log.clear()
    fetch(server, tmp_path, sha256=SHA)  # a checksum tells whether the pieces fit
    assert server.sent("/f.bin") == len(BODY)


def test_a_wrong_checksum_is_loaded_once_more_and_then_said(server, tmp_path):
    server.pages["/f.bin"] = Page(BODY, faults=[Fault(body=BODY[:-1] + b"?")])
    fetch(server, tmp_path, sha256=SHA)
    assert (tmp_path / "f.bin").read_bytes() == BODY and len(server.log) == 2
    with pytest.raises(UserError, match=f"has sha256 {SHA}, {'0' * 64} was expected, twice"):
        fetch_file(fast_web(), RemoteFile("g", server.url("/f.bin"), None, "0" * 64), tmp_path / "g", Progress([None]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".f.bin.part.json", "f.bin"]


def test_busy_servers_are_waited_for(server, tmp_path):
    faults = [Fault(status=500), Fault(status=429, headers={"Retry-After": "0.3"}), Fault(status=503)]
    server.pages["/f.bin"] = Page(BODY, faults=faults)
    fetch(server, tmp_path)
    times = [request.time for request in server.log]
    assert len(times) == 4 and times[2] - times[1] >= 0.3
    server.pages["/f.bin"].faults = [Fault(status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(UserError, match="asks to come back in 86400 s"):
        fetch(server, tmp_path)


@pytest.mark.parametrize(
    "status, said",
    [(404, "no such file or repository"), (410, "no such file"), (403, "not for everyone"), (400, "check the address")],
)
def test_refusals_are_said_at_once(server, tmp_path, status, said):
    server.pages["/f.bin"] = Page(faults=[Fault(status=status)] * 9)
    with pytest.raises(UserError, match=f"the server answers {status} .*{said}"):
        fetch(server, tmp_path)
    assert len(server.log) == 1


def test_a_gated_file_needs_a_token_which_goes_to_no_other_host(server, tmp_path, monkeypatch):
    server.pages["/f.bin"] = Page(needs_token="secret", status=302, headers={"Location": ""})
    with serving() as elsewhere:
        server.pages["/f.bin"].headers["Location"] = elsewhere.url("/content", host="localhost")
        elsewhere.pages["/content"] = Page(BODY)
        host = urlsplit(server.url()).netloc
        with pytest.raises(
            UserError, match="401 .*gated or private; ask for access on the dataset's page and set HF_TOKEN"
        ):
            fetch(server, tmp_path, fast_web(token=None, token_host=host))
        with pytest.raises(UserError, match="the account of HF_TOKEN has no access"):
            fetch(server, tmp_path, fast_web(token="other", token_host=host))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # as git users have it for the hub
        fetch(server, tmp_path, fast_web(token="secret", token_host=host))
        assert (tmp_path / "f.bin").read_bytes() == BODY
        assert "Authorization" not in elsewhere.log[0].headers
        server.log.clear()
        with pytest.raises(UserError):  # a token for another host is not sent
            fetch(server, tmp_path, fast_web(token="secret", token_host="huggingface.co"))
        assert "Authorization" not in server.log[0].headers


def test_ranges_are_kept_across_redirects_and_the_hub_tells_the_checksum(server, tmp_path):
    with serving() as store:
        location = {"Location": store.url("/blob", host="localhost"), "X-Linked-Etag": f'"{SHA}"'}
        server.pages["/f.bin"] = Page(status=302, headers=location)
        store.pages["/blob"] = Page(BODY, faults=[Fault(cut_after=120_000)])
        assert fetch(server, tmp_path).checked == "sha256"
        assert store.sent("/blob") == len(BODY)
        store.pages["/blob"].content = b"?" + BODY[1:]
        with pytest.raises(UserError, match=f"{SHA} was expected, twice"):
            fetch(server, tmp_path)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_only_http_is_followed(server, tmp_path, target):
    server.pages["/f.bin"] = Page(status=302, headers={"Location": target})
    with pytest.raises(UserError, match="only http and https"):
        fetch(server, tmp_path)
    server.pages["/f.bin"] = Page(status=302, headers={"Location": "/f.bin"})
    with pytest.raises(UserError, match="redirects in a circle"):
        fetch(server, tmp_path)


def test_no_server_is_one_short_sentence(tmp_path):
    with serving() as gone:
        url = gone.url("/f")
    with pytest.raises(
        UserError, match=r"could not be loaded in 2 attempts \(the connection to 127.0.0.1 is refused\)"
    ):
        fetch_file(fast_web(attempts=2), RemoteFile("f", url), tmp_path / "f", Progress([None]))
    with pytest.raises(UserError, match=r"the name nowhere.invalid cannot be resolved: is there a network\?"):
        fast_web(attempts=1).get_json("http://nowhere.invalid/x")


def test_too_little_disk_is_refused_before_the_first_byte(server, tmp_path, monkeypatch):
    server.pages["/f.bin"] = Page(BODY)
    usage = shutil.disk_usage(tmp_path)
    small = usage._replace(free=transfer_module.SPARE_BYTES + 1000)
    monkeypatch.setattr(transfer_module.shutil, "disk_usage", lambda path: small)
    with pytest.raises(UserError, match=r"has 0.00 GB free .*: make room, choose another --out, or take less"):
        fetch(server, tmp_path)
    assert not list(tmp_path.iterdir())
    server.log.clear()
    with pytest.raises(UserError, match="make room"):
        Job(fast_web(), tmp_path / "o", {"dataset": "d"}).run([RemoteFile("f", server.url("/f.bin"), len(BODY))])
    assert not server.log  # the listing told the size


def test_sizes_that_do_not_fit_and_lengths_that_are_not_told(server, tmp_path):
    server.pages["/f.bin"] = Page(BODY)
    with pytest.raises(UserError, match="has 300,000 bytes, 5 were announced"):
        fetch(server, tmp_path, bytes=5)
    server.pages["/f.bin"] = Page(BODY, chunked=True)
    assert fetch(server, tmp_path).bytes == len(BODY)
    server.pages["/f.bin"] = Page(b"")
    assert fetch(server, tmp_path).bytes == 0 and (tmp_path / "f.bin").read_bytes() == b""
    packed = gzip.compress(BODY)
    server.pages["/f.bin"] = Page(packed, headers={"Content-Encoding": "gzip"})
    assert fetch(server, tmp_path).sha256 == SHA  # packed for the way although it was not asked for
    server.pages["/f.bin"].faults = [Fault(cut_after=100_000)]
    assert fetch(server, tmp_path).sha256 == SHA  # of which no part can be asked for


def test_a_disk_that_fills_up_on_the_way(server, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.pages["/f.bin"] = Page(BODY)
    monkeypatch.setattr(transfer_module, "open", lambda *_: Full(), raising=False)
    with pytest.raises(UserError, match="the disk is full: make room"):
        fetch(server, tmp_path)


def test_the_beginning_of_a_file_ends_at_a_line(server, tmp_path):
    text = b"".join(b"line %d\n" % number for number in range(1000))
    server.pages["/f.bin"] = Page(text, faults=[Fault(cut_after=100)])
    remote = RemoteFile("f.bin", server.url("/f.bin"), len(text))
    fetched = fetch_file(fast_web(), remote, tmp_path / "f", Progress([None]), stop_at=1001)
    expected = text[: text.rfind(b"\n", 0, 1001) + 1]
    assert (tmp_path / "f").read_bytes() == expected and fetched.sha256 == hashlib.sha256(expected).hexdigest()
    assert server.sent("/f.bin") == 1001
    server.pages["/f.bin"] = Page(text, ranges=False)
    fetch_file(fast_web(), remote, tmp_path / "g", Progress([None]), stop_at=1001)
    assert (tmp_path / "g").read_bytes() == expected
    fetch_file(fast_web(), remote, tmp_path / "h", Progress([None]), stop_at=len(text) + 5)
    assert (tmp_path / "h").read_bytes() == text
    server.pages["/f.bin"] = Page(b"x" * 5000)
    with pytest.raises(UserError, match="no line end in its first 1,001 bytes: raise --limit-bytes"):
        fetch_file(fast_web(), RemoteFile("f", server.url("/f.bin")), tmp_path / "i", Progress([None]), stop_at=1001)


def test_limits_take_whole_files_and_the_first_lines_of_the_next():
    files = [RemoteFile(name, "u", size) for name, size in [("a.jsonl", 10), ("b.jsonl", 20), ("c.parquet", 5)]]
    assert [(file.path, stop) for file, stop in limited(files, 15)] == [("a.jsonl", None), ("b.jsonl", 5)]
    assert [(file.path, stop) for file, stop in limited(files, 33)] == [("a.jsonl", None), ("b.jsonl", None)]
    assert limited(files, None) == [(file, None) for file in files]
    names = ["d/a.first-5.jsonl", "d/a.first-10.jsonl", "b.jsonl", "b.first-99.jsonl", "c.parquet"]
    assert without_parts_of(names) == ["b.jsonl", "c.parquet", "d/a.first-10.jsonl"]
    with pytest.raises(UserError, match=r"ends within the first file, c.parquet \(5 bytes\)"):
        limited(files[2:], 4)


def test_retry_after_in_seconds_and_as_a_date():
    assert retry_after_s({"Retry-After": "7"}, 0) == 7
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:02:00 GMT"}, 60) == 60
    assert retry_after_s({"Retry-After": "soon"}, 0) is None and retry_after_s({}, 0) is None


def test_progress_tells_rate_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("data_tools.downloading.progress.time.monotonic", lambda: now[0])
    progress = Progress([4_000_000_000, 0, 0])
    progress.add(1_000_000_000)
    now[0] += 10
    progress.add(500_000_000)
    progress.file_done()
    assert progress.text() == "1 of 3 files, 1.50 GB of 4.00 GB (38 %), 50.0 MB/s, 50 s left"
    unknown = Progress([None])
    unknown.add(500)
    assert unknown.text() == "500 B, 0.0 MB/s"
    unknown.learn(1000)
    assert unknown.text() == "500 B of 1.00 kB (50 %), 0.0 MB/s"
    assert [duration(s) for s in (5, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 05 min"]


# -- several files and their record ------------------------------------------------------------------------------------


def serve_files(server: LocalServer, **contents: bytes) -> list[RemoteFile]:
    for name, content in contents.items():
        server.pages[f"/{name}"] = Page(content)
    return [RemoteFile(f"{name}.bin", server.url(f"/{name}"), len(content)) for name, content in contents.items()]


def test_a_job_loads_in_parallel_records_and_does_nothing_twice(server, tmp_path, capsys):
    files = serve_files(server, a=BODY, b=BODY[:1000], c=b"", d=BODY[5:])
    job = Job(fast_web(), tmp_path, {"dataset": "d"}, jobs=3)
    assert job.run(files) == ["a.bin", "b.bin", "c.bin", "d.bin"]
    record = json.loads((tmp_path / "download.json").read_text())
    assert record["dataset"] == "d" and list(record["files"]) == ["a.bin", "b.bin", "c.bin", "d.bin"]
    assert record["files"]["a.bin"]["sha256"] == SHA and record["files"]["a.bin"]["checked"] == "size"
    server.log.clear()
    Job(fast_web(), tmp_path, {"dataset": "d"}, verify=True).run(files)
    assert not server.log and "everything is here (4 files)" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds the dataset d: choose another --out for e"):
        Job(fast_web(), tmp_path, {"dataset": "e"}).run(files)


def test_what_kills_leave_is_cleared(server, tmp_path):
    (file,) = serve_files(server, a=BODY)
    Job(fast_web(), tmp_path, {"dataset": "d"}).run([file])
    (tmp_path / ".download.json.99999.tmp").write_text("{")
    (tmp_path / ".a.bin.part.json").write_text("{}")
    (tmp_path / "..a.bin.part.json.99999.tmp").write_text("{")
    Job(fast_web(), tmp_path, {"dataset": "d"}).run([file])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".download.lock", "a.bin", "download.json"]


def test_changed_files_are_named_and_taken_with_update(server, tmp_path):
    files = serve_files(server, a=BODY, b=b"b" * 1000)
    Job(fast_web(), tmp_path, {"dataset": "d"}).run(files)
    (tmp_path / "b.bin").write_bytes(b"c" * 1000)
    Job(fast_web(), tmp_path, {"dataset": "d"}).run(files)  # the size is right: only --verify looks closer
    for content, verify in ((b"c" * 1000, True), (b"c", False)):
        (tmp_path / "b.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"b.bin is not what was loaded on .*: --update loads it again"):
            Job(fast_web(), tmp_path, {"dataset": "d"}, verify=verify).run(files)
    Job(fast_web(), tmp_path, {"dataset": "d"}, verify=True, update=True).run(files)
    assert (tmp_path / "b.bin").read_bytes() == b"b" * 1000
    newer = [RemoteFile("a.bin", files[0].url, len(BODY), "1" * 64), files[1]]
    with pytest.raises(UserError, match="a.bin: it changed at its source since it was loaded"):
        Job(fast_web(), tmp_path, {"dataset": "d"}).run(newer)
    # a file that was removed here and comes back with another content
    (tmp_path / "b.bin").unlink()
    server.pages["/b"] = Page(b"x" * 1000)
    with pytest.raises(UserError, match=r"was recorded on .*; --update takes the new one"):
        Job(fast_web(), tmp_path, {"dataset": "d"}).run(files)
    Job(fast_web(), tmp_path, {"dataset": "d"}, update=True).run(files)
    assert (tmp_path / "b.bin").read_bytes() == b"x" * 1000


def test_a_file_of_the_users_own_is_not_overwritten(server, tmp_path):
    (file,) = serve_files(server, a=BODY)
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="is there, and this tool did not load it"):
        Job(fast_web(), tmp_path, {"dataset": "d"}).run([file])
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    (tmp_path / "a.bin").write_bytes(BODY)  # with a checksum it is known to be the right one
    server.log.clear()
    Job(fast_web(), tmp_path, {"dataset": "d"}).run([RemoteFile("a.bin", file.url, len(BODY), SHA)])
    assert not server.log


def test_one_failure_stops_the_others_and_keeps_their_bytes(server, tmp_path):
    files = serve_files(server, a=BODY, b=BODY)
    server.pages["/a"].rate = 200_000
    server.pages["/b"].faults = [Fault(status=404)] * 2
    with pytest.raises(UserError, match="404"):
        Job(fast_web(), tmp_path, {"dataset": "d"}).run(files)
    assert server.sent("/a") < len(BODY)
    server.pages["/a"].rate, server.pages["/b"].faults = None, []
    Job(fast_web(), tmp_path, {"dataset": "d"}).run(files)
    assert server.sent("/a") <= len(BODY) + 20_000 and (tmp_path / "a.bin").read_bytes() == BODY


def test_one_download_at_a_time_in_a_folder(server, tmp_path):
    from minillm.utils.files import file_lock

    with file_lock(tmp_path / ".download.lock"):
        line = (
            "from data_tools.downloading.job import Job; from data_tools.downloading.web import Web; "
            f"from pathlib import Path; Job(Web(), Path({str(tmp_path)!r}), {{'dataset': 'd'}}).run([])"
        )
        done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert "another download writes into" in done.stderr


def test_ctrl_c_stops_and_says_how_to_go_on(server, tmp_path, monkeypatch):
    (file,) = serve_files(server, a=BODY)
    server.pages["/a"].rate = 100_000

    def interrupted(*_: object, **__: object) -> None:
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Job(fast_web(), tmp_path, {"dataset": "d"}).run([file])
    assert 0 < part_paths(tmp_path / "a.bin")[0].stat().st_size < len(BODY)
    with pytest.raises(Stopped):
        web = fast_web()
        web.stop.set()
        web.retry("x", lambda: None)


# -- hubs, by the command ----------------------------------------------------------------------------------------------


def huggingface(server: LocalServer, repository: str, files: dict[str, bytes], page_size: int = 2) -> None:
    """Imitate the hub: a listing in pages, files that redirect to a store, checksums of large files."""
    entries: list[dict] = [{"type": "directory", "path": "data", "oid": "0", "size": 0}]
    for path, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        entry = {"type": "file", "path": path, "oid": "1", "size": len(content)}
        if not path.endswith(".md"):
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        entries.append(entry)
        server.pages[f"/datasets/{repository}/resolve/main/{path}"] = Page(
            status=302, headers={"Location": server.url(f"/store/{path}", host="localhost"), "X-Linked-Etag": digest}
        )
        server.pages[f"/store/{path}"] = Page(content)

    def answer(path: str) -> Page | None:
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if parts.path != f"/api/datasets/{repository}/tree/main" or query["recursive"] != ["true"]:
            return None
        start = int(query.get("cursor", ["0"])[0])
        link = f"<https://huggingface.co{parts.path}?recursive=true&cursor={start + page_size}>"  # also behind a mirror
        more = {"Link": f'{link}; rel="next"'} if start + page_size < len(entries) else {}
        return Page(json.dumps(entries[start : start + page_size]).encode(), "application/json", headers=more)

    server.answer = answer


def test_get_from_hugging_face_by_a_mirror(server, tmp_path):
    stories = {f"data/train-0000{n}.parquet": BODY[n:] for n in range(3)} | {"README.md": b"card", "x.txt": b"x"}
    huggingface(server, "some/stories", stories)
    done = command(
        "get", "hf:some/stories", "--files", "data/*.parquet", "--out", tmp_path / "o", HF_ENDPOINT=server.url()
    )
    assert done.returncode == 0, done.stderr
    assert "3 files, each as its checksum says" in done.stdout
    for name in list(stories)[:3]:
        assert (tmp_path / "o" / name).read_bytes() == stories[name]
    assert not (tmp_path / "o" / "x.txt").exists()
    record = json.loads((tmp_path / "o" / "download.json").read_text())
    assert record["repository"] == "some/stories" and record["files"]["data/train-00001.parquet"]["checked"] == "sha256"
    done = command("get", "hf:some/stories", "--files", "*.csv", "--out", tmp_path / "p", "--endpoint", server.url())
    assert (
        done.returncode == 2 and "no file of some/stories matches *.csv: there are README.md, data/train" in done.stderr
    )
    done = command("get", "hf:some/stories", "--dry-run", "--out", tmp_path / "q", HF_ENDPOINT=server.url())
    assert done.stdout.count("/datasets/some/stories/resolve/main/") == 4 and not (tmp_path / "q").exists()


def test_the_imitated_hub_answers_its_own_client(server, tmp_path):
    """huggingface_hub itself lists and loads from the imitation, and finds what this tool finds."""
    client = pytest.importorskip("huggingface_hub")
    files = {"data/a.parquet": BODY, "data/b c.parquet": BODY[:9], "README.md": b"card"}
    huggingface(server, "some/set", files, page_size=99)
    api = client.HfApi(endpoint=server.url())
    entries = [e for e in api.list_repo_tree("some/set", repo_type="dataset", recursive=True) if hasattr(e, "size")]
    source = Source("huggingface", "some/set", (), "main")
    ours = list_files(fast_web(), source, server.url(), ["*"])
    assert {(e.path, e.size, e.lfs and e.lfs.sha256) for e in entries} == {(f.path, f.bytes, f.sha256) for f in ours}
    urls = {f.path: client.hf_hub_url("some/set", f.path, repo_type="dataset", endpoint=server.url()) for f in ours}
    assert urls == {f.path: f.url for f in ours}


def test_gated_and_missing_repositories(server, tmp_path):
    server.pages["/api/datasets/some/gated/tree/main"] = Page(needs_token="t")
    done = command("get", "hf:some/gated", "--out", tmp_path / "o", HF_ENDPOINT=server.url())
    assert done.returncode == 2 and "gated" in done.stderr and "set HF_TOKEN" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = command("get", "hf:some/nothing", "--out", tmp_path / "o", HF_ENDPOINT=server.url())
    assert done.returncode == 2 and "404" in done.stderr and len(done.stderr.splitlines()) == 1
    server.pages["/api/datasets/some/page/tree/main"] = Page(b"<html>", "text/html")
    done = command("get", "hf:some/page", "--out", tmp_path / "o", HF_ENDPOINT=server.url())
    assert "something else than JSON" in done.stderr and not (tmp_path / "o").exists()


def modelscope(server: LocalServer, repository: str, files: dict[str, bytes], page_size: int = 100) -> None:
    """Imitate ModelScope: folder by folder, in pages, with checksums."""

    def answer(path: str) -> Page | None:
        parts = urlsplit(path)
        if parts.path == f"/api/v1/datasets/{repository}/repo/tree":
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            root, page = query.get("Root", ""), int(query["PageNumber"])
            prefix = f"{root}/" if root else ""
            below = [name for name in files if name.startswith(prefix)]
            folders = sorted(
                {prefix + name[len(prefix) :].split("/")[0] for name in below if "/" in name[len(prefix) :]}
            )
            entries = [{"Path": folder, "Type": "tree", "Size": 0} for folder in folders] + [
                {
                    "Path": name,
                    "Type": "blob",
                    "Size": len(files[name]),
                    "Sha256": hashlib.sha256(files[name]).hexdigest(),
                }
                for name in below
                if "/" not in name[len(prefix) :]
            ]
            shown = entries[(page - 1) * page_size : page * page_size]
            return Page(json.dumps({"Code": 200, "Data": {"Files": shown}}).encode(), "application/json")
        name = unquote(parts.path).removeprefix(f"/datasets/{repository}/resolve/master/")
        return Page(files[name]) if name in files else None

    server.answer = answer


def test_get_from_modelscope(server, tmp_path):
    files = {f"4_5/{n:03}.parquet": b"%d" % n for n in range(105)} | {
        "2_3/x.parquet": b"no",
        "a b/中 文.jsonl": b"{}\n",
    }
    modelscope(server, "open/corpus", files)
    done = command("get", "ms:open/corpus", "--files", "4_5/*.parquet", "--out", tmp_path, "--endpoint", server.url())
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "4_5").iterdir()} == {
        name[4:]: content for name, content in files.items() if name.startswith("4_5/")
    }
    assert not any("Root=2_3" in request.path for request in server.log)  # a folder that no pattern meets
    assert len([request for request in server.log if "Root=4_5" in request.path]) == 2
    done = command("get", "ms:open/corpus", "--files", "中*", "--out", tmp_path, "--endpoint", server.url())
    assert done.returncode == 0 and (tmp_path / "a b" / "中 文.jsonl").read_bytes() == b"{}\n"


def test_a_listing_cannot_write_outside_its_folder(server, tmp_path):
    modelscope(server, "bad/one", {"../escape.jsonl": b"x"})
    done = command("get", "ms:bad/one", "--out", tmp_path / "o", "--endpoint", server.url())
    assert done.returncode == 2 and "would lie outside the folder" in done.stderr and not list(tmp_path.iterdir())


def test_kill_in_the_middle_and_the_same_command_loads_the_rest(server, tmp_path):
    server.pages["/corpus.jsonl"] = Page(BODY, rate=150_000)
    line = [
        sys.executable,
        "-m",
        "data_tools.download",
        "get",
        server.url("/corpus.jsonl"),
        "--out",
        str(tmp_path / "o"),
    ]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = part_paths(tmp_path / "o" / "corpus.jsonl")[0]
    while not (part.exists() and part.stat().st_size > 60_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    here = part.stat().st_size
    assert not (tmp_path / "o" / "corpus.jsonl").exists() and here < len(BODY)
    server.pages["/corpus.jsonl"].rate = None
    server.log.clear()
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "corpus.jsonl").read_bytes() == BODY
    assert server.sent("/corpus.jsonl") == len(BODY) - here
    assert f"going on after {here:,} bytes" in done.stdout


def test_ctrl_c_in_the_command(server, tmp_path):
    server.pages["/corpus.jsonl"] = Page(BODY, rate=100_000)
    line = [sys.executable, "-m", "data_tools.download", "get", server.url("/corpus.jsonl"), "--out", str(tmp_path)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while server.sent("/corpus.jsonl") < 30_000:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "stopped; the same command goes on" in out and "Traceback" not in err


def test_killed_between_the_file_and_its_record(server, tmp_path, monkeypatch):
    (file,) = serve_files(server, a=BODY)
    monkeypatch.setattr(Job, "_write_record", lambda *_: None)
    Job(fast_web(), tmp_path, {"dataset": "d"}).run([file])
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.bin.part.json", ".download.lock", "a.bin"]
    server.log.clear()
    job = Job(fast_web(), tmp_path, {"dataset": "d"})
    job.run([file])
    assert not server.log and job.known["a.bin"]["sha256"] == SHA
    assert sorted(path.name for path in tmp_path.iterdir()) == [".download.lock", "a.bin", "download.json"]
