"""Waiting for the Hub, within bounds and with a line that says for what; and what came is what the Hub names.

huggingface_hub makes all its requests with one HTTP client, which may be replaced (set_client_factory): ours limits
each time-out, measures what arrives, and sends a token to the Hub alone. The libraries' own retries stay as they are.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, get_session, set_client_factory, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx, sha

from configs.secrets import redact
from configs.settings import say
from configs.translation import translated

# A user's own HF_HUB_DOWNLOAD_TIMEOUT wins. Without one the libraries wait 10 s at some places and forever at others.
TIMEOUT_S = constants.HF_HUB_DOWNLOAD_TIMEOUT if os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") else 20
PATIENCE_S = max(3 * TIMEOUT_S, 15)  # without anything useful: the end
SLOW = 64 * 1024  # bytes; less than this within PATIENCE_S is nothing useful
FIRST_LINE_S, NEXT_LINE_S = 10, 30  # of waiting, until it is said
LONGEST_PAUSE_S = 300  # that the Hub may ask for; it counts requests in windows of five minutes
BUSY = (408, 429, 500, 502, 503, 504)  # answers that the libraries ask again for
REFUSED = (401, 403)


class GaveUp(BaseException):
    """Nothing useful came for too long; its text says how long and what came last.

    No Exception: the libraries catch those, and go on without the file or ask again.
    """


class Wait:
    """What one model or data set is waited for.

    active: requests that are under way; useful: when something useful came last, idle: when the last request ended
    (time.monotonic); paused: seconds that the Hub has asked to wait; trouble: what was wrong last; failed: {address of
    a file: why it did not come}.
    """

    def __init__(self, what: str, mend: str = "", is_cached: bool = False):
        self.what, self.mend, self.is_cached, self.lock = what, mend, is_cached, threading.Lock()
        self.active, self.arrived, self.useful, self.idle, self.said = 0, 0, time.monotonic(), time.monotonic(), 0.0
        self.paused, self.trouble, self.address, self.failed = 0, "", "", {}

    def quiet(self) -> float:
        """Seconds without anything useful."""
        return time.monotonic() - self.useful

    def begin(self, address: str) -> None:
        """A request starts. Raises as give_up() where nothing useful has come for too long."""
        with self.lock:
            idle = time.monotonic() - self.idle - self.paused
            if not self.active and (not self.trouble or idle > NEXT_LINE_S):
                self.useful = time.monotonic()  # until now nobody has waited
            self.active, self.address = self.active + 1, address
        if self.quiet() > self.patience() or self.is_cached and _unreachable:
            self.give_up()

    def end(self) -> None:
        with self.lock:
            self.active, self.idle = self.active - 1, time.monotonic()

    def came(self, number: int) -> None:
        """Bytes of an answer have arrived. Raises as give_up() where they are too few for too long."""
        with self.lock:
            self.arrived += number
            if self.arrived >= SLOW:
                self.arrived, self.useful = 0, time.monotonic()
        if self.quiet() > self.patience():
            self.trouble = self.trouble or "it answers too slowly"
            self.give_up()

    def patience(self) -> float:
        """Seconds without anything useful that are waited; less where there is something to fall back on."""
        return PATIENCE_S / 3 if self.is_cached else PATIENCE_S

    def give_up(self) -> NoReturn:
        """Raises GaveUp; or OfflineModeIsEnabled, and the libraries then use what an earlier run has cached."""
        if not self.is_cached:
            raise GaveUp(self.reason())
        if not _unreachable:
            _unreachable.append(self.reason())
            say(f"note: {self.reason()}; using what an earlier run has cached of {self.what}")
        raise OfflineModeIsEnabled(_unreachable[0])

    def good(self, address: str) -> None:
        with self.lock:
            self.trouble, self.useful = "", time.monotonic()
            self.failed.pop(address, None)

    def bad(self, address: str, trouble: str) -> None:
        with self.lock:
            self.trouble = self.failed[address] = trouble

    def reason(self) -> str:
        """Why this wait lasts or ends, for people."""
        return f"nothing useful from {self.address} for {self.quiet():.0f} s ({self.trouble or 'no answer'})"

    def lost(self, name: str, kind: str) -> dict[str, str]:
        """{file: why} of what did not come and is not in the cache: the libraries go on without some of them."""
        lost, file = {}, re.compile(rf"/{re.escape(name)}/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
        for address, trouble in self.failed.items():
            if part := file.search(urlsplit(address).path):
                path, revision = unquote(part["file"]), unquote(part["revision"])
                kept = try_to_load_from_cache(name, path, revision=revision, repo_type=kind)
                lost |= {} if kept else {path: trouble}
        return lost


_waits: list[Wait] = []  # the innermost one last
_unreachable: list[str] = []  # why the Hub is not asked any more for what is cached; empty while it is


@contextlib.contextmanager
def waiting(what: str, mend: str, is_cached: bool) -> Iterator[Wait]:
    """A context in which the Hub is waited for. Raises GaveUp.

    what: for people, "model 'x' (MODEL_NAME)"; mend: what to do where it cannot be had; is_cached: whether an earlier
    run has left it in the cache.
    """
    if not _hooks:
        _hooks.extend(get_session().event_hooks["request"])
        set_client_factory(_client)
        threading.Thread(target=_watch, daemon=True).start()
    _waits.append(Wait(what, mend, is_cached))
    try:
        yield _waits[-1]
    finally:
        _waits.pop()


def _watch() -> None:
    """Say what is waited for, from a thread: the one that waits is inside of a library."""
    while True:
        time.sleep(1)
        wait = _waits[-1] if _waits else None
        if wait is None or not wait.active or wait.quiet() < FIRST_LINE_S:
            continue
        if time.monotonic() - wait.said > NEXT_LINE_S:
            wait.said = time.monotonic()
            say(f"note: waiting for {wait.what}: {wait.reason()}")
        if wait.quiet() > PATIENCE_S + 2 * TIMEOUT_S:
            # An answer whose headers drip is outside of every time-out, and its thread cannot be stopped. What this
            # program was writing is settled by the next run, as after a power cut.
            line = f"error: {wait.what} could not be fetched: {wait.reason()}; {wait.mend}"
            print(translated(redact(line)), file=sys.stderr, flush=True)
            os._exit(2)


# --- the client


_hooks: list[Callable] = []  # those of the library's own client: offline mode, and the requests' ids


class _Body(httpx.SyncByteStream):
    """The body of an answer; what arrives of it is counted."""

    def __init__(self, response: httpx.Response, wait: Wait):
        self.body, self.wait, self.address, self.open = response.stream, wait, _address(response.request), True
        self.is_good = response.status_code < 400
        with wait.lock:
            wait.active += 1

    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self.body:
                self.wait.came(len(piece))
                yield piece
        except (httpx.HTTPError, OfflineModeIsEnabled) as error:
            self.wait.bad(self.address, _words(error))
            raise
        if self.is_good:
            self.wait.good(self.address)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.wait.end()
        self.body.close()


class _Client(httpx.Client):
    def send(self, request: httpx.Request, **options) -> httpx.Response:
        wait, address = _waits[-1] if _waits else Wait(""), _address(request)
        try:
            wait.begin(address)
            response = super().send(request, **options)
        except (httpx.HTTPError, OfflineModeIsEnabled) as error:
            wait.bad(address, _words(error))
            raise
        finally:
            wait.end()
        if response.status_code in BUSY + REFUSED:
            wait.bad(address, f"HTTP {response.status_code} {response.reason_phrase}".strip())
            _bound_pause(response, wait)
        elif not options.get("stream"):
            wait.good(address)
        return response


def _client() -> httpx.Client:
    """huggingface_hub's client (default_client_factory), with our bounds."""
    hooks = {"request": [*_hooks, _before], "response": [_after]}
    return _Client(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT_S)


