"""The environment in which chat templates run: what they may use, and how much they may do.

A template is charged while it runs: for each round of a loop and each call, and for the sizes of
what it makes, writes, compares and hands to filters. `run` bounds the sum, so that what a template
can take of time and memory is in proportion to the conversation.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.parser
import jinja2.runtime
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from puna.errors import ModelFormatError

# What one operator of a template may make: a string or list, and a number.
_MAX_LENGTH = 1 << 20
_MAX_BITS = 1024

# What one run may do: a few seconds' worth, and more for each character of the conversation, of
# which Llama 4's own template needs 4 to 6.
_MAX_WORK = 1 << 24
_WORK_PER_CHARACTER = 64
# The work of a character that is copied or compared is 1; so much is that
_ROUND = 8  # of a round of a loop,
_CALL = 32  # of a function, macro, filter or operator,
_ITEM = 8  # and of a value within a list or dict.


def run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Renders a template of compile_template().

    Raises:
        jinja2.TemplateError: It refuses the variables, or does too much with them.
        Exception: Whatever else a program may raise.
    """
    work = _MAX_WORK + _WORK_PER_CHARACTER * _size(dict(variables))
    token = _METER.set(_Meter(work))
    try:
        return template.render(**variables)
    finally:
        _METER.reset(token)


@functools.lru_cache(maxsize=16)
def compile_template(source: str, origin: str) -> jinja2.Template:
    """Compiles a template, and runs nothing of it.

    Raises:
        ModelFormatError: It is not valid.
    """
    try:
        return _Environment().from_string(source)
    except Exception as error:  # Python's own, too, on what Jinja2 makes of a damaged template
        raise ModelFormatError(f"{origin} is not a valid template: {error}") from error


# --- what is charged -----------------------------------------------------------------------------


class _Meter:
    def __init__(self, work: int) -> None:
        self.most = self.left = work


_METER: ContextVar[_Meter] = ContextVar("_METER")


def _charge(work: int) -> None:
    meter = _METER.get()
    meter.left -= work
    if meter.left < 0:
        raise jinja2.TemplateError(
            f"it does more than {meter.most:,} steps, which no conversation of this length needs"
        )


def _length(value: Any) -> int:
    """Of a string or list itself."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 0


def _size(value: Any, most: float = float("inf")) -> int:
    """Of a value and all that it holds; where it is above `most`, something above that."""
    size, rest = 0, [value]
    while rest and size <= most:
        item = rest.pop()
        size += _ITEM
        if isinstance(item, Namespace):
            item = object.__getattribute__(item, "_Namespace__attrs")
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, range):
            size += _ITEM * len(item)
        elif isinstance(item, dict):
            rest += item.keys()
            rest += item.values()
        elif isinstance(item, list | tuple):
            rest += item
    return size


def _charge_size(value: Any) -> Any:
    _charge(_size(value, _METER.get().left))
    return value


def _charge_length(value: Any) -> Any:
    _charge(_length(value))
    return value


def _rounds(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _charge(_ROUND)
        yield value


def _text(written: str, characters: int) -> str:
    _charge(characters)
    return written


def _padding(form: Any, values: Iterable[Any]) -> int:
    """What a format can add to its values at most: each number in it may be a width."""
    if not isinstance(form, str):
        return 0
    padding = sum(int(number) for number in re.findall(r"\d+", form))
    if "*" in form or re.search(r"\{[^{}]*\{", form):  # widths come from the values
        padding += sum(abs(value) for value in values if isinstance(value, int))
    return padding


def _growth(name: str, value: Any, given: tuple[Any, ...]) -> int:
    """What a filter, or a method of strings, can make that is larger than all it is given.

    Args:
        name: Of the filter or method.
        value: What it is called for.
        given: Its arguments.
    """
    numbers = sum(abs(item) for item in given if isinstance(item, int))
    texts = [len(item) for item in given if isinstance(item, str | bytes)]
    if name == "format":
        return _padding(value, given)
    if name == "join":  # of `separator.join(list)`, or `list | join(separator)`
        everything = (value, *given)
        return max(map(_length, everything)) * max(
            len(item) if isinstance(item, str | bytes) else 0 for item in everything
        )
    if name == "replace" and len(given) > 1 and isinstance(given[0], str | bytes):
        old, new = given[:2]
        places = value.count(old) if isinstance(value, type(old)) else _size(value)
        return int(places * _length(new))
    if name == "wordwrap":
        return (1 + _length(value)) * max(texts, default=0)
    if name in ("indent", "expandtabs"):
        return (1 + _length(value)) * max([numbers, *texts])
    return numbers  # widths and counts, of characters or lists


# Injected into the tree of a template, which can have no filters of such names.
_COUNTED: dict[str, Callable[..., Any]] = {
    "charge size": _charge_size,
    "charge length": _charge_length,
    "charge rounds": _rounds,
    "charge text": _text,
}


class _Charging(NodeTransformer):
    """Puts what charges into a template's tree, where no method of the environment is called."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        node.iter = _filtered(node.iter, "charge rounds")
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        node.nodes = [_filtered(part, "charge size") for part in node.nodes]
        return self.generic_visit(node)

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:  # noqa: N802
        # Comparing takes as long as one of the two is large, and looking into something as it is.
        if not isinstance(node.expr, nodes.Const):
            node.expr = _filtered(node.expr, "charge size")
        return self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "charge length") if isinstance(node.arg, nodes.Slice) else node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        texts = [len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData)]
        if texts:
            empty = nodes.Const("", lineno=node.lineno)
            node.nodes = [*node.nodes, _filtered(empty, "charge text", sum(texts))]
        return node


