"""Writes out the small trained MoE checkpoint that the demo serves; it ships inside the package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from membership.base.errors import ConfigError

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def write_demo_model(directory: Path, *, retrain: bool = False, report: Callable[[str], None] = lambda _: None) -> None:
    """Write the checkpoint to `directory`, from the package or (minutes) trained anew; `report` gets progress lines."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not an empty directory", hint="name a new directory")
    if retrain:
        from elastic.demo.training import train

        train(directory, report)
        return
    directory.mkdir(parents=True, exist_ok=True)
    shipped = resources.files("elastic.demo").joinpath("checkpoint")
    for name in FILES:
        with shipped.joinpath(name).open("rb") as source, (directory / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    report(f"wrote {len(FILES)} files to {directory}")


def shipped_demo_model() -> Path:
    """Where the installed package keeps the checkpoint, to serve it in place."""
    found = Path(str(resources.files("elastic.demo").joinpath("checkpoint")))
    if not (found / "config.json").is_file():
        raise ConfigError("the demo checkpoint is not installed", hint="run `elastic demo-model DIR --retrain`")
    return found
