"""The hot operations of Lucie, one file each.

Every file reads from top to bottom: what is computed, its floor (the bytes or FLOPs no
implementation can go below), the definition in plain torch, and one public function. Between
its matrix products model.py calls nothing else.
"""

from kernels.attention import attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu

__all__ = ["add_rms_norm", "attention", "linear_cross_entropy", "rms_norm", "rope", "swiglu"]
