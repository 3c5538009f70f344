"""A Hugging Face Hub on the loopback interface, and small things to serve from it.

The libraries are not patched: a subprocess finds this server through HF_ENDPOINT and speaks to it as it
would to huggingface.co, so what a user meets (typed errors, the cache, revisions) is met here as well.
Reading is offered to everybody, and writing to the users of Hub.users, into their own name; every other attempt to
write is answered with 403. Hub.faults makes it misbehave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

# These the Hub keeps in LFS: their ETag is a sha256 and travels in X-Linked-Etag, not a git blob id.
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".gz", ".zip")
DATE = "2024-01-01T00:00:00.000Z"

RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+(?:/[^/]+)??)"
    r"(?:/(?P<call>revision|tree|paths-info|refs|auth-check)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)


class _File:
    """A file of one commit: its bytes, git blob id, and sha256 if the Hub would keep it in LFS."""

    def __init__(self, path: str, data: bytes):
        self.data = data
        self.oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.sha256 = hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else None


@dataclass
class _Repo:
    kind: str  # "models" or "datasets", as in the API's addresses
    name: str
    gated: bool
    main: str = ""
    refs: dict[str, str] = field(default_factory=dict)  # other branches, e.g. refs/convert/parquet
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with the requests whose "METHOD /path" matches `where` (re.search), at most `times` of them.

    kind: "refuse" (the connection is reset), "stall" (no answer), "stall body" (headers only), "drip" and
    "drip headers" (a byte every tenth of a second), "cut" (half of the body), "short" and "long" (a body of another
    size, with a Content-Length that fits), "flip" (a body of the right size with one other bit), "loop" (a redirect to
    itself), "elsewhere" (a redirect to `to`, an address without a path), "page" (a web page of somebody else),
    "nonsense" (half of a JSON text), "echo" (a 500 that repeats all it was sent), or "status" with `status` and
    `headers`.
    """

    kind: str
    where: str = ""
    times: int = 10**9
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    to: str = ""


