"""How models write tool calls. Each is data for `tool_calls.py`; to add one, add it here and to `ToolCallParser`.

No library parses these outside vLLM and SGLang, whose parsers import their engines; transformers' `parse_response` does
not stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import regex

from membership.base.enums import ToolCallParser

DEEPSEEK_ALL, DEEPSEEK_ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DEEPSEEK_ONE, DEEPSEEK_SEP, DEEPSEEK_ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Format:
    """`lead`: from an opener up to the JSON object. With a group `name` the object is the arguments; else it has both.

    `openers` begin a call anywhere, `first` only where the answer begins, `more` only after a call. `closers` are left
    out after one. `marked`: an opener is never part of a plain answer; without it, the name must be that of a tool.
    """

    lead: regex.Pattern[str]
    openers: tuple[str, ...]
    first: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()  # marks in the lead
    marked: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be special tokens of a vocabulary."""
        return tuple(each for each in (*self.openers, *self.closers, *self.inside) if len(each) > 3)


HERMES = Format(regex.compile(r"<tool_call>\s*(?=\{)"), ("<tool_call>",), closers=("</tool_call>",))
MISTRAL = Format(
    regex.compile(
        r"(?:\[TOOL_CALLS\]|,)\s*"
        r"(?:(?P<name>[^\s\[\]{},\"]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)|\[?\s*(?=\{))"
    ),
    ("[TOOL_CALLS]",),
    more=(",",),
    closers=("]",),
    inside=("[ARGS]", "[CALL_ID]"),
)
LLAMA_JSON = Format(
    regex.compile(r"(?:<\|python_tag\|>|;)?\s*(?=\{)"),
    (PYTHON_TAG,),
    first=("{",),
    more=(";", "{"),
    marked=False,
)
DEEPSEEK = Format(
    regex.compile(
        rf"(?:{DEEPSEEK_ALL}\s*)?{DEEPSEEK_ONE}"
        rf"(?:function{DEEPSEEK_SEP}(?P<name>[^\n{{]+)\n```json\s*|(?P<name>[^<\n]+){DEEPSEEK_SEP}\s*)(?=\{{)"
    ),
    (DEEPSEEK_ALL, DEEPSEEK_ONE),
    closers=("```", DEEPSEEK_ONE_END, DEEPSEEK_ALL_END),
    inside=(DEEPSEEK_SEP,),
)
CHOSEN = Format(regex.compile(r"[\[,]\s*(?=\{)"), (), first=("[",), more=(",",), closers=("]",))  # see `structured.py`
FORMATS = {
    ToolCallParser.HERMES: HERMES,
    ToolCallParser.MISTRAL: MISTRAL,
    ToolCallParser.LLAMA3_JSON: LLAMA_JSON,
    ToolCallParser.LLAMA4_JSON: LLAMA_JSON,
    ToolCallParser.DEEPSEEK_V3: DEEPSEEK,
    ToolCallParser.DEEPSEEK_V31: DEEPSEEK,
}


def format_for(parser: ToolCallParser, template: str) -> Format | None:
    """The format by its name, or as the chat template has it; None: tool calls are not parsed."""
    if parser is not ToolCallParser.AUTO:
        return FORMATS.get(parser)
    if DEEPSEEK_ONE in template:
        return DEEPSEEK
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return None if "<function=" in template else HERMES  # XML, of Qwen3-Coder: there is no parser for it
    return LLAMA_JSON if '"parameters":' in template and "<|start_header_id|>" in template else None
