"""Intruder dimensions: strong directions in the tuned weights that the base did not have (WEIGHT_ANALYSIS).

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228): LoRA, at a high
learning rate, adds singular vectors that are nearly orthogonal to all of the base's, and models with many of them have
forgotten more; full fine-tuning makes none.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from configs import device, models, state
from configs.settings import say

STRONGEST, ALIKE = 10, 0.5  # the paper's k and epsilon


@torch.inference_mode()
def intruders(before: torch.Tensor, after: torch.Tensor, strongest: int = STRONGEST, alike: float = ALIKE) -> int:
    """How many of the `strongest` left singular vectors of `after` are intruders.

    before, after: one weight matrix, shape (out, in). A vector is an intruder where its cosine with every left
    singular vector of `before` is below `alike`, whatever the sign.
    """
    old = torch.linalg.svd(before.float(), full_matrices=False).U
    new = torch.linalg.svd(after.float(), full_matrices=False).U[:, :strongest]
    return int(((old.T @ new).abs().amax(0) < alike).sum())


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, its embedding and head aside; under LoRA, the layers that it wraps."""
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head and "lora_" not in name:
            found[name.removeprefix("base_model.model.").removesuffix(".base_layer")] = module
    return found


def changed(method: str, folder: str, base: nn.Module, revision: str | None) -> Iterator[tuple]:
    """(matrix of the base, the same one tuned) for each linear layer that a training has changed."""
    mend = "sweep again with --rerun"
    if method == "full":
        tuned = matrices(models.load(AutoModelForCausalLM, folder, None, mend=mend, dtype=torch.float32).eval())
        for name, module in matrices(base).items():
            yield module.weight, tuned[name].weight.to(module.weight.device)
        return
    adapted = models.load_adapter(base, folder, mend)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            before = module.get_base_layer().weight.detach().clone()
            module.merge()
            after = module.get_base_layer().weight.detach().clone()
            module.get_base_layer().weight.data.copy_(before)  # exactly, where unmerging would round
            module.merged_adapters.clear()
            yield before, after
    adapted.unload()


def intruders_of(best: dict[str, dict | None], name: str, revision: str | None) -> dict[str, dict]:
    """{arm: {mean, share, matrices}} of each arm's best run: intruders a matrix, and share of matrices with any.

    An adapter that was trained over 4 bits is added to the base in full precision.
    """
    base = models.load(AutoModelForCausalLM, name, revision, dtype=torch.float32).eval().to(device.compute_device())
    found = {}
    for arm, run in best.items():
        if run is None:
            continue
        say(f"weights of {arm}: looking for intruder dimensions")
        folder = str(Path(run["folder"]) / state.final_folder(run["method"]))
        counts = [intruders(*pair) for pair in changed(run["method"], folder, base, revision)]
        some = sum(count > 0 for count in counts)
        found[arm] = {"mean": sum(counts) / len(counts), "share": some / len(counts), "matrices": len(counts)}
    return found