class _Refusal(Exception):
    """An answer other than 200; `code` is what huggingface_hub turns into a typed error."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code
        # With the commit, the client's cache remembers that the file does not exist.
        if commit:
            self.headers["X-Repo-Commit"] = commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes: with Nagle's algorithm every answer would wait for a delayed ACK.
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: what was asked is in Hub.requests."""

    def _handle(self) -> None:
        # Read even what is refused: the next request on this connection must not start inside this body.
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
        target, _, query = self.path.partition("?")
        self.server.hub.requests.append(f"{self.command} {target}")
        if "Authorization" in self.headers:
            self.server.hub.tokens.append((f"{self.command} {target}", self.headers["Authorization"]))
        try:
            status, content, headers = self._answer(target, parse_qs(query), body)
        except _Refusal as refusal:
            content = json.dumps({"error": str(refusal)}).encode()
            status, headers = refusal.status, {"Content-Type": "application/json"} | refusal.headers
        fault = self.server.hub.take_fault(f"{self.command} {target}")
        if fault:
            status, content, headers = self._changed(fault, status, content, headers)
        kind = fault.kind if fault else ""
        if kind in ("refuse", "stall"):
            self.server.hub.closing.wait(0 if kind == "refuse" else 300)
            self.close_connection = True
            # with no time to linger, closing resets the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        if kind == "drip headers":
            head, self._headers_buffer = b"".join(self._headers_buffer), []
            self._drip(head + b"\r\n")
        else:
            self.end_headers()
        if self.command == "HEAD":
            return None
        if kind == "stall body":
            self.server.hub.closing.wait(300)
        elif kind == "drip":
            return self._drip(content)
        elif kind == "cut":
            content = content[: len(content) // 2]
        self.close_connection |= kind in ("stall body", "cut")
        return self.wfile.write(content)

    def _drip(self, content: bytes) -> None:
        for byte in content:
            if self.server.hub.closing.wait(0.1):
                break
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def _changed(self, fault: Fault, status: int, content: bytes, headers: dict) -> tuple[int, bytes, dict[str, str]]:
        """The answer with what the fault changes in its status, body and headers."""
        if fault.kind == "status":
            return fault.status, json.dumps({"error": "a fault"}).encode(), fault.headers
        if fault.kind == "nonsense":
            return 200, b'{"half": ', {"Content-Type": "application/json"}
        if fault.kind == "page":
            return 200, b"<html>Please log in to this network.</html>", {"Content-Type": "text/html"}
        if fault.kind == "echo":
            sent = "".join(f"{key}: {value} " for key, value in self.headers.items())
            return 500, json.dumps({"error": sent}).encode(), {"X-Error-Message": sent}
        if fault.kind in ("loop", "elsewhere"):
            # as the Hub does it for large files: what the file is stands in the redirect
            kept = {key: value for key, value in headers.items() if key.startswith("X-") or key == "ETag"}
            return 302, b"", kept | {"Location": fault.to + self.path}
        if self.command == "HEAD" or status != 200:
            return status, content, headers
        if fault.kind == "short":
            content = content[:-3]
        elif fault.kind == "long":
            content += b"123"
        elif fault.kind == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        return status, content, headers

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_CONNECT = _handle

    def _answer(self, target: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if not target.startswith("/"):
            # Sent to us as to a proxy, hence meant for another host.
            raise _Refusal(403, f"{target} is not on the loopback hub")
        if target == "/api/whoami-v2":
            return 200, json.dumps(self._user()).encode(), {"Content-Type": "application/json"}
        if target in ("/api/models", "/api/datasets"):
            search, author = query.get("search", [""])[0], query.get("author", [""])[0]
            names = [name for kind, name in self.server.hub.repos if target.endswith(kind)]
            found = [name for name in names if search in name and name.startswith(f"{author}/" if author else "")]
            return 200, json.dumps([{"id": name} for name in found]).encode(), {"Content-Type": "application/json"}
        api = API.fullmatch(target)
        reads = self.command in ("GET", "HEAD") or (self.command == "POST" and api and api["call"] == "paths-info")
        if not reads:
            return 200, json.dumps(self._write(target, body)).encode(), {"Content-Type": "application/json"}
        if api:
            answer = self._api(api, query, parse_qs(body.decode()))
            return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        if resolve := RESOLVE.fullmatch(target):
            return self._file(resolve)
        raise _Refusal(404, "Not Found")

    def _user(self) -> dict:
        """Who asks, by the token; 401 for a token of nobody."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.server.hub.users:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": self.server.hub.users[token], "orgs": [{"name": "the-org"}], "auth": {}}

    def _write(self, target: str, body: bytes) -> object:
        """A repository made, or files of it received: whole in a commit, or apart from it as the Hub's LFS does."""
        hub = self.server.hub
        if target.startswith("/lfs/") and self.command == "PUT":  # the address itself is the permission
            hub.large[target.removeprefix("/lfs/")] = body
            return {}
        if not hub.users:
            raise _Refusal(403, "the loopback hub is read-only")
        user = self._user()
        if target == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if target == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or user['name']}/{asked['name']}"
            if ("models", name) in hub.repos:
                raise _Refusal(409, "You already created this model repo")
            hub.repos["models", name] = _Repo("models", name, False)
            hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub._add("models", name, {".gitattributes": b"*.safetensors filter=lfs\n"}, False)
            return {"url": f"{hub.url}/{name}", "id": "1", "name": name}
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/(preupload|commit|info)/(.+)", target)
        if not found or found[1].partition("/")[0] not in (user["name"], "the-org"):
            raise _Refusal(403, "You don't have the rights to do this")
        name, call = found[1], found[2]
        repo, commit = self._find("models", name, "main")
        if call == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
            return {"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": None} for p in paths]}
        if call == "info":
            wanted = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(body)["objects"]]
            return {"objects": [w | {"actions": {"upload": {"href": f"{hub.url}/lfs/{w['oid']}"}}} for w in wanted]}
        files = {path: file.data for path, file in repo.commits[commit].items()}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        commit = hub._add("models", name, files, False)
        return {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""}

    def _find(self, kind: str, name: str, revision: str | None) -> tuple[_Repo, str]:
        """The repository and the commit id that a request means."""
        repo = self.server.hub.repos.get((kind, unquote(name)))
        if repo is None:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        revision = unquote(revision or "main")
        commit = repo.main if revision in ("main", "refs/heads/main") else repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def _api(self, match: re.Match, query: dict[str, list[str]], form: dict[str, list[str]]) -> object:
        repo, commit = self._find(match["kind"], match["name"], match["revision"])
        files = repo.commits[commit]
        call, path = match["call"], unquote(match["path"] or "")
        # A gated repository shows its description and its list of files to everybody, as on huggingface.co.
        if call in (None, "revision"):
            return {
                "_id": commit[:24],
                "id": repo.name,
                "modelId" if repo.kind == "models" else "datasetId": repo.name,
                "author": repo.name.partition("/")[0],
                "sha": commit,
                "lastModified": DATE,
                "createdAt": DATE,
                "private": self.server.hub.private.get(repo.name, False),
                "gated": "manual" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [
                    {"rfilename": path, "size": len(file.data), "blobId": file.oid} for path, file in files.items()
                ],
            }
        if call == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.main}
            return {"branches": [branch], "tags": [], "converts": [], "pullRequests": []}
        if call == "auth-check":
            if repo.gated:
                raise _gated(repo)
            return {}
        entries = _tree(files)
        if call == "paths-info":
            expand = form.get("expand") == ["true"]
            return [_expanded(entries[name], commit, expand) for name in form.get("paths", []) if name in entries]
        # What is left is "tree": the entries below a folder, or all of them for an empty path.
        prefix = path.rstrip("/") + "/" if path else ""
        if prefix and not any(name.startswith(prefix) for name in files):
            raise _Refusal(404, f"{path} does not exist on {commit}", "EntryNotFound", commit)
        deep = query.get("recursive") == ["true"]
        expand = query.get("expand") == ["true"]
        below = [n for n in entries if n.startswith(prefix) and (deep or "/" not in n[len(prefix) :])]
        return [_expanded(entries[name], commit, expand) for name in below]

    def _file(self, match: re.Match) -> tuple[int, bytes, dict[str, str]]:
        kind = "datasets" if match["kind"] else "models"
        repo, commit = self._find(kind, match["name"], match["revision"])
        if repo.gated:
            raise _gated(repo)
        path = unquote(match["path"])
        file = repo.commits[commit].get(path)
        if file is None:
            raise _Refusal(404, f"{path} does not exist on {commit}", "EntryNotFound", commit)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{file.sha256 or file.oid}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if file.sha256:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted or wanted.groups() == ("", ""):
            return 200, file.data, headers
        size = len(file.data)
        if wanted[1]:
            start, stop = int(wanted[1]), min(int(wanted[2] or size), size - 1) + 1
        else:  # "bytes=-n": the last n bytes
            start, stop = max(size - int(wanted[2]), 0), size
        if start >= stop:
            # huggingface_hub reads the size here, to see that a file was already complete.
            return 416, b"", headers | {"Content-Range": f"bytes */{size}"}
        return 206, file.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}


