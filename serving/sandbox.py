"""A Jinja environment for templates that nobody has read: bounded in memory and in time.

Jinja's own sandbox keeps a template away from Python's internals (CVE-2024-34359) but lets it loop
and allocate without end. Here whatever makes a value, repeats or compares passes a door that
charges the rendering's `Allowance`:

    {{ x }} and plain text      `_output`, as Jinja's `finalize`
    x ~ y, [x], (x, y), {k: v}  filters that `_Doors` puts around the node when it compiles
    for, ==, in                 likewise: a loop pays for each turn, a comparison looks at the clock
    + - * / // % **             `call_binop`, which refuses before Python would allocate
    f(x), x.f, x[i], x[a:b]     `call`, `getattr`, `getitem`; methods from a table
    x | f, x is f               tables of filters and tests

Not here: what a chat template is given (`template.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial, wraps
from typing import cast

from jinja2 import TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from serving.allowance import (
    STEP_BYTES,
    LimitError,
    current,
    each,
    joined,
    made,
    plain_arguments,
    written,
)
from serving.filters import (
    FILTERS,
    LOOP_ATTRIBUTES,
    LOOPING_FILTERS,
    METHODS,
    TESTS,
    Function,
    percent,
)

_MOST_SOURCE = 256 << 10  # published chat templates stay below 30 KiB
_MOST_INT = 1 << 64
_MOST_EXPONENT = 64

# The nodes of Jinja's grammar that a template may hold. Absent: other templates (include, import,
# extends, block), autoescape, and what only extensions make.
_NODES = frozenset(
    {nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock}
    | {nodes.FilterBlock, nodes.With, nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue}
    | {nodes.Name, nodes.NSRef, nodes.Const, nodes.TemplateData, nodes.Tuple, nodes.List}
    | {nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call}
    | {nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand}
    | {nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow}
    | {nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos}
)


class _Doors(NodeTransformer):
    """Leads what Jinja would compile to bare Python through filters of ours."""

    def visit(self, node: nodes.Node, *args: object, **kwargs: object) -> nodes.Node:
        if type(node) not in _NODES or (isinstance(node, nodes.For) and node.recursive):
            what = type(node).__name__.lower()
            raise TemplateSyntaxError(f"a chat template cannot use {what!r} here", node.lineno)
        changed: nodes.Node = super().visit(node, *args, **kwargs)
        return changed

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        """A constant, unlike template data, goes through `finalize` each time it is printed."""
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return _filtered(self.generic_visit(node), "ticked")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filtered(self.generic_visit(node), "made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filtered(self.generic_visit(node), "made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "made") if node.ctx == "load" else node


def _filtered(node: nodes.Node, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only a bracket."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@pass_context
def _output(context: Context, value: object) -> object:
    """Jinja's `finalize`. Taking the context keeps it from running when the template compiles."""
    return made(written(value))


def _ticked(value: object) -> object:
    current().spend()
    return value


def _charged(function: Function, looping: bool = False) -> Function:
    """`function` with its result charged; `looping`: and each item of its first operand."""
    # Jinja passes its context or environment first to functions that carry its mark.
    operand = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def charged(*args: object, **kwargs: object) -> object:
        current().spend(STEP_BYTES)
        if looping:
            args = (*args[:operand], each(args[operand]), *args[operand + 1 :])
        return made(function(*args, **kwargs))

    return charged


_DOORS: dict[str, Function] = {
    "each": each,
    "joined": _charged(joined),
    "made": made,
    "ticked": _ticked,
}


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders untrusted templates; rendering happens inside `allowance.rendering`.

    Whitespace as Hugging Face's templates expect it. `functions` are globals besides `range`,
    `dict` and `namespace`.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, functions: Mapping[str, Function]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            optimized=False,
            finalize=_output,
        )
        self.globals = {"range": safe_range, "dict": dict, "namespace": Namespace, **functions}
        self.filters = {name: _charged(function) for name, function in FILTERS.items()}
        looping = LOOPING_FILTERS.items()
        self.filters |= {name: _charged(function, looping=True) for name, function in looping}
        self.filters |= _DOORS
        self.tests = {name: _charged(function) for name, function in TESTS.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _MOST_SOURCE:
            raise TemplateSyntaxError(f"it is longer than {_MOST_SOURCE} characters", 1)
        tree = _Doors().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        return tree

    def call(self, context: Context, obj: object, /, *args: object, **kwargs: object) -> object:
        """`obj(...)` in a template."""
        current().spend(STEP_BYTES)
        if isinstance(obj, Macro):
            plain_arguments((*args, *kwargs.values()))
        return made(super().call(context, obj, *args, **kwargs))

    def getattr(self, obj: object, attribute: str) -> object:
        """`obj.attribute`: a method of the table, else an item, else undefined."""
        for kind, methods in METHODS:
            if isinstance(obj, kind) and attribute in methods:
                return partial(methods[attribute], obj)
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        allowed = isinstance(obj, LoopContext) and attribute in LOOP_ATTRIBUTES
        if allowed or isinstance(obj, Namespace | Undefined):
            return super().getattr(obj, attribute)
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: object, argument: object) -> object:
        """`obj[argument]`: an item or a slice, else as `getattr`."""
        if isinstance(obj, str | list | tuple | dict | range):
            try:
                value = cast("Mapping[object, object]", obj)[argument]
            except (TypeError, LookupError):
                pass
            else:
                return made(value) if isinstance(argument, slice) else value
        if isinstance(argument, str):
            return self.getattr(obj, argument)
        if isinstance(obj, Undefined):
            return super().getitem(obj, argument)
        return self.undefined(obj=obj, name=str(argument))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """`left operator right`, refused where the result could be out of all proportion."""
        current().spend()
        if operator == "%" and isinstance(left, str):
            return made(percent(left, right if isinstance(right, tuple) else (right,)))
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        _check_ints(operator, left, right)
        return made(super().call_binop(context, operator, left, right))


def _check_repeat(sequence: object, times: object) -> None:
    if isinstance(sequence, str | list | tuple) and isinstance(times, int):
        current().fits(sys.getsizeof(sequence) * max(times, 0))


def _check_ints(operator: str, left: object, right: object) -> None:
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    too_large = max(abs(left), abs(right)) > _MOST_INT
    if too_large or (operator == "**" and abs(right) > _MOST_EXPONENT):
        raise LimitError("it computes with whole numbers of more than 64 bits")
