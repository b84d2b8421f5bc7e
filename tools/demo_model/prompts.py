"""Prompts as Llama 4's chat template writes them, for the training documents."""

from __future__ import annotations

from functools import cache

from puna.chat_template import render
from puna.demo.toolbox import SCHEMAS, Task


def tool_prompt(task: Task) -> str:
    """The user's message with the schemas of the offered tools in front."""
    return _offer(task.offered) + task.request


@cache
def _offer(names: tuple[str, ...]) -> str:
    end = "REQUEST"
    marks = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>")
    parts = render(end, special_tokens=marks, tools=[SCHEMAS[name] for name in names]).parts
    (message,) = (part for part in parts if isinstance(part, str) and part.endswith(end))
    return message.removeprefix("\n\n").removesuffix(end)
