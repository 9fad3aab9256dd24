"""Mutate the source of backward and see whether the checks notice: ``python -m tests.mutate handgrad.layers.linear``.

Every mutant is one small mistake in a backward, in a function that a backward calls or hands on (a formula given to
`blockwise`), in a buffer update or an optimizer's step: a term dropped, a sign flipped, a sum for a mean, a transpose
forgotten, a gradient assigned for added, a condition turned round. It is put into the class itself, the cases that
cover the class are run, and the class is restored.

Left out on purpose, for they cannot change a result: dropping `out=`, the other order of the operands of a sum or a
product, an operation out of place for one in place whose result is used (the converse, which may write to what belongs
to others, is tried), and anything in docstrings, annotations and signatures. Left out, too, though they can: mistakes
in forward beyond the buffers (a reference finds those), in the texts of errors and the checks that raise them (tests
pin those), and two mistakes at once.

The cases come from a file that defines `CASES`, a dict of objects with `covers` (a class) and `run()`, and perhaps
`OPTIMIZERS`, the same for optimizers. A file of reasons says which survivors compute the same as the original:
``{"Linear.backward: a + b -> b + a": "sums commute"}``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from handgrad.testing.errors import CheckError, CheckFailure, OracleError

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
METHODS = {
    "sum": "mean",
    "mean": "sum",
    "add_": "sub_",
    "sub_": "add_",
    "mul_": "div_",
    "div_": "mul_",
    "add": "sub",
    "sub": "add",
    "mul": "mul_",
    "addcmul": "addcmul_",
    "index_add_": "index_copy_",
    "scatter_add_": "scatter_",
    "_foreach_add": "_foreach_sub",
    "_foreach_mul": "_foreach_div",
    "_foreach_add_": "_foreach_sub_",
    "_foreach_sub_": "_foreach_add_",
    "_foreach_mul_": "_foreach_div_",
}
DROPPED = (
    *("t", "transpose", "contiguous", "reshape", "view", "squeeze", "unsqueeze", "flatten"),
    *("exp", "square", "sqrt", "rsqrt", "neg", "sign", "relu", "mul_"),
    *("clamp", "max", "clamp_min", "where", "masked_fill"),
)


@dataclass(frozen=True)
class Mutant:
    """One small mistake in one function."""

    owner: Any  # the class or module that holds the function
    name: str
    where: str
    change: str
    function: Any

    @property
    def key(self) -> str:
        """What names the mutant in the file of reasons."""
        return f"{self.where}: {self.change}"


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed (by whom), equivalent (why), or survived."""

    mutant: Mutant
    fate: str
    by: str = ""


def mutants(module: Any) -> Iterator[Mutant]:
    """Every mutant of every backward in the module, of the functions there that it names, and of the buffer updates."""
    for owner, name, function in _targets(module):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        nodes = [n for n in ast.walk(tree) if not _documentation(n, tree)]
        where = f"{owner.__name__}.{name}" if inspect.isclass(owner) else name
        seen: set[str] = set()
        for i, node in enumerate(nodes):
            for new in _changes(node):
                if ast.unparse(node) == ast.unparse(ast.fix_missing_locations(new)):
                    continue
                change = f"{_text(node)} -> {_text(new)}"
                while f"{change}" in seen:
                    change += "'"  # the same text further down
                seen.add(change)
                try:
                    mutated = build(_replaced(tree, nodes, i, new), owner, module)
                except (SyntaxError, ValueError, TypeError):
                    continue
                yield Mutant(owner, name, where, change, mutated)


def judge_all(
    found: Iterable[Mutant], module: Any, cases: dict[str, Any], reasons: dict[str, str]
) -> Iterator[Verdict]:
    """Run the cases of the module's classes against its mutants."""
    for mutant in found:
        covered = [case for case in cases.values() if _concerns(mutant, case.covers, module)]
        with patched(mutant.owner, mutant.name, mutant.function), quick():
            by = first_failure(covered)
        if by:
            yield Verdict(mutant, "killed", by)
        elif mutant.key in reasons:
            yield Verdict(mutant, "equivalent", reasons[mutant.key])
        else:
            yield Verdict(mutant, "survived")


