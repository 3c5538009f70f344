"""The loopback Hub serves the real libraries, in real subprocesses, as huggingface.co would."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, finance_rows, tiny_phi

MODEL, GATED, DATASET, PARQUET = "microsoft/phi-2", "org/gated", "gbharti/finance-alpaca", "org/parquet"
ROWS = finance_rows(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi(tmp_path_factory.mktemp("phi"))


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    with Hub() as hub:
        hub.add_model(MODEL, folder)
        hub.add_model(GATED, folder, gated=True)
        hub.add_dataset(DATASET, {"Cleaned_date.json": json.dumps(ROWS).encode()})
        hub.add_dataset(PARQUET, {"data/train-00000-of-00001.parquet": parquet.getvalue()})
        yield hub


def run(code: str, env: dict[str, str], **more: str) -> dict:
    """Run `code` in a new interpreter and return its last line, which is JSON; its failure fails the test."""
    done = subprocess.run([sys.executable, "-c", code], env=env | more, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOAD_MODEL = f"""
import hashlib, json
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.from_pretrained({MODEL!r})
tokenizer = AutoTokenizer.from_pretrained({MODEL!r})
model = AutoModelForCausalLM.from_pretrained({MODEL!r})
digest = lambda tensor: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
print(json.dumps({{
    "type": config.model_type, "class": type(model).__name__, "dtype": str(model.dtype),
    "embedding": digest(model.model.embed_tokens.weight), "bias": digest(model.lm_head.bias),
    "ids": tokenizer("Should I save $500?\\nYes: é")["input_ids"], "eos": tokenizer.eos_token_id,
    "pad": tokenizer.pad_token, "template": tokenizer.chat_template, "tokens": len(tokenizer),
}}))
"""

LOAD_DATASET = """
import json, sys
from datasets import load_dataset
data = load_dataset({name!r}, split="train")
print(json.dumps({{"columns": data.column_names, "rows": data.to_list()}}))
"""


def test_model_loads_by_name_and_again_offline_without_the_server(hub: Hub, folder: Path, tmp_path: Path):
    import hashlib

    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    got = run(LOAD_MODEL, hub.env(tmp_path))
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert got == {
        "type": "phi",
        "class": "PhiForCausalLM",
        "dtype": "torch.float16",
        "embedding": hashlib.sha256(weights["model.embed_tokens.weight"].tobytes()).hexdigest(),
        "bias": hashlib.sha256(weights["lm_head.bias"].tobytes()).hexdigest(),
        "ids": tokenizer.encode("Should I save $500?\nYes: é").ids,
        "eos": tokenizer.token_to_id("<|endoftext|>"),
        "pad": None,
        "template": None,
        "tokens": tokenizer.get_vocab_size(),
    }
    # What makes phi-2 awkward, and so what other tests want this model to have.
    assert weights["lm_head.bias"].dtype == "float16" and (weights["lm_head.bias"] != 0).all()
    assert got["eos"] == got["tokens"] - 1 < len(weights["lm_head.bias"]) - 1
    assert any(r.startswith(f"GET /{MODEL}/resolve/") and r.endswith("/model.safetensors") for r in hub.requests)
    assert hub.strays == []

    env = hub.env(tmp_path)
    hub.close()
    asked = len(hub.requests)
    assert run(LOAD_MODEL, env, HF_HUB_OFFLINE="1") == got
    assert len(hub.requests) == asked


@pytest.mark.parametrize("name", [DATASET, PARQUET])
def test_dataset_loads_by_name_and_again_offline_without_the_server(name: str, hub: Hub, tmp_path: Path):
    code = LOAD_DATASET.format(name=name)
    got = run(code, hub.env(tmp_path))
    assert got == {"columns": ["instruction", "input", "output", "text"], "rows": ROWS}
    # The dataset viewer is the one other host that datasets asks: that must end here and not in the DNS.
    assert hub.strays == [f"GET {hub.url.replace('://', '://datasets-server.')}/info"]

    env = hub.env(tmp_path)
    hub.close()
    assert run(code, env, HF_HUB_OFFLINE="1") == got


def test_a_plain_endpoint_setting_is_enough(hub: Hub, tmp_path: Path):
    # Without the proxies of Hub.env, so the child itself refuses to look up any other host, and names it.
    guard = """
import socket
tried, resolve = [], socket.getaddrinfo
def only_loopback(host, *args, **kwargs):
    if host != "127.0.0.1":
        tried.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "blocked by the test")
    return resolve(host, *args, **kwargs)
