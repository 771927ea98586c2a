"""/tokenize and /detokenize, in vLLM's shape: what the gateway makes of a prompt or a conversation, and back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import Field, model_validator

from elastic.gateway.http import json_response, read_body
from elastic.gateway.openai import Service, chat_token_ids, known_tokens, require_model, token_ids
from elastic.gateway.schema import MAX_BODY_BYTES, MAX_MESSAGES, Message, Shape, TokenId, parse
from elastic.gateway.tools import Tools, template_variables
from membership.base.errors import RequestError

MAX_IDS = MAX_BODY_BYTES // 2  # a body cannot hold more


class TokenizeRequest(Shape):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: Tools = Field(default=[])
    chat_template_kwargs: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if self.messages is not None and (self.add_special_tokens or not self.add_generation_prompt):
            raise RequestError(
                "messages are tokenized as /v1/chat/completions does it: with the generation prompt, and with the"
                " special tokens of the chat template only",
                param="add_special_tokens" if self.add_special_tokens else "add_generation_prompt",
                code="unsupported_parameter",
            )
        return self


class DetokenizeRequest(Shape):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=MAX_IDS)


def add_routes(app: FastAPI, service: Service) -> None:
    """Serve both."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = parse(await read_body(request), TokenizeRequest)
        if asked.model is not None:
            require_model(service, asked.model)
        if asked.messages is not None:
            tokens = await chat_token_ids(
                service, asked.messages, template_variables(asked.tools, None, asked.chat_template_kwargs)
            )
        else:
            tokens = await token_ids(service, asked.prompt or "", special=asked.add_special_tokens is not False)
        names = [service.tokenizer.token_name(token) for token in tokens] if asked.return_token_strs else None
        return json_response(
            {"count": len(tokens), "max_model_len": service.context, "tokens": tokens, "token_strs": names}
        )

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = parse(await read_body(request), DetokenizeRequest)
        if asked.model is not None:
            require_model(service, asked.model)
        tokens = known_tokens(service, asked.tokens, "tokens")
        return json_response({"prompt": await asyncio.to_thread(service.tokenizer.decode_all, tokens)})
