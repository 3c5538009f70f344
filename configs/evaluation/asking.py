"""The models answer people: the prompt forms, one question of --prompt, and one turn of a conversation."""

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextStreamer

from configs import chat, device
from configs.evaluation.candidates import Candidate
from configs.evaluation.phrases import CHAT
from configs.evaluation.report import as_text, load_words
from configs.evaluation.scoring import OwnDraw, acting_as, answer, continued, load_model
from configs.settings import fail, main_process, say
from configs.text import visible

# --- how a model is asked


def ask(candidate: Candidate, prompt: list[dict], form: str) -> list[int]:
    """Token ids of a prompt in the "chat" or the "plain" form."""
    return (chat.plain_prompt if form == "plain" else chat.chat_prompt)(candidate.tokenizer, prompt)


def usual_form(candidate: Candidate) -> str:
    """The form in which a person's question is put: a base without a template of its own was never shown one."""
    return "plain" if not candidate.taught and chat.is_our_template(candidate.tokenizer) else "chat"


def plain_ids(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a conversation as a base model is asked that has never seen a chat template.

    Each turn is a question and its answer, one below the other; a single question is that of chat.plain_prompt.
    """
    before, pending = "", []
    for message in messages:
        if message["role"] == "assistant":
            before += chat.PLAIN.format(question="\n\n".join(pending)) + f"\n{message['content']}\n\n"
            pending = []
        else:
            pending.append(message["content"])
    text = before + chat.PLAIN.format(question="\n\n".join(pending)) + "\n"
    return tokenizer(text, verbose=False).input_ids


def ends_of(tokenizer) -> list[int]:
    """Ids of the tokens that end an answer."""
    return sorted({tokenizer.eos_token_id, chat.answer_end(tokenizer)})


def answer_prompts(
    settings, candidate: Candidate, model: PreTrainedModel, prompt_ids: list, batch: int | None
) -> list:
    """The model's {answer, stopped} to each prompt. batch: prompts answered at once, None is prompt_budget()."""
    decoding = (settings.MAX_NEW_TOKENS, batch, candidate.label, settings.TEMPERATURE, settings.SEED)
    return answer(model, candidate.tokenizer, prompt_ids, ends_of(candidate.tokenizer), *decoding)


def marker_in(text: str, candidates: list[Candidate]) -> str | None:
    """A marker of some model's template that a text contains, and that would pose as another turn."""
    return next((mark for c in candidates for mark in chat.markers(c.tokenizer) if mark in text), None)


def known_format(data_dir: str) -> str:
    """PROMPT_FORMAT of the data, with which a base is asked that has no template; "auto" where there are no data."""
    try:
        manifest = json.loads((Path(data_dir) / "manifest.json").read_text("utf-8"))
        return manifest["settings"]["PROMPT_FORMAT"]
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"


def loaded(settings, candidates: list[Candidate]) -> Iterator[tuple[Candidate, PreTrainedModel]]:
    """Each candidate that answers, with its model; those with the same weights share one copy in memory."""
    dtype = device.scoring_precision(settings.PRECISION)
    for _, group in groupby(candidates, key=lambda candidate: candidate.weights):
        group = [candidate for candidate in group if not candidate.is_control]
        if group:
            model = load_model(group, dtype, settings.MODEL_REVISION)
            yield from ((candidate, model) for candidate in group)
            del model


# --- one question


def answer_one(settings, candidates: list[Candidate]) -> None:
    """Print every model's answer to PROMPT side by side; no result is written.

    The answers alone go to stdout; the question, and all else that is said, to stderr.
    """
    prompt = [{"role": "user", "content": settings.PROMPT}]
    if mark := marker_in(settings.PROMPT, candidates):
        fail(f"PROMPT contains {mark!r}, which would pose as another turn; leave it out")
    words, grid, answers = load_words(settings.REPORT_LANGUAGE), Table(), []
    say(f"{CHAT[settings.REPORT_LANGUAGE]['question']}: {settings.PROMPT}", to_stderr=True)
    for candidate, model in loaded(settings, candidates):
        ids = ask(candidate, prompt, usual_form(candidate))
        chat.check_lengths(model, [ids], "PROMPT", "a shorter one")
        with acting_as(model, candidate):
            (record,) = answer_prompts(settings, candidate, model, [ids], 1)
        del model  # its memory may be needed for the next one
        grid.add_column(Text(words.get(candidate.label, candidate.label)), ratio=1)
        cut = "" if record["stopped"] else f" [{words['cut_off']}]"
        answers.append(Text(visible(record["answer"]) + cut))
    grid.add_row(*answers)
    if main_process():
        print(as_text(grid), flush=True)


# --- one turn


class Stop(StoppingCriteria):
    """Ends an answer after its next token once `asked` is set, as Ctrl-C does."""

    def __init__(self):
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)


class Pieces(TextStreamer):
    """Hands each piece of text to `heard` as soon as the model has written it."""

    def __init__(self, tokenizer, heard: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.heard = heard

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.heard(text)


class Unanswered(Exception):
    """A model cannot answer this conversation; the message is a key of CHAT, `values` are its fields."""

    def __init__(self, key: str, **values: object):
        super().__init__(key)
        self.key, self.values = key, values


def reply(
    settings,
    candidate: Candidate,
    model: PreTrainedModel,
    messages: list[dict],
    stop: Stop,
    heard: Callable[[str], None],
) -> dict[str, object]:
    """The model's {answer, stopped} to a conversation. heard(piece) is called while it writes.

    Raises: Unanswered where the conversation has no form in its template, is too long for it or for the memory.
    """
    try:
        ids = (plain_ids if usual_form(candidate) == "plain" else chat.chat_prompt)(candidate.tokenizer, messages)
    except ValueError as error:
        raise Unanswered("no_form", why=" ".join(str(error).split())[:200]) from error
    if len(ids) >= (most := chat.positions(model.config)):
        raise Unanswered("too_long", tokens=len(ids), positions=most)
    tokenizer, turn = candidate.tokenizer, sum(message["role"] == "user" for message in messages) - 1
    draws = [OwnDraw([settings.SEED + turn], settings.TEMPERATURE, model.device)] if settings.TEMPERATURE else []
    batch = torch.tensor([ids])
    try:
        with acting_as(model, candidate):
            (record,) = continued(
                model,
                tokenizer,
                batch,
                torch.ones_like(batch),
                ends_of(tokenizer),
                settings.MAX_NEW_TOKENS,
                draws,
                streamer=Pieces(tokenizer, heard),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not should_reduce_batch_size(error):
            raise
        raise Unanswered("no_memory") from None
    return record
