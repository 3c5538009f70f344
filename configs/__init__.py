"""Settings and machinery of the scripts. What the libraries read from the environment is set here, first."""

import logging
import os
import warnings

# OpenMP's threads wait for one another in busy loops; on two cores any other program then slows training tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a short look first: a fifth faster on a small model
# The libraries would otherwise report every run to their makers.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# A tokenizer would otherwise warn about forked workers on every run.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Passes have other lengths every time: blocks of memory that can grow leave fewer gaps between them (read by CUDA).
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ) and os.name != "nt":
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# Deprecations among the libraries and an optional kernel of the Hub: nothing that a user can act on.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*is deprecated")
warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # accelerate then sets it well
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torchao tries kernels for other GPUs than this machine's when it loads, and says so each time.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
# DeepSpeed reports that there is no GPU whenever a library imports it. (It sets its level itself.)
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
