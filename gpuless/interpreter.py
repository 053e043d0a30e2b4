"""Triton's interpreter, repaired so that its results can be trusted.

With TRITON_INTERPRET=1 Triton runs kernels on the CPU in NumPy, one program after another. The
interpreter of Triton 3.6 to 3.9 is no oracle: it keeps bf16 as 16-bit integers and computes on
those, truncates float32 to bf16 instead of rounding, takes tf32 products in full float32, and reads
and writes wherever a wrong offset leads. After `install()`

- a bf16 value is a float32 whose lower 16 bits are zero. Every operation computes in float32 and
  rounds its result to nearest even, once;
- `tl.dot` accumulates in float32, and truncates float32 operands to tf32 where tf32 is asked for;
- each load and store must stay on the elements of the tensor whose pointer it started from. For a
  view this means the view: neither the rest of its storage nor the gaps between its rows. Views of
  one storage that are passed together may be reached from each other;
- a program that touches an address where another one has stored is a race. Programs may add to one
  address through the atomic addition of a tensor descriptor, which is fp32, and only so.

The last two raise `MemoryFault`. Other atomics, bf16 bitcasts, and conversions between bf16 and
8-bit floats are refused. Tensors in tuples are not known, and loop variables of `range` stay Python
integers, as shipped.
"""

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as shipped
from triton.tools.tensor_descriptor import TensorDescriptor

_machine = shipped._interpreter
_shipped_implicit_cvt = shipped._implicit_cvt
_shipped_np_dtype = shipped._get_np_dtype


class MemoryFault(Exception):
    """A kernel touched memory that is not its own, or two of its programs race for an address."""


# Memory: what a launch may touch, and which of its programs stored where.
#
# The upper 16 bits of an address are free. In a kernel they hold the number of the storage that the
# pointer came from, so that no offset, however wrong, leads from one storage into another.

TAG = 48  # its first bit
ADDRESS = np.uint64(2**TAG - 1)


class _Span:
    """The bytes of one tensor: from its first element to its last, without the gaps between."""

    def __init__(self, name: str, x: Tensor, tag: int) -> None:
        self.name = name
        self.low = tag + x.data_ptr()
        self.gaps: list[tuple[int, int]] = []  # from inner to outer: stride, bytes used of it
        used = x.itemsize
        for stride, size in sorted(zip(x.stride(), x.shape)):
            step = stride * x.itemsize
            if size == 1:
                continue
            if step < used:  # expanded, or sliding windows: rows and gaps cannot be told apart
                self.gaps.clear()
            elif step > used or self.gaps:
                self.gaps.append((step, used))
            used += (size - 1) * step
        self.high = self.low + used

    def holds(self, address: np.ndarray, size: int) -> np.ndarray:
        """Which accesses of `size` bytes at these addresses lie on elements of the tensor."""
        offset = address - np.uint64(self.low)  # below the start it wraps round to something huge
        inside = offset <= self.high - self.low - size
        for step, used in reversed(self.gaps):
            offset = offset % np.uint64(step)
            inside &= offset <= used - size
        return inside


