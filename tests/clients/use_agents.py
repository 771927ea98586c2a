"""Frameworks of agents: pydantic-ai and openai-agents, in both APIs; tools, objects as answers, streams."""

from __future__ import annotations

import asyncio
from typing import Any

import agents
import openai
import pydantic_ai
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.asked import ENOUGH, KEY, MODEL, PROMPT, TOO_LONG, URL, Place, fails

SHORT, LONG = {"max_tokens": 16}, {"max_tokens": ENOUGH}


async def with_pydantic_ai() -> None:
    """Plain, with history, streamed; an object by a tool and by structured output."""
    provider = OpenAIProvider(base_url=URL, api_key=KEY)
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(MODEL, provider=provider)
        plain: Any = Agent(model, model_settings=SHORT)
        first = await plain.run(PROMPT)
        assert first.output
        assert (await plain.run("And then?", message_history=first.all_messages())).output
        async with plain.run_stream(PROMPT) as stream:
            assert [text async for text in stream.stream_text()]
            assert stream.usage.output_tokens == 16
        for output in (ToolOutput(Place), NativeOutput(Place)):
            found = await Agent(model, output_type=output, model_settings=LONG, retries=0).run(PROMPT)
            assert isinstance(found.output, Place)


async def with_openai_agents() -> None:
    """A tool that has to be called, its result sent back, and an object as the last answer beside the tool."""
    client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)

    @agents.function_tool
    def weather(place: Place) -> str:
        """The weather."""
        return f"{place.city} {place.days}"

    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        settings = agents.ModelSettings(max_tokens=ENOUGH, tool_choice="required", parallel_tool_calls=False)
        agent = agents.Agent(
            "a", instructions="Be brief.", model=kind(model=MODEL, openai_client=client), tools=[weather],
            output_type=Place, model_settings=settings,
        )  # fmt: skip
        whole = await agents.Runner.run(agent, PROMPT, max_turns=4)
        streamed = agents.Runner.run_streamed(agent, PROMPT, max_turns=4)
        assert [event.type async for event in streamed.stream_events()]
        for result in (whole, streamed):
            kinds = [type(item).__name__ for item in result.new_items]
            assert kinds[:2] == ["ToolCallItem", "ToolCallOutputItem"], kinds
            assert isinstance(result.final_output, Place)


agents.set_tracing_disabled(True)
asyncio.run(with_pydantic_ai())
asyncio.run(with_openai_agents())
stranger = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="no")))
fails(ModelHTTPError, lambda: stranger.run_sync(PROMPT), "401")
agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY)))
fails(pydantic_ai.exceptions.ModelHTTPError, lambda: agent.run_sync(TOO_LONG), "maximum context length")
