"""Faults injected by a TcpProxy, proven twice: by a probe through the proxy and by the proxy's own counters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol, runtime_checkable

from chaos.faults.base import Fault, Injector, NotInjected, Params, Site, poll, see
from chaos.faults.probe import PROBE_TIMEOUT_S, Answer, ask
from chaos.faults.proxy import Counters, Faults, TcpProxy, Way

PROOF_TIMEOUT_S = 10.0
LEAST_TRANSFER_S = 0.05  # a shorter answer says nothing about bandwidth
SHARE = 0.8  # of a requested delay must be measured: a busy machine makes probes slower, never faster

HOLE = Way(hole=True)
SETTINGS: dict[str, tuple[str, Faults]] = {
    "net-delay": ("50 ms more per round trip", Faults(up=Way(delay_s=0.025), down=Way(delay_s=0.025))),
    "net-jitter": (
        "20 to 120 ms more per round trip",
        Faults(up=Way(delay_s=0.01, jitter_s=0.05), down=Way(delay_s=0.01, jitter_s=0.05)),
    ),
    "net-slow": ("200 kB/s", Faults(down=Way(bytes_per_s=200_000), up=Way(bytes_per_s=200_000))),
    "net-loss": ("every fifth packet lost, as TCP shows it", Faults(up=Way(loss=0.2), down=Way(loss=0.2))),
    "net-black-hole": ("nothing passes, and no error is reported", Faults(up=HOLE, down=HOLE)),
    "net-deaf": ("what is asked arrives, answers do not", Faults(down=HOLE)),
    "net-mute": ("what is asked does not arrive", Faults(up=HOLE)),
    "net-reset": ("every connection is reset, each new one too", Faults(reset=True)),
    "net-refuse": ("connections are reset, new ones refused", Faults(refuse=True, reset=True)),
    "net-cut": ("connections end in the middle of an answer", Faults(down=Way(cut_after=64))),
}


@runtime_checkable
class Proxied(Protocol):
    """A site with proxies before some of its servers: victim -> proxy."""

    proxies: Mapping[str, TcpProxy]


class ProxyFault(Injector):
    """One set of faults of one proxy. `path`: what to ask the server for to see that it happened."""

    def __init__(
        self, proxy: TcpProxy, fault: str, victim: str, faults: Faults | None = None, path: str = "/metrics"
    ) -> None:
        super().__init__(victim)
        self.fault, self._proxy, self._path = fault, proxy, path
        self._faults = faults or SETTINGS[fault][1]
        self._before = Answer(seconds=0.0)

    def _prepare(self) -> None:
        self._before = self._ask()
        if self._before.error:
            raise NotInjected(f"{self.victim} does not answer through the proxy as it is: {self._before}")

    def _inject(self) -> str:
        counted, after = self._proxy.counters(), self._before
        self._proxy.set(self._faults)

        def proof() -> str:
            nonlocal after
            still, after = self._proxy.counters(), self._ask()
            return shown(self._faults, self._before, after, counted, still, self._proxy.counters())

        if found := poll(proof, PROOF_TIMEOUT_S, 0.0):
            return found
        raise NotInjected(f"{self.fault} was not felt through the proxy: {self._before} before, {after} after")

    def _heal(self) -> None:
        self._proxy.set(Faults())
        see(lambda: not self._ask().error, f"{self.victim} answering through the healed proxy", PROOF_TIMEOUT_S)

    def _ask(self) -> Answer:
        return ask(self._proxy.url + self._path, PROBE_TIMEOUT_S)


def shown(faults: Faults, before: Answer, after: Answer, counted: Counters, still: Counters, now: Counters) -> str:
    """The proof that the faults happened, in words; "" if there is none. Pure.

    `counted`: the counters before the faults were set. `still`: before the last probe, because bytes that were under
    way when the faults were set may still pass.
    """
    up, down = faults.up, faults.down
    felt = f"a round trip through the proxy: {before} before, {after} after"
    if faults.refuse:
        return f"{felt}" if after.error == "ConnectionRefusedError" else ""
    if faults.reset:
        resets = now.reset - counted.reset
        return f"{felt}; {resets} resets" if "Reset" in after.error and resets else ""
    if up.hole or down.hole:
        passed = (now.up - still.up) * up.hole + (now.down - still.down) * down.hole
        return f"{felt}; no byte passed" if after.error == "TimeoutError" and not passed else ""
    if up.cut_after is not None or down.cut_after is not None:
        cuts = now.cut - counted.cut
        return f"{felt}; {cuts} connections cut" if after.error and cuts else ""
    if after.error:
        return ""
    asked_s = up.delay_s + down.delay_s
    stalled = now.stalled - counted.stalled
    if up.loss or down.loss:
        asked_s += min(way.stall_s for way in (up, down) if way.loss)
    if down.bytes_per_s:
        transfer_s = after.size / down.bytes_per_s
        asked_s += transfer_s if transfer_s > LEAST_TRANSFER_S else float("inf")
    slow = after.seconds - before.seconds >= SHARE * asked_s > 0
    if not slow or ((up.loss or down.loss) and not stalled):
        return ""
    return f"{felt}; {stalled} pieces late" if stalled else felt


def _make(fault: str, site: Site, victim: str, params: Params) -> Injector:
    if not isinstance(site, Proxied) or victim not in site.proxies:
        raise NotInjected(f"there is no proxy before the {victim}", hint="see chaos.faults.members.ProxiedSite")
    return ProxyFault(site.proxies[victim], fault, victim)


FAULTS = {
    name: Fault(
        about=f"between clients and the server: {about}", victims=("etcd", "gateway"), heals=True,
        make=partial(_make, name), needs=("a proxy before the victim",),
    )
    for name, (about, _) in SETTINGS.items()
}  # fmt: skip
