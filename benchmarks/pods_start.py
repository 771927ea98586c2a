"""From the start of the containers until values-many.yaml serves: `helm install` without scheduler and pulled images.

    python -m benchmarks.pods_start [--rounds 3]

All pods of the release at once, as processes in the shape of pods (root is needed): three members of etcd, two pods of
each role, four ranks of the demo model. Seconds until a gateway is ready (its Service serves) and until all pods are,
and seconds of processors of each role until then. The kubelet looks every two seconds; this looks more often.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter

import psutil

from elastic.demo.model import shipped_demo_model
from tests.support.pods import MEMBERS, ROLES, Pods, made_pods

POLL_S = 0.25
LIMIT_S = 600.0
VALUES = "values-many.yaml"


def start(pods: Pods) -> tuple[dict[str, float], Counter[str]]:
    """Seconds until each pod was ready, and those of processors by role. What ends is started again, as in a pod."""
    hosts = [*MEMBERS, *(f"{role}-{n}" for n in range(2) for role in ROLES)]
    begun = time.monotonic()
    for host in hosts:
        pods.start(host)
    ready: dict[str, float] = {}
    while len(ready) < len(hosts):
        for host in hosts:
            if pods.ready(host):
                ready.setdefault(host, time.monotonic() - begun)
        if time.monotonic() - begun > LIMIT_S:
            missing = ", ".join(sorted({*hosts} - {*ready}))
            raise TimeoutError(f"not ready within {LIMIT_S:g} s: {missing}")
        time.sleep(POLL_S)
    if pods.restarts:
        print(f"         started again after they had ended: {dict(pods.restarts)}")
    spent: Counter[str] = Counter()
    for host in hosts:
        spent[host.rpartition("-")[0]] += processor_s(pods.running[host].pid)
    return ready, spent


def processor_s(pid: int) -> float:
    """Of a container's first process and all below it, those that have ended too."""
    first = psutil.Process(pid).parent() or psutil.Process(pid)  # init containers ended below its parent
    return sum(sum(each.cpu_times()[:4]) for each in (first, *first.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    serving, whole = [], []
    for number in range(rounds):
        with made_pods(shipped_demo_model(), VALUES) as pods:
            ready, spent = start(pods)
        serving.append(min(ready[f"gateway-{n}"] for n in range(2)))
        whole.append(max(ready.values()))
        shown = ", ".join(f"{host} {at:.1f}" for host, at in sorted(ready.items(), key=lambda item: item[1]))
        print(f"round {number + 1}: ready after s: {shown}")
        print("         processors, s: " + ", ".join(f"{role} {each:.1f}" for role, each in spent.most_common()))
    print(
        f"serving after {statistics.median(serving):.1f} s, all ready after {statistics.median(whole):.1f} s (medians)"
    )


if __name__ == "__main__":
    sys.exit(main())
