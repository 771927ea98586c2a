"""LangChain's ChatOpenAI, in both APIs."""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from tests.clients.asked import ENOUGH, KEY, MODEL, PROMPT, TOO_LONG, URL, Place, fails


@tool(args_schema=Place)
def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"{city} {days}"


def added_up(chunks: Any) -> Any:
    """The message of a stream."""
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


to: Any = {"model": MODEL, "base_url": URL, "api_key": KEY, "max_retries": 0}
for more in ({}, {"use_responses_api": True}):
    chat = ChatOpenAI(**to, max_tokens=ENOUGH, temperature=0, stream_usage=True, **more)
    short = ChatOpenAI(**to, max_tokens=16, temperature=0, stream_usage=True, **more)
    answer = short.invoke(PROMPT)
    assert answer.text
    assert answer.usage_metadata["output_tokens"] == 16
    streamed = added_up(short.stream(PROMPT))
    assert (streamed.text, streamed.usage_metadata["output_tokens"]) == (answer.text, 16)
    forced = chat.bind_tools([weather], tool_choice="any", parallel_tool_calls=False, strict=True)
    for called in (forced.invoke(PROMPT), added_up(forced.stream(PROMPT))):
        (call,) = called.tool_calls
        assert call["name"] == "weather"
        Place.model_validate(call["args"])
    history = [SystemMessage("Be brief."), HumanMessage(PROMPT), called, ToolMessage("21 °C", tool_call_id=call["id"])]
    assert short.bind_tools([weather]).invoke(history).text
    assert isinstance(chat.with_structured_output(Place).invoke(PROMPT), Place)
    fails(openai.AuthenticationError, lambda more=more: ChatOpenAI(**to | {"api_key": "no"}, **more).invoke(PROMPT))
    fails(openai.NotFoundError, lambda more=more: ChatOpenAI(**to | {"model": "no"}, **more).invoke(PROMPT))
    fails(ContextOverflowError, lambda more=more: ChatOpenAI(**to, **more).invoke(TOO_LONG))

assert isinstance(chat.with_structured_output(Place, method="function_calling").invoke(PROMPT), Place)
assert OpenAI(**to, max_tokens=8).invoke(PROMPT)
assert len(OpenAI(**to, max_tokens=8, n=2, best_of=2).generate([PROMPT, "x"]).generations[0]) == 2
embeddings = OpenAIEmbeddings(model=MODEL, base_url=URL, api_key=KEY, check_embedding_ctx_length=False)
fails(openai.NotFoundError, lambda: embeddings.embed_query("x"), "/v1/embeddings")
