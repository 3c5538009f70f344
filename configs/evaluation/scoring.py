"""A model at work: loading it, scoring continuations, answering prompts, in batches that memory can hold."""

import contextlib
import gc
import inspect
import math
from collections.abc import Callable, Iterator

import evaluate
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Features, Value
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from configs import chat, device, models
from configs.evaluation import gguf
from configs.handover import PREPARE
from configs.settings import command, fail, main_process, say
from configs.translation import phrase

GENERAL_PIECES = 200  # of the general text that are scored at most, each of up to 256 tokens
CHUNK = 512  # positions whose logits over the whole vocabulary are held at once


# --- loading


def load_model(candidates: list, dtype: torch.dtype, revision: str | None) -> PreTrainedModel:
    """One copy of the weights that these candidates share, with LoRA's adapter over it where one of them has it.

    revision: of a base on the Hub. Raises: SystemExit(2) where a folder is damaged or does not fit into memory.
    """
    gc.collect()
    torch.cuda.empty_cache()
    candidate, options = candidates[0], {}
    if gguf.is_gguf(candidate.folder):
        return gguf.load(candidate.folder, candidate.remedy)
    source, revision = candidate.folder, revision if candidate.method == "base" or candidate.adapter else None
    # sdpa is transformers' own choice, for every model that has it; asked for by name, it refuses the others (Gemma 2)
    if (attention := device.attention(dtype)) != "sdpa":
        options["attn_implementation"] = attention
    if candidate.four_bit:
        options["quantization_config"] = device.nf4(dtype)
    mend = candidate.remedy if source == candidate.own_folder else None
    options |= {"dtype": dtype, "device_map": {"": device.compute_device()}}
    model = models.load(AutoModelForCausalLM, source, revision, mend=mend, **options)
    device.keep_4bit_layout(model)
    device.fuse_gelu(model)
    for adapted in (c for c in candidates if c.adapter):
        model = models.load_adapter(model, adapted.adapter, adapted.remedy)
    # a chat model's own decoding (temperature, repetition penalty) would make the answers incomparable
    model.generation_config = GenerationConfig()
    if isinstance(model, PeftModel):
        model.get_base_model().generation_config = GenerationConfig()
    return model.eval()


def acting_as(model: PreTrainedModel, candidate) -> contextlib.AbstractContextManager:
    """A context in which a shared copy is this candidate: LoRA's adapter is switched off for the base."""
    without = isinstance(model, PeftModel) and candidate.adapter is None
    return model.disable_adapter() if without else contextlib.nullcontext()


class RowMetric(evaluate.Metric):
    """A plain function of columns as an `evaluate.Metric`: RowMetric(answer_quality).compute(answers=..., ...).

    compute() gives {"rows": the function's list}, or the dict that the function returns.
    """

    KINDS = {"answers": "string", "references": "string", "questions": "string", "stopped": "bool"}
    KINDS |= {"nll": "float64", "tokens": "int64", "sizes": "int64"}

    def __init__(self, function: Callable):
        self.function = function
        super().__init__(keep_in_memory=True)  # several runs at once would share a cache file

    def _info(self) -> evaluate.MetricInfo:
        names = [name for name in inspect.signature(self.function).parameters if name in self.KINDS]
        features = Features({name: Value(self.KINDS[name]) for name in names})
        return evaluate.MetricInfo(description=self.function.__doc__, citation="", features=features)

    def _compute(self, **columns) -> dict:
        values = self.function(**columns)
        return values if isinstance(values, dict) else {"rows": values}


# --- batches that fit

# How much is computed at once must not follow from the memory that happens to be free: batches of another size round
# differently. So these are constants, and halved where memory runs out.
# A CPU is fastest while its caches hold a batch: of 256 to 8,192 tokens a pass, 1,024 and 2,048 were (LOG.md).
PASS_TOKENS_CPU = 2048
# A GPU has enough to do with them, and one layer of phi-2, some 60,000 numbers a token, takes 1 GB in 16 bits.
PASS_TOKENS_GPU = 8192
# For the key-value caches of the prompts that are answered together: 22 of phi-2 with 550 tokens each, in 16 bits.
CACHE_BYTES = 4_000_000_000
PROMPTS = 64  # at most, however small the caches are; the usual 100 test prompts are then two batches
# unit -> what memory could hold after it had run out in this process: no later batch is larger
_held: dict[str, int] = {}


def token_budget(model: PreTrainedModel) -> int:
    """Padded tokens of a forward pass."""
    if isinstance(model, gguf.GgufModel):
        return gguf.TOKENS  # it gives the logits of all of them
    return PASS_TOKENS_CPU if model.device.type == "cpu" else PASS_TOKENS_GPU


