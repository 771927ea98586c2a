"""Why an etcd ended at its start is said by its log, before a stack of calls."""

from __future__ import annotations

import pytest

from elastic.serve.etcd_server import fatal

pytestmark = pytest.mark.unit

WARNING = '{"level":"warn","msg":"failed to preallocate an initial WAL file","error":"no space left on device"}'
PANIC = '{"level":"panic","caller":"raft.go:433","msg":"failed to create WAL","error":"no space left on device"}'
STACK = ["", "goroutine 1 [running]:", "main.main()", "\t/tmp/etcd/server/main.go:32 +0x45"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([WARNING, PANIC, "panic: failed to create WAL", *STACK], "failed to create WAL: no space left on device"),
        (['{"level":"fatal","msg":"discovery failed"}'], "discovery failed"),
        (["panic: failed to create WAL", *STACK], "panic: failed to create WAL"),
        (["fatal error: runtime: out of memory", *STACK], "fatal error: runtime: out of memory"),
        ([WARNING, "[1]", "etcd: unknown flag"], ""),
        ([], ""),
    ],
)
def test_the_line_that_says_why(lines: list[str], why: str) -> None:
    assert fatal(lines) == why