class _Memory:
    """What one launch of a kernel may touch, and what it has stored so far."""

    PAGE = 20  # bits of an address within a page
    ADDED = -1  # the owner of an address that programs add to

    def __init__(self, kernel: str, args: dict[str, Any]) -> None:
        self.kernel = kernel
        self.tags: dict[int, int] = {}  # address of a storage -> its tag, in place
        self.spans: list[_Span] = []
        for name, arg in args.items():
            x = arg.base if isinstance(arg, TensorDescriptor) else arg
            if hasattr(x, "data_ptr"):
                x, tag = shipped._unwrap_tensor(x), (len(self.tags) + 1) << TAG
                tag = self.tags.setdefault(x.untyped_storage().data_ptr(), tag)
                self.spans.append(_Span(name, x, tag))
        # Page -> for each byte the program that stored there, counted from 1. Allocated where
        # something is stored, so that a tensor that spans many gigabytes costs nothing.
        self.owners: dict[int, np.ndarray] = {}

    def check(self, what: str, pointers: np.ndarray, mask: Any, size: int) -> np.ndarray:
        """Return the addresses without their tags, or raise MemoryFault. what: load, store or add;
        size: in bytes."""
        address, mask = pointers, np.asarray(mask, bool)  # `&` of masks may give integers
        if not mask.all():
            address = address[np.broadcast_to(mask, address.shape)]
        if address.size:
            low, high = int(address.min()), int(address.max()) + size
            for span in self.spans:
                if span.low <= low and high <= span.high and not span.gaps:
                    break
            else:
                self._check_each(what, address, size)
            if what != "load" or self.owners:
                first, last = low >> self.PAGE, (high - size) >> self.PAGE
                if first == last:
                    self._claim(what, first, address)
                else:
                    pages = address >> np.uint64(self.PAGE)
                    for page in np.unique(pages):
                        self._claim(what, int(page), address[pages == page])
        return pointers & ADDRESS

    def _check_each(self, what: str, address: np.ndarray, size: int) -> None:
        lanes, address = address.size, address.ravel()
        for span in self.spans:
            address = address[~span.holds(address, size)]
            if not address.size:
                return
        first = int(address[0])
        place = "at no address of a tensor"
        if self.spans:
            near = min(self.spans, key=lambda s: max(s.low - first, first - s.high + 1, 0))
            place = f"at byte {first - near.low:,} of {near.name}, which spans "
            place += f"{near.high - near.low:,} bytes{' with gaps' if near.gaps else ''}"
        program = shipped.interpreter_builder.grid_idx
        raise MemoryFault(
            f"{self.kernel}, program {program}: {what} outside the tensors passed to the kernel, "
            f"{address.size} of {lanes} lanes, the first {place}"
        )

    def _claim(self, what: str, page: int, address: np.ndarray) -> None:
        owner = self.owners.get(page)
        if owner is None:
            if what == "load":
                return
            owner = self.owners[page] = np.zeros(1 << self.PAGE, np.int32)
        x, y, z = program = shipped.interpreter_builder.grid_idx
        width, height, _ = shipped.interpreter_builder.grid_dim
        me = self.ADDED if what == "add" else 1 + x + width * (y + height * z)
        index = (address & np.uint64((1 << self.PAGE) - 1)).view(np.int64)
        found = owner[index]
        others = found[(found != 0) & (found != me)]
        if others.size:
            other = int(others[0]) - 1
            at = other % width, other // width % height, other // (width * height)
            who = "others add" if other < 0 else f"program {at} has stored"
            raise MemoryFault(
                f"{self.kernel}, program {program}: race: {what} where {who}, {others.size} lanes"
            )
        if what != "load":
            owner[index] = me


