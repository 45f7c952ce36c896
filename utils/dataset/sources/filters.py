"""`filter`: an expression over the columns of a table, in the syntax of Python, evaluated without running Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from utils.dataset.sources.locators import Fault, SourceProblem

Evaluate = Callable[[Mapping[str, Any]], Any]

MAX_CHARACTERS = 2000


def _length(value: Any) -> int:
    return 0 if value is None else len(value)


def _lower(value: Any) -> str:
    return "" if value is None else value.lower()


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"len": _length, "lower": _lower}
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ORDERS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_USUAL = "comparisons, and, or, not, in, + - * /, numbers, texts in quotes, len() and lower()"


class Filter:
    """Which rows of a table to use.

    Values are compared as in Python, with two exceptions. Compared with a number, a text is read as a number, since a
    CSV contains only texts. No comparison with an empty cell holds except `!=`, and empty cells cannot be used in
    arithmetic.
    """

    def __init__(self, text: str, columns: Collection[str]) -> None:
        """
        Raises:
            SourceProblem: it is not such an expression, or names a column that does not exist.
        """
        self.text = text
        self.columns: set[str] = set()
        """The columns that it reads."""
        self._known = columns
        if len(text) > MAX_CHARACTERS:
            raise self._refusal(f"it has more than {MAX_CHARACTERS} characters")
        try:
            tree = ast.parse(text.replace("\n", " ").strip(), mode="eval")
            self._evaluate = self._compiled(tree.body)
        except SyntaxError as error:
            raise self._refusal(f"it cannot be understood at character {error.offset}: {error.msg}") from None
        except (RecursionError, MemoryError, ValueError) as error:
            if isinstance(error, SourceProblem):
                raise
            raise self._refusal("it cannot be understood; make it simpler") from None

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is used.

        Raises:
            Fault: the expression cannot be evaluated, for example because a text is not a number.
        """
        try:
            return bool(self._evaluate(row))
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise Fault("broken row", f"filter = {self.text!r} cannot be worked out here: {error}") from None

    def _refusal(self, reason: str) -> SourceProblem:
        return SourceProblem(f"filter = {self.text!r}: {reason}")

    def _compiled(self, node: ast.expr) -> Evaluate:
        compilers: dict[type[ast.expr], Callable[[Any], Evaluate]] = {
            ast.BinOp: self._arithmetic,
            ast.BoolOp: self._logic,
            ast.Call: self._call,
            ast.Compare: self._comparison,
            ast.Constant: self._constant,
            ast.List: self._list,
            ast.Name: self._column,
            ast.Tuple: self._list,
            ast.UnaryOp: self._unary,
        }
        compiler = compilers.get(type(node))
        if compiler is None:
            raise self._refusal(f"{ast.unparse(node)!r} cannot be used; there are {_USUAL}")
        return compiler(node)

    def _column(self, node: ast.Name) -> Evaluate:
        name = node.id
        if name not in self._known:
            near = get_close_matches(name, self._known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(self._known))}"
            raise self._refusal(f"there is no column {name}; {hint}")
        self.columns.add(name)
        return lambda row: row.get(name)

    def _constant(self, node: ast.Constant) -> Evaluate:
        value = node.value
        if not isinstance(value, (str, int, float)):
            raise self._refusal(f"{ast.unparse(node)!r} cannot be used; there are {_USUAL}")
        return lambda row: value

    def _list(self, node: ast.List | ast.Tuple) -> Evaluate:
        members = [self._compiled(member) for member in node.elts]
        return lambda row: [member(row) for member in members]

    def _logic(self, node: ast.BoolOp) -> Evaluate:
        values = [self._compiled(value) for value in node.values]
        gathered = all if isinstance(node.op, ast.And) else any
        return lambda row: gathered(value(row) for value in values)

    def _unary(self, node: ast.UnaryOp) -> Evaluate:
        value = self._compiled(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda row: not value(row)
        if isinstance(node.op, ast.USub):
            return lambda row: _calculated(operator.sub, 0, value(row))
        raise self._refusal(f"{ast.unparse(node)!r} cannot be used; there are {_USUAL}")

    def _arithmetic(self, node: ast.BinOp) -> Evaluate:
        operation = _ARITHMETIC.get(type(node.op))
        if operation is None:
            raise self._refusal(f"{ast.unparse(node)!r} cannot be used; there are {_USUAL}")
        left, right = self._compiled(node.left), self._compiled(node.right)
        return lambda row: _calculated(operation, left(row), right(row))

    def _comparison(self, node: ast.Compare) -> Evaluate:
        operands = [self._compiled(operand) for operand in (node.left, *node.comparators)]
        tests = [self._test(operation, node) for operation in node.ops]

        def holds(row: Mapping[str, Any]) -> bool:
            values = [operand(row) for operand in operands]
            return all(test(*pair) for test, pair in zip(tests, _pairs(values), strict=True))

        return holds

    def _test(self, operation: ast.cmpop, node: ast.Compare) -> Callable[[Any, Any], bool]:
        if order := _ORDERS.get(type(operation)):
            return lambda left, right: _in_order(order, left, right)
        if test := _TESTS.get(type(operation)):
            return test
        raise self._refusal(f"{ast.unparse(node)!r} cannot be used; there are {_USUAL}")

    def _call(self, node: ast.Call) -> Evaluate:
        function = _FUNCTIONS.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if function is None or len(node.args) != 1 or node.keywords:
            raise self._refusal(f"{ast.unparse(node)!r} cannot be used; there are {_USUAL}")
        argument = self._compiled(node.args[0])
        return lambda row: function(argument(row))


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(values[:-1], values[1:], strict=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _number(value: Any) -> Any:
    """A text as the number that it spells."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{value!r:.40} is no number") from None


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Both as numbers if one of them is a number."""
    if _is_number(left) or _is_number(right):
        # An empty cell of a CSV is a text too.
        return tuple(None if value == "" else _number(value) for value in (left, right))
    return left, right


def _calculated(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    # Numbers only: a text times a number could fill the memory.
    numbers = [None if value is None or value == "" else _number(value) for value in (left, right)]
    if None in numbers:
        return None
    if not all(map(_is_number, numbers)):
        raise TypeError("only numbers can be calculated with")
    return operation(*numbers)


def _in_order(order: Callable[[Any, Any], bool], left: Any, right: Any) -> bool:
    pair = _alike(left, right)
    return None not in pair and order(*pair)


def _is_equal(left: Any, right: Any) -> bool:
    try:
        return operator.eq(*_alike(left, right))
    except ValueError:
        return False


def _contains(member: Any, group: Any) -> bool:
    if group is None or member is None:
        return False
    if isinstance(group, str):
        return str(member) in group
    return any(_is_equal(member, other) for other in group)


_TESTS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: _is_equal,
    ast.NotEq: lambda left, right: not _is_equal(left, right),
    ast.In: _contains,
    ast.NotIn: lambda left, right: not _contains(left, right),
}
