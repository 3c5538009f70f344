"""A GGUF, as llama.cpp serves it, in step 4's comparison: what quantising for deployment costs, on the same rows.

llama.cpp computes; transformers and step 4 see a model like any other. It is asked in the very token ids in which the
other models are asked, so their losses compare; whether its own tokenizer makes the same ids is checked beside it.
"""

import contextlib
import copy
import ctypes
import importlib.util
import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from configs import chat
from configs.settings import fail, say

SUFFIX = ".gguf"
PACKAGE = "llama-cpp-python"
TOKENS = 512  # read by llama.cpp at once; each gives as many logits as there are tokens in the vocabulary
ROWS = 64  # sequences that it holds at once; its own limit is 256
GROWTH = 256  # tokens by which an answer may grow before llama.cpp needs more room, and reads all of it anew


def is_gguf(folder: str | Path) -> bool:
    return Path(folder).suffix.lower() == SUFFIX and Path(folder).is_file()


def fault(path: Path) -> str:
    """Why a file cannot be measured, as the end of a sentence about it; "" where it can."""
    if importlib.util.find_spec("llama_cpp") is None:
        return f"is a GGUF, which needs {PACKAGE} (a C++ compiler builds it on your machine): pip install {PACKAGE}"
    try:
        import llama_cpp  # noqa: F401  (it may have been built for another machine)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        return f"is a GGUF, and {PACKAGE} does not start ({why}): pip install --force-reinstall {PACKAGE}"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if magic != b"GGUF":
        return "is no GGUF: its first bytes are not those of one"
    try:
        tokenizer_of(path)
    except ValueError:
        return f"cannot be read by llama.cpp as {PACKAGE} has it (it is damaged, or newer than the package)"
    return ""


class Weights:
    """A GGUF that llama.cpp has opened. vocab_only: its tokenizer and its metadata, without the weights.

    Raises: ValueError where llama.cpp cannot read it.
    """

    def __init__(self, path: str | Path, vocab_only: bool = False):
        import llama_cpp  # here: few have it

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # what is wrong is said in our words
        self.cpp = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = -1  # all of them, where the package was built for the GPU
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ValueError(path)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def close(self) -> None:
        if self.model:
            self.cpp.llama_model_free(self.model)
        self.model = None

    @property
    def template(self) -> str | None:
        """Its chat template, or None."""
        found = self.cpp.llama_model_chat_template(self.model, None)
        return found.decode("utf-8", "replace") if found else None

    @property
    def vocabulary(self) -> int:
        return self.cpp.llama_vocab_n_tokens(self.vocab)

    def ids(self, text: str, bos: str | None) -> list[int]:
        """What its own tokenizer makes of a rendered prompt, as a server does: `bos` is not put before it twice."""
        data, begun = text.encode(), bool(bos) and text.startswith(bos)
        found = (ctypes.c_int32 * (len(data) + 8))()
        return list(found[: self.cpp.llama_tokenize(self.vocab, data, len(data), found, len(found), not begun, True)])

    def text(self, token: int) -> bytes:
        """The bytes of a token."""
        found = ctypes.create_string_buffer(256)
        size = self.cpp.llama_token_to_piece(self.vocab, token, found, len(found), 0, True)
        return found.raw[: max(size, 0)]

    def ends_with(self, token: int) -> bool:
        """Whether a server ends an answer at this token."""
        return self.cpp.llama_vocab_is_eog(self.vocab, token)

    def config(self) -> PretrainedConfig:
        """Its shape, in transformers' names."""
        cpp, model = self.cpp, self.model
        return PretrainedConfig(
            vocab_size=self.vocabulary,
            max_position_embeddings=cpp.llama_model_n_ctx_train(model),
            hidden_size=cpp.llama_model_n_embd(model),
            num_hidden_layers=cpp.llama_model_n_layer(model),
            num_attention_heads=cpp.llama_model_n_head(model) or 1,  # none in a recurrent model
            num_key_value_heads=cpp.llama_model_n_head_kv(model) or 1,
        )