def _filtered(node: nodes.Node, name: str, *arguments: Any) -> nodes.Filter:
    constants = [nodes.Const(argument, lineno=node.lineno) for argument in arguments]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


# Filters that look at the length of a value, or at its items one by one, but not into them.
_SHALLOW = frozenset(
    {"attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"}
    | {"reject", "rejectattr", "reverse", "select", "selectattr", "sum"}
)
# Filters that may make something larger than they are given.
_GROWING = frozenset(
    {"batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap"}
)


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Behind the environment or context that some want.
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def metered(*arguments: Any, **keywords: Any) -> Any:
        _charge(_CALL)
        if name in _SHALLOW:
            return _charge_length(function(*arguments, **keywords))
        arguments = tuple(map(_held, arguments))
        value, *given = (*arguments[place:], *keywords.values())
        _charge_size([value, *given])
        if name in _GROWING:
            _charge(_growth(name, value, tuple(given)))
        return _charge_length(function(*arguments, **keywords))

    return metered


def _held(value: Any) -> Any:
    """What other filters would hand on piece by piece, as a list."""
    return list(_rounds(value)) if isinstance(value, Iterator) else value


def _metered_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def metered(*arguments: Any) -> Any:
        _charge_size(list(arguments))
        return function(*arguments)

    return metered


# Tests that compare values.
_COMPARING = frozenset({"==", "eq", "equalto", "!=", "ne", "in", ">", "gt", "greaterthan"}) | {
    *(">=", "ge", "<", "lt", "lessthan", "<=", "le"),
}


# --- the environment -----------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which training marks what a model says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@jinja2.pass_context
def _written(context: jinja2.runtime.Context, value: Any) -> Any:
    """What {{ }} writes, as it is; needing a context keeps Jinja2 from running it to compile it."""
    return _charge_size(value)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    def visit_EvalContextModifier(  # noqa: N802
        self, node: nodes.EvalContextModifier, frame: jinja2.compiler.Frame
    ) -> None:
        # What follows {% autoescape %} is evaluated when it is compiled, whatever it is.
        for option in node.options:
            if not isinstance(option.value, nodes.Const):
                raise jinja2.TemplateError("autoescape must be followed by true or false")
        super().visit_EvalContextModifier(node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    """Evaluates nothing when it compiles, and charges what is done when it runs."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CodeGenerator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            optimized=False,
            finalize=_written,
        )
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = _metered_filter(name, function)
        self.filters.update(_COUNTED)
        for name in _COMPARING:
            self.tests[name] = _metered_test(cast(Callable[..., Any], self.tests[name]))
        del self.globals["lipsum"]  # makes text of any length
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        *rest: Any,
        **more: Any,
    ) -> str:
        tree = cast(nodes.Template, _Charging().visit(source))
        return super()._generate(tree, name, filename, *rest, **more)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Every character may become a text of any length.
        if isinstance(obj, str) and attr == "translate":
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits, other = left.bit_length(), right.bit_length()
            if operator in ("*", "**") and (
                (bits * right if operator == "**" else bits + other) > _MAX_BITS
            ):
                raise jinja2.TemplateError(
                    f"{operator} makes a number of more than {_MAX_BITS:,} bits; "
                    "the template must do with smaller ones"
                )
        elif operator == "*" and _extent(left) * _extent(right) > _MAX_LENGTH:
            raise jinja2.TemplateError(
                f"* makes a string or list longer than {_MAX_LENGTH:,}; "
                "the template must do with shorter ones"
            )
        elif operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            _charge_size(right)
            _charge(_padding(left, values))
        _charge(_CALL)
        return _charge_length(super().call_binop(context, operator, left, right))

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **more: Any) -> Any:
        _charge(_CALL)
        if isinstance(function, jinja2.runtime.LoopContext) and args:  # of a recursive loop
            args = (_rounds(args[0]), *args[1:])
        # The sandbox puts a function of its own around str.format.
        method = getattr(function, "__wrapped__", function)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | list | tuple):
            args = tuple(map(_held, args))
            given = (*args, *more.values())
            _charge_size([owner, *given])
            if isinstance(owner, str | bytes | int):
                _charge(_growth(method.__name__, owner, given))
        return _charge_length(super().call(context, function, *args, **more))


def _extent(factor: Any) -> int:
    """By how much a factor makes a string or list longer."""
    if isinstance(factor, str | bytes | list | tuple):
        return len(factor)
    return abs(factor) if isinstance(factor, int) else 1