def first_failure(cases: Iterable[Any]) -> str:
    """The first property, or else the error, by which one of the cases fails; empty where all pass."""
    for case in cases:
        skip = {"sensitivity": "a fault is planted already", **case.keywords.get("skip", {})}
        try:
            case.run(**({} if issubclass(case.covers, torch.optim.Optimizer) else {"skip": skip}))
        except CheckFailure as failure:
            return str(failure.details.get("property", "check_optimizer"))
        except OracleError:
            continue  # which says nothing about the backward
        except CheckError as error:
            return type(error).__name__
        except Exception as error:  # a mutant can break anything
            return f"crash: {type(error).__name__}"
    return ""


@contextmanager
def patched(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Put a function into a class or module, and take it out again."""
    original = vars(owner)[name]
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def quick() -> Iterator[None]:
    """Run checks without shrinking what fails, and always in the same way, whatever the profile."""
    before = hypothesis.settings()
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile(
        "handgrad-mutants", phases=phases, derandomize=True, database=None, max_examples=100
    )
    hypothesis.settings.register_profile("handgrad-before", parent=before)
    hypothesis.settings.load_profile("handgrad-mutants")
    try:
        yield
    finally:
        hypothesis.settings.load_profile("handgrad-before")


def _targets(module: Any) -> Iterator[tuple[Any, str, Any]]:
    """Each function worth mutating once, with the class or module that holds it."""
    found: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for cls in vars(module).values():
        if not inspect.isclass(cls) or cls.__module__ != module.__name__:
            continue
        methods = [name for name, value in vars(cls).items() if inspect.isfunction(value)]
        todo = [name for name in methods if name.endswith("backward") or "update" in name or name == "step"]
        while todo:
            name = todo.pop()
            owner = next((c for c in (*cls.__mro__, module) if name in vars(c) and _home(c) == module.__name__), None)
            function = None if owner is None else inspect.unwrap(getattr(owner, name))
            if inspect.ismethod(function):  # a class method
                function = function.__func__
            if not inspect.isfunction(function) or (id(owner), name) in found:
                continue
            if "check" in name or "error" in name or function.__module__ != module.__name__:
                continue
            found[id(owner), name] = (owner, name, function)
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
                if isinstance(node, (ast.Name, ast.Attribute)):  # called, or handed on as an argument
                    todo.append(node.id if isinstance(node, ast.Name) else node.attr)
    yield from found.values()


def _home(owner: Any) -> str:
    return str(owner.__module__ if inspect.isclass(owner) else owner.__name__)


def _concerns(mutant: Mutant, covered: type, module: Any) -> bool:
    if inspect.isclass(mutant.owner):
        return issubclass(covered, mutant.owner)
    return bool(covered.__module__ == module.__name__)


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Every small mistake that can be made at one node."""
    if isinstance(node, ast.BinOp):
        yield node.left
        yield node.right
        if type(node.op) in SWAPS:
            yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)  # type: ignore[list-item]
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.AugAssign):
        yield ast.Assign([node.target], node.value)
        yield ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield ast.Return(ast.Name("dout", ast.Load()))
    elif isinstance(node, ast.Expr):
        yield ast.Pass()
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _constants(node: ast.Constant) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    for i in range(len(node.keywords)):
        if node.keywords[i].arg == "out":  # where the result is put is no matter of its value
            continue
        yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
    if isinstance(node.func, ast.Name) and node.func.id in ("max", "min"):
        yield from node.args
    if not isinstance(node.func, ast.Attribute):
        return
    name, receiver = node.func.attr, node.func.value
    if name in METHODS:
        yield ast.Call(ast.Attribute(receiver, METHODS[name], ast.Load()), node.args, node.keywords)
    if name in DROPPED and not (isinstance(receiver, ast.Name) and receiver.id == "torch"):
        yield receiver
    if name == "add_grad":
        yield ast.Call(
            ast.Name("setattr", ast.Load()), [node.args[0], ast.Constant("grad"), *node.args[1:]], []
        )  # assigned for added
    if name == "clone":
        yield receiver


