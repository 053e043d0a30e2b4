"""Check Triton kernels on a machine that has no GPU.

- `interpreter.py` repairs TRITON_INTERPRET=1, so that kernels compute on the CPU what they compute
  on the chip (bf16, tf32), and makes reads and writes outside of tensors errors.
- `compiler.py` is a Triton driver for an absent GPU: the real launching code compiles every kernel
  for it, and runs none.
- `sass.py` reads the machine code: tensor-core instructions, width of loads, overlap.

A process either interprets or compiles: Triton decides when it is first imported.
"""