def _gated(repo: _Repo) -> _Refusal:
    return _Refusal(403, f"Access to {repo.name} is restricted and you are not in the authorized list.", "GatedRepo")


def _tree(files: dict[str, _File]) -> dict[str, dict]:
    """Path -> the Hub's description of it, for every file and for every folder on the way to one."""
    entries: dict[str, dict] = {}
    for path, file in files.items():
        for parent in reversed(Path(path).parents[:-1]):
            name = parent.as_posix()
            entries[name] = {
                "type": "directory",
                "oid": hashlib.sha1(name.encode()).hexdigest(),
                "size": 0,
                "path": name,
            }
        entries[path] = {"type": "file", "oid": file.oid, "size": len(file.data), "path": path}
        if file.sha256:
            entries[path]["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
    return dict(sorted(entries.items()))


def _expanded(entry: dict, commit: str, expand: bool) -> dict:
    return entry | {"lastCommit": {"id": commit, "title": "add files", "date": DATE}} if expand else entry


class _Server(ThreadingHTTPServer):
    # A client that is killed in the middle of an answer must not keep the test run alive.
    daemon_threads = True
    # snapshot_download opens many connections at once; the default backlog of 5 would reset some.
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet when a client went away (tests kill subprocesses); show anything else."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """A Hub at `url`, from construction until close(); a context manager.

    `requests` lists what was asked, oldest first, as "METHOD /path" without the query. A request that was meant for
    another host and that the proxy settings of env() brought here stands there as
    "METHOD http://host/path" or "CONNECT host:443"; see strays. `tokens` lists (the same, the Authorization header)
    of those that had one. `faults`: what goes wrong, see Fault; the first that matches counts. `users`: {token: name}
    of those who may write; `private`: {name of a repository that was made: whether it is private}.
    """

    url: str
    requests: list[str]

    def __init__(self) -> None:
        self.requests = []
        self.tokens: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.users: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.closing = threading.Event()
        self.repos: dict[tuple[str, str], _Repo] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # The short poll is what close() waits for.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def strays(self) -> list[str]:
        """The entries of `requests` that were meant for a host other than this Hub."""
        return [line for line in self.requests if not line.split(" ", 1)[1].startswith("/")]

    def take_fault(self, request: str) -> Fault | None:
        """The fault that a request "METHOD /path" meets, which is then one time less to come."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, request):
                fault.times -= 1
                return fault
        return None

    def add_model(self, name: str, folder: Path, gated: bool = False) -> str:
        """Serve the files of `folder`, read now into memory, as the model `name`; return the commit id.

        Hidden files and folders are left out. A name that is already served gets a new commit on main, and its older
        commits stay reachable by their ids. Raises ValueError when the folder holds no file.
        """
        folder = Path(folder)
        paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
        return self._add("models", name, {path.as_posix(): (folder / path).read_bytes() for path in visible}, gated)

    def add_dataset(self, name: str, files: dict[str, bytes], gated: bool = False, branch: str = "main") -> str:
        """Serve `files` (path inside the repository -> content) as the data set `name`; return the commit id.

        A second call with the same name is a new commit, as in add_model. branch: where the commit goes, e.g.
        refs/convert/parquet. Raises ValueError for no files.
        """
        return self._add("datasets", name, files, gated, branch)

    def _add(self, kind: str, name: str, files: dict[str, bytes], gated: bool, branch: str = "main") -> str:
        if not files:
            raise ValueError(f"{name}: nothing to serve")
        commit_files = {path: _File(path, data) for path, data in sorted(files.items())}
        # An id made from the content only: the same files give the same revision in every run of the tests.
        listing = "".join(f"{path} {file.oid}\n" for path, file in commit_files.items())
        commit = hashlib.sha1(f"{kind} {name}\n{listing}".encode()).hexdigest()
        repo = self.repos.setdefault((kind, name), _Repo(kind, name, gated))
        repo.commits[commit] = commit_files
        repo.gated = gated
        if branch == "main":
            repo.main = commit
        else:
            repo.refs[branch] = commit
        return commit

    def env(self, home: Path) -> dict[str, str]:
        """The environment for a subprocess that is to see this Hub, and no other host.

        It is os.environ without any HF_*, HUGGING* or TRANSFORMERS_* setting (tokens, caches, offline modes), with
        HF_HOME=`home`. Proxies point at this server: datasets asks the host "datasets-server.127.0.0.1" (made from
        HF_ENDPOINT), which would be looked up in the DNS; now the request comes here, is refused, and is seen in
        `strays`. So is every other attempt, over http or https, to reach a host by name.
        """
        dropped = re.compile(r"(HF_|HUGGING|TRANSFORMERS_|(HTTPS?|ALL|NO)_PROXY$)", re.IGNORECASE)
        env = {key: value for key, value in os.environ.items() if not dropped.match(key)}
        for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            env[proxy] = env[proxy.lower()] = self.url
        env["NO_PROXY"] = env["no_proxy"] = "127.0.0.1,localhost"
        return env | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }

    def close(self) -> None:
        """Stop serving; a later connection is refused. A second call does nothing."""
        self.closing.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


