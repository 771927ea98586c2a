"""Can this checkpoint be served? One answer for every command that takes a MODEL, before a process is started.

From JSON, safetensors headers and the tokenizer alone: no torch, no weights, a second for the largest ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from membership.base.errors import ElasticError, ModelError
from workers.model.families import ModelInfo, read_config, read_model_info
from workers.model.tensors import check_tensors
from workers.model.text_files import DAMAGED_HINT, chat_templates, sampling_defaults, tokenizer_settings

# What a value of another type than any checkpoint has leads to, where nothing looks for it.
UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. `level` is ok, warn or fail; `hint` says what to do about it."""

    what: str
    level: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Checked:
    """What the checks of a checkpoint found. Without `info` it could not even be read."""

    info: ModelInfo | None
    findings: tuple[Finding, ...]


def check_model(directory: Path) -> Checked:
    """Look at all that can be seen without computing; nothing raises."""
    found: list[Finding] = []
    info: ModelInfo | None = None
    try:
        info = read_model_info(directory)
        found.append(Finding("model", "ok", _summary(info)))
    except (ModelError, OSError) as error:
        found.append(_failure("model", error))
    except UNFORESEEN as error:
        found.append(_failure("model", error, "config.json"))
    if info is not None:
        try:
            check_tensors(info)
            found.append(Finding("weights", "ok", f"every tensor is there, in {len(info.files)} files"))
        except (ModelError, OSError) as error:
            found.append(_failure("weights", error))
        except UNFORESEEN as error:
            found.append(_failure("weights", error, "config.json, or a header of the weights,"))
        found += _remarks(info)
    if directory.is_dir():
        found.append(_tokenizer(directory))
    return Checked(info, tuple(found))


def require_model(directory: Path) -> ModelInfo:
    """Describe a checkpoint that can be served. ModelError with the first thing that is wrong with it."""
    checked = check_model(directory)
    wrong = first_failure(checked.findings)
    if wrong is not None:
        raise wrong
    if checked.info is None:
        raise ModelError(f"{directory} could not be read")
    return checked.info


def first_failure(findings: Sequence[Finding]) -> ModelError | None:
    """The first failure, as the error that commands end with."""
    failed = [finding for finding in findings if finding.level == "fail"]
    if not failed:
        return None
    more = f"; and {len(failed) - 1} more findings, see elastic doctor" if len(failed) > 1 else ""
    return ModelError(f"{failed[0].message}{more}", hint=failed[0].hint)


def _failure(what: str, error: Exception, file: str = "tokenizer_config.json") -> Finding:
    if isinstance(error, ElasticError):
        return Finding(what, "fail", str(error), error.hint)
    if not isinstance(error, OSError):
        return Finding(what, "fail", f"{file} is damaged: {error}", DAMAGED_HINT)
    return Finding(what, "fail", f"cannot read {error.filename}: {error.strerror}", "is it a file that you may read?")


def _summary(info: ModelInfo) -> str:
    return f"{info.family}: {info.moe_layers} MoE layers x {info.experts} experts, top {info.top_k}"


def _remarks(info: ModelInfo) -> Iterator[Finding]:
    """What can be served, though perhaps not as its owner thinks."""
    config = read_config(Path(info.path))
    stated = config.get("dtype") or config.get("torch_dtype")
    if isinstance(stated, str) and stated != info.dtype:
        yield Finding("dtype", "warn", f"config.json says {stated}, the weights are {info.dtype} and computed as such",
                      f"serve with --dtype {stated} if that is meant")  # fmt: skip
    if info.max_position < config["max_position_embeddings"]:
        most = f"{info.max_position} of {config['max_position_embeddings']} tokens"
        yield Finding("length", "warn", f"served up to {most}: longrope's angles change there")


def _tokenizer(directory: Path) -> Finding:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        hint = "save the model's fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)"
        return Finding("tokenizer", "fail", f"no tokenizer.json in {directory}", hint)
    try:
        tokens = Tokenizer.from_str(path.read_text(encoding="utf-8")).get_vocab_size()
    except Exception as error:  # noqa: BLE001 - what the library raises is a bare Exception
        return Finding("tokenizer", "fail", f"damaged {path}: {error}", DAMAGED_HINT)
    try:
        chat_templates(directory, tokenizer_settings(directory))
        sampling_defaults(directory)
    except (ModelError, OSError, *UNFORESEEN) as error:
        return _failure("tokenizer", error, "tokenizer_config.json or generation_config.json")
    return Finding("tokenizer", "ok", f"{tokens} tokens")