def _bound_pause(response: httpx.Response, wait: Wait) -> None:
    """The library waits as long as it is asked to: that must not be for ever. Raises GaveUp."""
    asked = [response.headers.get("retry-after", "")]
    if response.status_code == 429:
        asked += re.findall(r"\bt=(\d+)", response.headers.get("ratelimit", ""))
    seconds = max((int(text) for text in asked if text.isdecimal()), default=0)
    wait.paused += seconds
    if wait.paused > LONGEST_PAUSE_S:
        raise GaveUp(f"{response.url.host} asks to wait {seconds} s (HTTP {response.status_code})")
    wait.useful += seconds
    if seconds >= FIRST_LINE_S:
        say(f"note: {response.url.host} asks to wait {seconds} s (HTTP {response.status_code}), for {wait.what}")


def _before(request: httpx.Request) -> None:
    """Limit the time-outs of a request, and keep the token from whom it is not meant for."""
    asked = request.extensions.get("timeout", {})
    limits = {key: min(asked.get(key) or TIMEOUT_S, TIMEOUT_S) for key in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": limits}
    host, hub = request.url.netloc.decode("ascii"), urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    # the Hub's own services have names below its own; those of a mirror are somebody's
    if host not in (hub, "hf.co") and not f".{host}".endswith(".huggingface.co"):
        request.headers.pop("Authorization", None)


def _after(response: httpx.Response) -> None:
    kind = response.headers.get("content-type", "")
    if response.status_code == 200 and "/api/" in response.url.path and "html" in kind:
        # of a network that wants a login first, or of a mirror that is no Hub; the library would raise a ValueError
        raise httpx.DecodingError(f"a web page from {_address(response.request)}, which is no Hub's answer")
    if _waits:
        response.stream = _Body(response, _waits[-1])


def _address(request: httpx.Request) -> str:
    """Where a request goes, without its query, which may hold a signature."""
    return str(request.url.copy_with(query=None))


def _words(error: Exception) -> str:
    """An error of the client for people: its type tells more than its text, which may be empty."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


# --- what has come


def remove_damaged(name: str, kind: str, since: float) -> list[str]:
    """The files of a repository that came after `since` (time.time) with other bytes than the Hub says; [] for none.

    The library compares sizes only. In its cache a file has the name of its content: the sha256 of a large file, git's
    hash of a small one. A damaged file is removed, so that it is fetched again. kind: "model" or "dataset".
    """
    folder, removed = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}", []
    for blob in folder.glob("blobs/*"):
        # a link leads to what several caches share, which its own protocol (Xet) has checked
        is_new = not blob.is_symlink() and blob.is_file() and blob.stat().st_mtime >= since - 60  # of another clock
        if is_new and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) and _hash(blob) != blob.name:
            links = [link for link in folder.glob("snapshots/*/**/*") if link.is_symlink() and link.resolve() == blob]
            removed += sorted({link.name for link in links})
            for path in (*links, blob):
                path.unlink(missing_ok=True)
    return removed


def _hash(blob: Path) -> str:
    if len(blob.name) == 40:
        return sha.git_hash(blob.read_bytes())
    with open(blob, "rb") as file:
        return sha.sha_fileobj(file).hex()
