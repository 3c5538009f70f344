"""Conversations as lists of {role, content}, from whatever a row or format_to_chatml holds."""

import re

from configs.preparation.reading import BadRow

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
ENDS = r"<\|im_end\|>|<\|endoftext\|>|</s>|<\|eot_id\|>"
# What a string is taken apart by; a row that holds it itself could pose as another turn.
STRING_MARKS = ("<|im_start|>", "<|im_end|>", "### Instruction:", "### Input:", "### Response:")
STRING_MARKS += ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class BadFunction(Exception):
    """What format_to_chatml returned is of no use; its text says why."""


def normalise_messages(messages: object) -> list[dict]:
    """Messages as {role, content: str}, from OpenAI's {role, content} or ShareGPT's {from, value}.

    A content may be a string or a list of text parts. Raises: BadRow for anything else, or without an answer.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("missing messages")
    result = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("message is not an object")
        role = ROLES.get(str(message.get("role") or message.get("from")).lower())
        content = message.get("content")
        content = message.get("value") if content is None else content
        if isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
            ]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if role is None or message.get("tool_calls"):
            raise BadRow("role or tool call that cannot be used")
        if not isinstance(content, str):
            raise BadRow("message is not text")
        result.append({"role": role, "content": content})
    while result and result[-1]["role"] != "assistant":  # what follows the last answer has nothing to teach
        result.pop()
    if not result:
        raise BadRow("missing answer")
    return result


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
    messages = normalise_messages(formatted)
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
