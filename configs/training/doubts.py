"""What makes a training doubtful before it costs anything: an odd learning rate, an unknown language, many hours."""

import math
from collections import Counter

from configs.comparison.question import centre
from configs.state import spell

FAR = 30  # times above or below the centre of a method's learning rates; the sweep's grid ends at 10
NEAR = 0.7  # of the bits that guessing takes; a base that knows the language needs about a third of them
LONG = 3600  # seconds


def odd_rate(settings, width: int) -> str | None:
    """A sentence where LEARNING_RATE is far from what the method wants on a model of this width; None elsewhere.

    The rule is the sweep's, and holds for Adam: other optimizers want other rates.
    """
    if settings.OPTIM != "auto" and "adam" not in settings.OPTIM:
        return None
    method = "lora" if hasattr(settings, "LORA_R") else "full"
    rate, usual = settings.LEARNING_RATE, centre(method, width)
    if usual / FAR <= rate <= usual * FAR:
        return None
    way, often = ("above", rate / usual) if rate > usual else ("below", usual / rate)
    name = {"lora": "LoRA", "full": "full fine-tuning"}[method]
    effect = "diverge" if rate > usual else "hardly learn"
    return (
        f"LEARNING_RATE is {rate:.1e}, {often:,.0f} times {way} what {name} mostly wants on a model of width {width}: "
        f"it may {effect}; try --learning_rate {usual:.1e}"
    )


def unknown_language(nll_per_token: float, tokens: int, answers: list[str], vocabulary: int) -> str | None:
    """A sentence where the base hardly knows the language of the answers; None elsewhere.

    It is measured against one who knows nothing: who takes every token for as likely as any other, or knows only how
    frequent each character is (in English about 4.3 bits a byte, in Chinese about 3), whichever is better. Answers of
    a few words tell nothing: there the form, which the base was never shown, costs most. nll_per_token: of the base,
    in nats, over `tokens` tokens of the answers; vocabulary: tokens of its tokenizer.
    """
    characters = Counter("".join(answers))
    count, size = characters.total(), len("".join(answers).encode("utf-8", "replace"))
    if not answers or size < 32 * len(answers):
        return None
    by_character = -sum(n * math.log2(n / count) for n in characters.values()) / size
    guessing = min(by_character, math.log2(vocabulary) * tokens / size)
    bits = nll_per_token * tokens / math.log(2) / size
    if not bits > NEAR * guessing:
        return None
    return (
        f"the base hardly knows the language of the answers: {bits:.2f} bits per byte, and guessing without any "
        f"knowledge of it takes {guessing:.2f}. A fine-tuning of this size teaches no language: take a base that was "
        "trained on it, with --model_name"
    )


def many_hours(seconds: float) -> str | None:
    """A sentence where more than an hour is left; None elsewhere."""
    if seconds < LONG:
        return None
    return (
        f"about {spell(seconds)} to go, as the first steps went. Ctrl-C saves a checkpoint, and the same command goes "
        "on from there; fewer rows take less: --max_train_samples 1000"
    )
