"""Rules that hold for the package as a whole."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import handgrad

PACKAGE = Path(handgrad.__file__).parent
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
AUTOGRAD_ALLOWED = ("testing/", "bridge.py", "bench/", "tracked.py", "rewrites.py", "products.py")
# the last two name operations of a graph
WORDS = re.compile(
    r"requires_grad|autograd|aten|torch\.ops|(torch|functional)\.\w*_backward|\.backward\(\)|retain_grad"
)


def module_of(path: str) -> str:
    return "handgrad." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, annotations: bool = False) -> set[str]:
    """The modules of handgrad that a source file imports at run time, or for annotations, too."""
    tree = ast.parse((PACKAGE / path).read_text())
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test) and not annotations
        for node in ast.walk(test)
    }
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    modules = {module_of(path) for path in SOURCES}
    found = {m if (m := f"{n.module}.{a.name}") in modules else str(n.module) for n in froms for a in n.names}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name for name in found if name.split(".")[0] == "handgrad"}


def test_all_lists_exactly_the_public_names() -> None:
    """What __init__ imports is what it exports, in order, and nothing else is public."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert set(handgrad.__all__) == imported
    assert len(set(handgrad.__all__)) == len(handgrad.__all__)


def test_every_public_name_is_documented() -> None:
    """With a docstring; a layer's or loss's with the sections that a reader looks for, and an example that runs."""
    for name in handgrad.__all__:
        thing = getattr(handgrad, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing) and issubclass(thing, handgrad.Layer) and not inspect.isabstract(thing):
            if thing in (handgrad.Layer, handgrad.Loss):
                continue
            text = vars(thing)["__doc__"]
            for section in ("Forward:", "Backward:", "Recorded:", "Raises:", ">>> "):
                assert section in text, f"{name} has no {section}"


@pytest.mark.parametrize("path", SOURCES)
def test_layers_know_the_contract_and_nothing_else(path: str) -> None:
    """A newcomer who opens one needs no other file; and nobody depends on testing, bench or what those read."""
    found = imports(path)
    family = path.split("/")[0]
    if family in ("layers", "losses") and not path.endswith("__init__.py"):
        # layers.* included
        allowed = ("handgrad.layer", "handgrad.errors", "handgrad.arguments", "handgrad.pieces", "handgrad.randomness")
        allowed = (*allowed, "handgrad.losses.loss")
        assert all(name.startswith(allowed) for name in found), found
    if family not in ("testing", "bench"):
        judges = ("handgrad.testing", "handgrad.bench", "handgrad.twins")
        assert not any(name.startswith(judges) for name in found), found


def test_no_two_modules_import_each_other() -> None:
    """Not in a larger circle either, nor for annotations. The files __init__.py, which import all, stand aside."""
    todo = {module_of(path): imports(path, annotations=True) for path in SOURCES if not path.endswith("__init__.py")}
    while todo:
        free = [module for module, found in todo.items() if not found & (todo.keys() - {module})]
        assert free, f"a circle among {sorted(todo)}"
        for module in free:
            del todo[module]


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.startswith(AUTOGRAD_ALLOWED)])
def test_no_autograd_inside(path: str) -> None:
    """No tape and no kernel of one, outside the judge and the bridges. Comments and docstrings may speak of it."""
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    code = ast.unparse(tree).replace("loss.backward()", "").replace("super().backward()", "")
    assert not WORDS.findall(code), path
