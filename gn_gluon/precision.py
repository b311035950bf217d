"""Narrow training: float32 parameters and statistics, activations in bfloat16 (CPUs) or float16 (GPUs)."""
import numpy as np

from gn_gluon import compat
from gn_gluon.errors import UserError

#: Types of activations beside which parameters, statistics and the classifier stay float32.
NARROW = ('float16', 'bfloat16')

_BFLOAT16 = np.dtype([('bfloat16', np.uint16)])  # what MXNet 1.9.1 calls bfloat16


def dtype_name(dtype):
    """'float32', 'float16', 'bfloat16'... of what MXNet or NumPy call a type."""
    if isinstance(dtype, str):
        return dtype
    dtype = np.dtype(dtype)
    return dtype.names[0] if dtype.names else dtype.name


def narrow(dtype):
    """The name of a type that is narrower than float32, None for another: what a layer's `cast` wants to know."""
    name = dtype_name(dtype)
    return name if name in NARROW else None


def to(F, x, name, adds=True):
    """x in the type `name`, with its gradient in x's own. `F` is mx.nd or mx.sym.

    adds : whether x may be something whose grad_req is 'add'. A cast alone loses its gradient then, without a word, so
    a copy comes between.
    """
    return F.amp_cast(F.identity(x) if adds else x, dtype=_BFLOAT16 if name == 'bfloat16' else name)


def check_trainable(dtype, devices):
    """Raises UserError unless `devices` can train in `dtype`, one of 'float32', 'bfloat16' and 'float16'.

    MXNet 1.9.1 multiplies no float16 matrices on a CPU and knows no bfloat16 on a GPU; a CPU without instructions for
    bfloat16 only imitates it, many times slower than float32.
    """
    kind = devices[0].device_type
    if dtype == 'float16' and kind == 'cpu':
        raise UserError("train.dtype = 'float16' is for GPUs; on a CPU use 'float32', or 'bfloat16' where it has that")
    if dtype == 'bfloat16' and kind != 'cpu':
        raise UserError("train.dtype = 'bfloat16' is for CPUs; on a GPU use 'float32' or 'float16'")
    if dtype == 'bfloat16' and not {'amx_bf16', 'avx512_bf16'} & set(compat.processor_flags()):
        raise UserError("train.dtype = 'bfloat16' needs a processor with AMX or AVX512_BF16, which "
                        f"{compat.processor()} lacks; use 'float32'")
