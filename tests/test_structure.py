"""The shape of the package: floors, registries, tables, documentation."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

import torch_bilevel as tb
from torch_bilevel import inner, optim
from torch_bilevel.estimators import PRESETS
from torch_bilevel.estimators import REGISTRY as ESTIMATORS
from torch_bilevel.solvers import REGISTRY as SOLVERS

ROOT = Path(tb.__file__).parent
FLOOR = {
    "_version": -1, "errors": -1, "_transforms": -1, "_first_calls": -1,
    "_vector": 0, "_checks": 0, "_registry": 0, "_program": 0, "_blocks": 0,
    "kernels": 0.5,
    "second_order": 1, "ops": 1,
    "problem": 2, "solvers": 2,
    "products": 2.5,
    "inner": 3,
    "estimators": 4,
    "optim": 5, "func": 5,
    "integrations": 6,
}  # fmt: skip


def modules():
    return [m.name for m in pkgutil.walk_packages([str(ROOT)], "torch_bilevel.")]


def imported(path):
    """Top-level parts of the package that a file imports."""
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level == depth:  # from the package's root
            names = [node.module] if node.module else [a.name for a in node.names]
            yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imported(path):
        same_floor_sibling = {own, name} == {"problem", "solvers"}
        assert FLOOR[name] < FLOOR[own] and not same_floor_sibling, (
            f"{own} imports {name}"
        )


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_and_functions_are_short(path):
    text = path.read_text("utf8")
    limit = 410 if path.name == "bilevel.py" else 400
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 70, f"{node.name} has {lines} lines"


@pytest.mark.parametrize(
    "folder",
    [
        "kernels",
        "ops",
        "problem",
        "solvers",
        "products",
        "inner",
        "estimators",
        "optim",
        "func",
        "integrations",
    ],
)
def test_no_private_name_crosses_folders(folder):
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                private = [a.name for a in node.names if a.name.startswith("_")]
                allowed = {"_checks", "_program", "_registry", "_vector"}  # floor 0
                assert set(private) <= allowed, f"{path.name}: {private}"


def test_every_member_of_a_registry_has_a_row():
    assert set(cases.ESTIMATORS) == set(tb.estimators()) - set(PRESETS)
    around = {"implicit", "stochastic"}  # go by the names of their solvers
    assert set(cases.ESTIMATORS) == set(SOLVERS) | set(ESTIMATORS) - around
    theirs = "test_", "torch_bilevel.integrations"  # registered when they are imported
    ours = {k for k in inner.RULES if not k.__module__.startswith(theirs)}
    assert {kind for kind, _ in cases.RULES} == ours
    algorithms = {
        name
        for name, value in vars(optim).items()
        if inspect.isclass(value)
        and issubclass(value, tb.BilevelOptimizer)
        and "bibtex" in vars(value)
    }
    assert algorithms == set(cases.ALGORITHMS) | set(cases.META_ALGORITHMS)


@pytest.mark.parametrize(
    "folder, base",
    [
        ("solvers", "Solver"),
        ("products", "Products"),
        ("estimators", "Estimator"),
        ("optim", "BilevelOptimizer"),
    ],
)
def test_every_file_is_imported_by_its_folder(folder, base):
    """A new member is one file and one import line; forgetting the line fails here."""
    package = importlib.import_module(f"torch_bilevel.{folder}")
    parent = getattr(package, base)
    for path in (ROOT / folder).glob("*.py"):
        module = importlib.import_module(f"torch_bilevel.{folder}.{path.stem}")
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, parent) and value is not parent:
                assert getattr(package, name, None) is value, f"{name} is not imported"


def test_every_rule_file_is_imported():
    for path in (ROOT / "inner").glob("*.py"):
        module = importlib.import_module(f"torch_bilevel.inner.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, inner.UpdateRule):
                assert inner.RULES[value.optimizer] is value


def test_presets_stand_for_strings():
    for name, text in PRESETS.items():
        made = tb.estimator(name)
        assert made == tb.estimator(text) == tb.estimator(str(made))
        assert name not in SOLVERS and name not in ESTIMATORS
    assert tb.estimator("stocbio(num_steps=3, cross_batches=2)") == tb.Stochastic(
        tb.StochasticNeumann(3), cross_batches=2
    )
    assert tb.estimator("truncated(window=3, offload='cpu')") == tb.Unrolled(
        window=3, offload="cpu"
    )


@pytest.mark.parametrize("name", sorted(cases.ESTIMATORS))
def test_names_round_trip(name):
    made = tb.estimator(name)
    assert str(made) == name and tb.estimator(str(made)) == made
    if cases.ESTIMATORS[name]:
        made = tb.estimator(cases.ESTIMATORS[name])
        assert tb.estimator(str(made)) == made


def test_objects_and_strings_are_the_same():
    assert tb.estimator("cg(max_steps=7, damping=0.5)") == tb.Implicit(
        tb.CG(7), damping=0.5
    )
    assert tb.estimator(tb.MINRES(3)) == tb.Implicit(tb.MINRES(3))
    assert tb.estimator("unrolled(window=4)") == tb.Unrolled(window=4)


@pytest.mark.parametrize("name", sorted(cases.ALGORITHMS))
def test_named_algorithms_only_choose_parts(name):
    """`AIDBiO(...)` is the plain optimizer with an estimator: equal trajectories."""

    def run(make):
        torch.manual_seed(0)
        y, x = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
        A = torch.randn(9, 4)
        optimizer = make(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        train = optimizer.inner_loss(
            lambda: ((A @ y) ** 2).mean() + ((y - x) ** 2).sum()
        )
        optimizer.outer_loss(lambda: (y - 1).pow(2).sum())
        torch.manual_seed(1)
        for _ in range(40):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        return x.detach(), optimizer

    estimator, inner_steps, options = cases.ALGORITHMS[name]
    named, optimizer = run(getattr(tb, name))
    plain, _ = run(
        lambda i, o: tb.BilevelOptimizer(
            i, o, estimator=estimator, inner_steps=inner_steps, **options
        )
    )
    assert torch.equal(named, plain) and optimizer.outer_steps == 40 // inner_steps
    assert tb.citation(optimizer).startswith("@")
    assert "differs" in type(optimizer).__doc__


def public():
    for name in tb.__all__:
        value = getattr(tb, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value


@pytest.mark.parametrize(
    "name, value", list(public()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_public_name_is_documented_with_an_example(name, value):
    text = inspect.getdoc(value)
    assert text
    error = inspect.isclass(value) and issubclass(value, (Exception, Warning))
    lists = "estimators", "solvers", "products"
    plain = name in (*lists, "HypergradientCheck", "Report")
    if not error and not plain:
        assert ">>>" in text, f"{name} has no example"
    if inspect.isfunction(value) and inspect.signature(value).parameters:
        if not inspect.isgeneratorfunction(inspect.unwrap(value)):
            assert "Returns:" in text or "Yields:" in text
        assert "Args:" in text


def test_every_public_name_is_in_the_reference():
    text = Path("docs/api.md").read_text()
    for name, value in public():
        if not (inspect.isclass(value) and issubclass(value, (Exception, Warning))):
            assert f"torch_bilevel.{name}\n" in text, name


def test_every_module_says_what_it_is():
    for name in modules():
        assert importlib.import_module(name).__doc__, name


def test_the_package_docstring_runs():
    assert doctest.testmod(tb).failed == 0


def test_version_and_all():
    assert tb.__version__ == "0.1.0"
    for name in tb.__all__:
        assert hasattr(tb, name)


def test_importing_calls_every_vector_function_once_on_one_thread():
    """In a process of its own; MKL may get a parallel first call wrong (pytorch#188792)."""
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        x = args[0] if args else None
        if isinstance(x, torch.Tensor) and x.is_cpu and x.numel() < 2048:
            self.calls.add((func._schema.name, x.dtype))  # more would be split
        return func(*args, **(kwargs or {}))

with torch.device("meta"), Seen() as seen:  # whatever the default device is
    import torch_bilevel
names = "acos asin atan cos erf erfc erfinv exp log log2 log10 sin sqrt tan tanh trunc"
for name in names.split():
    for dtype in (torch.float32, torch.float64):
        assert (f"aten::{name}", dtype) in seen.calls, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
