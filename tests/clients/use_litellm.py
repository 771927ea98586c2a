"""litellm, as for OpenAI and as for a vLLM of one's own."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
from litellm import exceptions

from tests.clients.asked import ENOUGH, KEY, MODEL, PROMPT, TOO_LONG, TOOL, URL, USER, Place, fails

for provider in ("openai", "hosted_vllm"):
    to: dict[str, Any] = {"model": f"{provider}/{MODEL}", "api_base": URL, "api_key": KEY, "num_retries": 0}
    answer = litellm.completion(messages=USER, max_tokens=8, temperature=0, **to)
    text = answer.choices[0].message.content
    assert answer.usage.completion_tokens == 8

    usage = {"include_usage": True}
    chunks = litellm.completion(messages=USER, max_tokens=8, temperature=0, stream=True, stream_options=usage, **to)
    whole = litellm.stream_chunk_builder(list(chunks), messages=USER)
    assert (whole.choices[0].message.content, whole.usage.completion_tokens) == (text, 8)

    called = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": ENOUGH}
    choice = litellm.completion(messages=USER, **called, **to).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    whole = litellm.stream_chunk_builder(list(litellm.completion(messages=USER, stream=True, **called, **to)))
    (again,) = whole.choices[0].message.tool_calls
    assert again.function.name == "weather"
    if provider == "openai":  # for the other one litellm leaves `additionalProperties` out: there may be any number
        assert choice.finish_reason == whole.choices[0].finish_reason == "tool_calls"
        for each in (call, again):
            Place.model_validate_json(each.function.arguments)
    broken = choice.message.model_copy(deep=True)
    broken.tool_calls[0].function.arguments = '{"city": "Ro'  # and the model is told so
    for sent in (choice.message, broken):
        told = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "21 °C"}
        history = [*USER, sent, told]
        assert litellm.completion(messages=history, tools=[TOOL], max_tokens=4, **to).choices[0].message.content

    formed = litellm.completion(messages=USER, response_format=Place, max_tokens=ENOUGH, **to)
    Place.model_validate_json(formed.choices[0].message.content)
    assert litellm.completion(messages=USER, logprobs=True, top_logprobs=2, max_tokens=3, **to).choices[0].logprobs
    assert litellm.responses(input=PROMPT, max_output_tokens=8, **to).output[0].content[0].text

    fails(exceptions.NotFoundError, lambda to=to: litellm.embedding(input=["x"], **to))
    fails(
        exceptions.NotFoundError,
        lambda to=to, p=provider: litellm.completion(messages=USER, **to | {"model": f"{p}/no"}),
    )
    fails(exceptions.AuthenticationError, lambda to=to: litellm.completion(messages=USER, **to | {"api_key": "no"}))
    fails(
        exceptions.BadRequestError, lambda to=to: litellm.completion(messages=USER, temperature=9, **to), "temperature"
    )
    long = [{"role": "user", "content": TOO_LONG}]
    fails(exceptions.ContextWindowExceededError, lambda to=to, long=long: litellm.completion(messages=long, **to))
    fails(exceptions.ContextWindowExceededError, lambda to=to: litellm.completion(messages=USER, max_tokens=5000, **to))


async def streamed() -> str:
    """As most servers use it."""
    answer = await litellm.acompletion(
        messages=USER, max_tokens=8, stream=True, model=f"openai/{MODEL}", api_base=URL, api_key=KEY
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


assert asyncio.run(streamed())
