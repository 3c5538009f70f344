"""Tokens, keys and passwords: what no line on the screen and no file of ours may hold."""

import contextlib
import functools
import os
import re
from pathlib import Path

# Where the libraries read a token or a key from; `hf auth login` keeps one more in a file.
VARIABLES = "HF_TOKEN HUGGING_FACE_HUB_TOKEN OPENAI_API_KEY WANDB_API_KEY MLFLOW_TRACKING_TOKEN".split()
# https://user:password@host, and https://host/?api_key=...
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)|(?<=[?&])[^?&=\s]*(?:key|token|secret|signature)=[^&\s#'\"]+", re.I)


def redact(text: str) -> str:
    """The text with *** in place of this user's tokens and keys, and of a password in an address.

    A server may repeat in its error what it was sent, and an address may have been given with a password in it.
    """
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    secrets = [os.environ.get(name, "").strip() for name in VARIABLES]
    secrets.append(_content(Path(os.environ.get("HF_TOKEN_PATH", home / "token")).expanduser()))
    for secret in secrets:
        if len(secret) >= 8:  # shorter ones are stand-ins, such as EMPTY
            text = text.replace(secret, "***")
    return IN_ADDRESS.sub("***", text)


def holds_secret(address: str) -> bool:
    """Whether an address has a password or a key in it."""
    return IN_ADDRESS.search(address) is not None


@functools.cache
def _content(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text("utf-8").strip()
    return ""