class _Access:
    """Stands before the functions that touch memory: they alone are given addresses."""

    memory = _Memory("no kernel", {})  # of the launch that runs

    def load(self, ptr: np.ndarray, mask: Any, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        address = self.memory.check("load", ptr, mask, dtype.itemsize)
        return _machine.load(address, mask, other, dtype)

    def store(self, ptr: np.ndarray, value: np.ndarray, mask: Any) -> None:
        address = self.memory.check("store", ptr, mask, value.itemsize)
        _machine.store(address, value, mask)

    def add(self, ptr: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        address = self.memory.check("add", ptr, mask, value.itemsize)
        before = _machine.load(address, mask, np.zeros_like(value), value.dtype)
        _machine.store(address, before + value, mask)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("fma_"):
            return getattr(_machine, name)
        raise NotImplementedError(f"{name} is not repaired")  # atomic_rmw, atomic_cas


def _implicit_cvt(arg: Any) -> Any:
    """An argument as the kernel sees it; for a tensor its pointer, tagged."""
    seen = _shipped_implicit_cvt(arg)
    if hasattr(arg, "data_ptr"):
        storage = shipped._unwrap_tensor(arg).untyped_storage().data_ptr()
        seen.handle.data += np.uint64(_Access.memory.tags.get(storage, 0))
    return seen


# Numbers: bf16 held in float32


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest float32 that is a bf16, ties to even."""
    bits = x.view(np.uint32)
    if not (bits & 0xFFFF).any():
        return x
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def _bf16_to_bits(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def _bits_to_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar.name == "bf16"


class _Handle(shipped.TensorHandle):
    """The array behind a `tl.tensor`. A bf16 array is rounded here, whatever made it."""

    def __post_init__(self) -> None:
        if not _is_bf16(self.dtype):
            super().__post_init__()
        elif self.data.dtype == np.float32:
            self.data = _round_to_bf16(self.data)
        elif self.data.dtype != np.bool_:  # comparisons keep the type of their operands
            raise TypeError(f"bf16 held as {self.data.dtype}: an operation that is not repaired")


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    return np.dtype(np.float32) if _is_bf16(dtype) else _shipped_np_dtype(dtype)


class _Builder(shipped.InterpreterBuilder):
    """Triton's operations, where they differ from those of the interpreter as shipped."""

    def get_bf16(self, value: float) -> _Handle:
        return _Handle(np.array([value], np.float32), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if _is_bf16(src.dtype) or _is_bf16(dst_type):
            return _Handle(src.data.astype(_np_dtype(dst_type)), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if not (_is_bf16(src.dtype) or _is_bf16(dst_type)):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        eight_bit = 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth)
        if eight_bit or rounding_mode == shipped._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("bf16 from or to 8-bit floats, or rounded toward zero")
        return self.cast_impl(src, dst_type)

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        if _is_bf16(src.dtype) or _is_bf16(dst_type):
            raise NotImplementedError("a bitcast of bf16")
        return super().create_bitcast(src, dst_type)

    def create_fabs(self, arg: Any) -> Any:
        return _Handle(np.abs(arg.data), arg.dtype.scalar)

    def create_dot(self, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        if not {a.dtype.scalar.name, b.dtype.scalar.name} <= {"bf16", "fp16", "fp32"}:
            return super().create_dot(a, b, acc, precision, imprecise)
        x, y = (handle.data.astype(np.float32, copy=False) for handle in (a, b))
        if precision == shipped._ir.INPUT_PRECISION.TF32:
            # Triton hands float32 to the tensor core as it is, and that drops the 13 lowest bits.
            x, y = ((v.view(np.uint32) & 0xFFFFE000).view(np.float32) for v in (x, y))
        total = np.matmul(x, y) + acc.data
        return _Handle(total.astype(acc.data.dtype, copy=False), acc.dtype.scalar)

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _is_bf16(ptrs.get_element_ty()):
            return super().create_masked_load(ptrs, mask, other, *args, **kwargs)
        words = _Handle(ptrs.data, tl.pointer_type(tl.uint16))
        if other is not None:
            other = _Handle(_bf16_to_bits(other.data), tl.uint16)
        loaded = super().create_masked_load(words, mask, other, *args, **kwargs)
        return _Handle(_bits_to_bf16(loaded.data), tl.bfloat16)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        if _is_bf16(ptrs.get_element_ty()):
            ptrs = _Handle(ptrs.data, tl.pointer_type(tl.uint16))
            value = _Handle(_bf16_to_bits(value.data), tl.uint16)
        return super().create_masked_store(ptrs, value, mask, *args)

    def create_descriptor_reduce(self, kind: Any, desc: Any, value: Any, indices: Any) -> None:
        if kind != shipped._ir.DESCRIPTOR_REDUCE_KIND.ADD or value.dtype.scalar.name != "fp32":
            raise NotImplementedError(f"an atomic {kind} of {value.dtype}")
        pointers, mask = desc.materialize_pointers(indices)
        shipped._interpreter.add(pointers.data, value.data, mask)


class _Launch(shipped.GridExecutor):
    """`kernel[grid](...)`."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        named = dict(zip(self.arg_names, args)) | kwargs
        _Access.memory = _Memory(self.fn.__name__, named)
        return args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            with np.errstate(all="ignore"):  # no floating-point warnings on a GPU either
                super().__call__(*args, **kwargs)
        except shipped.InterpreterError as error:
            cause: BaseException | None = error  # each function on the way has wrapped it once
            while isinstance(cause, shipped.InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, MemoryFault):
                raise cause from None
            raise


@cache
def install() -> None:
    """Repair the interpreter of this process. Idempotent.

    Raises RuntimeError where Triton was imported without TRITON_INTERPRET=1 in the environment.
    """
    interpreted = isinstance(tl.cdiv, shipped.InterpretedFunction)
    if os.environ.get("TRITON_INTERPRET") != "1" or not interpreted:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported for the first time")
    shipped.TensorHandle = _Handle
    shipped._get_np_dtype = _np_dtype
    shipped.InterpreterBuilder = _Builder
    shipped.interpreter_builder.__class__ = _Builder
    shipped._interpreter = _Access()
    shipped._implicit_cvt = _implicit_cvt
    shipped.GridExecutor = _Launch
    # As shipped, every launch and every call of a device function (tl.sum is one) patches the whole
    # language anew, a third of the run time. Once is enough: such a process never compiles.
    shipped._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    shipped._patch_lang = lambda function: shipped._LangPatchScope()
    # Triton 3.6 makes an int of an array of one element, which NumPy has refused since 2.4: every
    # `range` whose bound is known at run time only.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
