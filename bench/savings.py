"""What a step moves that a change could spare: predictions, for bench.traffic to count.

Each names the operations it concerns and the share of their bytes that would go. None overlaps with
another, so that all of them together save their sum.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.launches import Operation


@dataclass(frozen=True)
class Saving:
    """A change, which operations it concerns, and the share of their bytes that it saves."""

    what: str
    of: Callable[[Operation], bool]
    share: float = 1.0
    per_parameter: int = 0  # bytes that it adds, once a step


WIDENING = ("_chunk_cat", "_to_copy")
SAVINGS = [
    Saving(
        "AdamW writes a bf16 copy of the weights, no forward casts them",
        lambda o: o.phase == "weights forward",
        per_parameter=2,
    ),
    Saving("no second cast of the weights in the backward", lambda o: o.casts_again),
    Saving(
        "fp32 gradients neither joined nor copied for a reduction over one rank",
        lambda o: o.of_weights and o.name in ("copy_", "_chunk_cat") and "bf16" not in o.shapes,
    ),
    # of 2 read and 4 written, 2 remain: a product writes fp32 where it wrote bf16
    Saving(
        "products write d weight in fp32",
        lambda o: o.of_weights and o.name in WIDENING and "bf16" in o.shapes and not o.casts_again,
        4 / 6,
    ),
    Saving(
        "products add to the d weight of the micro-batch before",
        lambda o: o.of_weights and o.name == "add_",
        4 / 10,
    ),
    # of 6 read and 4 written, and the 2 the product wrote, 8 remain
    Saving(
        "the head's d weight added up by its product",
        lambda o: o.within == "linear_cross_entropy" and o.name == "add_",
        4 / 10,
    ),
    Saving(
        "the loss's gradients scaled where they are made, d weight left in fp32",
        lambda o: (o.unit, o.phase) == ("lm_head", "backward"),
    ),
    # 3 passes of a sum and 5 of a norm and a sum backward become one of add_rms_norm: 13 - 8 + 3
    Saving(
        "each block's last sum fused into the next one's norm",
        lambda o: o.unit.startswith("layers.") and not o.of_weights and o.name == "add",
        1 / 2,
    ),
    Saving("v read where it lies in q|k|v", lambda o: o.name == "clone"),
    Saving("dq, dk, dv written into one tensor", lambda o: o.name == "cat"),
    Saving(
        "clipping's factor applied by the optimizer",
        lambda o: o.unit == "clip" and o.name == "mul_",
    ),
]
