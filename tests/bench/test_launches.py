"""What a block of the model launches: a change that adds a kernel or a copy must say so here.

The process has no interpreter, unlike this one: kernels are counted where they would be launched,
and neither compiled nor run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

SCRIPT = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction
import kernels, parallel
from generate import Decoder
from gpuless.compiler import fake_gpu
from model import Lucie, LucieConfig

names = []
JITFunction.run = lambda self, *args, **options: names.append(self.fn.__name__)
COMPOSITE = "CompositeImplicitAutograd"  # torch's word for an operation made of others

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if any(issubclass(t, FakeTensor) for t in types):  # torch asks itself about shapes
            return func(*args, **kwargs)
        made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)
        if func.namespace == "nanolucie" or made_of_others:
            with self:
                return func.redispatch(torch._C.DispatchKeySet("CPU"), *args, **kwargs)
        launches = not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view"))
        names.extend([name] * launches)
        return func(*args, **kwargs)

config = LucieConfig(512, 256, 384, 1, 2, 1)
found = {}
with fake_gpu(90):
    kernels.use("triton")
    for mode in parallel.ACTIVATION_CHECKPOINTING:
        model = Lucie(config).bfloat16()
        parallel.checkpoint_activations(model, mode)
        cos, sin = (table[:256] for table in model.rope_tables(torch.device("cpu")))
        x = torch.zeros(1, 256, 256, dtype=torch.bfloat16, requires_grad=True)
        with Count():
            y = model.layers[0](x, cos, sin)
            forward, gradient = list(names), torch.zeros_like(y)
            names.clear()
            torch.autograd.grad(y, [x, *model.layers[0].parameters()], gradient)
        found[mode] = [forward, list(names)]
        names.clear()
    model = Lucie(config).bfloat16()
    decoder, tables = Decoder(model), model.rope_tables(torch.device("cpu"))
    cache, ids = decoder.reserve(1, 64), torch.zeros(1, dtype=torch.int64)
    cache.decode_from([9])
    with torch.no_grad(), Count():
        model.layers[0](x[:, :1], *tables, cache=cache)
        block = list(names)
        names.clear()
        decoder.step(ids)
    found["decoding"] = [block, list(names)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[list[str]]]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_launches_of_a_block(found):
    counts = {mode: (len(forward), len(backward)) for mode, (forward, backward) in found.items()}
    del counts["decoding"]
    # a fifth matrix product, norm or copy would be one more
    assert counts == {"none": (12, 20), "selective": (12, 25), "full": (12, 28)}, found


def test_launches_of_a_decoding_step(found):
    """At batch 1. Lucie-7B's 32 blocks make 32 * 13 + 6 = 422."""
    block, step = found["decoding"]
    # two norms, four products, RoPE, k and v into the cache, attention and the sum of its splits,
    # SwiGLU, the residual
    assert len(block) == 13, block
    # the embedding, the last norm, the head, its logits to fp32, positions + 1, their bound
    assert len(step) == len(block) + 6, step
