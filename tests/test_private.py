"""Private API of other libraries is used in the files named for it alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gpkit"

# What torch, and what Lightning and torchmetrics, do not promise.
COMPAT = {
    "autodiff/compat.py",
    "autodiff/sharding/compat.py",
    "findings/compat.py",
    "autodiff/taylor/compat.py",
    "autodiff/tracing/compat.py",
    "shortcut/compat.py",
    "lightning/compat.py",
}

# Hydra's parser of options, with its reason beside it. Keys of configs, and the names of a named
# tuple, are public.
ALLOWED = {("app/cli.py", "hydra._internal.utils")}
PUBLIC = {"_target_", "_fields"}


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def found(tree):
    """Yield what a file takes of others: attributes, modules, and names in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names)):
                if any(map(private, name.split("."))):
                    yield name
                    break
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if any(map(private, a.name.split("."))))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value):
                yield f"{ast.unparse(node.args[0])}.{name.value}"


def test_private_names_are_in_the_files_for_them():
    elsewhere = set()
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        if where not in COMPAT:
            elsewhere |= {(where, name) for name in found(ast.parse(path.read_text()))}
    assert elsewhere == ALLOWED


def test_it_sees_each_way_to_take_one():
    code = """
import torch._dynamo
from torch._C import default_generator
from torch.utils import _pytree
module._buffers
getattr(node, "_saved_train", None)
self._own, gpkit.__version__, cfg._target_
"""
    assert set(found(ast.parse(code))) == {
        "torch._dynamo",
        "torch._C",
        "torch.utils._pytree",
        "module._buffers",
        "node._saved_train",
    }
