"""Conversations to prompts, through the checkpoint's chat template.

A template is a program that mixes its own markup with what people wrote. Both look alike in its
output: `<|eot|>` from the template ends a turn, `<|eot|>` in a message is seven characters that
somebody typed. They are told apart so: where the messages hold one of the characters that special
tokens are marked with (`<`, `|`, `>`), the conversation is rendered once more with each of those
replaced by a private character of its own. In that rendering, what reads as a special token was
written by the template, whole; the private characters are turned back afterwards.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from puna import _core
from puna.errors import InvalidRequest, ModelFormatError
from puna.images import to_rgb
from puna.template_environment import compile_template, run

ROLES = ("system", "user", "assistant", "tool", "ipython")
IMAGE_TOKEN = "<|image|>"  # what a template writes where a picture goes

MAX_NESTING = 64  # of lists and dicts in messages and tools; schemas of real tools stay below 20
MAX_TEMPLATE_BYTES = 16 << 20  # of a file; those of real checkpoints have less than 100 KB

# The format of Llama 4, for checkpoints that bring no template. Message texts are kept as they are,
# the system message is trimmed; the schemas of tools go in front of the first message after it.
DEFAULT_TEMPLATE = """\
{%- macro content_of(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- "<|image|>" if part.type == "image" else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro header(role) -%}
    {{- "<|header_start|>" + role + "<|header_end|>\\n\\n" -}}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0].role == "system" -%}
    {{- header("system") -}}
    {%- if tools -%}
        {{- "Environment: ipython\\n" -}}
    {%- endif -%}
    {{- content_of(messages[0]) | trim + "<|eot|>" -}}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- if not messages -%}
        {{- raise_exception("tools go with a user message, and there is none") -}}
    {%- endif -%}
    {{- header("user") -}}
    {{- "Given the following functions, please respond with a JSON for a function call " -}}
    {{- "with its proper arguments that best answers the given prompt.\\n\\n" -}}
    {{- 'Respond in the format {"name": function name, ' -}}
    {{- '"parameters": dictionary of argument name and its value}.' -}}
    {{- "Do not use variables.\\n\\n" -}}
    {%- for tool in tools -%}
        {{- tool | tojson(indent=4) + "\\n\\n" -}}
    {%- endfor -%}
    {{- content_of(messages[0]) | trim + "<|eot|>" -}}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.tool_calls -%}
        {{- header("assistant") + "<|python_start|>" + content_of(message) + "<|python_end|>" -}}
        {%- for call in message.tool_calls -%}
            {{- '{"name": "' + call.function.name + '", "parameters": ' -}}
            {{- call.function.arguments | tojson + "}" -}}
        {%- endfor -%}
    {%- elif message.role in ["tool", "ipython"] -%}
        {{- header("ipython") + message.content | tojson -}}
    {%- else -%}
        {{- header(message.role) + content_of(message) -}}
    {%- endif -%}
    {{- "<|eot|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- header("assistant") -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja2 template, and what it needs besides the conversation.

    Attributes:
        source: The template.
        tool_source: A template of its own for conversations with tools, if there is one.
        origin: Where the template comes from, for messages.
        tokens: Variables such as "bos_token" and the special tokens they stand for.
    """

    source: str
    tool_source: str | None = None
    origin: str = "the chat template"
    tokens: Mapping[str, str] | None = None


DEFAULT = ChatTemplate(DEFAULT_TEMPLATE, origin="the Llama 4 chat template")


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A special token written by the template."""

    name: str


@dataclass(frozen=True, slots=True)
class ImagePlaceholder:
    """The place of an image; `index` counts in `RenderedPrompt.images`."""

    index: int


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation, ready for the tokenizer.

    Attributes:
        parts: Plain text (to be encoded without special tokens; no two texts are neighbours),
            special tokens and images, in order.
        images: RGB pictures, uint8 [H, W, 3].
    """

    parts: tuple[str | SpecialToken | ImagePlaceholder, ...]
    images: tuple[NDArray[np.uint8], ...]


def render(
    messages: str | Sequence[Mapping[str, Any]],
    *,
    special_tokens: Collection[str],
    images: Sequence[Any] | None = None,
    template: ChatTemplate = DEFAULT,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> RenderedPrompt:
    """Renders a conversation.

    Args:
        messages: A string (one user message), or messages with "role" and "content"; content is a
            string or a list of parts: {"type": "text", "text": ...}, {"type": "image", "image" or
            "path" or "url" or "base64": ...} as for Hugging Face, or OpenAI's {"type": "image_url",
            "image_url": {"url": "data:..."}}.
        special_tokens: Names of the tokenizer's special tokens.
        images: Pictures for the parts {"type": "image"} that name none, in order; if there are no
            such parts, the pictures go in front of the last user message.
        template: The checkpoint's template.
        tools: JSON schemas of functions that the model may call.
        add_generation_prompt: Begin the turn of the assistant.

    Returns:
        The prompt. What the messages hold is text in it, whatever it looks like.

    Raises:
        InvalidRequest: Messages, images or tools that make no sense, or that the template refuses.
        ImageError: A picture that cannot be read.
        ModelFormatError: The template is not valid.
    """
    conversation, sources = _parse_messages(messages, images)
    schemas = plain_tools(tools)
    variables = {
        name: token
        for name, token in (template.tokens or {"bos_token": "<|begin_of_text|>"}).items()
        if token in special_tokens
    }
    variables.setdefault("bos_token", "")

    source = (schemas and template.tool_source) or template.source
    compiled = compile_template(source, template.origin)

    def write(conversation: Any, schemas: Any) -> str:
        given = {"messages": conversation, "tools": schemas}
        try:
            return run(
                compiled, {**variables, **given, "add_generation_prompt": add_generation_prompt}
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"{template.origin} refuses the messages: {error.message}", param="messages"
            ) from error
        except Exception as error:  # a template is a program, and may fail like one
            raise InvalidRequest(
                f"{template.origin} cannot render these messages: {error}", param="messages"
            ) from error

    parts = tuple(_render_parts(write, conversation, schemas, frozenset(special_tokens)))
    placed = sum(isinstance(part, ImagePlaceholder) for part in parts)
    if placed != len(sources):
        raise InvalidRequest(
            f"{template.origin} placed {placed} of {len(sources)} images; "
            f"images belong in user messages, and the tokenizer must know {IMAGE_TOKEN}",
            param="images",
        )
    return RenderedPrompt(parts, tuple(to_rgb(source) for source in sources))


def with_pictures(
    messages: str | Sequence[Mapping[str, Any]], images: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """Messages whose image parts hold their decoded pictures, so that they can be kept.

    Args:
        messages: As for `render`.
        images: As for `render`.

    Raises:
        InvalidRequest, ImageError: As for `render`.
    """
    conversation, sources = _parse_messages(messages, images)
    pictures = (to_rgb(source) for source in sources)
    for message in conversation:
        if not isinstance(message["content"], str):
            message["content"] = [
                {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                for part in message["content"]
            ]
    return conversation


# --- messages ------------------------------------------------------------------------------------


def _parse_messages(
    messages: str | Sequence[Mapping[str, Any]], images: Sequence[Any] | None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in the form that templates expect, and the pictures in the order of their parts."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise _invalid(f"messages is {_kind(messages)}; it must be text or a list of messages")
    if not messages:
        raise _invalid("messages is empty; give at least one message")
    conversation = []
    sources: list[Any] = []
    for i, message in enumerate(messages):
        parsed, found = _parse_message(message, f"messages[{i}]")
        conversation.append(parsed)
        sources += found
    return conversation, _place_images(conversation, sources, images)


def _parse_message(message: Any, where: str) -> tuple[dict[str, Any], list[Any]]:
    if not isinstance(message, Mapping):
        raise _invalid(f'{where} is {_kind(message)}; it must be a dict with "role" and "content"')
    role = message.get("role")
    if role not in ROLES:
        raise _invalid(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    # A message of the assistant that only calls tools may have no content.
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and not calls:
        raise _invalid(f"{where} has no content")
    parsed = {
        str(key): _plain(value, f"{where}[{key!r}]")
        for key, value in message.items()
        if key not in ("content", "tool_calls") and value is not None
    }
    parsed["content"], sources = _parse_content("" if content is None else content, where)
    if calls:
        parsed["tool_calls"] = _parse_calls(calls, where)
    return parsed, sources


def _parse_content(content: Any, where: str) -> tuple[Any, list[Any]]:
    if isinstance(content, str):
        return str(content), []
    if not isinstance(content, Sequence):
        raise _invalid(f"the content of {where} is {_kind(content)}; it must be text or parts")
    parts: list[dict[str, str]] = []
    sources: list[Any] = []
    for i, part in enumerate(content):
        name = f"part {i} of {where}"
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": str(part["text"])})
        elif kind == "text":
            raise _invalid(f'{name} has no "text"')
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            sources.append(_image_source(part, name))
        else:
            raise _invalid(f'{name} is {kind!r}; a part is a dict of type "text" or "image"')
    if not sources:
        # Every template reads text; not every template reads parts in every place.
        return "".join(part["text"] for part in parts), []
    return parts, sources


# Stands for the picture of a part that names none.
_MISSING = object()


def _image_source(part: Mapping[str, Any], name: str) -> Any:
    """What `to_rgb` is to read; _MISSING if the part leaves it to the argument `images`."""
    if part["type"] == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        # The form of OpenAI's API. Its requests come from elsewhere and may not name files here.
        if not isinstance(url, str) or not url.lower().startswith(("data:", "http:", "https:")):
            raise _invalid(
                f'{name} has no data: URL; for a file give {{"type": "image", "path": ...}}'
            )
        return url
    given = [key for key in ("image", "path", "url", "base64") if part.get(key) is not None]
    if not given:
        return _MISSING
    if len(given) > 1:
        raise _invalid(f"{name} names its picture twice: {' and '.join(given)}")
    source = part[given[0]]
    if given[0] == "path" and isinstance(source, str):
        return Path(source)
    if given[0] == "base64" and isinstance(source, str) and not source.startswith("data:"):
        return f"data:;base64,{source}"
    return source


def image_list(images: Sequence[Any] | None) -> list[Any]:
    """The argument `images` as a list.

    Raises:
        InvalidRequest: It is not a list; a single picture must stand in one too.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Sequence | None):
        raise InvalidRequest(f"images is {_kind(images)}; it must be a list", param="images")
    return list(images or ())


