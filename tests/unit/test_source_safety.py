"""What no line of the product may do, read from its source: run what a file holds, or build SQL from values."""

import ast
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest

from innerloop.config import Settings

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "worker").rglob("*.py"), *(ROOT / "schemas").rglob("*.py")])
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.jit.load", "np.save", "np.load", "numpy.load", "eval", "exec"}
SQL_CALLS = {
    "text",
    "execute",
    "exec_driver_sql",
    "copy_expert",
    "mogrify",
    "execute_values",
    "SQL",
    "scalar",
    "scalars",
}


def faults(source: str) -> list[str]:
    """What is unsafe in this module, by line."""
    tree = ast.parse(source)
    return [f"{line}: {what}" for line, what in sorted([*_unpickling(tree), *_built_sql(tree)])]


def _unpickling(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}{alias.name}" for alias in node.names):
                if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS:
                    yield node.lineno, name
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if called in UNSAFE_CALLS or called.endswith((".read_pickle", ".to_pickle")):
                yield node.lineno, called
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only", "True") != "True":
                yield node.lineno, f"{called} with pickle"


def _built_sql(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Statements that hold anything but what the source itself says: values belong into parameters."""
    fixed = _fixed_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for argument in node.args[:2] if name in SQL_CALLS else []:
                if isinstance(argument, ast.JoinedStr | ast.BinOp | ast.Call) and not _is_fixed(argument, fixed):
                    said = f"{name}({ast.unparse(argument)})"
                    yield (node.lineno, said)


def _fixed_names(tree: ast.Module) -> set[str]:
    """The module's constants, and parameters that can only be one of a few names: those of a Literal type."""
    constants: set[str] = set()
    literals: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value) == "Literal":
                literals.add(node.targets[0].id)
            elif _is_text(node.value) and _is_fixed(node.value, constants):
                constants.add(node.targets[0].id)
    parameters: dict[str, set[str]] = {}
    for arguments in (node for node in ast.walk(tree) if isinstance(node, ast.arguments)):
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            parameters.setdefault(each.arg, set()).add(ast.unparse(each.annotation) if each.annotation else "")
    chosen = {name for name, said in parameters.items() if all(a in literals or a.startswith("Literal[") for a in said)}
    return (constants - parameters.keys()) | chosen


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_fixed(node: ast.expr, fixed: set[str]) -> bool:
    """Whether the source alone says what this is. Statements that arrive by name are left to the linter (S608)."""
    if isinstance(node, ast.JoinedStr):
        return all(_is_fixed(part, fixed) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _is_fixed(node.value, fixed)
    if isinstance(node, ast.Name):
        return node.id in fixed
    if isinstance(node, ast.BinOp):
        return _is_fixed(node.left, fixed) and _is_fixed(node.right, fixed)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        quotes = ast.unparse(node.func).startswith("sql.SQL(")  # psycopg2 quotes what it formats
        return quotes or all(_is_fixed(each, fixed) for each in (node.func.value, *node.args))
    return isinstance(node, ast.Constant | ast.Call)


def test_there_is_source_to_read() -> None:
    assert len(SOURCES) > 100


def test_no_file_can_run_code_and_no_value_becomes_sql() -> None:
    assert {str(path): found for path in SOURCES if (found := faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from joblib import load",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "frame.to_pickle('x')",
        "connection.execute(text(f'SELECT {user}'))",
        "cursor.execute('SELECT ' + user)",
        "cursor.execute('SELECT %s' % user)",
        "cursor.execute('SELECT {}'.format(user))",
        "N = 'a'\ndef f(N):\n    connection.exec_driver_sql(f'SELECT {N}')",
        "S = 'SELECT {}'\ncursor.execute(S.format(user))",
        "T = Literal['a']\ndef f(t: T): ...\ndef g(t: str):\n    cursor.execute(f'SELECT {t}')",
    ],
)
def test_each_unsafe_way_is_found(source: str) -> None:
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        "_N = 'a, b'\nconnection.execute(text(f'SELECT {_N} FROM t'))",
        "cursor.execute('SELECT %s', (user,))",
        "T = Literal['a', 'b']\nS = 'TABLE {}'\ndef f(t: T):\n    cursor.execute(S.format(t))",
        "cursor.execute(sql.SQL('GRANT {x}').format(x=sql.Identifier(role)))",
    ],
)
def test_what_is_safe_passes(source: str) -> None:
    assert not faults(source)


def test_no_security_rule_is_off_without_a_reason() -> None:
    """The linter has every rule, bandit's among them (S); what the product leaves out says why on its line."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    off = [line.strip() for line in lines if line.strip().startswith('"S') and line.strip()[2:3].isdigit()]
    assert off
    assert all("# " in line for line in off), off
    assert 'select = ["ALL"]' in lines


def test_listeners_are_on_loopback_unless_told_otherwise() -> None:
    sections = {name: getattr(Settings(), name) for name in Settings.model_fields}
    hosts = {name: section.host for name, section in sections.items() if hasattr(section, "host")}
    assert "http" in hosts
    assert all(ipaddress.ip_address(host).is_loopback for host in hosts.values()), hosts
