"""Every small change of a module that its tests should notice: cosmic-ray's operators, and guards taken out.

`RULES` leaves out what changes types and not values. What only stands in an annotation is no change, and the numbers of
module-wide constants are settings: a test that repeats them proves nothing. A class's decorators (frozen, slots) count
as types.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.support import ROOT

EXPLAINED = ROOT / "tests" / "golden" / "mutation_survivors.yaml"
RULES = (
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt",
        "Is_IsNot", "IsNot_Is",
    )),
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "BitOr_BitAnd", "BitAnd_BitOr",
    )),
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer",
    "ZeroIterationForLoop", "ReplaceUnaryOperator_Delete_Not",
)  # fmt: skip


Make = Callable[[], str | None]


class Survivor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change that no test notices, and why none should. `after` left out: any change of this line."""

    file: str
    before: str
    after: str = ""
    why: str

    def explains(self, mutant: Mutant) -> bool:
        """Whether it is this change."""
        return (self.file, self.before) == (mutant.file, mutant.before) and self.after in ("", mutant.after)


class Mutant(NamedTuple):
    """A module with one change. `line`, `before`, `after`: the first line that differs."""

    file: str
    line: int
    before: str
    after: str
    source: str


def explained() -> list[Survivor]:
    """The list that is kept of survivors."""
    return msgspec.yaml.decode(EXPLAINED.read_bytes(), type=list[Survivor])


def mutants(file: str, seed: int) -> Iterator[Mutant]:
    """All changes of this module, each once, in an order that the seed decides; each is made when it is asked for."""
    source = Path(ROOT, file).read_text(encoding="utf-8")
    genuine = _meaning(source)
    makers = [*_by_cosmic_ray(source), *_without_a_guard(source)]
    random.Random(f"{seed} {file}").shuffle(makers)
    made: set[str] = set()
    for make in makers:
        changed = make()
        if changed is None or changed in made or _meaning(changed) in ("", genuine):
            continue
        made.add(changed)
        lines = zip(source.splitlines(), changed.splitlines(), strict=False)
        at, before, after = next((n, b.strip(), a.strip()) for n, (b, a) in enumerate(lines, start=1) if a != b)
        yield Mutant(file, at, before, after, changed)


def _by_cosmic_ray(source: str) -> Iterator[Make]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    nodes = list(ast_nodes(get_ast(source)))
    for rule in RULES:
        operator = get_operator(f"core/{rule}")()
        for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in nodes)):
            yield partial(mutate_code, source, operator, occurrence)


def _without_a_guard(source: str) -> Iterator[Make]:
    """A condition that never holds, one that has an operand less, a statement that is not there."""
    text = source.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def without(node: ast.expr | ast.stmt, instead: str) -> str:
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return (text[:begin] + instead.encode() + text[end:]).decode()

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.If(test=test) | ast.IfExp(test=test):
                yield partial(without, test, "False")
            case ast.BoolOp(op=op, values=values):
                yield from (partial(without, value, str(isinstance(op, ast.And))) for value in values)
            case ast.Expr(value=ast.Call()) if not _logs(node):
                yield partial(without, node, "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign() | ast.Raise() | ast.Delete():
                yield partial(without, node, "pass")


def _logs(node: ast.Expr) -> bool:
    return ast.unparse(node).startswith(("log.", "self._log.", "logger."))


def _meaning(source: str) -> str:
    """The tree without annotations and without the numbers of constants; "" if it does not compile."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef():
                node.decorator_list = []
            case ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.arg():
                node.annotation = None
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                node.returns = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and t.id.isupper() for t in node.targets):
            node.value = ast.Constant(None)
    return ast.dump(tree)
