"""What a failure is to whoever asked: one sentence that says what to do, as an answer of the protocol."""

import math

import structlog
import torch

from persona.engine.protocol import Failed
from persona.errors import Busy, PersonaError

MAX_RETRY_SECONDS = 60
CAPTURE = range(900, 909)  # cudaErrorStreamCapture…: of a recording that came to nothing, the device is well
log = structlog.get_logger("engine")


def failed(job: int, error: PersonaError) -> Failed:
    retry = error.retry_after if isinstance(error, Busy) else 0
    return Failed(job, type(error).__name__, error.message, error.code, retry)


def crowded(wait: float) -> Busy:
    """wait: seconds until a turn would come."""
    seconds = max(1, math.ceil(min(wait, MAX_RETRY_SECONDS)))
    return Busy(f"Too many requests are waiting; try again in {seconds} seconds.", retry_after=seconds)


def trouble(error: Exception | None) -> PersonaError:
    """What a failed load is to those who wait for it: other failures than a bad file are not the adapter's fault."""
    if isinstance(error, PersonaError):
        return error
    log.error("adapter not loaded", kind=type(error).__name__, reason=cause(error) if error else "")
    return Busy("The adapter could not be loaded now; try again later.", retry_after=10)


def fatal(error: BaseException) -> bool:
    """Whether the device itself is lost to this process, as after a fault in a kernel: only a new process helps."""
    if not isinstance(error, torch.AcceleratorError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return getattr(error, "error_code", None) not in CAPTURE


def starved(error: BaseException) -> bool:
    """Whether memory ran out; torch's CPU allocator says so in words only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)  # its error is a RuntimeError, in other words on each system


def cause(error: BaseException) -> str:
    """The system's own words for a failure: never user text."""
    if isinstance(error, OSError):
        return f"{error.strerror}."
    return "out of memory, or a fault in the computation; serving goes on."
