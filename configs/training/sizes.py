"""What a model consists of: its parameters, and the activations that training keeps, counted before it is loaded."""

import copy
import functools
import re

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from configs import device, hub
from configs.settings import fail


def adapt(model, adapter):
    """The model with LoRA's adapters around it; exit code 2 where LORA_TARGET_MODULES fits no layer."""
    wanted = adapter.target_modules
    names = [wanted] if isinstance(wanted, str) else sorted(wanted)
    modules = [name for name, _ in model.named_modules()]
    try:
        for name in names if not isinstance(wanted, str) else []:
            if not any(module == name or module.endswith("." + name) for module in modules):
                raise ValueError(name)
        if not names:
            raise ValueError("an empty list")
        return get_peft_model(model, copy.deepcopy(adapter))
    except (ValueError, re.error) as error:
        known = sorted({module.rpartition(".")[2] for module in modules if module and not module[-1].isdigit()})
        fail(
            f"LORA_TARGET_MODULES {wanted if isinstance(wanted, str) else names} fits no layer of this model "
            f"({' '.join(str(error).split())[:120]}); it has: {', '.join(known)}; adapt every linear layer with: "
            "--lora_target_modules all-linear"
        )


def _masked(values: torch.Tensor, p: float) -> torch.Tensor:
    return torch.native_dropout(values, p, True)[0]


class Sizes:
    """Parameters of a model, and bytes of its activations, from its configuration and the adapter's alone.

    Activations are counted, not estimated: a model of one and of two layers runs forward on tensors without storage
    (torch's FakeTensorMode), and what autograd keeps is added up, at two lengths, so that what grows with the rows is
    told from what does not. gpu: whether the training runs on one, whose dropout keeps a byte a value.
    """

    def __init__(self, config, adapter, dtype: torch.dtype, length: int, gpu: bool = False):
        self.gpu = gpu
        # fp16's attention is computed in fp32 and keeps more; flash attention cannot run without storage
        self.fp32_attention = device.attention(dtype) == "sdpa_fp32"
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=hub.TRUST_REMOTE_CODE)
            model.tie_weights()
            head = model.get_output_embeddings()
            layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
            self.linear = sum(m.weight.numel() for m in layers)  # what bitsandbytes holds in 4 bits
            self.largest = max(m.weight.numel() for m in layers)
            embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
            self.embeddings = sum(weight.numel() for weight in embeddings)
            self.total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
            self.trainable = self.total
            if adapter is not None:
                model = adapt(model, adapter)
                self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        text = config.get_text_config()
        self.layers, self.hidden, self.vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
        self.length = length
        # two models and two lengths: the differences between them are what one layer, and one token, costs
        kept = {
            n: [self._kept(config, adapter, dtype, n, part) for part in (length // 2, length // 2 * 2)] for n in (1, 2)
        }
        slopes = {n: (long - short) / max(length // 2, 1) for n, (short, long) in kept.items()}
        self.layer = (slopes[2] - slopes[1]) * length  # bytes a layer and row
        self.fixed = (2 * slopes[1] - slopes[2]) * length  # embedding, final norm: bytes a row

    def _kept(self, config, adapter, dtype: torch.dtype, layers: int, length: int) -> int:
        """Bytes that autograd keeps of a row of `length` tokens through `layers` layers, without the head."""
        config = copy.deepcopy(config)
        config.get_text_config().num_hidden_layers = layers
        if self.fp32_attention:
            config._attn_implementation = "sdpa_fp32"
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=hub.TRUST_REMOTE_CODE)
            if adapter is not None:
                model = adapt(model, adapter).get_base_model()
        model = model.base_model.train()
        device.fuse_gelu(model)  # as the trainer does
        for module in model.modules() if self.gpu else ():
            if isinstance(module, torch.nn.Dropout) and module.p:  # CUDA keeps a mask of bytes, the CPU the noise
                module.forward = functools.partial(_masked, p=module.p)
        with FakeTensorMode():
            tensors = {}
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                trained = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
                frozen = tensor.dtype if not tensor.is_floating_point() else dtype
                tensors[name] = torch.empty(
                    tensor.shape, dtype=torch.float32 if trained else frozen, requires_grad=trained
                )
            # autograd's own tensors are counted; weights, which it refers to as well, are not
            own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
            given = {"input_ids": torch.ones(1, max(length, 1), dtype=torch.long), "use_cache": False}
            autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            uncast = disable_input_dtype_casting(model, adapter is not None)  # the same
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast, uncast:
                torch.func.functional_call(model, tensors, kwargs=given)
        # without storage a causal mask is made, where real tensors need none
        mask = (1, 1, length, length)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own and t.shape != mask)
