"""Makes the demo's base model: a small Phi and its tokenizer, pre-trained in under a minute on a CPU.

    python configs/demo/base_model.py
    python configs/demo/base_model.py zh

Reads:  configs/demo/finance_prose.txt, connected prose, and configs/demo/finance_texts.txt, 3,000 short texts;
        no row of finance_qa.jsonl is among them; with zh the Chinese files, whose names end in _zh
Writes: outputs/demo_base_model/ in the current folder, or outputs/demo_base_model_zh/: the model, its tokenizer, and
        general_text.txt, prose that is held out from the pre-training

It has phi-2's habits (PhiForCausalLM, float16, a bias on the head, `<|endoftext|>` as its only special token, no pad
token, no chat template), so that the demo meets what the real run meets. It is a toy that knows a little textbook
finance, and it has no settings: the only arguments are zh, for the Chinese demo, and --help.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run by its path, python looks for modules beside the script only

from configs import handover, hub
from configs.settings import fail, quiet_errors, say
from configs.translation import phrase


def read_arguments(arguments: list[str]) -> str:
    """The ending of the files' names: "" or "_zh". Answers --help with the text at the top of this file."""
    if "-h" in arguments or "--help" in arguments:
        print((__doc__ or "").strip())
        raise SystemExit(0)
    if unknown := [word for word in arguments if word != "zh"]:
        fail(*(f"unknown argument {word!r}: base_model.py has no settings, only zh and --help" for word in unknown))
    return "_zh" if arguments else ""


if __name__ == "__main__":
    quiet_errors()
    LANGUAGE = read_arguments(sys.argv[1:])  # before the imports below, which take seconds

hub.go_online()  # nothing is to be fetched

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup
from transformers.utils import logging

FOLDER = "outputs/demo_base_model"  # relative to the current folder, as every output is
END = "<|endoftext|>"
SEED = 0
VOCABULARY = 2048
STEPS, BATCH, LENGTH = 150, 16, 128  # optimizer steps, sequences a step, tokens a sequence
LEARNING_RATE = 3e-3


def corpus(language: str) -> tuple[list[str], list[str]]:
    """The texts to pre-train on, and the prose that is held out from them.

    Both files hold one text a paragraph. Half of the short texts are statements, the other half questions with their
    worked answers, since a base model of today has read many of those, as plain text without any chat marker.
    """
    prose, short = (
        (ROOT / "configs/demo" / f"{name}{language}.txt").read_text("utf-8").strip().split("\n\n")
        for name in ("finance_prose", "finance_texts")
    )
    held_out = len(prose) // 10
    # the prose three times: it is the smaller part, and the only one with connected sentences
    return prose[:-held_out] * 3 + short, prose[-held_out:]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`: it encodes every string, and the end token is its only special one."""
    tokenizer = Tokenizer(models.BPE())
    # each Chinese character by itself: so few texts would else make tokens of whole phrases, which no other text holds
    characters = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([characters, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=1024
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> PhiForCausalLM:
    """A Phi of about two million parameters with random weights."""
    config = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=768,
        hidden_act="gelu_pytorch_tanh",  # phi-2's gelu_new in one kernel
        num_hidden_layers=2,  # two learn to copy from the question; a third costs a third more time
        num_attention_heads=6,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return PhiForCausalLM(config)


def pretrain(model: PhiForCausalLM, ids: torch.Tensor) -> float:
    """Train on random windows of `ids`, one long row of token ids.

    Returns the mean loss of the last 20 steps, in nats per token.
    """
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    losses = []
    for _ in tqdm(range(STEPS), desc=phrase("pre-training the demo's base model")):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=random)
        batch = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def main(language: str) -> None:
    began = time.monotonic()
    logging.disable_progress_bar()  # "Writing model shards"
    torch.manual_seed(SEED)
    texts, held_out = corpus(language)
    tokenizer = make_tokenizer(texts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SEED)).tolist()
    ids = torch.tensor([i for n in order for i in [*tokenizer(texts[n]).input_ids, tokenizer.eos_token_id]])
    model = make_model(tokenizer)
    loss = pretrain(model, ids)
    outputs, name = Path(FOLDER).parent, Path(FOLDER).name + language
    with handover.lock(outputs), handover.replacing(outputs) as new:
        model.half().save_pretrained(new / name)
        tokenizer.save_pretrained(new / name)
        handover.write_text(new / name / "general_text.txt", "\n\n".join(held_out) + "\n")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"done: {outputs / name}, {millions:.1f} million parameters, pre-trained on {STEPS * BATCH * LENGTH:,} "
        f"tokens in {time.monotonic() - began:.0f} s, last loss {loss:.2f} nats per token"
    )


if __name__ == "__main__":
    main(LANGUAGE)
