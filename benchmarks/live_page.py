"""What the live page costs: a look at the cluster in the gateway, and frames in a browser that draws 1,000 ranks.

`python -m benchmarks.live_page [--browser [--picture FILE]]`. The gateway's part compares a look of the page with a
status of a view that is new, in turn, and prints the ratio. The browser's part needs chromium and selenium.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from msgspec.structs import replace

from elastic.gateway.live import LiveDocument, merge_patch
from elastic.gateway.page import with_page
from elastic.status import cluster_status
from membership.placement.plan import plan
from membership.store.records import (
    AgentRecord,
    Assignment,
    ClusterConfig,
    ClusterState,
    Desired,
    EngineRecord,
    EngineStatus,
    ExpertLoad,
    Member,
    RankRecord,
    RankSpec,
    RankState,
    View,
)

SHAPES = ((4, 4, 8), (64, 58, 256), (256, 58, 256))  # ranks, MoE layers, experts
LOOKS = 20
MANY, LAYERS, EXPERTS = 1000, 4, 512
FRAMES_S = 10
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
MEASURE = """
const done = arguments[1], ends = performance.now() + 1000 * arguments[0], frames = []; let last = performance.now();
const step = (at) => { frames.push(at - last); last = at; at < ends ? requestAnimationFrame(step) : done(frames); };
requestAnimationFrame(step);
"""


def state_of(ranks: int, layers: int, experts: int) -> ClusterState:
    """A cluster that is well, with measured loads."""
    members = tuple(Member(rank=rank, node=f"host-{rank // 8}", incarnation=rank + 1) for rank in range(ranks))
    specs = tuple(RankSpec(rank=m.rank, incarnation=m.incarnation) for m in members)
    nodes = sorted({m.node for m in members})
    placement = plan(layers, experts, range(ranks), 2.0)
    return ClusterState(
        revision=1,
        config=ClusterConfig(
            cluster="bench", model="/m", served_model_name="m", moe_layers=layers, experts=experts, max_ranks=ranks
        ),
        desired=Desired(ranks=ranks, slots=tuple(range(ranks))),
        view=View(epoch=1, members=members, placement=placement),
        engine=EngineRecord(node="host-0", pid=1, address="a", broadcast_handle=b"", mask_handle=b""),
        engine_token=1,
        engine_status=EngineStatus(token=1, epoch=1),
        expert_load=ExpertLoad(at=1.0, loads=(tuple(8 + e % 17 for e in range(experts)),) * layers),
        agents={node: AgentRecord(node=node, pid=1, started=1.0) for node in nodes},
        assignments={
            node: Assignment(
                node=node,
                agent_started=1.0,
                ranks=tuple(s for s, m in zip(specs, members, strict=True) if m.node == node),
            )
            for node in nodes
        },
        ranks={
            m.id: RankRecord(rank=m.rank, node=m.node, incarnation=m.incarnation, pid=9, state=RankState.STANDBY)
            for m in members
        },
    )


def looks() -> None:
    """Time a look that finds nothing new, and a status of a view that was not seen before, in turn."""
    for shape in SHAPES:
        state, document = state_of(*shape), LiveDocument()
        shown = document.of(state, 1.0, "")
        page: list[float] = []
        whole: list[float] = []
        for number in range(LOOKS):
            document.of(state, 1.0, "")  # the other side's view is remembered no longer
            begun = time.process_time()
            fresh = document.of(replace(state, revision=number), 1.0 + number, "")
            patch = merge_patch(shown, fresh)
            page.append(time.process_time() - begun)
            if patch:
                raise SystemExit(f"nothing changed, but the page would be sent {patch}")
            another = replace(state, view=replace(state.view or View(epoch=0), epoch=2 + number))
            begun = time.process_time()
            cluster_status(another, 1.0)
            whole.append(time.process_time() - begun)
        a, b = statistics.median(page) * 1000, statistics.median(whole) * 1000
        print(f"{shape[0]:4} ranks x {shape[1]:2} layers x {shape[2]:3} experts: a look {a:6.2f} ms "
              f"({a / 10:.2f} % of a core at one a second), a status anew {b:6.2f} ms, ratio {b / a:.1f}")  # fmt: skip


def many_ranks() -> FastAPI:
    """An admin port whose stream has 1,000 ranks; ten times a second some of them die or come back."""
    app = FastAPI()
    first = LiveDocument().of(state_of(MANY, LAYERS, EXPERTS), 1.0, "")

    async def stream() -> AsyncIterator[bytes]:
        yield message("begin", {"now": time.time()})
        yield message("patch", first)
        for turn in range(10_000):
            await asyncio.sleep(0.1)
            ranks = {str((turn * 37 + k * 101) % MANY): {"state": ("dead", "serving")[turn % 2]} for k in range(10)}
            yield message("patch", {"ranks": ranks})

    @app.get("/admin/v1/stream")
    async def answer() -> StreamingResponse:
        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


def message(kind: str, data: Any) -> bytes:
    """One server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(data))


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Its address, while it is served."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30.0)


def frames(picture: str) -> None:
    """Times between frames of a browser: of an empty page, and of 1,000 ranks."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as folder, served(with_page(many_ranks())) as url:
        for flag in (*FLAGS, f"--user-data-dir={folder}", "--window-size=1320,1000"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            browser.set_script_timeout(60)
            browser.get(f"{url}/ui")
            report("sign-in page", browser.execute_async_script(MEASURE, FRAMES_S))
            field = browser.find_element("id", "token")
            field.send_keys("x\n")
            time.sleep(3)
            report(f"{MANY} ranks", browser.execute_async_script(MEASURE, FRAMES_S))
            if picture:
                browser.save_screenshot(picture)
        finally:
            browser.quit()


def report(what: str, found: list[float]) -> None:
    """Their median, 99th percentile and worst."""
    order = sorted(found)
    late = order[int(0.99 * (len(order) - 1))]
    middle = statistics.median(order)
    print(f"{what:14}: {len(order)} frames, median {middle:.1f} ms, p99 {late:.1f}, worst {order[-1]:.1f}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", action="store_true", help="also time frames of 1,000 ranks in chromium")
    parser.add_argument("--picture", default="", metavar="FILE", help="where to put a screenshot of them")
    chosen = parser.parse_args()
    looks()
    if chosen.browser:
        frames(chosen.picture)


if __name__ == "__main__":
    main()
