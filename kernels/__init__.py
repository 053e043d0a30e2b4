"""The hot operations of Lucie, one file each.

Every file reads from top to bottom: what is computed, its floor (the bytes or FLOPs that no
implementation can go below), the definition in plain torch, the Triton kernels, the operators that
torch sees, and one public function. Between its matrix products model.py calls nothing else.
`use("torch")` or `use("triton")` overrides the choice between definition and kernels (launch.py).
"""

from kernels.attention import attention
from kernels.int4_linear import int4_linear
from kernels.launch import use
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm", "attention", "int4_linear", "linear_cross_entropy", "rms_norm", "rope",
    "swiglu", "use",
]  # fmt: skip
