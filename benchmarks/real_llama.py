"""llama.cpp beside ours: what runs in its process (`real_aside.py`), and what it takes to have it.

Its wheels need a compiler, or have no kernels for bf16. Built with them for many processors it comes in an npm package,
and the C declarations of the same state of llama.cpp in one of PyPI. Neither is a dependency of the project:

    pip install gguf cffi && pip install --no-deps llama-cpp-py-sync==0.11413
    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    export LLAMA_CPP_DIR=$PWD/package/bins/linux-x64
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gguf_file import write
from benchmarks.real_aside import CONTEXT

DIRECTORY = "LLAMA_CPP_DIR"
READY_S = 3600.0  # with the writing of its file
MOST_STEPS = 992  # that a stream has room for
ERROR_LEVEL = 4
TOGETHER = 512  # tokens of a prompt, as it cuts them unless told otherwise


def missing() -> str:
    """What is not installed, or nothing."""
    absent = [name for name in ("gguf", "cffi", "llama_cpp_py_sync") if importlib.util.find_spec(name) is None]
    if absent:
        return f"no package {', '.join(absent)} (see benchmarks/real_llama.py)"
    directory = os.environ.get(DIRECTORY)
    if directory is None or not list(Path(directory).glob("libllama.*so*")):
        return f"{DIRECTORY} does not name a directory with libllama (see benchmarks/real_llama.py)"
    return ""


class Llama:
    """The library with a model in it."""

    def __init__(self, file: Path, threads: int) -> None:
        directory = Path(os.environ[DIRECTORY])
        ffi = importlib.import_module("cffi").FFI()
        ffi.cdef("void ggml_backend_load_all_from_path(const char *);")
        (ggml,), (library,) = (list(directory.glob(f"lib{name}.*so*")) for name in ("ggml", "llama"))
        # Which kernels it has is chosen by processor, from the files beside it.
        ffi.dlopen(str(ggml), ffi.RTLD_NOW | ffi.RTLD_GLOBAL).ggml_backend_load_all_from_path(bytes(directory))
        self._ffi = importlib.import_module("llama_cpp_py_sync._cffi_bindings").ffi
        self._lib = lib = self._ffi.dlopen(str(library))
        self._threads = threads
        self._log = self._ffi.callback("void(enum ggml_log_level, const char *, void *)", _log(self._ffi))
        lib.llama_log_set(self._log, self._ffi.NULL)
        lib.llama_backend_init()
        known = lib.llama_context_default_params()
        if (known.n_batch, known.n_ubatch, known.type_k, known.offload_kqv, known.n_samplers) != (
            2048,
            512,
            1,
            True,
            0,
        ):
            raise RuntimeError("the declarations of llama.cpp are of another version than its library")
        self._model = lib.llama_model_load_from_file(bytes(file), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {file}")

    def context(self, streams: int, longest: int) -> Any:
        """Room for the keys and values of so many streams."""
        wanted = self._lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = streams * longest, streams
        wanted.n_ubatch = TOGETHER
        wanted.n_threads = wanted.n_threads_batch = self._threads
        made = self._lib.llama_init_from_model(self._model, wanted)
        if not made:
            raise RuntimeError(f"llama.cpp has no context for {streams} streams of {longest} tokens")
        return made

    def run(self, context: Any, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One step of (token, position, stream, whether its logits are wanted), done at return."""
        lib = self._lib
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for row, (token, position, stream, wanted) in enumerate(tokens):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, stream
        code = lib.llama_decode(context, batch)
        lib.llama_synchronize(context)
        lib.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode says {code}")

    def free(self, context: Any) -> None:
        """Give a context's memory back."""
        self._lib.llama_free(context)

    @contextmanager
    def alone(self, longest: int) -> Iterator[Any]:
        """A context of one stream."""
        made = self.context(1, longest)
        try:
            yield made
        finally:
            self.free(made)


def _log(ffi: Any) -> Callable[[int, Any, Any], None]:
    """Only its errors are told: it says a page about each context."""

    def told(level: int, text: Any, _: Any) -> None:
        if level == ERROR_LEVEL:
            sys.stderr.write(ffi.string(text).decode())

    return told


def model_file(checkpoint: Path, write: Callable[[Path, Path], None] = write) -> Path:
    """This very checkpoint's file beside it, written if it is not there whole; of another one that was there, none."""
    made_of = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.glob("*.safetensors")]
    named = hashlib.sha256(f"{sorted(made_of)}".encode()).hexdigest()[:16]
    file = checkpoint / f"llama-cpp-{named}.gguf"
    if not file.exists():
        for old in checkpoint.glob("llama-cpp-*"):
            old.unlink()
        part = file.with_suffix(".part")
        write(checkpoint, part)
        part.rename(file)
    return file


def llama_main(pipe: Connection, path: str, threads: int) -> None:
    """Write the model's file where there is none, load it, then measure what is asked for."""
    llama, chance = Llama(model_file(Path(path)), threads), random.Random(0)
    contexts: dict[int, tuple[Any, int]] = {}  # of each number of streams: its context, and how many tokens are in it
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        streams, steps, tokens = asked
        found = []
        if not streams:
            with llama.alone(len(tokens)) as context:
                began = time.perf_counter()
                llama.run(context, [(token, at, 0, at == len(tokens) - 1) for at, token in enumerate(tokens)])
                found.append(time.perf_counter() - began)
            pipe.send(found)
            continue
        context, length = contexts.get(streams) or (_begun(llama, streams, chance), CONTEXT)
        for at in range(length, length + steps):
            began = time.perf_counter()
            llama.run(context, [(chance.randrange(1000), at, stream, True) for stream in range(streams)])
            found.append(time.perf_counter() - began)
        contexts[streams] = context, length + steps
        pipe.send(found)


def _begun(llama: Llama, streams: int, chance: random.Random) -> Any:
    context = llama.context(streams, CONTEXT + MOST_STEPS)
    for stream in range(streams):
        llama.run(context, [(chance.randrange(1000), at, stream, False) for at in range(CONTEXT)])
    return context