def tiny_phi(
    folder: Path, *, tied: bool = False, hidden: int = 64, layers: int = 2, vocab: int = 512, seed: int = 0
) -> Path:
    """Save a tiny causal LM with random weights, and its tokenizer, into `folder`; return the folder.

    As phi-2 has it: PhiForCausalLM, float16 safetensors, a head with a (non-zero) bias, 2048 positions, more rows in
    the embedding ([vocab, hidden]) than the tokenizer has tokens, a byte-level BPE whose last token <|endoftext|> is
    bos, eos and unk at once, no pad token, no chat template. With tied=True the model is a LlamaForCausalLM whose head
    is the embedding (tie_word_embeddings) and has no bias; the tokenizer stays. `hidden` must be a multiple of 16
    (four heads, of which phi rotates half) and `vocab` at least 280, else ValueError. The caller's random state is
    left as it was.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import CodeGenTokenizer, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

    if hidden % 16 or vocab < 280:
        raise ValueError(f"hidden must be a multiple of 16 and vocab at least 280, not {hidden} and {vocab}")
    texts = [row[column] for row in finance_rows(64, seed=1) for column in ("instruction", "input", "output")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab - 17, show_progress=False)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = CodeGenTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=2048)

    shared = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if tied:
            model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=True))
        else:
            model = PhiForCausalLM(PhiConfig(**shared))
            # Fresh models have a zero bias, and code that loses the bias would pass every test.
            torch.nn.init.normal_(model.lm_head.bias, std=0.5)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


_PRODUCTS = {
    "a savings account": "money that you may need soon",
    "a money market fund": "cash that should earn a little more",
    "a government bond": "income that is nearly certain",
    "a corporate bond": "income with some credit risk",
    "an index fund": "growth over many years",
    "a dividend stock": "growth with regular payments",
    "a certificate of deposit": "money with a known date of use",
    "a pension plan": "income after you stop working",
    "a real estate trust": "rents without owning a house",
    "a balanced fund": "a mix of growth and income",
}

# Every question names product, amount and years, so different numbers can never give the same instruction.
_QUESTIONS = (
    (
        "Should I put ${amount} into {product} for {years} years?",
        "It can fit. {Product} is meant for {purpose}. Keep a reserve first, and put in ${amount} only if you "
        "can leave it for {years} years.",
    ),
    (
        "How much would ${amount} in {product} be worth after {years} years at {rate}% simple interest?",
        "Simple interest adds {rate}% of ${amount} each year. After {years} years that is ${interest:.2f} of "
        "interest, so {product} would hold ${total:.2f}.",
    ),
    (
        "What is the main risk of holding ${amount} in {product} over {years} years?",
        "Inflation and changing prices. {Product} suits {purpose}, yet ${amount} may buy less after {years} years.",
    ),
    (
        "I want to save ${amount} in {years} years using {product}. How much is that per month?",
        "Divide the goal by the months: ${amount} over {months} months is about ${monthly:.2f} a month, before "
        "any return that {product} may add.",
    ),
    (
        "Explain to a beginner why someone holds ${amount} of {product} for {years} years.",
        "Because {product} is meant for {purpose}. With ${amount} and {years} years, time matters more than timing.",
    ),
    (
        "Is ${amount} too much to keep in {product} if I retire in {years} years?",
        "That depends on your other assets. {Product} is for {purpose}; with {years} years left, many people "
        "keep no more than a third of their wealth in one place, so ${amount} is fine if you own three times as "
        "much.",
    ),
)
_INPUTS = ("I am risk averse.", "My income is $4,000 a month.", "I have no debts.", "I pay tax at 25%.")
_ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request."
)


def finance_rows(n: int, seed: int = 0) -> list[dict]:
    """`n` made-up rows with finance-alpaca's columns: instruction, input, output, text (all strings).

    No instruction occurs twice. About one row in five has an input, and about half have a `text`: the row in the
    classic Alpaca rendering (the others have ""). The same n and seed give the same rows. Raises ValueError for more
    rows than there are combinations.
    """
    rng = random.Random(seed)
    products, amounts, years = list(_PRODUCTS), range(500, 50_500, 500), range(2, 32)
    combinations = len(_QUESTIONS) * len(products) * len(amounts) * len(years)
    if n > combinations:
        raise ValueError(f"only {combinations} different rows can be made, not {n}")
    rows = []
    for code in rng.sample(range(combinations), n):
        code, question = divmod(code, len(_QUESTIONS))
        code, product = divmod(code, len(products))
        year, amount = divmod(code, len(amounts))
        name, rate = products[product], rng.randint(1, 8)
        interest = amounts[amount] * rate / 100 * years[year]
        values = {
            "product": name,
            "Product": name[0].upper() + name[1:],
            "purpose": _PRODUCTS[name],
            "amount": amounts[amount],
            "years": years[year],
            "rate": rate,
            "interest": interest,
            "total": amounts[amount] + interest,
            "months": 12 * years[year],
            "monthly": amounts[amount] / (12 * years[year]),
        }
        instruction, output = (text.format(**values) for text in _QUESTIONS[question])
        context = rng.choice(_INPUTS) if rng.random() < 0.2 else ""
        text = ""
        if rng.random() < 0.5:
            head = _ALPACA.format(with_input=", paired with an input that provides further context" if context else "")
            given = f"### Input:\n{context}\n\n" if context else ""
            text = f"{head}\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n{output}"
        rows.append({"instruction": instruction, "input": context, "output": output, "text": text})
    return rows
