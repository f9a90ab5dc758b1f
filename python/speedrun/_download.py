"""Get one file over HTTP: resumed, retried, and hashed on the way. Used by speedrun.fetch only."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from speedrun._progress import Progress
from speedrun.shards import sha256_file

_BLOCK_BYTES = 1 << 18
_STEP_BYTES = 1 << 20  # so much further, and the count of failed tries starts again


class FetchError(RuntimeError):
    """A download that can't be had. The message names the file, what was found and the fix."""


@dataclass(frozen=True)
class Retry:
    """How long to insist. `tries` in a row without a further MiB of a file are the end of it."""

    tries: int = 5
    first_wait_s: float = 1.0  # doubled at each further try
    max_wait_s: float = 60.0  # also the most that a server's Retry-After is waited for
    timeout_s: float = 30.0  # without a byte
    answer_s: float = 8.0  # from asking about a file to the answer, all addresses of a host tried


@dataclass(frozen=True)
class Remote:
    """A file at its source. None where the server doesn't say."""

    place: str  # URL, or path in a local folder
    bytes: int | None = None
    sha256: str | None = None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects with method and headers kept, and remembers what they say of the file.

    Hugging Face reports a file's size and SHA-256 on the redirect, not where it leads.
    """

    def __init__(self):
        self.linked: dict[str, str] = {}

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        for name in ("X-Linked-Size", "X-Linked-Etag"):
            if name in headers:
                self.linked.setdefault(name, headers[name])
        if request.get_method() == "HEAD" and len(self.linked) == 2:
            return None  # nothing more to learn
        if request.type == "https" and not newurl.lower().startswith("https:"):
            raise FetchError(f"{request.full_url}: redirects to {newurl}, which is not https")
        return urllib.request.Request(
            newurl, headers=request.headers, unverifiable=True, method=request.get_method()
        )

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def _open(url: str, method: str, headers: dict[str, str], timeout_s: float):
    """The response, and what its redirects said. A HEAD's last answer may be a redirect."""
    handler = _Redirects()
    request = urllib.request.Request(
        url, method=method, headers={"User-Agent": "nanogpt-speedrun", **headers}
    )
    try:
        return urllib.request.build_opener(handler).open(request, timeout=timeout_s), handler.linked
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400 and len(handler.linked) == 2:
            return error, handler.linked
        raise


def reported_sha256(headers, linked: dict[str, str]) -> str | None:
    """The file's SHA-256 as the server reports it, in hex, or None."""
    for tag in (linked.get("X-Linked-Etag"), headers.get("X-Linked-Etag"), headers.get("ETag")):
        if tag and re.fullmatch('"?[0-9a-fA-F]{64}"?', tag):
            return tag.strip('"').lower()
    for name in ("Repr-Digest", "Content-Digest", "Digest"):
        found = re.search(
            r"\bsha-256=:?([A-Za-z0-9+/]{43}=)", headers.get(name) or "", re.IGNORECASE
        )
        if found:
            return base64.b64decode(found[1]).hex()
    return None


# An OSError of the disk is none of these.
TRANSIENT = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


