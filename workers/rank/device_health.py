"""What follows when a rank's device fails it: the work may be tried again, or the process has to end.

A device that is lost takes no more work from this process. A lack of memory is no such thing: what torch holds in
reserve is given back, and the step runs again. If that lacks memory, too, or if a rank that does not serve yet cannot
load, it ends with that reason; after several such ends in a row its slot is set aside (`agent/exits.py`), since a new
process needs as much. A rank that serves and cannot load more keeps what it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from membership.base.errors import DeviceFull, DeviceLost, OutOfDeviceMemory

if TYPE_CHECKING:
    from workers.model.backend import Backend

MOST_SHORT = 2  # steps in a row for which there was too little memory
WHAT_TO_CHANGE = "lower --kv-cache-memory or --kv-blocks, --max-model-len or --redundancy, or use more GPUs"


class DeviceHealth:
    """Of one rank process. `beside` may be called in any thread, all else in the main one."""

    def __init__(self) -> None:
        self._short = 0
        self._ending: DeviceLost | None = None

    def step_done(self) -> None:
        """A step has gone well."""
        self._short = 0

    def in_step(self, backend: Backend | None, error: BaseException) -> None:
        """A step has failed with this. It may run again, unless DeviceLost is raised."""
        self._short = self._short + 1 if _lacks_memory(backend, error) else 0
        if self._short == MOST_SHORT:
            raise _full(error) from error

    def beside(self, backend: Backend | None, error: BaseException, *, serving: bool) -> None:
        """Work beside a step has failed with this, or a load. If the process has to end, `require` says so."""
        try:
            if _lacks_memory(backend, error) and not serving:
                raise _full(error) from error
        except DeviceLost as lost:
            self._ending = lost

    def require(self) -> None:
        """DeviceLost, if the process has to end for what `beside` found."""
        if self._ending is not None:
            raise self._ending


def _lacks_memory(backend: Backend | None, error: BaseException) -> bool:
    """DeviceLost, if nothing else will do either."""
    short = backend.check(error) if backend is not None else False
    return short or isinstance(error, OutOfDeviceMemory)


def _full(error: BaseException) -> DeviceFull:
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return DeviceFull(f"out of device memory: {said}; {WHAT_TO_CHANGE}")