def _place_images(
    conversation: list[dict[str, Any]], sources: list[Any], images: Sequence[Any] | None
) -> list[Any]:
    images = image_list(images)
    open_places = sum(source is _MISSING for source in sources)
    if open_places:
        if open_places != len(images):
            raise InvalidRequest(
                f"the messages have {open_places} image parts without a picture, "
                f"and images holds {len(images)}",
                param="images",
            )
        given = iter(images)
        return [next(given) if source is _MISSING else source for source in sources]
    if not images:
        return sources
    last = max((i for i, m in enumerate(conversation) if m["role"] == "user"), default=None)
    if last is None:
        raise InvalidRequest("images go with a user message, and there is none", param="images")
    before = sum(_image_count(message) for message in conversation[:last])
    content = conversation[last]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    conversation[last]["content"] = [{"type": "image"}] * len(images) + parts
    return sources[:before] + images + sources[before:]


def _image_count(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def _parse_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    name = f"the tool_calls of {where}"
    if not isinstance(calls, list | tuple):
        raise _invalid(f"{name} are {_kind(calls)}; they must be a list")
    parsed = []
    for call in _plain(calls, name):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid(f'{where} has a tool call without "function" and "name"')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI's form: JSON in a string
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise _invalid(f"{where} calls a tool with arguments that are not JSON") from error
            except RecursionError as error:  # Python's own limit is far above ours
                raise _too_deep(f"the arguments of a tool call in {where}", "messages") from error
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    # Once more, for the arguments that were a string: the next turn may bring them back as a dict.
    plain: list[dict[str, Any]] = _plain(parsed, name)
    return plain


def answer_message(text: str, *, calls: bool) -> dict[str, Any]:
    """An answer as a message of the assistant.

    Args:
        text: What it said.
        calls: Whether it began with the marks of a tool call. Then `text` is read as one or more
            calls, which templates write with their marks; if it is none, it stays text.
    """
    said: dict[str, Any] = {"role": "assistant", "content": text}
    if not calls:
        return said
    functions = []
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        try:
            call, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return said
        if not isinstance(call, dict) or call.keys() != {"name", "parameters"}:
            return said
        functions.append({"name": call["name"], "arguments": call["parameters"]})
    if not all(isinstance(function["name"], str) for function in functions):
        return said
    called = [{"type": "function", "function": function} for function in functions]
    try:
        _plain(called, "the answer")
    except InvalidRequest:  # as a call, every later turn of the conversation would be refused
        return said
    return {"role": "assistant", "content": "", "tool_calls": called} if called else said


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A copy of JSON schemas of functions; None if there are none."""
    if not tools:
        return None
    listed = isinstance(tools, Sequence) and not isinstance(tools, str)
    if not listed or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRequest("tools must be a list of JSON schemas (dicts)", param="tools")
    plain: list[dict[str, Any]] = _plain(tools, "tools", param="tools")
    return plain


def _plain(value: Any, where: str, param: str = "messages", depth: int = 0) -> Any:
    """A copy made of JSON types only: templates are not trusted with richer objects."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if depth == MAX_NESTING and isinstance(value, Mapping | list | tuple):
        raise _too_deep(where, param)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, param, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, param, depth + 1) for item in value]
    raise InvalidRequest(f"{where} holds {_kind(value)}, which is not JSON", param=param)


