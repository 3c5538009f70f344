"""The Modelfile beside a merged or full model: Ollama then speaks the very chat template that was trained."""

from pathlib import Path

import jinja2

from configs import chat, handover
from configs.settings import say

# What `ollama create` reads from safetensors: LoadModelMetadata in ollama/ollama, convert/convert.go, of early 2026.
READ_BY_OLLAMA = (
    "LlamaForCausalLM MixtralForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Phi3ForCausalLM "
    "Qwen2ForCausalLM Olmo3ForCausalLM CohereForCausalLM"
).split()
# What stands for a message while the template's own text between messages is looked for: no template changes it.
SAID = "said-{}-here"
HEAD = """# Made for this folder; give it to Ollama with: ollama create my-model -f Modelfile
# The template is the one that the model was trained with. Ollama itself puts the tokenizer's BOS before it.
FROM .
PARAMETER stop "{stop}"
TEMPLATE \"\"\"{template}\"\"\"
"""


def write(folder: Path, tokenizer, architecture: str) -> None:
    """Write `folder`/Modelfile, or say why there is none. architecture: the class in the model's config.json.

    Nothing is written, and nothing said, where Ollama does not read the architecture: there it takes a GGUF.
    """
    if architecture not in READ_BY_OLLAMA:
        return
    try:
        handover.write_text(folder / "Modelfile", modelfile(tokenizer, architecture))
    except ValueError as why:
        say(f"no Modelfile for Ollama in {folder.name}: {why}")


def modelfile(tokenizer, architecture: str) -> str:
    """The content of a Modelfile: where the weights are, the token that ends an answer, the chat template in Go.

    Raises: ValueError where Ollama does not read the architecture, or the template cannot be said in Go.
    """
    if architecture not in READ_BY_OLLAMA:
        raise ValueError(
            f"it does not read {architecture} from safetensors; llama.cpp's convert_hf_to_gguf.py may make a GGUF"
        )
    stop = tokenizer.decode([chat.answer_end(tokenizer)])
    return HEAD.format(stop=stop, template=go_template(tokenizer))


def go_template(tokenizer) -> str:
    """The tokenizer's chat template as a Go template over Ollama's .Messages, up to where the answer begins.

    What a template writes between two messages depends, in nearly all, on their two roles alone; so it is read off
    the template's own output, {(role before, role): text}, and checked on longer conversations.
    Source of the variables: docs/template.mdx in ollama/ollama.
    Raises: ValueError where the template writes anything else.
    """
    between = _between(tokenizer)
    for conversation in _conversations():
        if _joined(between, conversation) != _rendered(tokenizer, conversation):
            raise ValueError("what the chat template writes depends on more than the roles of the messages")
    if any("{{" in text or '"""' in text for text in between.values()):
        raise ValueError("the chat template writes what Ollama would read as an instruction")
    lines = ['{{- $last := "" }}{{ range .Messages }}']
    for number, ((before, role), text) in enumerate(item for item in between.items() if item[0][1] != "answer"):
        word = "else if" if number else "if"
        lines.append(f'{{{{ {word} and (eq $last "{before}") (eq .Role "{role}") }}}}{text}')
    lines.append("{{ end }}{{ .Content }}{{ $last = .Role }}{{ end }}" + between["user", "answer"])
    return "".join(lines)


def _between(tokenizer) -> dict[tuple[str, str], str]:
    """{(role before, role): the text before a message}; the role before the first is "", after the last "answer"."""
    between = {}
    for conversation in _conversations()[:3]:
        rest = _rendered(tokenizer, conversation)
        if rest is None:
            continue
        roles = ["", *(message["role"] for message in conversation), "answer"]
        for before, role, message in zip(roles, roles[1:], [*conversation, {"content": None}], strict=False):
            text, found, rest = rest.partition(message["content"]) if message["content"] else (rest, True, "")
            if not found:
                raise ValueError("the chat template changes what is said")
            between[before, role] = text
    if ("", "user") not in between or ("user", "answer") not in between:
        raise ValueError("the chat template has no form for a question alone")
    return between


def _conversations() -> list[list[dict]]:
    """Conversations that hold every pair of roles in the first three, and longer ones."""
    turns = [{"role": role, "content": SAID.format(n)} for n, role in enumerate(["user", "assistant"] * 3)]
    system = [{"role": "system", "content": SAID.format("system")}]
    return [turns[:1], turns[:3], system + turns[:3], turns[:5], system + turns[:1], system + turns[:5]]


def _rendered(tokenizer, conversation: list[dict]) -> str | None:
    """The prompt as the template writes it, without a BOS that the tokenizer adds; None: it has no form for it."""
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError:
        return None
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else text


def _joined(between: dict[tuple[str, str], str], conversation: list[dict]) -> str | None:
    """The prompt made of the texts between messages; None where one is missing."""
    roles = ["", *(message["role"] for message in conversation), "answer"]
    texts = [between.get(pair) for pair in zip(roles, roles[1:], strict=False)]
    said = [message["content"] for message in conversation] + [""]
    return None if None in texts else "".join(text + what for text, what in zip(texts, said, strict=True))
