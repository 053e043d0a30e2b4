"""Check Triton kernels on a machine that has no GPU.

- `interpreter.py`: repairs TRITON_INTERPRET=1, so that kernels compute on the CPU what they
  compute on the chip (bf16, tf32), and turns reads and writes out of place into errors.
- `compiler.py`: a Triton driver for an absent GPU. The real launching code compiles every kernel
  just as it would there, and runs nothing.
- `sass.py`: reads the machine code that came out: registers, spills, tensor-core instructions,
  the width of the loads, what overlaps with what.

The interpreter and the compiler exclude each other in one process: Triton decides when it is first
imported. Nothing here imports the rest of the repository.
"""
