"""The experiments at small sizes: they run, resume, refuse bad input, and show their law."""

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
RUN = ROOT / "examples" / "experiments" / "run.py"
NAMES = [
    "least_squares",
    "error_against_steps",
    "cleaning",
    "penalties",
    "hyper_cleaning",
    "acceleration",
    "stochastic_hypergradients",
    "quadratic",
    "hyper_representation",
    "poisoning",
]


@pytest.fixture(scope="module")
def experiments():
    before = list(sys.path)
    yield runpy.run_path(str(RUN), run_name="example")
    sys.path[:] = before


@pytest.fixture(scope="module")
def quick(experiments, tmp_path_factory):
    """Rows of an experiment's quick run, measured once."""
    folder, known = tmp_path_factory.mktemp("quick"), {}

    def rows(name):
        if name not in known:
            arguments = [name, "--quick", "--output", str(folder)]
            known[name] = experiments["main"](arguments)[name]
        return known[name]

    rows.folder = folder
    return rows


def test_the_list_has_a_line_for_each(experiments, capsys):
    assert experiments["main"](["--list"]) == {}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(20 < len(line) < 120 and line.rstrip().endswith(".") for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_measures_nothing(name, quick, experiments, monkeypatch, capsys):
    first = quick(name)
    assert (quick.folder / f"{name}.png").stat().st_size > 10000
    with (quick.folder / f"{name}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(first)

    def measure(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(experiments["EXPERIMENTS"][name], "measure", measure)
    again = [name, "--quick", "--output", str(quick.folder)]
    capsys.readouterr()
    assert experiments["main"](again)[name] == first
    printed = capsys.readouterr().out
    assert "found in" in printed and "no --data DIR" in printed
    for more in (["--fresh"], ["--seed", "1"]):
        with pytest.raises(AssertionError, match="measured again"):
            experiments["main"]([*again, *more])


def test_only_what_is_missing_is_measured(quick, experiments, tmp_path, monkeypatch):
    rows = quick("least_squares")
    kept = [row for row in rows if row["solver"] != "CG"]
    experiments["write"](tmp_path / "least_squares.csv", kept)
    module = experiments["EXPERIMENTS"]["least_squares"]
    measure, solvers = module.measure, []

    def noted(configuration, args):
        solvers.append(configuration["solver"])
        return measure(configuration, args)

    monkeypatch.setattr(module, "measure", noted)
    arguments = ["least_squares", "--quick", "--output", str(tmp_path)]
    assert experiments["main"](arguments)["least_squares"] == rows
    assert set(solvers) == {"CG"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["least_square"], "did you mean 'least_squares'"),
        (["nothing"], "no experiment 'nothing'; see --list"),
        (["--data", "/nowhere"], "is not a folder"),
        (["cleaning", "--data", "{empty}"], "no file mnist/train-images-idx3-ubyte.gz"),
        (["penalties", "--data", "{empty}"], "no file libsvm/ijcnn1.trn.bz2"),
        (["--seed", "x"], "invalid int value"),
        (["--budget", "0"], "--budget must be at least 1"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--output", str(RUN)], "is not a folder"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    arguments = [a.format(empty=tmp_path / "empty") for a in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(RUN), run_name="__main__")
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not [line for line in lines[:-1] if "it/s" not in line and "?" not in line]


# --- what each is there to show -----------------------------------------------------------


def test_least_squares_needs_ten_steps_of_cg(quick):
    rows = quick("least_squares")
    error = {(r["inner_steps"], r["solver"], r["steps"]): r["error"] for r in rows}
    assert error["exact", "CG", 10] < 1e-11
    assert error["exact", "HB", 10] > 1e-3 and error["exact", "GD", 10] > 1e-3
    assert error["exact", "HB", 50] < 1e-3 * error["exact", "GD", 50]
    # from an inexact inner solution the error stays at a floor
    floor = error[40, "CG", 50]
    assert floor > 1e-7 and error[40, "CG", 10] == pytest.approx(floor, rel=1e-3)
    assert all(r["error"] <= r["bound"] * (1 + 1e-9) + 1e-13 for r in rows)


def test_errors_against_steps_have_their_order_and_their_law(quick):
    rows = quick("error_against_steps")
    error = {(r["problem"], r["method"], r["T"]): r["error"] for r in rows}
    steps = sorted({T for problem, _, T in error if problem == "ridge"})
    assert len(steps) > 10
    for T in steps:
        itd, fp, cg = (error["ridge", m, T] for m in ("ITD", "AID-FP", "AID-CG"))
        assert cg < fp < itd
    for row in rows:
        if row["problem"] == "one number":
            assert row["error"] == pytest.approx(row["law"], rel=1e-9)
    # T q^(T−1): the ratio to AID-FP is α h T/(q (1 − q^T))
    ratio = error["one number", "ITD", 79] / error["one number", "AID-FP", 79]
    assert ratio == pytest.approx(0.1 * 79 / 0.9 / (1 - 0.9**79), rel=1e-9)


def test_cleaning_lowers_the_loss_within_the_budget(quick):
    last = {}
    for row in quick("cleaning"):
        first = last.get(row["rule"], (row["outer_loss"],))[0]
        last[row["rule"]] = first, row["outer_loss"], row["iterations"]
    for first, loss, iterations in last.values():
        assert loss < first and 1200 <= iterations < 1203
    assert last["relative"][1] < last["relative"][0] - 0.01
    # CG to a relative tolerance from a warm start, GD to an absolute one from zero
    assert last["relative"][1] < last["absolute"][1] - 0.001


def test_cleaning_resumes_where_it_was_interrupted(
    quick, experiments, tmp_path, monkeypatch
):
    whole = [r for r in quick("cleaning") if r["rule"] == "relative"]
    module = experiments["EXPERIMENTS"]["cleaning"]
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    only = [{k: whole[0][k] for k in list(whole[0])[:7]}]
    monkeypatch.setattr(module, "configurations", lambda args: only)
    progress, count = module.progress, iter(range(40))

    def interrupted(*args):
        if next(count) == 30:
            raise KeyboardInterrupt
        return progress(*args)

    monkeypatch.setattr(module, "progress", interrupted)
    arguments = ["cleaning", "--quick", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        experiments["main"](arguments)
    assert [p.suffix for p in tmp_path.iterdir()] == [".pt"]
    monkeypatch.setattr(module, "progress", progress)
    calls = []
    monkeypatch.setattr(
        module, "set_steps", lambda *a, f=module.set_steps: calls.append(f(*a))
    )
    resumed = experiments["main"](arguments)["cleaning"]
    assert len(calls) < 0.8 * whole[-1]["outer_steps"]
    for a, b in zip(resumed, whole, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert not list(tmp_path.glob("*.pt"))


def test_the_labels_are_those_of_the_authors(experiments):
    """Theirs: seed 0, two data loaders, then ``randint`` and ``randperm``."""
    y = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(1))
    given = experiments["EXPERIMENTS"]["cleaning"].corrupted(y, 0.1, 0)
    assert int((given != y).sum()) == 100
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(2):
            data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), 1000)
            (labels,) = next(iter(data))
        moved = torch.randint(1, 10, (100,))
        index = torch.randperm(1000)[:100]
        labels[index] = (labels[index] + moved) % 10
    assert torch.equal(given, labels)


def test_learned_penalties_beat_fixed_ones(quick):
    last = {r["method"]: r["valid_loss"] for r in quick("penalties")}
    fixed = last.pop("penalties fixed")
    assert len(last) == 3 and all(loss < 0.6 * fixed for loss in last.values())
    cg = last.pop("cg(max_steps=10, cross_calls=1)")
    assert all(cg < loss for loss in last.values())


def test_every_method_beats_no_cleaning(quick):
    last = {r["method"]: r for r in quick("hyper_cleaning")}
    without, oracle = last.pop("no cleaning"), last.pop("oracle")
    assert oracle["test_accuracy"] > without["test_accuracy"] + 2
    assert len(last) == 4
    for row in last.values():
        assert row["test_accuracy"] > without["test_accuracy"]
        assert oracle["valid_loss"] < row["valid_loss"] < 0.8 * without["valid_loss"]
        assert row["f1"] > 0.8


# --- the data -----------------------------------------------------------------------------


def test_products_with_a_sparse_matrix_are_those_of_the_dense_one(experiments):
    sparse = sys.modules["data"].Sparse
    x = torch.randn(30, 8) * (torch.rand(30, 8) < 0.3)
    v = torch.randn(8, 3)
    found = []
    for matrix in (x, sparse(x)):
        w = torch.linspace(-1, 1, 24).reshape(8, 3).requires_grad_()
        loss = (matrix @ w).logsumexp(1).sum()
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        (product,) = torch.autograd.grad(gradient, w, v)
        found.append((loss, gradient, product))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert len(sparse(x)) == 30


def test_newsgroups_are_split_and_rare_words_left_out(experiments, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"shape": np.array([40, 12])}
    for part, n in (("train", 40), ("test", 10)):
        counts = rng.poisson(0.5, (n, 12)) + (np.arange(12) == 3)
        counts[:, 7] = 0  # a word that training documents do not have
        rows, columns = counts.nonzero()
        arrays |= {
            f"{part}_data": counts[rows, columns].astype(np.int16),
            f"{part}_indices": columns.astype(np.int32),
            f"{part}_indptr": np.searchsorted(rows, np.arange(n + 1)),
            f"{part}_y": rng.integers(0, 20, n),
        }
    (tmp_path / "20news").mkdir()
    np.savez(tmp_path / "20news" / "20news_counts_full.npz", **arrays)
    parts = sys.modules["data"].newsgroups(tmp_path, least=1)
    assert [tuple(x.shape) for x, _ in parts] == [(20, 11), (20, 11), (10, 11)]
    assert [len(y) for _, y in parts] == [20, 20, 10]
    norms = [x.pair[0].to_dense().norm(dim=1) for x, _ in parts]
    torch.testing.assert_close(torch.cat(norms), torch.ones(50).float())


def test_accbio_needs_fewer_outer_steps(quick):
    steps = {(r["method"], r["kappa"]): r["steps"] for r in quick("acceleration")}
    assert steps["AccBiO", 20] < 0.7 * steps["gradient descent", 20]
    growth = {m: steps[m, 20] / steps[m, 5] for m, _ in steps}
    assert growth["AccBiO"] < 0.75 * growth["gradient descent"]


def test_decreasing_steps_go_on_where_constant_ones_stop(quick):
    error = {
        (r["schedule"], r["K"]): r["error"] for r in quick("stochastic_hypergradients")
    }
    assert error["decreasing", 80] < 0.5 * error["constant", 80]
    assert error["constant", 80] < 0.2 * error["batch", 80]
    assert error["decreasing", 80] < 0.3 * error["decreasing", 20]


def test_saba_goes_on_where_soba_stands_still(quick):
    last = {row["method"]: row["error"] for row in quick("quadratic")}
    assert last["saba"] < 1e-2 * min(last["soba"], last["stocbio"])


def test_poisoned_images_do_harm_within_their_ball_and_random_ones_do_not(quick):
    last = {row["method"]: row for row in quick("poisoning")}
    before = last["no poisoning"]["valid_loss"]
    assert last["random"]["valid_loss"] < 1.2 * before
    for method in ("bsgm, cold", "soba", "cg, warm"):
        assert last[method]["valid_loss"] > 2 * before
        assert last[method]["norm"] <= 1.5 + 1e-5


def test_representations_are_learned(quick):
    last = {(r["problem"], r["method"]): r for r in quick("hyper_representation")}
    for problem in ("linear", "small net, digits"):
        fixed = last[problem, "features fixed"]["valid_loss"]
        assert last[problem, "aid_cg"]["valid_loss"] < 0.9 * fixed