socket.getaddrinfo = only_loopback
"""
    env = {"PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    tried = "print(json.dumps(sorted(set(tried))))"
    # The viewer of the data set, and a bucket that counts downloads: Hub.env keeps both from being looked up.
    hosts = ["datasets-server.127.0.0.1", "s3.amazonaws.com"]
    assert run(guard + LOAD_DATASET.format(name=DATASET) + tried, env) == hosts


def test_typed_errors(hub: Hub, tmp_path: Path):
    code = f"""
import json
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api, seen = HfApi(), {{}}
def attempt(name, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
        seen[name] = "no error"
    except Exception as error:
        seen[name] = type(error).__name__
attempt("unknown repo", hf_hub_download, "org/nothing", "config.json")
attempt("unknown repo, info", api.model_info, "org/nothing")
attempt("a model is no data set", api.dataset_info, {MODEL!r})
attempt("unknown revision", hf_hub_download, {MODEL!r}, "config.json", revision="v9")
attempt("unknown revision, info", api.model_info, {MODEL!r}, revision="v9")
attempt("unknown revision, snapshot", snapshot_download, {MODEL!r}, revision="v9")
attempt("unknown file", hf_hub_download, {MODEL!r}, "nothing.json")
attempt("unknown folder", lambda: list(api.list_repo_tree({MODEL!r}, "nothing")))
attempt("gated", hf_hub_download, {GATED!r}, "config.json")
attempt("gated, check", api.auth_check, {GATED!r})
attempt("gated, info", api.model_info, {GATED!r})
attempt("open, check", api.auth_check, {MODEL!r})
attempt("unknown data set", load_dataset, "org/nothing")
attempt("unknown data revision", load_dataset, {DATASET!r}, revision="v9")
attempt("push", api.create_repo, "org/new", token="hf_x")
print(json.dumps(seen))
"""
    assert run(code, hub.env(tmp_path)) == {
        "unknown repo": "RepositoryNotFoundError",
        "unknown repo, info": "RepositoryNotFoundError",
        "a model is no data set": "RepositoryNotFoundError",
        "unknown revision": "RevisionNotFoundError",
        "unknown revision, info": "RevisionNotFoundError",
        "unknown revision, snapshot": "RevisionNotFoundError",
        "unknown file": "RemoteEntryNotFoundError",
        "unknown folder": "RemoteEntryNotFoundError",
        "gated": "GatedRepoError",
        "gated, check": "GatedRepoError",
        # huggingface.co shows the description of a gated model to everybody: info alone proves no access.
        "gated, info": "no error",
        "open, check": "no error",
        "unknown data set": "DatasetNotFoundError",
        "unknown data revision": "DatasetNotFoundError",
        "push": "HfHubHTTPError",
    }


def test_transformers_says_what_is_wrong_with_a_gated_or_unknown_model(hub: Hub, tmp_path: Path):
    code = f"""
import json
from transformers import AutoConfig
seen = {{}}
for name in ({GATED!r}, "org/nothing"):
    try:
        AutoConfig.from_pretrained(name)
    except OSError as error:
        seen[name] = [type(error).__name__, type(error.__cause__).__name__]
print(json.dumps(seen))
"""
    assert run(code, hub.env(tmp_path)) == {
        GATED: ["OSError", "GatedRepoError"],
        "org/nothing": ["OSError", "RepositoryNotFoundError"],
    }


def test_snapshot_revisions_listings_and_remote_reads(hub: Hub, folder: Path, tmp_path: Path):
    old = hub.repos["datasets", DATASET].main
    new = hub.add_dataset(DATASET, {"README.md": b"# new\n", "a/b/c.json": b"[]", "a/d.json": b"[1]"})
    code = f"""
import json
from huggingface_hub import HfApi, HfFileSystem, get_safetensors_metadata, hf_hub_download, snapshot_download
from pathlib import Path
api = HfApi()
root = Path(snapshot_download({MODEL!r}))
data = Path(snapshot_download({DATASET!r}, repo_type="dataset"))
def tree(*path, **more):
    return [entry.path for entry in api.list_repo_tree({DATASET!r}, *path, repo_type="dataset", **more)]
tensors = get_safetensors_metadata({MODEL!r}).files_metadata["model.safetensors"].tensors
with HfFileSystem().open("{MODEL}/model.safetensors", block_size=1024) as file:
    file.seek(-64, 2)
    tail = file.read().hex()
print(json.dumps({{
    "root": str(root), "data": str(data), "files": sorted(p.name for p in root.iterdir()),
    "old": hf_hub_download({DATASET!r}, "Cleaned_date.json", repo_type="dataset", revision={old!r}),
    "top": tree(), "below": tree("a"), "all": tree(recursive=True, expand=True),
    "paths": [e.path for e in api.get_paths_info({DATASET!r}, ["a", "a/d.json", "no"], repo_type="dataset")],
    "branches": [b.name for b in api.list_repo_refs({MODEL!r}).branches],
    "lfs": api.get_paths_info({MODEL!r}, ["model.safetensors"])[0].lfs.size,
    "bias": tensors["lm_head.bias"].shape,
    "tail": tail,
}}))
"""
    got = run(code, hub.env(tmp_path))
    weights = (folder / "model.safetensors").read_bytes()
    assert got["files"] == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        assert (Path(got["root"]) / path.name).read_bytes() == path.read_bytes()
    assert Path(got["data"]).name == new
    assert json.loads(Path(got["old"]).read_text()) == ROWS
    assert got["top"] == ["README.md", "a"]
    assert got["below"] == ["a/b", "a/d.json"]
    assert got["all"] == ["README.md", "a", "a/b", "a/b/c.json", "a/d.json"]
    assert got["paths"] == ["a", "a/d.json"]
    assert got["branches"] == ["main"]
    assert got["lfs"] == len(weights)
    assert got["bias"] == [512]
    assert got["tail"] == weights[-64:].hex()
    assert hub.strays == []


def test_ranges(hub: Hub, folder: Path):
    weights = (folder / "model.safetensors").read_bytes()

    def get(value: str) -> tuple[int, bytes, str]:
        url = f"{hub.url}/{MODEL}/resolve/main/model.safetensors"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, headers={"Range": value})) as answer:
                return answer.status, answer.read(), answer.headers["Content-Range"]
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers["Content-Range"]

    size = len(weights)
    assert get("bytes=0-0") == (206, weights[:1], f"bytes 0-0/{size}")
    assert get("bytes=8-99") == (206, weights[8:100], f"bytes 8-99/{size}")
    assert get(f"bytes={size - 3}-") == (206, weights[-3:], f"bytes {size - 3}-{size - 1}/{size}")
    assert get("bytes=-5") == (206, weights[-5:], f"bytes {size - 5}-{size - 1}/{size}")
    assert get(f"bytes=1-{size * 2}") == (206, weights[1:], f"bytes 1-{size - 1}/{size}")
    assert get(f"bytes={size}-") == (416, b"", f"bytes */{size}")


def test_env_leaves_no_way_out(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    env = hub.env(tmp_path)
    assert env["PATH"] == os.environ["PATH"]
    assert {name for name in env if name.startswith(("HF_", "HUGGING", "TRANSFORMERS"))} == {
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_XET",
        "HF_UPDATE_DOWNLOAD_COUNTS",
    }
    code = """
import json
from huggingface_hub import get_session
seen = []
for url in ("https://huggingface.co/api/models/gpt2", "http://example.org/x"):
    try:
        seen.append(get_session().get(url).status_code)
    except Exception as error:
        seen.append(type(error).__name__)
print(json.dumps(seen))
"""
    assert run(code, env) == ["ProxyError", 403]
    assert hub.strays == ["CONNECT huggingface.co:443", "GET http://example.org/x"]


def test_tied_model(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_phi(tmp_path, tied=True, hidden=32, layers=1, vocab=300)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tuple(model.lm_head.weight.shape) == (300, 32)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"
    with pytest.raises(ValueError, match="multiple of 16"):
        tiny_phi(tmp_path / "bad", hidden=24)


def test_seed_decides_the_weights_and_the_caller_keeps_its_random_state(folder: Path, tmp_path: Path):
    import torch

    before = torch.get_rng_state()
    same, other = tiny_phi(tmp_path / "same"), tiny_phi(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = (folder / "model.safetensors").read_bytes()
    assert (same / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights


def test_finance_rows():
    rows = finance_rows(5000, seed=3)
    assert len({row["instruction"] for row in rows}) == 5000
    assert rows[:10] != finance_rows(5000, seed=4)[:10]
    assert rows == finance_rows(5000, seed=3)
    assert all(list(row) == ["instruction", "input", "output", "text"] for row in rows)
    assert all(row["instruction"] and row["output"] for row in rows)
    assert 0.15 < sum(bool(row["input"]) for row in rows) / 5000 < 0.25
    rendered = [row for row in rows if row["text"]]
    assert 0.45 < len(rendered) / 5000 < 0.55
    assert all(row["text"].endswith(f"### Response:\n{row['output']}") for row in rendered)
    assert all((f"### Input:\n{row['input']}\n" in row["text"]) == bool(row["input"]) for row in rendered)
    with pytest.raises(ValueError, match="different rows"):
        finance_rows(10**7)