def _too_deep(where: str, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where}: lists or dicts lie within each other more than {MAX_NESTING} deep; "
        "make them flatter",
        param=param,
    )


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="messages")


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"


# --- telling the template's tokens from text -----------------------------------------------------


@lru_cache(maxsize=8)
def _special_pattern(special_tokens: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str]]:
    """A pattern of all special tokens, and characters of which each of them has at least one.

    A token made of letters and digits only is marked by its first character.
    """
    names = sorted((name for name in special_tokens if name), key=len, reverse=True)
    marks: set[str] = set()
    for name in names:
        symbols = {c for c in name if not (c.isalnum() or c.isspace() or c == "_")}
        marks |= symbols or {name[0]}
    pattern = re.compile("|".join(map(re.escape, names)) if names else "(?!)")
    return pattern, frozenset(marks)


def _render_parts(
    write: Callable[[Any, Any], str],
    conversation: list[dict[str, Any]],
    schemas: list[Any] | None,
    special_tokens: frozenset[str],
) -> Iterator[str | SpecialToken | ImagePlaceholder]:
    """Runs a template, and tells its special tokens from text that looks like them."""
    pattern, marks = _special_pattern(special_tokens)
    plain = write(conversation, schemas)
    written = list(_strings([conversation, schemas]))
    if not any(mark in text for text in written for mark in marks):
        return _split(plain, pattern, {})
    hidden = _private_characters(marks, [plain, *written])
    masked = write(_translate(conversation, hidden), _translate(schemas, hidden))
    back = {ord(private): chr(mark) for mark, private in hidden.items()}
    if masked.translate(back) == plain:
        return _split(masked, pattern, back)
    # The template itself reads or rewrites those characters. Its output can only be trusted if
    # nobody wrote a special token.
    _refuse_special_tokens(conversation, written, pattern)
    return _split(plain, pattern, {})


