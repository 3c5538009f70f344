"""A person judges on a page of their own browser: one HTML file from a server that only this machine reaches.

The server listens on 127.0.0.1 alone. Its address holds a random token, and nothing is answered without it. A request
must name this server as its host, so that no other site can reach it under a name of its own (DNS rebinding), and a
verdict must come from this page's origin, as JSON, which no form of another site can send.
"""

import hmac
import json
import os
import secrets
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from configs.settings import say

PAGE = Path(__file__).with_name("templates") / "judge_page.html"
LONGEST = 1000  # bytes of a request's body
VERDICTS = ("first", "second", "tie", "skip", "back", "quit")
NAMES = (
    "lang",
    "title",
    "task",
    "question",
    "empty",
    "first",
    "second",
    "tie",
    "skip",
    "back",
    "quit",
    "sure_page",
    "lost",
)


def judge_on_page(session, words: dict) -> None:
    """Serve the page until all is judged or the person stops; its address is said, and opened where a browser is.

    session: person.Session. Raises: what writing a verdict raises, such as the OSError of a full disk.
    """
    server = Server(session, words)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        say(words["address"].format(address=server.address))
        if any(os.environ.get(key) for key in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")) or sys.platform == "darwin":
            if webbrowser.open(server.address):
                say(words["opened"])
        server.over.wait()
    finally:
        server.shutdown()
        server.server_close()
    if server.error:
        raise server.error


class Server(ThreadingHTTPServer):
    """The page and what it asks for, for one session. `over` is set once nothing is left to ask."""

    daemon_threads = True  # a browser keeps connections open that it may need

    def __init__(self, session, words: dict):
        super().__init__(("127.0.0.1", 0), Handler)
        self.session, self.words, self.lock = session, words, threading.Lock()
        self.over, self.error = threading.Event(), None
        self.token, port = secrets.token_urlsafe(24), self.server_address[1]
        self.hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        self.address = f"http://127.0.0.1:{port}/{self.token}/"

    def state(self) -> dict:
        """What the page shows now."""
        session, words = self.session, self.words
        shown = {"words": {name: words[name] for name in NAMES}, "number": session.number, "over": None}
        if session.number is None or session.ended:
            return shown | {"over": words["done" if session.number is None else "stopped"]}
        showing = session.current
        count = words["count"].format(n=session.number + 1, of=len(session.showings))
        return shown | {"count": count, "question": showing.question, "answers": [showing.first, showing.second]}

    def hear(self, number: int, verdict: str) -> dict:
        """Note a verdict on what stands at this place; what is to be shown then."""
        with self.lock:
            if verdict == "quit":
                self.session.ended = True
            elif verdict == "back":
                self.session.back()
            else:
                self.session.give(number, verdict)
            return self.state()


class Handler(BaseHTTPRequestHandler):
    """Answers the page (GET /TOKEN/), what it shows (GET /TOKEN/state) and a verdict (POST /TOKEN/verdict)."""

    server: Server
    server_version, sys_version = "judge", ""
    timeout = 30

    def do_GET(self) -> None:
        name = self.asked()
        if name == "":
            nonce = secrets.token_urlsafe(16)
            page = PAGE.read_text("utf-8").replace("NONCE", nonce)
            self.reply(200, "text/html; charset=utf-8", page.encode(), nonce)
        elif name == "state":
            with self.server.lock:
                self.reply_json(self.server.state())
        elif name is not None:
            self.refuse(404)

    def do_POST(self) -> None:
        if (name := self.asked()) is None:
            return
        length = self.headers.get("Content-Length", "")
        is_ours = self.headers.get("Origin") in (None, *(f"http://{host}" for host in self.server.hosts))
        if name != "verdict":
            return self.refuse(404)
        if not is_ours or self.headers.get_content_type() != "application/json":
            return self.refuse(403)
        if not length.isdecimal() or int(length) > LONGEST:
            return self.refuse(413)
        try:
            given = json.loads(self.rfile.read(int(length)))
            number, verdict = given["number"], given["verdict"]
            if verdict not in VERDICTS or type(number) is not int:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.refuse(400)
        try:
            self.reply_json(self.server.hear(number, verdict))
        except OSError as error:  # the verdict could not be written, or the page is gone
            if not isinstance(error, ConnectionError):
                self.server.error = error
                self.server.over.set()
        if self.server.session.ended:
            self.server.over.set()

    def asked(self) -> str | None:
        """What is asked for behind the token; None, and a refusal, where host or token are wrong."""
        _, token, name = [*self.path.partition("?")[0].split("/", 2), "", ""][:3]
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self.refuse(403)
        elif not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            self.refuse(404)
        else:
            return name
        return None

    def refuse(self, status: int) -> None:
        self.close_connection = True
        self.reply(status, "text/plain; charset=utf-8", b"")

    def reply_json(self, value: dict) -> None:
        self.reply(200, "application/json", json.dumps(value).encode())  # ASCII, half characters too

    def reply(self, status: int, kind: str, body: bytes, nonce: str = "") -> None:
        """Send an answer that no browser keeps, frames, guesses at or takes scripts from but the page's own."""
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; " if nonce else ""
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            (
                "Content-Security-Policy",
                f"default-src 'none'; {own}base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            ),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),  # the address holds the token
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
