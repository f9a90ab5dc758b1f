"""Downloads, against a server on this machine that misbehaves as told."""

import base64
import email.utils
import hashlib
import http.server
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from speedrun import fetch
from speedrun._download import FetchError, Retry, reported_sha256
from speedrun._numpy_loader import MAGIC
from speedrun.fetch import fetch_rank_file, fetch_shards
from speedrun.shards import folder_lock

QUICK = Retry(tries=3, first_wait_s=0.01, max_wait_s=2, timeout_s=2, answer_s=2)
VAL, TRAIN = "fineweb_val_000000.bin", "fineweb_train_000001.bin"


def shard_bytes(num_tokens=1_000_000, seed=0):
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, 1, num_tokens
    tokens = np.random.default_rng(seed).integers(0, 50256, num_tokens).astype("<u2")
    tokens[::1000] = 50256
    return header.tobytes() + tokens.tobytes()


def sha(content):
    return hashlib.sha256(content).hexdigest()


@dataclass
class Mirror:
    """What the server holds and how it behaves; `requests` is what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"one"'
    headers: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)  # of the next GETs, before it behaves
    retry_after: str | None = None
    drop_after: list[int] = field(default_factory=list)  # bytes that the next GETs send
    ranges: bool = True
    heads: bool = True
    redirect: bool = False  # as Hugging Face does: the hash is on the redirect only
    linked_etag: str | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def gets(self):
        return [(path, span) for method, path, span in self.requests if method == "GET"]


def make_handler(mirror):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            name = self.path.rsplit("/", 1)[-1]
            mirror.requests.append((self.command, self.path, self.headers.get("Range")))
            if not body and not mirror.heads:
                return self.end(405)
            if name not in mirror.files:
                return self.end(404)
            content = mirror.files[name]
            if mirror.redirect and not self.path.startswith("/cdn/"):
                linked = mirror.linked_etag or f'"{sha(content)}"'
                return self.end(
                    302,
                    {
                        "Location": f"/cdn/{name}",
                        "X-Linked-Etag": linked,
                        "X-Linked-Size": str(len(content)),
                    },
                )
            if body and mirror.statuses:
                after = {"Retry-After": mirror.retry_after} if mirror.retry_after else {}
                return self.end(mirror.statuses.pop(0), after)
            start, status, headers = 0, 200, dict(mirror.headers)
            if mirror.etag:
                headers["ETag"] = mirror.etag
            span = self.headers.get("Range")
            if span and mirror.ranges and self.headers.get("If-Range") in (None, mirror.etag):
                start, status = int(span[len("bytes=") : -1]), 206
                if start >= len(content):
                    return self.end(416)
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if not body:
                return None
            end = len(content)
            if mirror.drop_after:
                end = min(end, start + mirror.drop_after.pop(0))
                self.close_connection = True
            self.wfile.write(content[start:end])
            return None

        def end(self, status, headers=None):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@pytest.fixture
def mirror():
    state = Mirror(files={VAL: shard_bytes(), TRAIN: shard_bytes(seed=1)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}/data"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


class Get:
    """fetch_shards with the quick retry; `said` collects what it says."""

    def __init__(self, folder, source):
        self.folder, self.source, self.said = folder, source, []

    def __call__(self, train_shards=0, **options):
        options.setdefault("retry", QUICK)
        return fetch_shards(
            self.folder, train_shards, self.source, progress=False, say=self.said.append, **options
        )

    def text(self):
        return "\n".join(self.said)

    def entry(self, name=VAL):
        return json.loads((self.folder / "manifest.json").read_text())["files"][name]

    def leftovers(self):
        return sorted(path.name for path in self.folder.glob("*.part*"))


@pytest.fixture
def get(tmp_path, mirror):
    return Get(tmp_path / "out", mirror.url)


def test_plain_and_again(get, mirror):
    paths = get(1)
    assert [path.name for path in paths] == [VAL, TRAIN]
    assert [path.read_bytes() for path in paths] == [mirror.files[VAL], mirror.files[TRAIN]]
    assert get.entry() == {
        "bytes": 2_001_024,
        "tokens": 1_000_000,
        "documents": 1000,
        "sha256": sha(mirror.files[VAL]),
        "reported_sha256": None,
    }
    assert "2 files, 4.0 MB, into" in get.said[0]
    assert "no hash reported; size checked" in get.text()
    asked = len(mirror.requests)
    get(1)
    get(1, verify=True)
    assert len(mirror.requests) == asked
    assert get.leftovers() == []


def test_connection_dropped_is_resumed(get, mirror):
    mirror.drop_after = [700_000, 600_000]
    assert get()[0].read_bytes() == mirror.files[VAL]
    spans = [span for _, span in mirror.gets()]
    assert spans == [None, "bytes=700000-", "bytes=1300000-"]
    assert get.entry()["sha256"] == sha(mirror.files[VAL])


def test_every_mebibyte_earns_new_tries(get, mirror):
    mirror.files[VAL] = shard_bytes(4_000_000)
    mirror.drop_after = [1_100_000] * 6  # more often than QUICK.tries
    assert get()[0].read_bytes() == mirror.files[VAL]


def test_given_up_and_resumed_by_the_next_run(get, mirror):
    mirror.drop_after = [100_000] * 3
    with pytest.raises(FetchError, match="gave up after 3 tries: the connection ended at byte"):
        get()
    assert get.leftovers() == [f"{VAL}.part", f"{VAL}.part.json"]
    assert not (get.folder / VAL).exists()
    get()
    assert mirror.gets()[-1][1] == "bytes=300000-"
    assert (get.folder / VAL).read_bytes() == mirror.files[VAL]
    assert "0.3 MB of it here already" in get.text()
    assert get.leftovers() == []


@pytest.mark.parametrize("reported", [True, False])
def test_changed_file_starts_again(get, mirror, reported):
    def serve(content, etag):
        mirror.files[VAL], mirror.etag = content, etag
        mirror.headers = {"Repr-Digest": digest_field(content)} if reported else {}

    serve(shard_bytes(), '"one"')
    mirror.drop_after = [100_000] * 3
    with pytest.raises(FetchError):
        get()
    serve(shard_bytes(seed=9), '"two"')
    assert get()[0].read_bytes() == mirror.files[VAL]


def test_changed_file_without_etag_starts_again(get, mirror):
    mirror.etag = None
    mirror.drop_after = [100_000] * 3
    with pytest.raises(FetchError):
        get()
    assert get()[0].read_bytes() == mirror.files[VAL]
    assert {span for _, span in mirror.gets()} == {None}


def test_no_range_support(get, mirror):
    mirror.ranges = False
    mirror.drop_after = [500_000]
    assert get()[0].read_bytes() == mirror.files[VAL]
    assert get.entry()["sha256"] == sha(mirror.files[VAL])


def test_no_range_support_and_always_dropped_ends(get, mirror):
    mirror.ranges = False
    mirror.drop_after = [1_500_000] * 50
    with pytest.raises(FetchError, match="gave up after 3 tries"):
        get()
    assert len(mirror.gets()) <= 2 * QUICK.tries


def test_redirect_keeps_the_hash(get, mirror):
    mirror.redirect = True
    mirror.drop_after = [500_000]
    get()
    assert get.entry()["reported_sha256"] == sha(mirror.files[VAL])
    assert "sha256 as its source reports" in get.text()
    assert ("GET", f"/cdn/{VAL}", "bytes=500000-") in mirror.requests
    assert ("HEAD", f"/cdn/{VAL}", None) not in mirror.requests


def test_wrong_hash(get, mirror):
    mirror.redirect, mirror.linked_etag = True, f'"{"0" * 64}"'
    with pytest.raises(FetchError, match=f"{VAL}: what came has sha256 .* reports 0000"):
        get()
    assert list(get.folder.glob("*.bin*")) == []


def test_part_that_was_spoiled_is_fetched_anew(get, mirror):
    mirror.headers = {"Repr-Digest": digest_field(mirror.files[VAL])}
    mirror.drop_after = [100_000] * 3
    with pytest.raises(FetchError):
        get()
    part = get.folder / f"{VAL}.part"
    part.write_bytes(b"?" + part.read_bytes()[1:])
    assert get()[0].read_bytes() == mirror.files[VAL]
    assert "wrong sha256 after a resume" in get.text()


@pytest.mark.parametrize("size", [2_001_024, 3_000_000])
def test_part_as_long_as_the_file_or_longer(get, mirror, size):
    mirror.drop_after = [100_000] * 3
    with pytest.raises(FetchError):
        get()
    part = get.folder / f"{VAL}.part"
    part.write_bytes(mirror.files[VAL].ljust(size, b"x"))
    assert get()[0].read_bytes() == mirror.files[VAL]


def digest_field(content):
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


@pytest.mark.parametrize(
    "name, value",
    [
        ("ETag", lambda c: f'"{sha(c)}"'),
        ("Repr-Digest", digest_field),
        ("Content-Digest", lambda c: "md5=:AAAA:, " + digest_field(c)),
        ("Digest", lambda c: "SHA-256=" + base64.b64encode(hashlib.sha256(c).digest()).decode()),
    ],
)
def test_hashes_that_servers_report(name, value):
    content = b"content"
    assert reported_sha256({name: value(content)}, {}) == sha(content)
    other = {"X-Linked-Etag": f'"{sha(b"linked")}"'}
    assert reported_sha256({name: value(content)}, other) == sha(b"linked")


@pytest.mark.parametrize("etag", ['W/"' + "0" * 64 + '"', '"abc"', '"' + "0" * 40 + '"'])
def test_other_etags_are_no_hashes(etag):
    assert reported_sha256({"ETag": etag}, {}) is None


def test_server_without_head(get, mirror):
    mirror.heads = False
    mirror.headers = {"Repr-Digest": digest_field(mirror.files[VAL])}
    get()
    assert get.entry()["reported_sha256"] == sha(mirror.files[VAL])


def test_missing_file_is_not_tried_again(get, mirror):
    del mirror.files[TRAIN]
    with pytest.raises(FetchError, match=f"(?s){TRAIN}: the server answers 404 .*--source"):
        get(1)
    assert len(mirror.requests) == 2
    assert mirror.gets() == []  # nothing is downloaded before everything is known to be there


@pytest.mark.parametrize("status", [408, 500, 503])
def test_passing_trouble_is_waited_out(get, mirror, status):
    mirror.statuses = [status, status]
    assert get()[0].read_bytes() == mirror.files[VAL]
    assert f"HTTP Error {status}" in get.text() and "try 3 of 3" in get.text()


def test_lasting_trouble_ends(get, mirror):
    mirror.statuses = [500] * 10
    with pytest.raises(FetchError, match="gave up after 3 tries: HTTP Error 500"):
        get()
    assert len(mirror.gets()) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(get, mirror, form):
    mirror.statuses = [429]
    in_two_seconds = email.utils.formatdate(time.time() + 2, usegmt=True)
    mirror.retry_after = "1" if form == "seconds" else in_two_seconds
    began = time.monotonic()
    get()
    assert time.monotonic() - began > (1.0 if form == "seconds" else 0.5)


def test_retry_after_too_long_is_told(get, mirror):
    mirror.statuses, mirror.retry_after = [429], "3600"
    with pytest.raises(FetchError, match="come back in 3600 s"):
        get()


def test_truncated_shard_on_the_server(get, mirror):
    mirror.files[VAL] = mirror.files[VAL][:-2]
    with pytest.raises(FetchError, match=r"not a good shard: .*truncated"):
        get()
    assert list(get.folder.glob("*.bin*")) == []


def test_something_that_is_no_shard(get, mirror):
    mirror.files[VAL] = b"<html>please log in</html>" * 100
    with pytest.raises(FetchError, match=r"not a good shard: .*magic number"):
        get()


def test_no_network(get):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        get.source = f"http://127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(FetchError) as caught:
        get(2, retry=Retry())
    assert time.monotonic() - began < 5
    for needed in (
        "can't be reached",
        str(get.folder),
        VAL,
        "fineweb_train_000002.bin",
        "--source",
    ):
        assert needed in str(caught.value)


def test_silent_network(get):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        get.source = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FetchError, match=r"can't be reached .no answer in 0\.2 s"):
            get(retry=Retry(tries=3, first_wait_s=0.01, timeout_s=30, answer_s=0.2))


def test_unusable_addresses(get, tmp_path):
    for source, message in (
        (str(tmp_path / "none"), "neither an http"),
        ("ftp://example.org", "neither an http"),
        (str(get.folder), "the folder to fill itself"),
        ("http://exa mple.org", "not a usable address"),
    ):
        get.source = source
        get.folder.mkdir(exist_ok=True)
        with pytest.raises(FetchError, match=message):
            get()
    with pytest.raises(FetchError, match="-1 training shards"):
        get(-1)


def test_local_folder(get, mirror, tmp_path):
    get(1)
    copy = Get(tmp_path / "copy", str(get.folder))
    paths = copy(1)
    assert [path.read_bytes() for path in paths] == [mirror.files[VAL], mirror.files[TRAIN]]
    assert copy.entry()["reported_sha256"] == sha(mirror.files[VAL])
    with pytest.raises(FetchError, match=r"lacks fineweb_train_000002\.bin"):
        copy(2)

    spoiled = get.folder / VAL
    spoiled.write_bytes(mirror.files[VAL][:-1] + b"\0")
    with pytest.raises(FetchError, match="its manifest says"):
        Get(tmp_path / "third", str(get.folder))()


def test_damaged_files_are_replaced(get, mirror):
    path = get()[0]
    path.write_bytes(mirror.files[VAL][:-2])
    get()
    assert path.read_bytes() == mirror.files[VAL]
    path.write_bytes(mirror.files[VAL][:-2] + b"\0\0")
    get()
    assert path.read_bytes() != mirror.files[VAL]
    get(verify=True)
    assert path.read_bytes() == mirror.files[VAL]
    assert "sha256 is no longer the one in the manifest" in get.text()


def test_files_brought_by_hand_are_taken(get, mirror):
    get.folder.mkdir()
    (get.folder / VAL).write_bytes(mirror.files[VAL])
    get()
    assert mirror.requests == []
    assert get.entry()["sha256"] == sha(mirror.files[VAL])


def test_second_fetch_into_the_folder_is_refused(get):
    with folder_lock(get.folder, wait=False):
        with pytest.raises(FetchError, match="another process"):
            get()


def test_too_little_disk(get, monkeypatch):
    usage = fetch.shutil.disk_usage("/")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(FetchError, match=r"2\.0 MB are to come and 1\.0 MB are free"):
        get()


def test_ctrl_c_keeps_the_part(get, mirror, monkeypatch):
    def stop(self, done):
        if done > 1_000_000:
            raise KeyboardInterrupt

    monkeypatch.setattr(fetch.Progress, "show", stop)
    with pytest.raises(KeyboardInterrupt):
        get()
    assert "run again to go on" in get.text()
    monkeypatch.undo()
    get()
    assert mirror.gets()[-1][1] is not None
    assert (get.folder / VAL).read_bytes() == mirror.files[VAL]


@pytest.fixture
def merges(monkeypatch):
    """Small stand-ins for the public vocabulary, with their hashes."""
    content = b"#version: 0.2\n\xc4\xa0 t\nh e\n"
    ranks = fetch.ranks_from_merges(content)
    monkeypatch.setattr(fetch, "MERGES_SHA256", sha(content))
    monkeypatch.setattr(fetch, "RANK_FILE_SHA256", sha(ranks))
    monkeypatch.setattr("speedrun.tokenizer.RANK_FILE_SHA256", sha(ranks))
    return content, ranks


def test_rank_file_from_merges_or_the_mirror(get, mirror, merges, tmp_path):
    content, ranks = merges
    options = dict(retry=QUICK, say=get.said.append)
    mirror.files["merges.txt"] = content
    urls = [f"{mirror.url}/gone.bpe", f"{mirror.url}/merges.txt"]
    path = fetch_rank_file(tmp_path / "a", fetch.PUBLIC_SOURCE, urls=urls, **options)
    assert path.read_bytes() == ranks
    asked = len(mirror.requests)
    fetch_rank_file(tmp_path / "a", fetch.PUBLIC_SOURCE, urls=urls, **options)
    assert len(mirror.requests) == asked

    mirror.files["gpt2.tiktoken"] = ranks
    path = fetch_rank_file(tmp_path / "b", mirror.url, urls=[], **options)
    assert path.read_bytes() == ranks
    path = fetch_rank_file(tmp_path / "c", str(tmp_path / "b"), **options)
    assert path.read_bytes() == ranks
    path = fetch_rank_file(tmp_path / "d", mirror.url, path, urls=[], **options)
    assert path.read_bytes() == ranks
    assert [p.name for p in Path(tmp_path / "b").glob("*.part*")] == []


def test_bad_rank_files(get, mirror, merges, tmp_path):
    options = dict(retry=QUICK, say=get.said.append)
    mirror.files["gpt2.tiktoken"] = b"IQ== 0\n"
    with pytest.raises(FetchError, match=r"(?s)can't be had.*--rank-file.*what came has sha256"):
        fetch_rank_file(tmp_path / "a", mirror.url, urls=[], **options)
    (tmp_path / "wrong").write_bytes(b"IQ== 0\n")
    with pytest.raises(FetchError, match="not GPT-2's public rank file"):
        fetch_rank_file(tmp_path / "a", mirror.url, tmp_path / "wrong", **options)
    (tmp_path / "empty").mkdir()
    assert fetch_rank_file(tmp_path / "a", str(tmp_path / "empty"), **options) is None
    assert "--rank-file" in get.text()
