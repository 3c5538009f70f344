"""Hides a CPU's bf16 instructions from torch and bitsandbytes, for the runs whose PYTHONPATH names this folder.

A processor with avx512_bf16 then takes the paths of one without: fp32 where PRECISION is "auto", and bitsandbytes'
4-bit layers without their bf16 kernels.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import tempfile

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # torch's own kernels
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # and its matrix products
# What torch compiles for one of them it would take for the other, too: the cache's key does not name them.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "torchinductor_without_bf16"))
HIDDEN = {
    "torch.cpu": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    "bitsandbytes.functional": ("has_avx512bf16",),
}


class Hide(importlib.abc.MetaPathFinder):
    """Lets the modules in HIDDEN load as usual, and then makes their questions answer no."""

    def find_spec(self, name, path=None, target=None):
        if name not in HIDDEN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for question in HIDDEN[name]:
                assert callable(getattr(module, question)), question
                setattr(module, question, lambda: False)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Hide())
