"""Tools in requests: what clients may say of them, and what the chat template gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from membership.base.errors import RequestError

MAX_TOOLS = 1024
MAX_NAME = 256
OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"})


class Function(BaseModel):
    """What a tool is."""

    model_config = ConfigDict(strict=True)

    name: str = Field(min_length=1, max_length=MAX_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool. `given`: as the client wrote it, whose order is part of the prompt."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function
    _given: dict[str, Any] = PrivateAttr(default={})

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, data: Any, handler: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = handler(data)
        tool._given = data
        return tool

    @property
    def given(self) -> dict[str, Any]:
        """All of it, for the chat template."""
        return self._given


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]
ToolChoice = str | dict[str, Any]


class CalledFunction(BaseModel):
    """The function of a call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(min_length=1, max_length=MAX_NAME)
    arguments: str = ""


class ToolCall(BaseModel):
    """A call in an assistant's message. Clients send back what they put together from a stream: its index, too."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = Field(default=None, max_length=MAX_NAME)
    type: Literal["function"] = "function"
    function: CalledFunction


def forced_tools(choice: ToolChoice | None, tools: Sequence[Tool]) -> list[Tool]:
    """The tools of which one has to be called; none: the model is free. RequestError: `tool_choice` names none."""
    if choice in (None, "none", "auto"):
        return []
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if choice == "required":
        return list(tools)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    found = [tool for tool in tools if isinstance(function, dict) and tool.function.name == function.get("name")]
    if not found:
        message = "tool_choice is none, auto, required, or a function of tools"
        raise RequestError(message, param="tool_choice", code="invalid_value")
    return found[:1]


def template_variables(
    tools: Sequence[Tool], choice: ToolChoice | None, others: Mapping[str, Any], effort: str | None = None
) -> dict[str, Any]:
    """What the chat template gets beside the messages. RequestError: `others` has what is not for a client to set."""
    if reserved := sorted(OURS.intersection(others)):
        raise RequestError(
            f"chat_template_kwargs: {reserved[0]} is not supported",
            param="chat_template_kwargs",
            code="unsupported_parameter",
            hint="say it in the request, where there is a field for it",
        )
    variables = dict(others)
    if tools and choice != "none":
        variables["tools"] = [tool.given for tool in tools]
    if effort is not None:
        variables["reasoning_effort"] = effort
    return variables