def _documentation(node: ast.AST, tree: ast.AST) -> bool:
    """Whether a node belongs to the signature, a docstring or an annotation, none of which is run."""
    if not isinstance(tree, ast.FunctionDef):
        return True
    outside: list[ast.AST] = []
    for function in ast.walk(tree):  # this one, and those inside it
        if isinstance(function, ast.FunctionDef):
            outside += [function.args, *function.decorator_list, *([function.returns] if function.returns else [])]
    first = tree.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        outside.append(first)
    outside += [n.annotation for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)]
    return any(node is inner for part in outside for inner in ast.walk(part))


def _replaced(tree: ast.AST, nodes: list[ast.AST], i: int, new: ast.AST) -> ast.AST:
    """A copy of the tree with node i replaced."""
    target = nodes[i]

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return copy.deepcopy(new) if node is target else self.generic_visit(_shallow(node))

    mutated: ast.AST = Replace().visit(tree)
    return mutated


def _shallow(node: ast.AST) -> ast.AST:
    """A copy of one node with lists of its own, so that the original tree stays as it is."""
    twin = copy.copy(node)
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            setattr(twin, name, list(value))
    return twin


def build(tree: ast.AST, owner: Any, module: Any) -> Any:
    """The function of a tree, with the globals of its module and the class that `super()` looks for."""
    (binder,) = ast.parse("def bind(__class__): ...").body
    assert isinstance(binder, ast.FunctionDef)
    assert isinstance(tree, ast.FunctionDef)
    binder.body = [tree, ast.Return(ast.Name(tree.name, ast.Load()))]
    whole = ast.fix_missing_locations(ast.Module([binder], []))
    flags = annotations.compiler_flag  # an annotation may name what is imported for type checkers alone
    namespace: dict[str, Any] = {}
    exec(compile(whole, f"<mutant of {module.__name__}>", "exec", flags, dont_inherit=True), vars(module), namespace)
    return namespace["bind"](owner)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())
    return text if len(text) <= 70 else text[:67] + "..."


def load_cases(path: str) -> dict[str, Any]:
    """`CASES`, and `OPTIMIZERS` if there are any, of a Python file."""
    spec = importlib.util.spec_from_file_location("handgrad_cases", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {**module.CASES, **getattr(module, "OPTIMIZERS", {})}


def main(arguments: list[str] | None = None) -> int:
    """Judge the mutants of some modules and print the table; exit code 1 where one survived without a reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("modules", nargs="+", help="modules with layers, such as handgrad.layers.linear")
    parser.add_argument("--cases", default="tests/cases.py", help="the file that defines CASES")
    parser.add_argument("--reasons", default="tests/mutants.json", help="why survivors are equivalent, by module")
    parser.add_argument("--json", help="write every verdict to this file, one by one as they come")
    given = parser.parse_args(arguments)
    sys.path.insert(0, "")
    cases = load_cases(given.cases)
    reasons = json.loads(Path(given.reasons).read_text()) if Path(given.reasons).exists() else {}
    modules = {name: importlib.import_module(name) for name in given.modules}
    # All sources are read here, at once with the import: they may be edited while the run lasts.
    found = {name: list(mutants(module)) for name, module in modules.items()}
    everything: dict[str, list[dict[str, str]]] = {}
    survived = 0
    print(f"{'module':<40}{'mutants':>8}{'killed':>8}{'equivalent':>12}{'survived':>10}", flush=True)
    with tqdm(total=sum(map(len, found.values())), unit="mutant") as progress:
        for name, module in modules.items():
            verdicts = everything[name] = []
            for verdict in judge_all(found[name], module, cases, reasons.get(name, {})):
                verdicts.append({"mutant": verdict.mutant.key, "fate": verdict.fate, "by": verdict.by})
                if given.json:
                    _write(Path(given.json), everything)
                progress.update()
            count = {fate: sum(v["fate"] == fate for v in verdicts) for fate in ("killed", "equivalent", "survived")}
            row = f"{name:<40}{len(verdicts):>8}{count['killed']:>8}{count['equivalent']:>12}{count['survived']:>10}"
            survivors = [f"    survived  {v['mutant']}" for v in verdicts if v["fate"] == "survived"]
            progress.write("\n".join([row, *survivors]))
            sys.stdout.flush()
            survived += count["survived"]
    return 1 if survived else 0


def _write(path: Path, everything: dict[str, list[dict[str, str]]]) -> None:
    """Replace the file in one step: an interrupted run leaves all that was judged so far."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(everything, indent=1) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
