"""What a run computes on: device, dtype, kernels; memory and peak speed of the cards we know."""

import os
from typing import NamedTuple

import torch

import kernels
from config import Config, ConfigError


class Card(NamedTuple):
    part_of_name: str  # as CUDA tells it
    memory: float  # nominal, in bytes
    flops: float  # dense bf16, a second


# The SXM form. Other H100s (PCIe, NVL) are slower and not listed.
CARDS = {
    "h200": Card("H200", 141e9, 989.4e12),
    "h100": Card("H100 80GB HBM3", 80e9, 989.4e12),
    "a100": Card("A100", 80e9, 312e12),
}


def pick_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device of this process and the dtype to compute in."""
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device {config.device!r}: not to be had here; --device=cpu")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if config.dtype == "auto":
        # On a processor without bf16 products they are emulated, several times slower than fp32.
        config.dtype = "bfloat16" if kind == "cuda" or cpu_has_bfloat16() else "float32"
    if config.dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype is bfloat16, float32 or auto, not {config.dtype!r}")
    return device, getattr(torch, config.dtype)


def pick_kernels(config: Config, device: torch.device) -> None:
    if config.kernels == "triton" and device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError("kernels=triton: not with --device=cpu")
    try:
        kernels.use(config.kernels)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"kernels={config.kernels}: {error}") from None


def cpu_has_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def memory_of_machine(device: torch.device) -> int:
    """Bytes of the GPUs of this machine, or its main memory; 0 where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1] * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this GPU; None for a CPU or a card that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (card.flops for card in CARDS.values() if card.part_of_name in name)
    return None if "NVL" in name else next(known, None)
