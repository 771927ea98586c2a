"""What follows when a rank's device fails it: the work may be tried again, or the process has to end.

A device that is lost takes no more work from this process. A lack of memory is no such thing: what torch holds in
reserve is given back, and the step runs again; rows of peers are refused, and go elsewhere. If the next one lacks
memory, too, or if a rank that does not serve yet cannot load, it ends with that reason; after several such ends in a
row its slot is set aside (`agent/exits.py`), since a new process needs as much. A rank that serves and cannot load more
keeps what it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from membership.base.errors import DeviceFull, DeviceLost, OutOfDeviceMemory

if TYPE_CHECKING:
    from workers.model.backend import Backend

MOST_SHORT = 2  # steps in a row, or answers to peers, for which there was too little memory
WHAT_TO_CHANGE = "lower --kv-cache-memory or --kv-blocks, --max-model-len or --redundancy, or use more GPUs"


class DeviceHealth:
    """Of one rank process. `beside` may be called in any thread, all else in the main one."""

    def __init__(self) -> None:
        self._short = 0
        self._refusal: BaseException | None = None  # for want of memory, since the last answer to peers
        self._refusals = 0  # answers in a row with one
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

    def refused(self, backend: Backend | None, error: BaseException) -> None:
        """Rows were refused for this. See `answered`; `require`, if the device is lost."""
        try:
            if _lacks_memory(backend, error):
                self._refusal = error
        except DeviceLost as lost:
            self._ending = lost

    def answering(self) -> None:
        """What peers have asked for is answered next. Lacks within steps, which replicas made good, do not count."""
        self._refusal = None

    def answered(self) -> None:
        """What peers had asked for beside a step is answered. DeviceFull, if they are refused for want of memory."""
        refusal, self._refusal = self._refusal, None
        self._refusals = self._refusals + 1 if refusal is not None else 0
        if refusal is not None and self._refusals == MOST_SHORT:
            raise _full(refusal) from refusal

    def require(self) -> None:
        """DeviceLost, if the process has to end for what `beside` found."""
        if self._ending is not None:
            raise self._ending


def _lacks_memory(backend: Backend | None, error: BaseException) -> bool:
    """DeviceLost, if nothing else will do either. What was raised may only wrap what the device said."""
    cause: BaseException | None = error
    while cause is not None:
        if (backend is not None and backend.check(cause)) or isinstance(cause, OutOfDeviceMemory):
            return True
        cause = cause.__cause__
    return False


def _full(error: BaseException) -> DeviceFull:
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return DeviceFull(f"out of device memory: {said}; {WHAT_TO_CHANGE}")
