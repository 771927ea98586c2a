"""The fields that clients send and we do not offer: which of them change nothing, and which are refused by name.

One table. A field that is in no shape of `schema.py` and not in here is an error that names it: to ignore it could give
another answer than was asked for. What cannot change the answer is ignored, and logged once per name.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog

from membership.base.errors import RequestError

log = structlog.get_logger(__name__)
Note = Callable[[str], None]


class Place(StrEnum):
    """Which object of a request has the field."""

    REQUEST = "request"
    STREAM_OPTIONS = "stream_options"
    MESSAGE = "messages"
    PART = "content"
    RESPONSES = "responses"
    STRUCTURED = "structured_outputs"
    TEXT = "text"  # of /v1/responses,
    REASONING = "reasoning"  # as this


class Of(StrEnum):
    """Whose field it is."""

    OPENAI = "OpenAI"
    ANTHROPIC = "Anthropic"
    VLLM = "vLLM"
    SGLANG = "SGLang"


@dataclass(frozen=True)
class Extra:
    """A field that is not offered. `off`: its values that ask for nothing; None: no value can change the answer.

    `hint`: what to do instead, for the refusal.
    """

    name: str
    of: Of
    off: tuple[Any, ...] | None = None
    hint: str = ""
    place: Place = Place.REQUEST


ONE_AT_A_TIME = "ask for each alternative with n"
CHAT_ONLY = "only /v1/chat/completions has it"
NOT_STORED = "nothing is stored here: send the whole conversation as input"
OLD_TOOLS = "use tools and tool_choice"
BOOTSTRAP = ("bootstrap_host", "bootstrap_port", "bootstrap_room")  # of prefill on another server
TEXT_ONLY = "this serves text models"

EXTRAS = (
    # what cannot change the answer
    *(Extra(name, Of.OPENAI) for name in (
        "user", "metadata", "store", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "verbosity",
        "parallel_tool_calls",
    )),
    Extra("prompt_cache_options", Of.OPENAI),
    *(Extra(name, Of.VLLM) for name in (
        "request_id", "session_id", "priority", "cache_salt", "stream_interval",
        "truncation_side", "routed_experts_prompt_start",  # of what is refused below
        "return_token_offsets", "return_mm_kwargs", "mm_payload",  # of endpoints that render a prompt
    )),
    *(Extra(name, Of.SGLANG) for name in (
        "rid", "extra_key", "custom_labels", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank",
        "routed_experts_start_len",
    )),
    Extra("include_obfuscation", Of.OPENAI, place=Place.STREAM_OPTIONS),
    Extra("annotations", Of.OPENAI, place=Place.MESSAGE),
    Extra("phase", Of.OPENAI, place=Place.MESSAGE),
    Extra("cache_control", Of.ANTHROPIC, place=Place.MESSAGE),
    Extra("annotations", Of.OPENAI, place=Place.PART),
    Extra("cache_control", Of.ANTHROPIC, place=Place.PART),
    # OpenAI's that would
    Extra("echo", Of.OPENAI, (False,), "only /v1/completions has it"),
    Extra("best_of", Of.OPENAI, (1,), ONE_AT_A_TIME),
    Extra("suffix", Of.OPENAI, ("",), "put what surrounds the gap into the prompt"),
    Extra("tools", Of.OPENAI, ([],), CHAT_ONLY),
    Extra("functions", Of.OPENAI, ([],), OLD_TOOLS),
    Extra("tool_choice", Of.OPENAI, ("none", "auto"), CHAT_ONLY),
    Extra("function_call", Of.OPENAI, ("none", "auto"), OLD_TOOLS),
    Extra("modalities", Of.OPENAI, (["text"], []), TEXT_ONLY),
    Extra("audio", Of.OPENAI, ({},), TEXT_ONLY),
    Extra("service_tier", Of.OPENAI, ("auto", "default"), "there is one tier"),
    Extra("prediction", Of.OPENAI, ({},), "leave it out"),
    Extra("web_search_options", Of.OPENAI, (), "leave it out"),
    Extra("moderation", Of.OPENAI, (), "leave it out"),
    Extra("reasoning_effort", Of.OPENAI, ("none",), CHAT_ONLY),
    Extra("function_call", Of.OPENAI, ({},), "use tool_calls", Place.MESSAGE),
    Extra("refusal", Of.OPENAI, ("",), "put it into content", Place.MESSAGE),
    Extra("audio", Of.OPENAI, ({},), TEXT_ONLY, Place.MESSAGE),
    # OpenAI's of /v1/responses
    *(Extra(name, Of.OPENAI, place=Place.RESPONSES) for name in (
        "user", "store", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
        "stream_options",
    )),
    Extra("verbosity", Of.OPENAI, place=Place.TEXT),
    Extra("summary", Of.OPENAI, place=Place.REASONING),  # the reasoning itself is in the answer
    Extra("generate_summary", Of.OPENAI, place=Place.REASONING),
    Extra("include", Of.OPENAI, ([], ["reasoning.encrypted_content"]), "leave it out", Place.RESPONSES),
    *(Extra(name, Of.OPENAI, (), NOT_STORED, Place.RESPONSES)
      for name in ("previous_response_id", "conversation", "prompt")),
    Extra("background", Of.OPENAI, (False,), NOT_STORED, Place.RESPONSES),
    Extra("truncation", Of.OPENAI, ("disabled",), "shorten the input", Place.RESPONSES),
    Extra("service_tier", Of.OPENAI, ("auto", "default"), "there is one tier", Place.RESPONSES),
    Extra("max_tool_calls", Of.OPENAI, (), "tools are called by the client", Place.RESPONSES),
    Extra("top_logprobs", Of.OPENAI, (0,), "use /v1/chat/completions", Place.RESPONSES),
    Extra("background_options", Of.OPENAI, (), NOT_STORED, Place.RESPONSES),
    Extra("context_management", Of.OPENAI, ([],), "shorten the input", Place.RESPONSES),
    Extra("image", Of.OPENAI, (), TEXT_ONLY, Place.RESPONSES),
    *(Extra(name, Of.OPENAI, (), "leave it out", Place.RESPONSES) for name in ("moderation", "access_programs")),
    # vLLM's and SGLang's of /v1/responses
    *(Extra(name, Of.VLLM, place=Place.RESPONSES) for name in (
        "request_id", "session_id", "priority", "cache_salt", "spaces_between_special_tokens", "return_mm_kwargs",
        "mm_payload",
    )),
    *(Extra(name, Of.SGLANG, place=Place.RESPONSES) for name in (
        "extra_key", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank",
    )),
    Extra("skip_special_tokens", Of.VLLM, (True,), "ask for logprobs, which name every token", Place.RESPONSES),
    Extra("watermarking", Of.VLLM, (False,), "leave it out", Place.RESPONSES),
    Extra("enable_response_messages", Of.VLLM, (False,), "leave it out", Place.RESPONSES),
    Extra("previous_input_messages", Of.VLLM, ([],), "send them as input", Place.RESPONSES),
    *(Extra(name, Of.VLLM, ({},), TEXT_ONLY, Place.RESPONSES) for name in ("mm_processor_kwargs", "media_io_kwargs")),
    *(Extra(name, Of.VLLM, ({},), "leave it out", Place.RESPONSES)
      for name in ("kv_transfer_params", "ec_transfer_params", "vllm_xargs")),
    *(Extra(name, Of.SGLANG, (), "leave it out", Place.RESPONSES) for name in BOOTSTRAP),
    # vLLM's that would
    Extra("use_beam_search", Of.VLLM, (False,), ONE_AT_A_TIME),
    Extra("length_penalty", Of.VLLM, (1,), "it needs beam search, which is not offered"),
    Extra("early_stopping", Of.VLLM, (False,), "it needs beam search, which is not offered"),
    Extra("skip_special_tokens", Of.VLLM, (True,), "ask for logprobs, which name every token"),
    Extra("spaces_between_special_tokens", Of.VLLM),  # none are shown
    Extra("add_special_tokens", Of.VLLM, (), "it is as the model's tokenizer has it; send token ids for other ones"),
    Extra("add_generation_prompt", Of.VLLM, (True,), "send the rendered prompt to /v1/completions"),
    Extra("continue_final_message", Of.VLLM, (False,), "send the rendered prompt to /v1/completions"),
    Extra("documents", Of.VLLM, ([],), "put them into a message"),
    Extra("chat_template", Of.VLLM, ("",), "send the rendered prompt to /v1/completions"),
    Extra("chat_template_kwargs", Of.VLLM, ({},), CHAT_ONLY),
    *(Extra(name, Of.VLLM, ({},), TEXT_ONLY) for name in ("mm_processor_kwargs", "media_io_kwargs")),
    Extra("truncate_prompt_tokens", Of.VLLM, (), "shorten the prompt"),
    Extra("prompt_embeds", Of.VLLM, ([],), "send text or token ids"),
    Extra("logits_processors", Of.VLLM, ([],), "use logit_bias"),
    *(Extra(name, Of.VLLM, ({},), "leave it out") for name in (
        "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    )),
    *(Extra(name, Of.VLLM, (False,), "leave it out") for name in (
        "return_tokens_as_token_ids", "return_token_ids", "return_weight_versions", "return_prompt_text",
        "watermarking",
    )),
    Extra("logprob_token_ids", Of.VLLM, (), "use logprobs with allowed_token_ids"),
    Extra("repetition_detection", Of.VLLM, ({},), "use stop, or a penalty"),
    Extra("thinking_token_budget", Of.VLLM, (-1,), "use max_tokens"),
    Extra("include_reasoning", Of.VLLM, (True,), CHAT_ONLY),
    Extra("guided_decoding_backend", Of.VLLM),
    Extra("guided_whitespace_pattern", Of.VLLM, (), "leave it out"),
    *(Extra(name, Of.VLLM, (False,), "leave it out", Place.STRUCTURED)
      for name in ("disable_any_whitespace", "disable_additional_properties")),
    Extra("whitespace_pattern", Of.VLLM, (), "leave it out", Place.STRUCTURED),
    Extra("structural_tag", Of.VLLM, (), "use grammar or regex", Place.STRUCTURED),
    # SGLang's that would
    *(Extra(name, Of.SGLANG, (), "use structured_outputs or response_format")
      for name in ("regex", "ebnf", "json_schema", "structural_tag")),
    Extra("no_stop_trim", Of.SGLANG, (False,), "use include_stop_str_in_output"),
    Extra("stop_regex", Of.SGLANG, ([],), "use stop"),
    *(Extra(name, Of.SGLANG, (), "leave it out") for name in (
        "lora_path", "session_params", "watermark", "sampling_logprobs_mode", "task", *BOOTSTRAP,
    )),
    Extra("custom_params", Of.SGLANG, ({},), "leave it out"),
    Extra("thinking", Of.SGLANG, (), "use chat_template_kwargs"),
    Extra("input_ids", Of.SGLANG, (), "send token ids to /v1/completions"),
    *(Extra(name, Of.SGLANG, (), TEXT_ONLY)
      for name in ("images_config", "video_config", "max_dynamic_patch", "min_dynamic_patch")),
    Extra("use_audio_in_video", Of.SGLANG, (False,), TEXT_ONLY),
    Extra("prefix", Of.SGLANG, (False,), "send the rendered prompt to /v1/completions", Place.MESSAGE),
    Extra("tools", Of.SGLANG, ([],), "put them beside the messages", Place.MESSAGE),
    Extra("separate_reasoning", Of.SGLANG),  # of a completion, reasoning is part of the text
    Extra("stream_reasoning", Of.SGLANG),
    *(Extra(name, Of.SGLANG, (False,), "leave it out") for name in (
        "return_hidden_states", "return_routed_experts", "return_cached_tokens_details", "return_spec_tokens_details",
        "return_prompt_token_ids", "return_meta_info", "return_input_ids_in_sglext", "return_output_ids_in_sglext",
        "return_sampling_mask", "return_flat_raw_output_top_logprobs", "return_flat_raw_top_logprobs_b64",
    )),
    Extra("custom_logit_processor", Of.SGLANG, ("",), "use logit_bias"),
    Extra("typical_p", Of.SGLANG, (1,), "use top_p or min_p"),
    Extra("no_repeat_ngram_size", Of.SGLANG, (0,), "use frequency_penalty"),
)  # fmt: skip
_BY_NAME = {(each.place, each.name): each for each in EXTRAS}


def without_extras(data: dict[str, Any], place: Place, offered: Container[str], note: Note) -> dict[str, Any]:
    """The fields of `data` that are for its shape to judge: the `offered` ones, and those that the table lacks.

    Null means "not given". RequestError names the first field that asks for what is not offered.
    """
    kept = {}
    for name, value in data.items():
        extra = _BY_NAME.get((place, name))
        if value is None:
            continue
        if extra is None or name in offered:
            kept[name] = value
        elif extra.off is None:
            note(name)
        elif value not in extra.off:
            raise _refusal(extra)
    return kept


def _refusal(extra: Extra) -> RequestError:
    name = extra.name if extra.place is Place.REQUEST else f"{extra.place}: {extra.name}"
    return RequestError(f"{name} is not supported", param=extra.name, code="unsupported_parameter", hint=extra.hint)


class NotedOnce:
    """Logs the name of an ignored field the first time that it is seen. The names are those of the table."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, name: str) -> None:
        if name not in self._seen:
            self._seen.add(name)
            log.info("field_ignored", field=name)