def _split(
    text: str, pattern: re.Pattern[str], back: Mapping[int, str]
) -> Iterator[str | SpecialToken | ImagePlaceholder]:
    """Cuts rendered text at its special tokens, and turns private characters back in the rest."""
    position = images = 0
    for match in pattern.finditer(text):
        if match.start() > position:
            yield _text(text[position : match.start()].translate(back))
        if match[0] == IMAGE_TOKEN:
            yield ImagePlaceholder(images)
            images += 1
        else:
            yield SpecialToken(match[0])
        position = match.end()
    if position < len(text):
        yield _text(text[position:].translate(back))


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _invalid(f"a message holds half of a surrogate pair: {error}") from error
    return text


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON types, the keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _translate(value: Any, table: Mapping[int, str]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {key.translate(table): _translate(item, table) for key, item in value.items()}
    if isinstance(value, list):
        return [_translate(item, table) for item in value]
    return value


def _private_characters(marks: Collection[str], texts: Sequence[str]) -> dict[int, str]:
    """For each mark a private-use character that none of the texts holds."""
    used = set().union(*texts)
    # Planes 15 and 16 hold nothing else.
    free = [chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in used]
    if len(free) < len(marks):
        raise _invalid("the messages hold nearly every private-use character of Unicode")
    return {ord(mark): free[i] for i, mark in enumerate(sorted(marks))}


def _refuse_special_tokens(
    conversation: Sequence[Mapping[str, Any]], written: Sequence[str], pattern: re.Pattern[str]
) -> None:
    # Texts side by side may form a token that none of them holds alone.
    together = ""
    for message in conversation:
        content = message["content"]
        if isinstance(content, str):
            together += content
        else:
            together += "".join(part.get("text", "") for part in content)
    for text in (*written, together):
        if found := pattern.search(text):
            raise _invalid(
                f"the messages hold {found[0]!r}, and this checkpoint's chat template does not "
                "keep it apart from special tokens of its own: leave it out"
            )


# --- templates -----------------------------------------------------------------------------------


def find_template(path: Path) -> ChatTemplate:
    """The chat template of a checkpoint; Llama 4's own where it has none.

    In a GGUF file it is in the metadata. In a directory it is looked for, in this order, in
    chat_template.jinja, chat_template.json, processor_config.json and tokenizer_config.json.

    Templates are programs of the checkpoint. They are compiled here and run by `render`, kept from
    Python's objects, files and modules, and stopped where they do more than a conversation of that
    length can need (see puna.template_environment).

    Raises:
        ModelFormatError: One of the files is damaged, or the template is not valid.
    """
    if _core.is_gguf(os.fspath(path)):
        return _gguf_template(path)
    directory = path
    settings = _read_json(directory / "tokenizer_config.json")
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    tokens.setdefault("bos_token", "<|begin_of_text|>")
    source = tool_source = None
    origin = directory / "chat_template.jinja"
    if os.path.isfile(origin):
        source = _read_text(origin)
        additional = directory / "additional_chat_templates" / "tool_use.jinja"
        tool_source = _read_text(additional) if os.path.isfile(additional) else None
    else:
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            origin = directory / name
            held = _read_json(origin).get("chat_template")
            if held is not None:
                source, tool_source = _from_settings(held, origin)
                break
    if source is None:
        return ChatTemplate(DEFAULT.source, origin=DEFAULT.origin, tokens=tokens)
    return _checked(ChatTemplate(source, tool_source, f"the chat template in {origin}", tokens))


def _checked(template: ChatTemplate) -> ChatTemplate:
    for text in (template.source, template.tool_source):
        if text is not None:
            compile_template(text, template.origin)
    return template


def _gguf_template(path: Path) -> ChatTemplate:
    templates, tokens = _core.gguf_chat(str(path))
    tokens.setdefault("bos_token", "<|begin_of_text|>")
    if "default" not in templates:
        return ChatTemplate(DEFAULT.source, origin=DEFAULT.origin, tokens=tokens)
    origin = f"the chat template in {path}"
    return _checked(ChatTemplate(templates["default"], templates.get("tool_use"), origin, tokens))


def _from_settings(held: Any, origin: Path) -> tuple[str, str | None]:
    """A template as JSON settings hold it: text, or a list of named ones."""
    if isinstance(held, list) and all(isinstance(item, dict) for item in held):
        named = [item for item in held if isinstance(item.get("name"), str)]
        held = {item["name"]: item.get("template") for item in named}
    if isinstance(held, str):
        return held, None
    if isinstance(held, dict) and isinstance(held.get("default"), str):
        tool_use = held.get("tool_use")
        return held["default"], tool_use if isinstance(tool_use, str) else None
    raise ModelFormatError(
        f'{origin}: "chat_template" is neither text nor a list of templates, one of them "default"'
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} is not a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_TEMPLATE_BYTES:
            raise ModelFormatError(
                f"{path} has {size:,} bytes; a template and its settings may have at most "
                f"{MAX_TEMPLATE_BYTES:,}: get the file anew"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"{path} cannot be read: {error}") from error
