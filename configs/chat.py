"""A conversation as text and as token ids: the same in preparation, training and scoring."""

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jinja2
import psutil
from transformers import PretrainedConfig, PreTrainedModel

from configs import models
from configs.settings import ROOT, fail, say
from configs.text import quoted

# what a base model that was never shown a chat template is asked with
PLAIN = "Question: {question}\n\nAnswer:"


# A chat template is a program that somebody else wrote. Real ones have up to 20,000 characters and take milliseconds.
LONGEST_TEMPLATE = 200_000  # characters
RENDERING_SECONDS = 10  # for one conversation
RENDERING_BYTES = 2_000_000_000
NO_THINKING = "{%- set enable_thinking = false %}\n"  # before a template that reads it
THOUGHTS = "</think>"  # where a model's thoughts end

# --- templates


def chat_template_file(prompt_format: str) -> Path:
    """configs/chat_templates/<prompt_format>.jinja, or exit code 2 with the formats that exist."""
    known = {path.stem: path for path in sorted((ROOT / "configs" / "chat_templates").glob("*.jinja"))}
    if prompt_format not in known:  # a name, never a path
        fail(f"PROMPT_FORMAT {quoted(prompt_format)} does not exist; choose auto, {', '.join(known)}")
    return known[prompt_format]


def load_tokenizer(
    name: str, revision: str | None, prompt_format: str, flag: str = "MODEL_NAME", mend: str | None = None
):
    """A tokenizer whose chat template is the model's own ("auto", where it has one) or one of ours; no token is added.

    Its template travels with it: whatever is saved with this tokenizer renders conversations as they were trained.
    flag: the setting that names the model; mend: what a user can do where it is damaged.
    Raises: SystemExit(2) when the model cannot be had, or its tokenizer or template cannot be used.
    """
    tokenizer = models.load_tokenizer(name, revision, flag, mend)
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    own = prompt_format == "auto" and tokenizer.chat_template
    if not own:
        template = chat_template_file("chatml" if prompt_format == "auto" else prompt_format).read_text("utf-8")
        # Llama's tokenizer begins every text with its BOS, phi-2's does not: the template does what the model knows.
        begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [
            tokenizer.bos_token_id
        ]
        tokenizer.chat_template = "{{- bos_token -}}\n" + template if begins_with_bos else template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # only fills rows up; the loss is masked by position, not by token id
    check_template(tokenizer, f"the chat template of model {name!r} ({flag})")
    if own:
        switch_thinking_off(tokenizer)
    return tokenizer


def switch_thinking_off(tokenizer) -> None:
    """Let a template that lets its model think before it answers (Qwen3, SmolLM3, GLM-4.5) not do so.

    Such a template closes an empty block of thoughts before the answer. In the data's answers there are none: they
    would teach the model to think nothing, and the base would spend its answer on thoughts. As a part of the template,
    the switch holds in training, in scoring and wherever the model is served. A template that it does not change, or
    that no longer fits its own answers with it, stays as it is.
    """
    template = tokenizer.chat_template
    if not re.search(r"\benable_thinking\b", template) or template.startswith(NO_THINKING):
        return
    shortest = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    with contextlib.suppress(Exception):  # it may ask for a system message first, or have no form without thoughts
        before = tokenizer.apply_chat_template(shortest[0], tokenize=False, add_generation_prompt=True)
        tokenizer.chat_template = NO_THINKING + template
        if render(tokenizer, *shortest)[0] != before:
            return
    tokenizer.chat_template = template


def is_silent(tokenizer) -> bool:
    """Whether thinking is switched off in this tokenizer's template."""
    return (tokenizer.chat_template or "").startswith(NO_THINKING)


def say_if_silent(tokenizer) -> None:
    if is_silent(tokenizer):
        say("note: this model can think before it answers; its chat template is used with thinking switched off")


