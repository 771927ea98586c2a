"""Clients of a service of the demo's model that stream for as long as something is done to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import httpx

from tests.support.helpers import eventually

TOKENS = 60
REST_S = 1.0  # of a client between two answers: pods that start need the processor, too
ANSWER_S = 180.0


def client() -> httpx.Client:
    """One for many questions: each new one would read the certificates of all authorities, of which none is asked."""
    return httpx.Client(verify=False, trust_env=False)


class Streams:
    """Clients that stream one answer after the other; `failed` is what a client saw instead of a whole one."""

    def __init__(self, url: str | Callable[[], str], clients: int, key: str = "") -> None:
        """`url`: where each answer is asked for, if a Service would choose anew each time."""
        self._url, self._stop = url, threading.Event()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.whole, self.failed = 0, list[str]()
        self._threads = [threading.Thread(target=self._run, name=f"client-{number}") for number in range(clients)]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=180.0)
            assert not thread.is_alive(), "a client waits for ever"

    def go_on(self) -> None:
        """Wait until each client has had another whole answer, begun from now on or before."""
        wanted = self.whole + 2 * len(self._threads)
        eventually(lambda: self.whole >= wanted or self.failed, ANSWER_S, "answers after that")

    def _run(self) -> None:
        with client() as asking:
            while not self._stop.is_set():
                try:
                    self._ask(asking)
                except (AssertionError, httpx.HTTPError) as error:
                    self.failed.append(repr(error))
                    return
                self.whole += 1
                self._stop.wait(REST_S)

    def _ask(self, asking: httpx.Client) -> None:
        body = {
            "model": "demo-moe", "prompt": "The", "max_tokens": TOKENS, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        at = self._url if isinstance(self._url, str) else self._url()
        with asking.stream(
            "POST", f"{at}/v1/completions", json=body, headers=self._headers, timeout=ANSWER_S
        ) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1]
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == TOKENS
