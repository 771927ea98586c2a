"""A rendered pod as a process in its shape, without Kubernetes: its command as pid 1 of a PID namespace, its user
without an entry in passwd, its environment and nothing of ours, a read-only root, and emptyDirs that are root's with
mode 2777; its init containers run before. The network is the host's, unless it is given a namespace of its own. Needs
root.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import ROOT
from tests.support.helpers import eventually

SYSTEM = ("/usr", "/bin", "/lib", "/lib64")
PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin"
SECRET_MODE = 0o440
DIES_WITH_US = ("setpriv", "--pdeathsig=KILL")  # again after a change of the user, which clears it


def _may() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    tried = ["unshare", "--mount", "--pid", "--fork", "mount", "--make-rprivate", "/"]
    return subprocess.run(tried, capture_output=True, timeout=30).returncode == 0


NEEDS_NAMESPACES = pytest.mark.skipif(not _may(), reason="only root may make mount and PID namespaces")


class Pod:
    """One pod of a StatefulSet. `start` and `kill` are what the kubelet does to its container."""

    def __init__(
        self,
        template: dict[str, Any],
        name: str,
        folder: Path,
        *,
        address: str = "",
        inside: Sequence[str] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        """`folder`: of its volumes, which last as long as the pod. `inside`: what runs a command at `address`.

        `names`: the addresses of what the cluster's DNS knows.
        """
        self._names = dict(names or {})
        self._spec, self.name, self._folder = template["spec"], name, folder
        self._claims = folder.parent / "claims"  # of PersistentVolumes, which outlast pods
        self.address, self._inside = address, inside
        self.container: dict[str, Any] = self._spec["containers"][0]
        self.grace_s = float(self._spec["terminationGracePeriodSeconds"])
        self._process: subprocess.Popen[bytes] | None = None
        self.output = folder / "output"
        folder.mkdir(parents=True)
        group = self._spec["securityContext"]["fsGroup"]
        for volume in self._spec["volumes"]:
            if "emptyDir" in volume or "persistentVolumeClaim" in volume:
                directory = self._source(volume)
                directory.mkdir(parents=True, exist_ok=True)
                os.chown(directory, 0, group)
                directory.chmod(0o2777)
            for key, value in volume.get("secret", {}).get("data", {}).items():
                self.put_secret(volume["name"], key, value)

    def put_secret(self, volume: str, key: str, value: str) -> None:
        """What the kubelet makes of a Secret that was made or changed: the file is replaced by another one."""
        directory = self._folder / volume
        directory.mkdir(exist_ok=True)
        draft = directory / f".{key}"
        draft.write_text(value)
        os.chown(draft, 0, self._spec["securityContext"]["fsGroup"])
        draft.chmod(SECRET_MODE)
        draft.rename(directory / key)

    def _source(self, volume: dict[str, Any]) -> Path:
        """Where it is on the host."""
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        claim = volume.get("persistentVolumeClaim")
        return self._claims / claim["claimName"] if claim else self._folder / volume["name"]

    @property
    def environment(self) -> dict[str, str]:
        """As rendered; of the downward API, what each pod has, and what its container asks for or may have."""
        return self._environment(self.container)

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        return {"PATH": PATH, **{each["name"]: self._value(each) for each in container["env"]}}

    @property
    def _fields(self) -> dict[str, str]:
        """Of the pod's object. Each is on a node of its own, in one of two zones in turn."""
        zone = f"zone-{self.name[-1:]}" if self.address else ""
        return {
            "metadata.name": self.name, "status.podIP": self.address, "spec.nodeName": f"node-of-{self.name}",
            "metadata.labels['topology.kubernetes.io/zone']": zone,
        }  # fmt: skip

    def _value(self, variable: dict[str, Any]) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "fieldRef" in source:
            return self._fields[source["fieldRef"]["fieldPath"]]
        which, resource = source["resourceFieldRef"]["resource"].split(".")
        quantity = str(self.container["resources"][which][resource])
        return str(math.ceil(int(quantity[:-1]) / 1000) if quantity.endswith("m") else math.ceil(float(quantity)))

    def start(self) -> None:
        """Start the container, once each of the init containers has ended well."""
        apart = [*DIES_WITH_US, "unshare", "--mount", "--pid", "--fork", "sh", "-ec"]
        first = [shlex.join([*apart, self._script(each)]) for each in self._spec.get("initContainers", ())]
        all_of_it = "\n".join([*first, f"exec {shlex.join([*apart, self._script(self.container)])}"])
        command = [*DIES_WITH_US, *self._inside, "sh", "-ec", all_of_it]
        with self.output.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={"PATH": os.environ["PATH"]}
            )

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec` does."""
        target = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--root", "--wd"]
        return subprocess.run(
            [*target, *self._as_user(command)], capture_output=True, text=True, timeout=120, env=self.environment
        )

    @property
    def pid(self) -> int:
        """Of its first process, as the host sees it."""
        return eventually(self._first, 30.0, "the container to start").pid

    def _first(self) -> psutil.Process | None:
        """None if it has not begun, or has ended."""
        assert self._process is not None
        return next(iter(psutil.Process(self._process.pid).children()), None)

    def signal(self, number: signal.Signals) -> None:
        """Send it to the first process."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Its exit status, once all of it has ended."""
        assert self._process is not None
        return self._process.wait(timeout=timeout_s)

    def ended(self) -> bool:
        """Whether all of it has ended."""
        return self._process is not None and self._process.poll() is not None

    def close(self) -> None:
        """Kill it: all of a PID namespace ends with its first process, then `unshare`. It may end by itself."""
        if self._process is not None:
            eventually(self._killed, 30.0, f"{self.name} to end")

    def _killed(self) -> bool:
        if not self.ended() and (first := self._first()):
            with suppress(psutil.NoSuchProcess):
                first.kill()
        return self.ended()

    def lines(self) -> list[str]:
        """The lines that it wrote so far, as `kubectl logs` shows them; not one that is still being written."""
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def _script(self, container: dict[str, Any]) -> str:
        root = self._folder / "root"
        readable = [*SYSTEM, sys.base_prefix, str(ROOT)]
        binds = [(each, f"{root}{each}", "ro") for each in dict.fromkeys(readable) if Path(each).exists()]
        sources = {each["name"]: each for each in self._spec["volumes"]}
        for mount in container["volumeMounts"]:
            source = str(self._source(sources[mount["name"]]))
            binds.append((source, f"{root}{mount['mountPath']}", "ro" if mount.get("readOnly") else "rw"))
        q = shlex.quote
        lines = [
            "mount --make-rprivate /", f"mkdir -p {q(str(root))}", f"mount -t tmpfs none {q(str(root))}",
            f"mkdir -p {q(str(root))}/proc {q(str(root))}/dev {q(str(root))}/sys",
            f"mount -t proc proc {q(str(root))}/proc", f"mount --rbind /dev {q(str(root))}/dev",
            f"mount --rbind /sys {q(str(root))}/sys",
            f"cp -a /etc {q(str(root))}",  # not mounted: Secrets are, below it
            *(f"echo {address} {name} >> {q(str(root))}/etc/hosts" for name, address in self._names.items()),
        ]  # fmt: skip
        for source, target, how in sorted(binds, key=lambda bind: bind[1]):  # a checkout in /tmp lies in a volume
            lines += [f"mkdir -p {q(target)}", f"mount --bind {q(source)} {q(target)}"]
            lines += [f"mount -o remount,bind,ro {q(target)}"] if how == "ro" else []
        lines.append(f"mount -o remount,ro {q(str(root))}")
        environment = self._environment(container)
        given = [*container["command"], *container.get("args", ())]
        expanded = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], each) for each in given]
        inside = ["env", "-i", *(f"{key}={value}" for key, value in environment.items()), *self._as_user(expanded)]
        return "\n".join([*lines, f"exec chroot {q(str(root))} {shlex.join(inside)}"])

    def _as_user(self, command: Sequence[str]) -> list[str]:
        context = self._spec["securityContext"]
        user, groups = context["runAsUser"], context["fsGroup"]
        return [
            *DIES_WITH_US, f"--reuid={user}", "--regid=0", f"--groups={groups}", "--no-new-privs", "--inh-caps=-all",
            "--bounding-set=-all", *command,
        ]  # fmt: skip
