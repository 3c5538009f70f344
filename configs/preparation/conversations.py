"""Conversations as lists of {role, content}, from whatever a row or format_to_chatml holds."""

import re

from configs import chat
from configs.preparation.reading import BadRow

# what the formats of OpenAI, ShareGPT, FastChat, Gemini, LLaMA-Factory and Chinese data sets call the speakers
ROLES = {role: role for role in ("system", "user", "assistant")} | {"developer": "system", "系统": "system"}
ROLES |= dict.fromkeys(("human", "用户"), "user")
ROLES |= dict.fromkeys(("gpt", "model", "chatgpt", "bing", "bard", "bot", "ai", "助手"), "assistant")
# types of a part of a content that are text: Hugging Face, OpenAI's Chat and Responses; Gemini and Bedrock name none
TEXT_TYPES = (None, "text", "input_text", "output_text")
# what a turn of both speakers is called where one object holds both: XTuner, MOSS, Firefly
PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("query", "response"))
ENDS = r"<\|im_end\|>|<\|endoftext\|>|</s>|<\|eot_id\|>"
# What a string is taken apart by; a row that holds it itself could pose as another turn.
STRING_MARKS = ("<|im_start|>", "<|im_end|>", "### Instruction:", "### Input:", "### Response:")
STRING_MARKS += ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class BadFunction(Exception):
    """What format_to_chatml returned is of no use; its text says why."""


def normalise_messages(messages: object) -> list[dict]:
    """Messages as {role, content: str}, whatever large trainer's format they are in.

    Known are OpenAI's {role, content}, ShareGPT's {from, value}, Gemini's {role, parts}, and objects that hold a
    question and its answer (PAIRS). A content may be a string or a list of text parts. An answer that OpenAI's
    `weight: 0` keeps from being trained has `weight` 0 here, too.
    Raises: BadRow for anything else, or without an answer.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("missing messages")
    result = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("message is not an object")
        if pair := next((keys for keys in PAIRS if set(keys) <= set(message) and "role" not in message), None):
            turns = [("system", message.get("system")), ("user", message[pair[0]]), ("assistant", message[pair[1]])]
            turns = [{"role": role, "content": text} for role, text in turns if text or role != "system"]
        else:
            turns = [message]
        result += map(normalise_message, turns)
    while result and result[-1]["role"] != "assistant":  # what follows the last answer has nothing to teach
        result.pop()
    if not result:
        raise BadRow("missing answer")
    return result


def normalise_message(message: dict) -> dict:
    """One message as {role, content: str}. Raises: BadRow where it is no text of a known speaker."""
    role = ROLES.get(str(message.get("role") or message.get("from")).lower())
    content = next((message[key] for key in ("content", "value", "parts") if message.get(key) is not None), None)
    if role is None or message.get("tool_calls"):
        raise BadRow("role or tool call that cannot be used")
    content = text_of_parts(content)
    if content is None:
        raise BadRow("message is not text")
    return {"role": role, "content": content} | ({"weight": 0} if message.get("weight") == 0 else {})


def text_of_parts(content: object) -> str | None:
    """A content as a string: itself, or the text of its parts, one after the other; None where a part is no text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in TEXT_TYPES:
            part = next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)
        texts.append(part)
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def pairs_of(history: list) -> list[dict]:
    """The messages of a `history`, as ms-swift and LLaMA-Factory write it: a list of [question, answer].

    Raises: BadRow for another list.
    """
    messages = []
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("history is not a list of questions and answers")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def as_conversation(example: dict, turns: list, only_read: int) -> dict:
    """The row with its `messages`, and how many of them there are in front of the first that may be trained."""
    messages = normalise_messages(turns)
    example["removed"] = ROLES.get(str(turns[-1].get("role") or turns[-1].get("from")).lower()) in ("user", "system")
    if not isinstance(example["system"], str | None):
        raise BadRow("system is not a string")
    if (example["system"] or "").strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": example["system"]})
        only_read += 1
    return {**example, "messages": messages, "only_read": only_read}