def check_template(tokenizer, what: str) -> None:
    """Exit code 2 where a chat template is no template, or takes more than a template may; `what` names it."""
    mend = "give the data a format of ours: --prompt_format chatml, or use another model"
    if len(tokenizer.chat_template) > LONGEST_TEMPLATE:
        size = len(tokenizer.chat_template)
        fail(f"{what} has {size:,} characters, and no real one has more than {LONGEST_TEMPLATE:,}; {mend}")
    try:
        with memory_limit(RENDERING_BYTES):
            render(tokenizer, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}])
    except MemoryError:
        fail(f"{what} takes more than {RENDERING_BYTES / 1e9:.0f} GB for one short conversation; {mend}")
    except (jinja2.TemplateSyntaxError, jinja2.exceptions.SecurityError, RecursionError) as error:
        fail(f"{what} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}); {mend}")
    except Exception:  # it may ask for a system message first: the rows will tell
        return


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let this process take at most `size` bytes more: beyond, a MemoryError. Without effect on macOS and Windows."""
    try:
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        most = psutil.Process().memory_info().vms + size
        resource.setrlimit(resource.RLIMIT_AS, (most if before[0] < 0 else min(most, before[0]), before[1]))
    except (ImportError, ValueError, OSError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the program with exit code 2 where a chat template takes longer.

    A signal interrupts it, which Windows does not have, and which reaches the main thread only.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        fail(
            f"the chat template takes more than {seconds:g} s for one conversation, so it may never end; use another "
            "model, or prepare the data with a format of ours: --prompt_format chatml"
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_our_template(tokenizer) -> bool:
    """True when the chat template is one of configs/chat_templates, so not one that the model came with."""
    ours = (ROOT / "configs" / "chat_templates").glob("*.jinja")
    return any((tokenizer.chat_template or "").endswith(path.read_text("utf-8")) for path in ours)


def markers(tokenizer) -> list[str]:
    """Strings that would pose as a turn or as the end of one: special tokens and the markers of the chat template."""
    marks = set(tokenizer.all_special_tokens)
    marks |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    template = tokenizer.chat_template or ""
    declared = re.search(r"\{#-? markers: (.*?) -?#\}", template)
    if declared:  # "### Response:" holds a space, so the list is cut before each marker's own beginning
        marks |= {m.strip() for m in re.split(r"\s+(?=###|\[|<)", declared.group(1)) if m.strip()}
    else:
        marks |= set(re.findall(r"<[|｜][^|｜<>]+[|｜]>|\[/?[A-Z_]{3,}\]|<</?SYS>>|<(?:start|end)_of_turn>", template))
    return sorted(marks)


def without_markers(text: str, marks: list[str]) -> str:
    """Text that cannot pose as a turn: behind the first character of each marker stands a space."""
    for mark in marks:
        if len(mark) > 1:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


# --- conversations


def render(tokenizer, prompt: list[dict], completion: list[dict]) -> tuple[str, str]:
    """Text of the prompt up to where the answer begins, and of the answer up to and with the token that ends it.

    Raises: ValueError when the template has no form for the conversation, or does not continue its own generation
    prompt (the answer cannot be told apart).
    """
    try:
        with time_limit(RENDERING_SECONDS):
            before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            conversation = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    except (jinja2.TemplateSyntaxError, jinja2.exceptions.SecurityError, MemoryError, RecursionError):
        raise
    except Exception as error:  # a template is a program, and may raise whatever Python does
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"the chat template has no form for this conversation ({why})") from error
    if not conversation.startswith(before):
        raise ValueError("the chat template renders a prompt differently once its answer is there")
    after = conversation[len(before) :]
    ends = [token for token in tokenizer.all_special_tokens if after.rstrip().endswith(token)]
    # the line break that many templates put behind the end token is the next turn's, not the answer's
    return before, after.rstrip() if ends else after + tokenizer.eos_token


def encode(tokenizer, prompt: list[dict], completion: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with the one token that ends it: the same in training and scoring.

    prompt, completion: lists of {role, content}. The prompt's ids are exactly those that generation will start from.
    """
    before, after = render(tokenizer, prompt, completion)
    context = tokenizer(before, add_special_tokens=False, verbose=False).input_ids
    together = tokenizer(before + after, add_special_tokens=False, verbose=False).input_ids
    if together[: len(context)] == context:
        return context, together[len(context) :]
    # a merge across the boundary: generation could never produce it, so the answer is tokenised by itself
    return context, tokenizer(after, add_special_tokens=False, verbose=False).input_ids


def answer_end(tokenizer) -> int:
    """Id of the token that ends an answer under this tokenizer's template (EOS, or a chat model's end-of-turn)."""
    shortest = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    return encode(tokenizer, *shortest)[1][-1]


def chat_prompt(tokenizer, prompt: list[dict]) -> list[int]:
    """Token ids of a prompt in the chat template, up to where the answer begins."""
    return encode(tokenizer, prompt, [{"role": "assistant", "content": "a"}])[0]


def plain_prompt(tokenizer, prompt: list[dict]) -> list[int]:
    """Token ids of a prompt as a base model is asked that has never seen a chat template."""
    question = "\n\n".join(message["content"] for message in prompt)
    return tokenizer(PLAIN.format(question=question) + "\n", verbose=False).input_ids


# --- lengths


class Ruler:
    """Tells which rows are longer than max_length tokens, without tokenising those that cannot be.

    A token is at least one byte, so a row of fewer bytes, its template's included, is short enough. What the template
    adds depends on the roles alone, but for answers with thoughts in them. A tokenizer's longest token says from how
    many characters on a row is too long whatever it holds: 50 MB would take minutes.
    """

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)
        self.added: dict[tuple, int] = {}  # roles of a prompt -> bytes that the template adds

    def too_long(self, prompt: list[dict], completion: list[dict]) -> int | None:
        """None where the row fits, else its tokens, or 0 where it is too long to count them.

        Raises: ValueError where the chat template has no form for such a conversation (Gemma's: no system turn; one
        whose thinking is switched off: no answer with thoughts).
        """
        roles = tuple(message["role"] for message in prompt)
        if roles not in self.added:
            bare = [{"role": role, "content": "x"} for role in roles], [{**completion[0], "content": "x"}]
            self.added[roles] = len("".join(render(self.tokenizer, *bare)).encode()) - len(roles) - 1
        texts = [message["content"] for message in (*prompt, *completion)]
        short = self.added[roles] + sum(len(text.encode()) for text in texts) <= self.max_length
        if short and THOUGHTS not in texts[-1]:
            return None
        if sum(map(len, texts)) > max(self.max_length, 2048) * self.longest:
            return 0
        tokens = sum(map(len, encode(self.tokenizer, prompt, completion)))
        return tokens if tokens > self.max_length else None


def positions(config: PretrainedConfig) -> int:
    """How many tokens a model can see at once, as its configuration says; 10**9 where it says nothing."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9


def check_lengths(model: PreTrainedModel, prompts: list[list[int]], where: str, mend: str) -> None:
    """Refuse prompts that leave no position for an answer."""
    most, longest = positions(model.config), max(map(len, prompts))
    if longest >= most:
        fail(f"{where} holds a prompt of {longest} tokens, and the model has {most} positions; mend it: {mend}")
