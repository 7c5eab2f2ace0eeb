"""Memory: how much a run needs, how much there is, and what to say when it does not suffice (B3)."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on the CPU or on an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator raises a plain RuntimeError.
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


def smaller_batch(batch_size: int, accumulation: int) -> str:
    """What to try when a batch does not fit: the same run in more parts, or another run with a smaller batch."""
    parts = min(batch_size, 2 * accumulation)
    if parts == accumulation:
        return "use a smaller model (--model-size) or smaller images (--image-size)"
    return (
        f"--set training.accumulation={parts} gives the same run in about half the memory, or try --batch-size "
        f"{max(1, batch_size // 2)}"
    )


def reset_peak(device: torch.device) -> None:
    """Begin to measure anew, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # 5: the high-water mark of the resident memory becomes what it is now
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most bytes in use at once: allocated on the GPU, or resident in this process (with Python and torch)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if os.name == "nt":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def limit(device: torch.device) -> int | None:
    """How many bytes there are: of the GPU, or of the machine, its container or this process's limit. None: unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found) if found else None
