"""Peak memory of a piece of work, by the best means that the device and the system have.

    meter = PeakMemory(model.device)
    meter.start()
    model.forward(inputs)
    meter.stop()      # bytes at the peak above what was in use at the start

| where | what is read |
| --- | --- |
| CUDA | the allocator's peak, reset at the start |
| Linux | the resident set's high-water mark (`VmHWM`), reset through `/proc/self/clear_refs` |
| elsewhere | the process's lifetime maximum, which only the first and greediest work moves |

Garbage is collected once, and before each start the C library's free heap is handed back, so that
memory kept from earlier work does not hide what this work needs.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Literal

import torch

Source = Literal["cuda", "high-water mark", "lifetime maximum"]
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """A meter for one device; start and stop it around the work.

    Attributes:
        source: what is read, see the table above.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device = device
        self._before = 0
        self.source: Source
        if device.type == "cuda":
            self.source = "cuda"
        elif _reset():
            self.source = "high-water mark"
        else:
            self.source = "lifetime maximum"

    @property
    def note(self) -> str:
        """One phrase that says how the number was made."""
        return {
            "cuda": "peak of the CUDA allocator",
            "high-water mark": "growth of the resident set's high-water mark",
            "lifetime maximum": "growth of the process's lifetime maximum: later passes show less",
        }[self.source]

    def start(self) -> None:
        """Forget earlier peaks and note what is in use."""
        if self.source == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = int(torch.cuda.memory_allocated(self._device))
            return
        trim_heap()
        if self.source == "high-water mark":
            _reset()
            self._before = _status("VmRSS")
        else:
            self._before = _lifetime_maximum()

    def stop(self) -> int:
        """Return the bytes at the peak since `start`, above what was in use then."""
        if self.source == "cuda":
            peak = int(torch.cuda.max_memory_allocated(self._device))
        else:
            peak = _status("VmHWM") if self.source == "high-water mark" else _lifetime_maximum()
        return max(peak - self._before, 0)


def _reset() -> bool:
    """Set `VmHWM` to the present resident set; return whether the system lets us."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
        return _status("VmHWM") > 0
    except OSError:
        return False


def trim_heap() -> None:
    """Hand freed memory back to the system, where the allocator can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _status(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _lifetime_maximum() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
