"""The official Python client as its users use it: streams, choices, schemas with references, calls, what is refused."""

from __future__ import annotations

from typing import Any

import openai
from pydantic import BaseModel, ConfigDict

from tests.clients.asked import ENOUGH, KEY, MODEL, TOO_LONG, URL, USER, Place, fails

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
asked: Any = {"model": MODEL, "messages": USER}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


class Trip(BaseModel):
    """References to a type that is used twice."""

    model_config = ConfigDict(extra="forbid")
    first: Place
    last: Place | None


def choices_and_probabilities() -> None:
    """n > 1, whole and streamed, with log probabilities; the usage is of all of them."""
    whole = client.chat.completions.create(**asked, max_tokens=5, n=3, logprobs=True, top_logprobs=2, seed=7)
    assert [len(choice.logprobs.content) for choice in whole.choices] == [5, 5, 5]
    usage = {"include_usage": True}
    *chunks, last = client.chat.completions.create(
        **asked, max_tokens=5, n=3, logprobs=True, seed=7, stream=True, stream_options=usage
    )
    assert (last.choices, last.usage.completion_tokens) == ([], 15)
    assert all(chunk.usage is None for chunk in chunks)
    texts = ["", "", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    both = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=4, logprobs=3, echo=True)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]


def stops() -> None:
    """A list of stop strings; a stream that its reader leaves."""
    stopped = client.chat.completions.create(**asked, max_tokens=200, temperature=0, stop=[".", "e"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert not {".", "e"} & set(stopped.message.content)
    with client.chat.completions.create(**asked, max_tokens=900, stream=True) as stream:
        next(stream)
    with client.chat.completions.stream(**asked, max_tokens=400, stop=["e"]) as stream:
        assert [event.type for event in stream][-1] == "content.done"


def forms_and_calls() -> None:
    """A schema with references; a call of a tool without parameters; the message sent back as it came."""
    trip = client.chat.completions.parse(**asked, max_tokens=2 * ENOUGH, response_format=Trip).choices[0].message
    assert isinstance(trip.parsed, Trip)
    tools: Any = [{"type": "function", "function": {"name": "now"}}]
    named: Any = {"type": "function", "function": {"name": "now"}}
    answer = client.chat.completions.create(**asked, tools=tools, tool_choice=named, max_tokens=ENOUGH)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "now"
    told = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "noon"}]}
    for sent in (message, message.model_dump()):
        after: Any = [*USER, sent, told, {"role": "user", "content": "And?"}]
        assert client.chat.completions.create(model=MODEL, messages=after, tools=tools, max_tokens=3).choices


def responses() -> None:
    """A conversation by its items; by the earlier answer's id it is refused."""
    first = client.responses.create(model=MODEL, input="x", max_output_tokens=8)
    items: Any = [{"role": "user", "content": "x"}, *(each.model_dump() for each in first.output)]
    assert client.responses.create(model=MODEL, input=items, max_output_tokens=8).output_text
    more: Any = {"model": MODEL, "input": "y", "previous_response_id": first.id}
    fails(openai.BadRequestError, lambda: client.responses.create(**more), "send the whole conversation")
    fails(openai.NotFoundError, lambda: client.responses.retrieve(first.id))
    picture: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]
    fails(openai.BadRequestError, lambda: client.responses.create(model=MODEL, input=picture), "input_image")


def refusals() -> None:
    """What is not served is refused in words."""
    picture: Any = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, PICTURE]}]
    fails(openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages=picture), "image_url")
    long: Any = [{"role": "user", "content": TOO_LONG}]
    fails(openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages=long), "maximum context")
    fails(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="x"), "/v1/embeddings")
    stranger = openai.OpenAI(base_url=URL, api_key="no", max_retries=0)
    fails(openai.AuthenticationError, lambda: stranger.models.list())
    assert client.models.retrieve(MODEL).id == MODEL


choices_and_probabilities()
stops()
forms_and_calls()
responses()
refusals()
