"""instructor: objects of a type, by tools and by structured output; whole, and growing."""

from __future__ import annotations

import instructor
import openai
from instructor import Mode

from tests.clients.asked import ENOUGH, KEY, MODEL, URL, USER, Place, fails

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
for mode in (Mode.TOOLS, Mode.JSON_SCHEMA):
    asking = instructor.from_openai(client, mode=mode).chat.completions
    asked = {"model": MODEL, "messages": USER, "response_model": Place, "max_retries": 0, "max_tokens": ENOUGH}
    assert isinstance(asking.create(**asked), Place)
    found, raw = asking.create_with_completion(**asked)
    assert isinstance(found, Place)
    assert raw.usage.completion_tokens > 0
    *_, last = asking.create_partial(**asked)
    Place.model_validate(last.model_dump())
responses = instructor.from_openai(client, mode=Mode.RESPONSES_TOOLS)
assert isinstance(responses.responses.create(model=MODEL, input="x", response_model=Place, max_retries=0), Place)
stranger = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="no", max_retries=0))
fails(Exception, lambda: stranger.create(model=MODEL, messages=USER, response_model=Place, max_retries=0), "401")
