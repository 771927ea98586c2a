"""From a request's fields to the sampler's settings: what it does not say is as the checkpoint has it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from elastic.gateway.schema import CommonRequest
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import RequestError
from workers.model.text_files import SamplingDefaults
from workers.protocol.messages import Sampling, Shaping

NO_SHAPING = Shaping()


def sampling_of(
    asked: CommonRequest,
    defaults: SamplingDefaults,
    tokenizer: Tokenizer,
    size: int,
    ends: Iterable[int],
    grammar: str = "",
) -> Sampling:
    """The settings, without the seed. `size`: of the vocabulary; `ends`: the model's end tokens.

    RequestError names a field whose token does not exist, or that leaves no token to choose from.
    """

    def said(name: str) -> float:
        source = asked if name in asked.model_fields_set else defaults
        return float(getattr(source, name))

    shaping = Shaping(
        repetition_penalty=said("repetition_penalty"),
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        bias=_bias(asked.logit_bias, size),
        allowed=_allowed(asked.allowed_token_ids, size),
        bad_words=[ids for word in asked.bad_words for ids in _spellings(word, tokenizer)],
        min_tokens=asked.min_tokens,
        grammar=grammar,
        end_tokens=sorted({*ends, *asked.stop_token_ids}) if asked.min_tokens else [],
    )
    _require_a_choice(shaping)
    return Sampling(
        temperature=said("temperature"),
        top_p=said("top_p"),
        top_k=max(int(said("top_k")), 0),
        min_p=said("min_p"),
        logprobs=asked.wanted_logprobs,
        shaping=None if shaping == NO_SHAPING else shaping,
    )


def _bias(asked: dict[str, float], size: int) -> list[tuple[int, float]]:
    found = []
    for key, bias in asked.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"logit_bias: {key[:20]!r} is not a token id", param="logit_bias")
        found.append((_known(int(key), size, "logit_bias"), bias))
    return found


def _allowed(asked: list[int] | None, size: int) -> bytes:
    ids = sorted({_known(token, size, "allowed_token_ids") for token in asked or ()})
    return np.array(ids, np.uint32).tobytes()


def _known(token: int, size: int, field: str) -> int:
    if token >= size:
        raise RequestError(f"{field}: token id {token} is not in the vocabulary of {size}", param=field)
    return token


def _spellings(word: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """A bad word's tokens at the beginning of a text and, as vLLM has it, after a space where that is another word."""
    bare, spaced = (tokenizer.encode(before + word.lstrip(), special=False) for before in ("", " "))
    if bare:
        yield bare
    if bare and len(spaced) == len(bare) and spaced[0] != bare[0]:
        yield spaced


def _require_a_choice(shaping: Shaping) -> None:
    """RequestError if the first token cannot be any."""
    barred = {*shaping.end_tokens, *(word[0] for word in shaping.bad_words if len(word) == 1)}
    if shaping.allowed and barred.issuperset(np.frombuffer(shaping.allowed, np.uint32).tolist()):
        message = "allowed_token_ids: bad_words and min_tokens leave none of them"
        raise RequestError(message, param="allowed_token_ids")