class GgufModel(PreTrainedModel, GenerationMixin):
    """A GGUF as a causal language model of transformers.

    Its body gives logits where others give hidden states, since llama.cpp keeps those to itself: shape (rows, width,
    vocabulary), float32. Rows are computed one sequence each, and what llama.cpp has read of a row before is not read
    again: that is its key-value cache.
    """

    config_class = PretrainedConfig
    base_model_prefix = "served"
    _is_stateful = True  # the cache lies in llama.cpp; generate() must make none of its own

    def __init__(self, path: str | Path):
        weights = Weights(path)
        super().__init__(weights.config())
        self.weights, self.context, self.room, self.read = weights, None, 0, []
        self.nothing = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # where transformers looks for device
        self.served = Served(self)
        self.generation_config = GenerationConfig()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **more: object):
        """Logits, shape (rows, width, vocabulary), or of the last `logits_to_keep` positions alone."""
        found = self.served(input_ids=input_ids, attention_mask=attention_mask, **more)
        return CausalLMOutputWithPast(logits=found.last_hidden_state)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, attention_mask=None, **_) -> dict:
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def logits(self, rows: list[list[int]], keep: int | None) -> list[np.ndarray]:
        """Logits of each row's last `keep` positions (None: of all), shape (positions, vocabulary).

        rows: at most ROWS lists of token ids. Raises: OutOfMemoryError where they do not fit, RuntimeError where
        llama.cpp cannot compute them.
        """
        self.make_room(len(rows), max(map(len, rows)), keep)
        memory = self.weights.cpp.llama_get_memory(self.context)
        forget, pending = self.weights.cpp.llama_memory_seq_rm, []
        for n in range(len(rows), ROWS):  # what an earlier batch has left takes room
            if self.read[n]:
                forget(memory, n, -1, -1)
                self.read[n] = []
        for n, row in enumerate(rows):
            wanted = 0 if keep is None else len(row) - keep
            known = min(common(self.read[n], row), wanted)
            if not forget(memory, n, known, -1):  # a recurrent model keeps all or nothing
                forget(memory, n, -1, -1)
                known = 0
            self.read[n] = list(row)
            # (row, position, token, whether its logits are wanted)
            pending += [(n, place, row[place], place >= wanted) for place in range(known, len(row))]
        found = [[] for _ in rows]
        for start in range(0, len(pending), TOKENS):
            self.decode(pending[start : start + TOKENS], found)
        return [np.stack(parts) for parts in found]

    def decode(self, part: list[tuple[int, int, int, bool]], found: list[list[np.ndarray]]) -> None:
        """Let llama.cpp read these tokens, and append the logits that are wanted to their rows in `found`."""
        cpp = self.weights.cpp
        batch = cpp.llama_batch_init(len(part), 0, 1)
        try:
            batch.n_tokens = len(part)
            for i, (row, place, token, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            if status := cpp.llama_decode(self.context, batch):
                self.free()
                kind = torch.OutOfMemoryError if status in (1, -2) else RuntimeError  # no room, no memory
                raise kind(f"llama.cpp could not compute {len(part)} tokens (status {status})")
            for i, (row, _, _, wanted) in enumerate(part):
                if wanted:
                    values = cpp.llama_get_logits_ith(self.context, i)
                    found[row].append(np.ctypeslib.as_array(values, shape=(self.config.vocab_size,)).copy())
        finally:
            cpp.llama_batch_free(batch)

    def make_room(self, rows: int, width: int, keep: int | None) -> None:
        """A context of llama.cpp that holds so many rows of so many tokens; the one that is there, where it does."""
        if self.context and rows * width <= self.room:
            return
        self.free()
        cpp, self.room = self.weights.cpp, max(rows * (width if keep is None else width + GROWTH), TOKENS)
        params = cpp.llama_context_default_params()
        params.n_seq_max, params.kv_unified, params.n_ctx = ROWS, True, self.room
        params.n_batch = params.n_ubatch = TOKENS
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.no_perf = True
        self.context = cpp.llama_init_from_model(self.weights.model, params)
        if not self.context:
            raise torch.OutOfMemoryError(f"llama.cpp found no memory for {rows} rows of {width} tokens")
        self.read = [[] for _ in range(ROWS)]

    def free(self) -> None:
        if self.context:
            self.weights.cpp.llama_free(self.context)
        self.context = None

    def __del__(self):
        with contextlib.suppress(Exception):  # the interpreter may be on its way out
            self.free()
            self.weights.close()


class Served(torch.nn.Module):
    """The body of a GgufModel."""

    def __init__(self, model: GgufModel):
        super().__init__()
        self.of = lambda: model  # no submodule: it is the one that holds this

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep = logits_to_keep or input_ids.shape[1]
        model, (rows, width) = self.of(), input_ids.shape
        out = torch.zeros(rows, keep, model.config.vocab_size)
        for start in range(0, rows, ROWS):
            here = range(start, min(start + ROWS, rows))
            ids = [input_ids[row][mask[row].bool()].tolist() for row in here]
            for row, values in zip(here, model.logits(ids, logits_to_keep), strict=True):
                # to the places of its own tokens: padding on either side stays zero
                places = mask[row].nonzero()[:, 0][-len(values) :] - (width - keep)
                out[row, places] = torch.from_numpy(values)
        return BaseModelOutputWithPast(last_hidden_state=out)


# --- its tokenizer


@lru_cache
def tokenizer_of(path: str | Path) -> Weights:
    """A GGUF without its weights. Raises: ValueError where llama.cpp cannot read it."""
    return Weights(path, vocab_only=True)


def with_its_template(path: str, tokenizer):
    """The base's tokenizer with the chat template that the GGUF brings: in that one it is asked where it is deployed.

    Raises: SystemExit(2) where the GGUF has other tokens than the tokenizer, so that it was made from another model.
    """
    own = tokenizer_of(path)
    if own.vocabulary < len(tokenizer) or strangers(own, tokenizer) > 0.5:
        fail(
            f"{path} has {own.vocabulary:,} tokens, which are not those of MODEL_NAME's tokenizer "
            f"({len(tokenizer):,}): it was made from another model; leave it out of CANDIDATES"
        )
    if not own.template or own.template == tokenizer.chat_template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = own.template
    chat.check_template(tokenizer, f"the chat template of {path}")
    chat.switch_thinking_off(tokenizer)
    return tokenizer


def strangers(own: Weights, tokenizer) -> float:
    """The share of 300 tokens, spread over the vocabulary, whose text is another one in the GGUF."""
    ids = [*range(0, len(tokenizer), len(tokenizer) // 300 or 1)]
    texts = {n: tokenizer.decode([n]).strip().encode() for n in ids}
    whole = [n for n, text in texts.items() if text and b"\xef\xbf\xbd" not in text]  # not a part of a character
    return sum(own.text(n).strip() != texts[n] for n in whole) / max(len(whole), 1)


def served_otherwise(candidates: list, prompts: list[dict]) -> list[tuple[str, dict]]:
    """Notes on what a server would do otherwise than step 4 with the GGUFs among the candidates.

    prompts: {prompt} of the test prompts. It may have no template, or one that lets it think; its own tokenizer may
    make other tokens of the prompts; and the token that ends an answer may not be one at which the server stops.
    """
    notes = []
    for candidate in (c for c in candidates if is_gguf(c.folder)):
        own, tokenizer = tokenizer_of(candidate.folder), candidate.tokenizer
        if not own.template:
            notes.append(("no_template", {"name": candidate.label}))
            continue
        if chat.is_silent(tokenizer) and own.template != tokenizer.chat_template:
            notes.append(("served_thinking", {"name": candidate.label}))
        other = 0
        for prompt in prompts:
            text = chat.render(tokenizer, prompt["prompt"], [{"role": "assistant", "content": "a"}])[0]
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            other += own.ids(text, tokenizer.bos_token) != ids
        if other:
            notes.append(("other_tokens", {"name": candidate.label, "number": other, "of": len(prompts)}))
        if not own.ends_with(end := chat.answer_end(tokenizer)):
            token = tokenizer.convert_ids_to_tokens(end)
            notes.append(("no_end_token", {"name": candidate.label, "token": token, "id": end}))
    return notes


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def load(path: str, mend: str) -> GgufModel:
    """Raises: SystemExit(2) where llama.cpp cannot read it, or finds no memory for it."""
    try:
        model = GgufModel(path)
    except ValueError:
        fail(f"{path} cannot be loaded by llama.cpp (it is damaged, or there is no memory for it); {mend}")
    gpu = model.weights.cpp.llama_supports_gpu_offload()
    if torch.cuda.is_available() and not gpu:
        say(f"note: {PACKAGE} was built without the GPU, so {path} is computed on the CPU")
    return model