def _pause_s(url: str, error: Exception, failures: int, retry: Retry) -> float:
    """Seconds to the next try after a transient error; FetchError if there shall be none."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code not in (408, 416, 429) and error.code < 500:
            raise FetchError(
                f"{url}: the server answers {error.code} {error.reason}; check the address, "
                "or name another place with --source URL-or-FOLDER"
            ) from error
    elif isinstance(error, http.client.InvalidURL):
        raise FetchError(f"{url}: not a usable address ({error})") from error
    elif isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
        raise FetchError(f"{url}: {error.reason}; the server's certificate is not good") from error
    if failures >= retry.tries:
        raise FetchError(f"{url}: gave up after {failures} tries: {error}") from error
    pause_s = min(retry.first_wait_s * 2 ** (failures - 1), retry.max_wait_s)
    if isinstance(error, urllib.error.HTTPError):
        asked_s = _retry_after_s(error.headers.get("Retry-After"))
        if asked_s > retry.max_wait_s:
            raise FetchError(f"{url}: busy; the server says to come back in {asked_s:.0f} s")
        pause_s = max(pause_s, asked_s)
    return pause_s


def _retry_after_s(value: str | None) -> float:
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _ask_once(url: str, timeout_s: float) -> Remote:
    try:
        response, linked = _open(url, "HEAD", {}, timeout_s)
    except urllib.error.HTTPError as error:
        if error.code not in (403, 405, 501):  # servers and signed addresses that know only GET
            raise
        response, linked = _open(url, "GET", {}, timeout_s)
    with response:
        size = linked.get("X-Linked-Size") or response.headers.get("Content-Length")
        known = int(size) if size and size.isdigit() else None
        return Remote(url, known, reported_sha256(response.headers, linked))


def _ask_in_time(url: str, retry: Retry) -> Remote:
    """`_ask_once`, given up after `retry.answer_s`: a dead network may hold each address longer."""
    answer: list[Remote] = []
    problem: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(_ask_once(url, retry.timeout_s))
        except BaseException as error:  # raised again below, in the thread that asked
            problem.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(retry.answer_s)
    if problem:
        raise problem[0]
    if not answer:
        raise TimeoutError(f"no answer in {retry.answer_s:g} s")
    return answer[0]


def ask(url: str, retry: Retry, say: Callable[[str], None], *, tries: int | None = None) -> Remote:
    """What the server says about a file, without its content.

    `tries`: how often a server is called that can't be reached; None is retry.tries.
    """
    failures = 0
    while True:
        try:
            return _ask_in_time(url, retry)
        except TRANSIENT as error:
            failures += 1
            if not isinstance(error, urllib.error.HTTPError) and failures == tries:
                raise FetchError(f"{url}: can't be reached ({error})") from error
            pause_s = _pause_s(url, error, failures, retry)
            say(f"{url}: {error}; try {failures + 1} of {retry.tries} in {pause_s:.1f} s")
            time.sleep(pause_s)


def _told(part: Path) -> dict[str, str | None]:
    """What was noted of the file that `part` is the beginning of."""
    try:
        noted = json.loads(_note(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def discard(part: Path) -> None:
    """Remove an unfinished file and its note."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _validator(headers) -> str | None:
    """What If-Range may name: a strong ETag, else the date of change."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _resume_point(remote: Remote, part: Path, told: dict[str, str | None]) -> int:
    """Bytes of `part` that can be kept: all, or none where it may be of another file."""
    if not part.exists():
        return 0
    reported = told.get("sha256")
    same = remote.sha256 == reported if remote.sha256 and reported else bool(told.get("validator"))
    held = part.stat().st_size
    return held if same and (remote.bytes is None or held <= remote.bytes) else 0


def _receive(remote: Remote, part: Path, timeout_s: float, progress: Progress) -> tuple[str, bool]:
    """One try: bring `part` to the end. Returns its SHA-256, and whether a part of it was old."""
    told = _told(part)
    start = _resume_point(remote, part, told)
    if start and start == remote.bytes:
        return sha256_file(part).hexdigest(), True
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and told.get("validator"):
        headers["If-Range"] = told["validator"]
    response, linked = _open(remote.place, "GET", headers, timeout_s)
    with response:
        length = response.headers.get("Content-Length")
        expected = int(length) if length and length.isdigit() else None
        if response.status == 206:
            span = re.match(r"bytes (\d+)-(\d+)/", response.headers.get("Content-Range") or "")
            if not start or not span or int(span[1]) != start:
                discard(part)
                raise http.client.HTTPException("the server sent another range than was asked for")
        else:
            start = 0  # it knows no ranges, or has another file by now
        if expected is not None and remote.bytes not in (None, start + expected):
            raise FetchError(
                f"{remote.place}: {start + expected:,} bytes now, {remote.bytes:,} before: "
                "the file is being changed; run again"
            )
        if not start:
            note = {
                "validator": _validator(response.headers),
                "sha256": remote.sha256 or reported_sha256(response.headers, linked),
            }
            _note(part).write_text(json.dumps(note), encoding="utf-8")
        with part.open("r+b" if start else "wb") as file:
            state = sha256_file(part) if start else hashlib.sha256()
            file.seek(start)
            done = start
            while block := response.read1(_BLOCK_BYTES):
                file.write(block)
                state.update(block)
                done += len(block)
                progress.show(done)
            file.flush()
            os.fsync(file.fileno())
        if expected is not None and done != start + expected:
            raise http.client.HTTPException(f"the connection ended at byte {done:,}")
    return state.hexdigest(), start > 0


def download(
    remote: Remote, part: Path, retry: Retry, say: Callable[[str], None], progress: Progress
) -> str:
    """Bring the whole file to `part` and return its SHA-256, checked against `remote.sha256`.

    A `part` of the same file is continued. FetchError when it can't be had; `part` then keeps what
    came, unless it was wrong.
    """
    failures, furthest, restarted = 0, 0, False
    while True:
        try:
            digest, resumed = _receive(remote, part, retry.timeout_s, progress)
        except TRANSIENT as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                discard(part)  # not the beginning of the file that is there now
            held = part.stat().st_size if part.exists() else 0
            if held >= furthest + _STEP_BYTES:
                failures, furthest = 0, held
            failures += 1
            pause_s = _pause_s(remote.place, error, failures, retry)
            say(f"{remote.place}: {error}; try {failures + 1} of {retry.tries} in {pause_s:.1f} s")
            time.sleep(pause_s)
            continue
        expected = remote.sha256 or _told(part).get("sha256")
        if expected is None or digest == expected:
            return digest
        discard(part)
        if restarted or not resumed:
            raise FetchError(
                f"{remote.place}: what came has sha256 {digest}, and the server reports "
                f"{expected}; removed. Run again, or name another place with --source"
            )
        restarted = True
        say(f"{remote.place}: wrong sha256 after a resume; from the beginning again")