def ends_of(messages: list[dict], first: int, turns: str) -> list[int]:
    """Where the conversations to learn from end: behind the last answer ("last"), or behind each one ("all").

    first: the messages in front of this one are only read, as those are whose weight is 0. An answer without a
    question in front of it is only read, too, where there is another to learn from.
    Raises: BadRow where there is none.
    """
    answers = [
        n + 1
        for n, message in enumerate(messages)
        if message["role"] == "assistant" and n >= first and message.get("weight") != 0
    ]
    if not answers:
        raise BadRow("missing answer")
    asked = [end for end in answers if end > 1 and messages[end - 2]["role"] == "user"]
    return asked if turns == "all" and asked else answers[-1:]


def to_conversation(example: dict, formatted: object) -> tuple[list[dict], list[dict]]:
    """(prompt, completion) as messages from whatever format_to_chatml returned. Raises BadRow for an unusable row.

    Raises BadFunction for a string that does not end with the answer: that is a mistake in the function.
    """
    if isinstance(formatted, str):
        return split_text(formatted, example.get("output"))
    if isinstance(formatted, dict) and "messages" in formatted:
        formatted = formatted["messages"]
    if isinstance(formatted, dict) and {"prompt", "completion"} <= set(formatted):
        prompt, completion = formatted["prompt"], formatted["completion"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        formatted = normalise_messages(list(prompt) + list(completion))
    if not isinstance(formatted, list):
        raise BadFunction(
            f"format_to_chatml returned {type(formatted).__name__}; it must return messages, prompt and completion, "
            "or one string that ends with the answer"
        )
    messages = [{"role": m["role"], "content": m["content"]} for m in normalise_messages(formatted)]
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise BadRow("no question in front of an answer")
    return messages[:-1], messages[-1:]


def split_text(text: str, answer: object) -> tuple[list[dict], list[dict]]:
    """Split one rendered string in front of its answer; the turns of the common templates become messages again."""
    answer = answer.strip() if isinstance(answer, str) else ""  # functions like to strip, too
    at = text.rfind(answer) if answer else -1
    # "s" is also in "</s>": the answer is the last one that has nothing but end tokens behind it
    while at >= 0 and re.sub(ENDS, "", text[at + len(answer) :]).strip():
        at = text.rfind(answer, 0, at + len(answer) - 1)
    if at < 0:
        raise BadFunction(
            f"format_to_chatml returned a string that does not end with the row's answer {str(answer)[:60]!r}, so the "
            "loss could not be kept on the answer; end it with the `output` column, or return messages"
        )
    before, turns = text[:at], []
    if "<|im_start|>" in before:
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", before, re.DOTALL)
    elif "### Instruction:" in before:
        body = re.split(r"### (?:Instruction|Input|Response):\n?", before)
        preamble, *parts = [part.strip() for part in body]
        turns = ([("system", preamble)] if preamble else []) + [("user", "\n\n".join(p for p in parts if p))]
    elif "[INST]" in before:
        inner = re.sub(r"^<s>|\[/?INST\]", "", before.strip())
        system, _, user = inner.rpartition("<</SYS>>")
        turns = [("system", system.replace("<<SYS>>", "").strip())] if system.strip() else []
        turns.append(("user", user.strip()))
    else:
        turns = [("user", before.strip())]
    prompt = [{"role": role, "content": content} for role, content in turns if role != "assistant" or content]
    return prompt, [{"role": "assistant", "content": answer}]


def check_conversation(prompt: list[dict], completion: list[dict], marks: list[str]) -> None:
    """Raise BadRow when a conversation has an empty side, repeats itself, or holds text that could pose as a turn."""
    answer, text = completion[0]["content"], "\n".join(m["content"] for m in prompt)
    if not answer.strip():
        raise BadRow("empty answer")
    if not text.strip() or not prompt[-1]["content"].strip():
        raise BadRow("empty prompt")
    if prompt[-1]["content"].strip() == answer.strip():
        raise BadRow("prompt equal to answer")
    for content in (text, answer):
        if "\0" in content:
            raise BadRow("NUL character")
        if any(mark in content for mark in marks):
            raise BadRow("template marker or special token in the text")
        try:
            content.encode()
        except UnicodeEncodeError:  # JSON may hold half of a pair, "\\ud83d"; no file can
            raise BadRow("half a surrogate pair") from None


def no_form(tokenizer, completion: list[dict]) -> str:
    """Why a row is left out for which the chat template has no form."""
    if chat.is_silent(tokenizer) and chat.THOUGHTS in completion[0]["content"]:
        return "answer with thoughts, which the chat template switches off (--prompt_format chatml keeps them)"
    return "conversation that the chat template cannot render"
