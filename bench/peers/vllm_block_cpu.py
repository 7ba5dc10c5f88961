"""Lets vLLM's second model runner, the only one with DSpark, run on a machine without a GPU. PATCHED, and slow on purpose.

That runner's kernels are written in Triton, whose wheel has no CPU back end, so vLLM 0.32.0 falls back to its first runner
and ends with "Model Runner V1 does not support: dspark speculative decoding" (`vllm/triton_utils/importing.py`,
`VllmConfig._validate_v1_model_runner`). Two things change that, none of them inside vLLM's own code: Triton's interpreter
computes the very same kernels in numpy, and a stand-in for the missing back end lets vLLM see that Triton is usable.
Networks and attention are those of every CPU run. A step takes about a second.

Used as `sitecustomize.py` of a folder in PYTHONPATH, beside what `vllm_cpu_shim.py` does (`check_vllm.py` does so).
"""

import os
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends  # noqa: E402


class _Driver:
    @staticmethod
    def is_active():
        return True


backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)
