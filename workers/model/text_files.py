"""What a checkpoint's files say about text: special tokens, chat templates, the end token, the sampling defaults.

Read as transformers reads them, without importing it (a gateway would take a second longer to start and 35 MB more);
always as UTF-8, whatever the locale.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membership.base.errors import ModelError

# What generation_config.json may also ask for, with the values that ask for nothing. It is not offered here.
NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "min_new_tokens": (0,),
    "min_length": (0,),
}
DAMAGED_HINT = "download the file again"


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that does not say how to sample."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_json(path: Path, *, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file; ModelError if it is missing or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path.name} in {path.parent}", hint=hint) from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="is it a file that you may read?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}", hint=DAMAGED_HINT) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object", hint=DAMAGED_HINT)
    return found


def read_json_if_any(path: Path) -> dict[str, Any]:
    """As `read_json`; empty if there is no such file."""
    return read_json(path) if path.exists() else {}


def tokenizer_settings(root: Path) -> dict[str, Any]:
    """tokenizer_config.json. Where it does not list the added tokens, special_tokens_map.json comes before it."""
    settings = read_json_if_any(root / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_json_if_any(root / "special_tokens_map.json")
    return settings


def named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens that have a name (bos_token, eos_token, image_token), and that templates know by it."""
    extra = settings.get("extra_special_tokens")
    named = {name: value for name, value in settings.items() if name.endswith("_token") and value is not True}
    named |= extra if isinstance(extra, dict) else {}
    return {name: text for name, value in named.items() if (text := token_text(value))}


def unnamed_tokens(settings: dict[str, Any]) -> list[str]:
    """The special tokens beside those."""
    found = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return [token_text(value) for value in found] if isinstance(found, list) else []


def token_text(value: Any) -> str:
    """The text of a token that is written as a string or as an object with its flags."""
    return str(value.get("content") or "") if isinstance(value, dict) else str(value or "")


def chat_templates(root: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name; a single one is "default". Files of their own hide those among the settings."""
    files = {path.stem: path for path in sorted((root / "additional_chat_templates").glob("*.jinja"))}
    if (root / "chat_template.jinja").is_file():
        files["default"] = root / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    found = settings.get("chat_template") or {}
    if isinstance(found, list):
        return {str(each["name"]): str(each["template"]) for each in found}
    return dict(found) if isinstance(found, dict) else {"default": str(found)}


def end_token_of_tokenizer(root: Path) -> tuple[int, ...]:
    """The tokenizer's eos_token as an id, if it has one: the end where no configuration names any."""
    text = named_tokens(tokenizer_settings(root)).get("eos_token")
    path = root / "tokenizer.json"
    if not text or not path.exists():
        return ()
    backend = read_json(path)
    added = {token["content"]: token["id"] for token in backend.get("added_tokens") or []}
    vocabulary = (backend.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # a unigram model: pieces with their scores, in order
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    found = added.get(text, vocabulary.get(text))
    return () if found is None else (int(found),)


def sampling_defaults(root: Path) -> SamplingDefaults:
    """Those of generation_config.json. Not its `do_sample`: OpenAI's API samples unless a request says otherwise."""
    path = root / "generation_config.json"
    said = read_json_if_any(path)
    plain = SamplingDefaults()
    found = SamplingDefaults(
        temperature=_number(path, said, "temperature", plain.temperature),
        top_p=_number(path, said, "top_p", plain.top_p),
        top_k=int(_number(path, said, "top_k", plain.top_k)),
        min_p=_number(path, said, "min_p", plain.min_p),
        repetition_penalty=_number(path, said, "repetition_penalty", plain.repetition_penalty),
    )
    good = {
        "temperature": found.temperature >= 0,
        "top_p": 0 < found.top_p <= 1,
        "top_k": found.top_k >= 0,
        "min_p": 0 <= found.min_p <= 1,
        "repetition_penalty": 0 < found.repetition_penalty <= 10,
    }
    if wrong := [name for name, is_good in good.items() if not is_good]:
        raise ModelError(f"{path} has an impossible {' and '.join(wrong)}", hint="correct it, or remove the key")
    return found


def not_applied(root: Path) -> list[str]:
    """What generation_config.json asks for that answers will not follow, as `key=value`."""
    said = read_json_if_any(root / "generation_config.json")
    asked = {name: said[name] for name in NOT_APPLIED if said.get(name) is not None}
    return [f"{name}={value}" for name, value in asked.items() if value not in NOT_APPLIED[name]]


def _number(path: Path, said: dict[str, Any], name: str, otherwise: float) -> float:
    value = said.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{path}: {name} is {value!r}, not a number", hint="correct it, or remove the key")
    return float(value)
