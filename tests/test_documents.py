"""README, docs and examples run as written."""

import csv
import difflib
import functools
import inspect
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb
from torch_bilevel.inner import RULES
from torch_bilevel.solvers import Operator

ROOT = Path(__file__).parent.parent


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf8"), re.S)


@pytest.fixture(autouse=True)
def float32():
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float64)
    if "matplotlib.pyplot" in sys.modules:  # examples leave their figure to the process
        sys.modules["matplotlib.pyplot"].close("all")


def images(n):
    return TensorDataset(torch.randn(n, 5), torch.randint(0, 3, (n,)), torch.arange(n))


def test_the_readme_runs():
    train_set = images(200)
    pairs = TensorDataset(*train_set.tensors[:2])
    space = {
        "Net": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
        "train_set": train_set,
        "train_loader": DataLoader(train_set, 5, shuffle=True),
        "valid_loader": DataLoader(pairs, 20),
    }
    code = blocks("README.md")
    assert code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tb.BilevelWarning)
        for block in code:
            exec(compile(block, "README.md", "exec"), space)
    assert space["optimizer"].outer_steps >= 2
    assert (space["weights"] != 0).any()


def test_the_quickstart_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X = torch.randn(400, 20)
    y = X[:, :3].sum(1) + 0.1 * torch.randn(400)
    data = TensorDataset(X, y)
    space = {
        "train_loader": DataLoader(data, 10, shuffle=True),
        "valid_loader": DataLoader(data, 50),
    }
    for block in blocks("docs/quickstart.md"):
        exec(compile(block, "quickstart.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "outer step 2" in printed and "relative error" in printed


def test_the_solver_and_the_rule_of_the_docs_work():
    solver, _ = blocks("docs/extending.md")
    space = {"__name__": "steepest"}
    exec(solver, space)
    A = torch.diag(torch.tensor([1.0, 3.0]))
    made = space["SteepestDescent"](max_steps=100)
    found = made.solve(Operator(A.mv, 2), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found.value, torch.ones(2))
    # what has converged stays as it is, in any units
    for scale in (1e-12, 1.0, 1e12):
        b = scale * torch.tensor([0.1, 3.0])
        found = space["SteepestDescent"](500).solve(Operator(A.mul(0.3).mv, 2), b)
        torch.testing.assert_close(
            0.3 * A @ found.value / scale, b / scale, rtol=1e-5, atol=1e-5
        )


class Lion(torch.optim.Optimizer):
    """As its users know it, without a word about derivatives."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((beta1 * m + (1 - beta1) * p.grad).sign(), alpha=-group["lr"])
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def test_the_update_rule_of_the_docs_works(monkeypatch):
    torch.set_default_dtype(torch.float64)
    y = torch.randn(4, requires_grad=True)
    x = torch.tensor([-2.0, -1.0], requires_grad=True)
    lion = Lion([y], weight_decay=0.1)
    outer = torch.optim.SGD([x], lr=0.1)
    with pytest.raises(tb.NoUpdateRule, match="register_update_rule"):
        tb.BilevelOptimizer(lion, outer, estimator="unrolled")
    _, rule = blocks("docs/extending.md")
    monkeypatch.setitem(RULES, Lion, None)  # taken out again after the test
    exec(rule, {"Lion": Lion})
    optimizer = tb.BilevelOptimizer(lion, outer, estimator="unrolled")
    train_loss = optimizer.inner_loss(lambda: ((y - 1) ** 4).sum())
    optimizer.outer_loss(lambda: (y**2).sum())
    optimizer.inner_hyperparameters(
        lambda: {"lr": x[0].exp(), "weight_decay": x[1].exp()}
    )
    for _ in range(4):
        optimizer.zero_grad()
        train_loss().backward()
        optimizer.step()
    assert (optimizer.hypergradient()[0] != 0).all()
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


def test_the_fused_loss_of_the_docs_works():
    (code,) = blocks("docs/products.md")
    model, weights = torch.nn.Linear(4, 3), torch.zeros(20, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([weights], lr=0.1)
    )
    space = {"optimizer": optimizer, "model": model, "weights": weights}
    exec(code, space)
    x, y, index = torch.randn(6, 4), torch.arange(6) % 3, torch.arange(6)
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    expected = (weights[index].sigmoid() * losses).mean()
    torch.testing.assert_close(space["train_loss"](x, y, index), expected)


@pytest.mark.parametrize("page", ["docs/functions.md", "docs/coming_from.md"])
def test_a_page_runs_from_top_to_bottom(page):
    """Listings compare their numbers themselves; those in ```py are only read."""
    space, code = {}, blocks(page)
    assert len(code) > 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchopt imports old functorch
        for block in code:
            exec(compile(block, page, "exec"), space)


def test_every_engine_is_in_the_table_of_the_products_page():
    text = (ROOT / "docs/products.md").read_text("utf8")
    assert all(f'products="{name}' in text for name in tb.products())


def test_every_error_has_an_entry_in_the_troubleshooting_page():
    text = (ROOT / "docs/troubleshooting.md").read_text("utf8")
    for name in tb.errors.__all__:
        if name not in ("BilevelWarning",):
            assert f"`{name}`" in text or f"`tb.{name}`" in text, name


def test_every_estimator_is_in_the_table_of_the_choosing_page():
    text = (ROOT / "docs/choosing.md").read_text("utf8")
    text += (ROOT / "docs/algorithms.md").read_text("utf8")
    for name in set(tb.estimators()) - {"richardson"}:
        assert f'`"{name}' in text, name


def test_ci_runs_the_command_of_the_readme():
    readme = (ROOT / "README.md").read_text("utf8").splitlines()
    commands = [line for line in readme if line.startswith("python3 -m venv")]
    assert len(commands) == 2 and all("-c constraints.txt" in c for c in commands)
    assert "examples/data_cleaning.py" in commands[0] and '".[test]"' in commands[1]
    assert "grep -F '\".[test]\"' README.md" in (ROOT / ".ci/run").read_text("utf8")


# --- examples ---------------------------------------------------------------------------------


def example(name):
    return runpy.run_path(str(ROOT / "examples" / name), run_name="example")


# For a handful of outer numbers, of one step only, or noisy: not for a thousand weights.
OTHER_JOBS = {"displacement", "first_order", "forward", "forward_gradient", "one_step"}
OTHER_JOBS |= {"sample_space"}  # with products="gauss_newton", below


# Other names for parts that are tried, and what needs numbered batches.
SAME = {
    "aid_cg",
    "aid_fp",
    "itd",
    "accbio_bg",
    "bsa",
    "bsgm",
    "amigo",
    "sustain",
    "pzobo_s",
}
SAME |= {"truncated", "checkpointed", "ma_soba", "joint", "accelerated", "saba", "srba"}
SAME |= {
    "stochastic_neumann",
    "stochastic_richardson",
    "random_truncated_neumann",
    "sgd",
}
CLEANING = sorted(set(tb.estimators()) - OTHER_JOBS - SAME)


def data_cleaning(arguments, figure=False):
    """The table of a run of the main example, without the figure unless asked for."""
    main = example("data_cleaning.py")["main"]
    if not figure:
        main.__globals__["draw"] = lambda *_: None
    return main(arguments)


@functools.cache
def cleaned_by_direct(*arguments):
    """What other ways to the same solution are compared with, once in a process."""
    return data_cleaning([*arguments, "--estimator", "direct"])


@pytest.mark.parametrize("estimator", CLEANING)
def test_data_cleaning_on_digits(estimator, tmp_path, capsys):
    """At least 3 points better than without cleaning (identity: no worse)."""
    outer = ["--outer", "sgd"] if estimator == "accbio" else []
    table = data_cleaning(
        ["--estimator", estimator, "--output", str(tmp_path), *outer],
        figure=estimator == "cg",
    )
    without, with_, oracle = (
        float(table[f"test accuracy {kind}"].split()[0])
        for kind in ("without cleaning", "with cleaning", "of the oracle")
    )
    assert with_ >= without + (0 if estimator == "identity" else 3)
    noisy = {"pzobo": 0.6, "vrbo": 0.8}
    assert float(table["F1"]) > noisy.get(estimator, 0.85) and oracle > 95
    assert table["weights that received a gradient"] == "100.0 %"
    with (tmp_path / "weights.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1000 and sum(int(r["corrupted"]) for r in rows) == 400
    assert all(
        (r["given_label"] != r["true_label"]) == (r["corrupted"] == "1") for r in rows
    )
    if estimator == "cg":
        assert (tmp_path / "cleaning.png").stat().st_size > 10000
    assert "precision" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ops"],
        ["--ops", "--products", "traced"],
        ["--products", "traced"],
        ["--products", "gauss_newton"],
        ["--products", "gauss_newton", "--estimator", "sample_space"],
    ],
)
def test_data_cleaning_with_other_products(arguments, tmp_path, tmp_path_factory):
    """The same table as with plain losses and double backward, up to rounding."""
    short, base = ["--outer-steps", "12"], tmp_path_factory.getbasetemp()
    plain = cleaned_by_direct(*short, "--output", str(base))
    exact = ["--estimator", "cg(max_steps=200, rtol=1e-6)"]
    found = data_cleaning([*short, *exact, *arguments, "--output", str(tmp_path)])
    name = "test accuracy with cleaning"
    accuracies = [float(t[name].split()[0]) for t in (plain, found)]
    assert abs(accuracies[0] - accuracies[1]) < 0.5
    assert abs(float(plain["F1"]) - float(found["F1"])) < 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--products", "trace"], r"traced"),
        (["--corruption", "1"], r"must lie in \[0, 1\)"),
        (["--corruption", "-0.1"], r"must lie in \[0, 1\)"),
        (["--estimator", "cgg"], r"Did you mean 'cg'"),
        (["--estimator", "cg(max_steps=0)"], r"whole number"),
        (["--data", "/nowhere"], r"no file train-images-idx3-ubyte"),
        (["--data", "{truncated}"], r"truncated"),
        (["--data", "{broken}"], r"cannot be read"),
        (["--inner-steps", "0"], r"--inner-steps must be at least 1"),
        (["--estimator", "accbio"], r"outer=torch\.optim\.SGD"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    for folder, content in (
        ("truncated", b"\0\0\x08\x01\0\0\0\x05ab"),
        ("broken", None),
    ):
        (tmp_path / folder).mkdir()
        name = "train-images-idx3-ubyte" + ("" if content else ".gz")
        (tmp_path / folder / name).write_bytes(content or b"\x1f\x8bnot gzip")
    places = {"truncated": tmp_path / "truncated", "broken": tmp_path / "broken"}
    arguments = [a.format(**places) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["data_cleaning.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "examples/data_cleaning.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert re.search(message, printed.err) and printed.err.strip().count("\n") == 0
    assert printed.err.startswith("error: ")


def test_a_learned_schedule_beats_the_best_constant(tmp_path):
    """A short run: better than where it began; the default also beats the grid."""
    results = example("learned_schedule.py")["main"](
        ["--steps", "25", "--runs", "25", "--output", str(tmp_path)]
    )
    learned, _, start = (loss for loss, _ in results.values())
    assert learned < 0.6 * start
    assert (tmp_path / "learned_schedule.png").stat().st_size > 10000


@pytest.mark.filterwarnings("ignore::torch_bilevel.NegativeCurvatureWarning")
@pytest.mark.parametrize(
    "method", ["maml", "fomaml", "anil", "imaml", "reptile", "itd"]
)
def test_few_shot(method, tmp_path, capsys):
    arguments = ["--method", method, "--outer-steps", "40", "--tasks", "2"]
    arguments += ["--test-episodes", "40", "--output", str(tmp_path)]
    results = example("few_shot.py")["main"](arguments)
    (before, _), (after, half) = results.values()
    # many steps from anywhere are good at this already
    if method in ("imaml", "reptile"):
        assert after > 75
    else:
        assert after > before
    assert 0 < half < 10
    assert (tmp_path / f"few_shot_{method}.png").stat().st_size > 10000
    assert "unseen classes" in capsys.readouterr().out


def test_few_shot_refuses_bad_input(monkeypatch, capsys, tmp_path):
    for arguments, message in (
        (["--ways", "9"], "--ways must lie between 2 and 4"),
        (["--tasks", "0"], "--tasks must be at least 1"),
        (["--data", str(tmp_path / "none.npz")], "is not the Omniglot archive"),
    ):
        monkeypatch.setattr(sys, "argv", ["few_shot.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "examples/few_shot.py"), run_name="__main__")
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_drop_in_differs_in_few_lines():
    space = example("drop_in.py")
    a, b = (
        inspect.getsource(space[name]).splitlines()[2:]
        for name in ("ordinary", "bilevel")
    )
    strip = lambda line: re.sub(r"\s+# [+~]$", "", line)  # noqa: E731
    changes = [
        line
        for line in difflib.ndiff(list(map(strip, a)), list(map(strip, b)))
        if line[0] in "+-" and line[2:].strip()
    ]
    added = sum(line[0] == "+" for line in changes)
    removed = sum(line[0] == "-" for line in changes)
    assert removed <= 1 and added <= 10
    marked = [line for line in b if re.search(r"# [+~]$", line)]
    assert len(marked) in (added, added + 1)  # what differs is marked


def test_drop_in_runs():
    results = example("drop_in.py")["main"]()
    assert results["bilevel"] > results["ordinary"] + 10


def test_sinusoid(tmp_path):
    arguments = ["--outer-steps", "60", "--tasks", "2", "--test-tasks", "30"]
    results = example("sinusoid.py")["main"]([*arguments, "--output", str(tmp_path)])
    errors = {name: table[10][0] for name, table in results.items()}
    assert 0 < errors["MAML"] < errors["pretrained"]
    assert (tmp_path / "sinusoid.png").stat().st_size > 10000


def test_sinusoid_refuses_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sinusoid.py", "--tasks", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "examples/sinusoid.py"), run_name="__main__")
    assert caught.value.code == 2
    assert "--tasks must be at least 1" in capsys.readouterr().err


def test_dataset_distillation(tmp_path):
    arguments = ["--outer-steps", "150", "--per-class", "2", "--steps", "5"]
    results = example("dataset_distillation.py")["main"](
        [*arguments, "--outer-lr", "0.05", "--output", str(tmp_path)]
    )
    real, learned, _ = results.values()
    assert learned > real + 2
    assert (tmp_path / "dataset_distillation.png").stat().st_size > 10000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "no file train-images-idx3-ubyte"),
        (["--per-class", "500"], "--per-class must be at most"),
        (["--estimator", "unroled"], "Did you mean"),
    ],
)
def test_dataset_distillation_refuses_bad_input(
    arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["dataset_distillation.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(
            str(ROOT / "examples/dataset_distillation.py"), run_name="__main__"
        )
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_batched_tasks(tmp_path):
    arguments = ["--tasks", "8", "--repetitions", "1", "--outer-steps", "15"]
    results = example("batched_tasks.py")["main"](
        [*arguments, "--test-tasks", "50", "--output", str(tmp_path)]
    )
    assert results.pop("difference") < 1e-5
    for name in ("MAML", "iMAML"):
        assert results[name, "after"][0] < results[name, "before"][0]  # query loss
    assert (tmp_path / "batched_tasks.png").stat().st_size > 10000


def test_implicit_layer(tmp_path):
    arguments = ["--epochs", "10", "--springs", "4", "--output", str(tmp_path)]
    results = example("implicit_layer.py")["main"](arguments)
    assert results["equilibrium"] > 90 and results["explicit"] > 90
    assert results["gradient error"] < 1e-6 and results["misfit"] < 3
    assert (tmp_path / "implicit_layer.png").stat().st_size > 10000


def test_learned_regularisation(tmp_path):
    """Lower validation loss than the grid; whether the test follows is printed, not certain."""
    arguments = ["--splits", "1", "--grid", "15", "--outer-steps", "15"]
    results = example("learned_regularisation.py")["main"](
        [*arguments, "--output", str(tmp_path)]
    )
    (_, grid, _), (_, learned, _) = results.values()
    assert 0 < learned < grid
    assert (tmp_path / "learned_regularisation.png").stat().st_size > 10000


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("batched_tasks", ["--ways", "11"], "--ways must lie between 2 and 10"),
        (
            "batched_tasks",
            ["--outer-lr", "nan"],
            "--outer-lr must be a positive number",
        ),
        ("implicit_layer", ["--springs", "1"], "--springs must be at least 2"),
        (
            "learned_regularisation",
            ["--data", "nowhere"],
            "--data nowhere cannot be read",
        ),
        ("learned_regularisation", ["--train", "400"], "for the test; at least 50"),
    ],
)
def test_the_examples_of_functions_refuse_bad_input(
    name, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in printed and printed.strip().count("\n") == 0