def prompt_budget(model: PreTrainedModel, length: int) -> int:
    """Prompts that are answered at once, each of at most `length` tokens with its answer: at most PROMPTS."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_token = 2 * config.num_hidden_layers * heads * width * torch.empty(0, dtype=model.dtype).element_size()
    return min(max(CACHE_BYTES // (length * of_token), 1), PROMPTS)


def batches(items: list[int], sizes: list[int], budget: int) -> Iterator[list[int]]:
    """`items`, largest first, in batches of similar size: number of items times the largest is at most `budget`."""
    batch: list[int] = []
    for i in sorted(items, key=lambda i: -sizes[i]):
        if batch and sizes[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def in_batches(
    items: list[int], sizes: list[int], budget: int, unit: str, work: Callable[[list[int]], list], label: str
) -> dict[int, object]:
    """{item: its result}, from work(batch) -> results of the batch's items, under a progress bar called `label`.

    Where memory runs out, the budget is halved, down to single items; the smaller one is kept for what follows.
    unit: what sizes and budget count, "tokens" or "prompts". Raises: SystemExit(2) where one item is too large.
    """
    found, rest, of = {}, items, "rows" if unit == "tokens" else unit
    with tqdm(total=len(items), desc=phrase(label), unit=f" {phrase(of)}", disable=not main_process()) as bar:
        while rest:
            for batch in batches(rest, sizes, min(budget, _held.get(unit, budget))):
                results = tried(work, batch)
                if results is None:
                    halve(unit, len(batch) * sizes[batch[0]])
                    break  # and cut what is left into smaller batches
                found |= zip(batch, results, strict=True)
                bar.update(len(batch))
            rest = [i for i in items if i not in found]
    return found


def tried(work: Callable[[list[int]], list], batch: list[int]) -> list | None:
    """work(batch), or None where memory runs out. Raises: SystemExit(2) where it does with a single item."""
    try:
        return work(batch)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not should_reduce_batch_size(error):
            raise
        if len(batch) == 1:
            fail(
                f"memory runs out with a single row ({str(error).splitlines()[0]}); use --precision bf16, a smaller "
                f"model, or shorter rows: {command(PREPARE, '--max_length', '512')}"
            )
    return None


def halve(unit: str, size: int) -> None:
    """Memory ran out with `size` tokens or prompts at once: half as many from now on.

    To be called outside the clause that caught the error: inside, the error holds the tensors of the failed pass.
    """
    gc.collect()
    torch.cuda.empty_cache()
    if unit not in _held:
        flag = "--batch_tokens" if unit == "tokens" else "--generation_batch"
        say(
            f"note: memory ran out with {size:,} {unit} at once; batches are halved until they fit, and stay so "
            f"(to start with smaller ones: {flag} {size // 2})"
        )
    _held[unit] = size // 2


def spread(lengths: list[int], work: Callable[[list[int]], dict[int, object]]) -> list:
    """The results of all items in order, whichever process worked on which: work(items) -> {item: result}.

    Every process gets every so many-th of the items, sorted by length, so that all have the same to do.
    """
    state = PartialState()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    mine = work(order[state.process_index :: state.num_processes])
    found = dict(gather_object(list(mine.items())))
    return [found[i] for i in range(len(lengths))]


# --- scores


@torch.inference_mode()
def score(
    model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], budget: int | None, label: str
) -> np.ndarray:
    """nll of each continuation given its context, in nats, float64, shape (rows,).

    rows: (context_ids, continuation_ids); a context holds at least one token. budget: padded tokens of a forward pass,
    None is token_budget(). The body of the model sees whole rows; its head only the positions that predict a
    continuation, CHUNK of them at once, so the logits of a batch never exist.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    body = getattr(causal, causal.base_model_prefix)
    lengths = [len(a) + len(b) - 1 for a, b in rows]  # the last token is predicted, not read
    budget = budget or token_budget(causal)

    def head(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """nll of target, shape (n,), from hidden states (n, hidden).

        It is the model's own forward, with its head, scale and soft cap, around a body that gives these hidden states.
        """
        usual = body.forward
        given = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])
        body.forward = lambda *_, **__: given
        try:
            logits = causal(input_ids=target[None], use_cache=False).logits[0].float()
        finally:
            body.forward = usual
        wanted = logits.gather(-1, target[:, None])[:, 0]
        top = logits.amax(-1)
        # log-sum-exp in place: the logits are the largest tensor of all, and are not needed again
        return logits.sub_(top[:, None]).exp_().sum(-1).log() + top - wanted

    def of_batch(batch: list[int]) -> list[float]:
        # Padding is on the right, where causal attention cannot see it: no mask is needed, and without one attention
        # is faster.
        width = max(lengths[i] for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        asked = torch.zeros(len(batch), width, dtype=torch.bool)
        for line, i in enumerate(batch):
            context, continuation = rows[i]
            ids[line, : lengths[i]] = torch.tensor((context + continuation)[:-1])
            asked[line, len(context) - 1 : lengths[i]] = True
        target = torch.tensor([token for i in batch for token in rows[i][1]], device=model.device)
        hidden = body(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        hidden = hidden[asked.to(hidden.device)]
        parts = [head(h, t) for h, t in zip(hidden.split(CHUNK), target.split(CHUNK), strict=True)]
        nll = torch.cat(parts).double().cpu()
        return [part.sum().item() for part in nll.split([len(rows[i][1]) for i in batch])]

    def work(items: list[int]) -> dict[int, object]:
        return in_batches(items, lengths, budget, "tokens", of_batch, f"scoring {label}")

    return np.array(spread(lengths, work), dtype=float)


def better_form(model: PreTrainedModel, tokenizer, rows: list[dict], budget: int | None, label: str) -> str:
    """The prompt form, "chat" or "plain", with which a base answers these rows better.

    rows: {prompt, completion} of the validation part: a form chosen by the test rows would flatter the base on them.
    """
    encoded = [chat.encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    # the answer's text alone: the token that ends it is the template's, which the base was never shown
    pairs = {"chat": [(context, answer_ids[:-1]) for context, answer_ids in encoded]}
    plain = [chat.plain_prompt(tokenizer, row["prompt"]) for row in rows]
    pairs["plain"] = [(context, answer_ids[:-1]) for context, (_, answer_ids) in zip(plain, encoded, strict=True)]
    nll = {form: score(model, pairs[form], budget, f"{label}, {form} prompt, validation").sum() for form in pairs}
    return min(nll, key=lambda form: nll[form])


def pieces(tokenizer, texts: list[str], width: int = 256) -> tuple[list[list[int]], list[int]]:
    """(token ids, UTF-8 bytes) of GENERAL_PIECES pieces of up to `width` tokens, spread over all texts.

    The bytes of a piece are what it adds to its text: a character that two pieces share counts once.
    """
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        before = 0
        for end in range(width, len(ids) + width, width):
            size = len(tokenizer.decode(ids[:end]).encode())
            found.append((ids[end - width : end], size - before))
            before = size
    some = found[:: math.ceil(len(found) / GENERAL_PIECES) or 1]
    return [ids for ids, _ in some], [size for _, size in some]


# --- answers


class OwnDraw(LogitsProcessor):
    """Makes the most likely token a sample at `temperature`, from a generator of each prompt's own.

    It adds Gumbel noise to the logits, whose maximum is distributed as the model's softmax. So a prompt's answer does
    not depend on the prompts beside it, which sampling from one generator for the whole batch would.
    """

    def __init__(self, seeds: list[int], temperature: float, where: torch.device):
        self.generators = [torch.Generator(where).manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(scores, self.generators, strict=True)
        noise = torch.stack([torch.empty_like(row).exponential_(generator=own) for row, own in rows])
        return scores / self.temperature - noise.log()


@torch.inference_mode()
def continued(
    model: PreTrainedModel,
    tokenizer,
    ids: torch.Tensor,
    mask: torch.Tensor,
    ends: list[int],
    limit: int,
    draws: list[LogitsProcessor],
    **more: object,
) -> list[dict]:
    """The {answer, stopped} to each row of `ids`, shape (rows, width), padded on the left; mask: 0 where it is padded.

    ends: ids that end an answer; draws: [] for greedy answers; more: for the model's `generate`, such as a streamer.
    """
    width = ids.shape[1]
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=min(limit, chat.positions(model.config) - width),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        logits_processor=LogitsProcessorList(draws),
        **more,
    )[:, width:].tolist()
    found = []
    for tokens in output:
        stop = next((n for n, token in enumerate(tokens) if token in ends), None)
        text = tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
        found.append({"answer": text, "stopped": stop is not None})
    return found


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer,
    prompts: list[list[int]],
    ends: list[int],
    limit: int,
    size: int | None,
    label: str,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict]:
    """Answers as {answer, stopped}: stopped is whether the model ended it by itself within `limit` tokens.

    size: prompts that are answered at once, None is prompt_budget(); temperature 0 is greedy.
    """
    lengths = [len(prompt) for prompt in prompts]
    size = size or prompt_budget(model, max(lengths, default=1) + limit)
    if isinstance(model, gguf.GgufModel):
        size = min(size, gguf.ROWS)  # beyond, it would read all rows anew for each token
    # a prompt that leaves less than `limit` positions would cut the answers beside it, so it is answered alone
    sizes = [1 if length + limit <= chat.positions(model.config) else size for length in lengths]

    def of_batch(batch: list[int]) -> list[dict]:
        width = max(lengths[i] for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(batch):  # padded on the left: the answer follows the prompt
            ids[line, width - lengths[i] :] = torch.tensor(prompts[i])
            mask[line, width - lengths[i] :] = 1
        draws = [OwnDraw([seed + i for i in batch], temperature, model.device)] if temperature else []
        return continued(model, tokenizer, ids, mask, ends, limit, draws)

    def work(items: list[int]) -> dict[int, object]:
        return in_batches(items, sizes, size, "prompts", of_batch, f"answering {label}")

    return spread(lengths, work)
