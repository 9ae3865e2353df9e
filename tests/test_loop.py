"""The user's loop in all its forms: each compares hypergradients."""

import contextlib
import copy
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from problems import DataWeights, Quadratic, flat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb
from torch_bilevel.inner.pool import Pool
from torch_bilevel.inner.stepper import split
from torch_bilevel.inner.trajectory import tensors_of

NAMES = ["cg", "neumann", "richardson", "minres", "direct", "identity", "unrolled"]


class Net(nn.Module):
    """A small classifier, as in the README."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.layers(x)


def data(n=60, m=30):
    X, t = torch.randn(n, 5), torch.randint(0, 3, (n,))
    train_set = TensorDataset(X, t, torch.arange(n))
    valid = TensorDataset(torch.randn(m, 5), torch.randint(0, 3, (m,)))
    return train_set, DataLoader(valid, 10, shuffle=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_of_the_readme(name):
    torch.set_default_dtype(torch.float32)
    train_set, valid_loader = data()
    train_loader = DataLoader(train_set, 3, shuffle=True)
    model = Net()
    weights = torch.zeros(len(train_set), requires_grad=True)

    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        outer=torch.optim.Adam([weights], lr=0.05),
        modules=model,
        estimator=name,
        inner_steps=20,
    )

    @optimizer.inner_loss
    def train_loss(x, y, index):
        return (
            weights[index].sigmoid() * F.cross_entropy(model(x), y, reduction="none")
        ).mean()

    @optimizer.outer_loss(data=valid_loader)
    def valid_loss(x, y):
        return F.cross_entropy(model(x), y)

    for _ in range(5):
        for x, y, index in train_loader:
            optimizer.zero_grad()
            train_loss(x, y, index).backward()
            optimizer.step()
    assert optimizer.outer_steps == 5 and len(optimizer.history) == 5
    assert (weights != 0).all() and torch.isfinite(weights).all()
    assert optimizer.last_report.steps == 20
    assert name in str(optimizer.last_report)


# --- one loop, written in many ways --------------------------------------------------------


class Cleaning:
    """A model, weights and batches that every variation starts from."""

    def __init__(self, estimator, inner=None, modules=True, **options):
        torch.manual_seed(3)
        self.model = Net()
        self.weights = torch.randn(24).requires_grad_()
        self.X, self.t = torch.randn(24, 5), torch.randint(0, 3, (24,))
        self.Xv, self.tv = torch.randn(15, 5), torch.randint(0, 3, (15,))
        make = inner or (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05)
        )
        self.inner = make(self.model.parameters())
        self.optimizer = tb.BilevelOptimizer(
            self.inner,
            torch.optim.SGD([self.weights], lr=0.1),
            modules=self.model if modules else (),
            estimator=estimator,
            **options,
        )
        self.train = self.optimizer.inner_loss(self.train_loss)
        self.valid = self.optimizer.outer_loss(self.valid_loss)

    def train_loss(self, index, scale=1.0):
        losses = F.cross_entropy(
            self.model(self.X[index]), self.t[index], reduction="none"
        )
        return scale * (self.weights[index].sigmoid() * losses).mean()

    def valid_loss(self):
        return F.cross_entropy(self.model(self.Xv), self.tv)

    def batches(self, k):
        return torch.arange(24).split(8)[k % 3]

    def gradient(self):
        (found,) = self.optimizer.hypergradient()
        return found


def reference(estimator, inner=None, num_steps=4, prepare=None):
    case = Cleaning(estimator, inner)
    for k in range(num_steps):
        case.optimizer.zero_grad()
        case.train(case.batches(k)).backward()
        if prepare:
            prepare(case)
        case.optimizer.step()
    return case


BOTH = pytest.mark.parametrize(
    "estimator",
    ["cg(max_steps=60, rtol=1e-12)", "unrolled", "unrolled(keep_graph=True)"],
)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tb.NegativeCurvatureWarning)
        warnings.simplefilter("ignore", tb.ZeroHypergradientWarning)  # short windows
        yield


@BOTH
def test_stepping_the_inner_optimizer_directly(estimator):
    expected = reference(estimator).gradient()
    case = Cleaning(estimator)
    for k in range(4):
        case.inner.zero_grad()
        case.train(case.batches(k)).backward()
        case.inner.step()
    assert torch.equal(case.gradient(), expected)


@BOTH
def test_step_with_a_closure(estimator):
    expected = reference(estimator).gradient()
    case = Cleaning(estimator)
    for k in range(4):

        def closure(k=k):
            case.optimizer.zero_grad()
            loss = case.train(case.batches(k))
            loss.backward()
            return loss

        loss = (
            case.optimizer.step(closure) if k % 2 else case.inner.step(closure=closure)
        )
        assert loss is not None
    assert torch.equal(case.gradient(), expected)


@BOTH
def test_gradient_accumulation_with_scaled_losses(estimator):
    expected = reference(estimator).gradient()
    case = Cleaning(estimator)
    for k in range(4):
        case.optimizer.zero_grad()
        for part in case.batches(k).split(2):
            (case.train(part) / 4).backward()
        case.train(case.batches(k))  # logged, never back-propagated: does not count
        case.optimizer.step()
    torch.testing.assert_close(case.gradient(), expected, rtol=1e-9, atol=1e-12)


@BOTH
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_abandoned_backward_does_not_count(estimator, set_to_none):
    """A step that was skipped: its backward must not leak into the next one."""
    expected = reference(estimator).gradient()
    case = Cleaning(estimator)
    for k in range(4):
        case.inner.zero_grad(set_to_none=set_to_none)
        if k == 2:
            case.train(case.batches(0), scale=7.0).backward()
            case.inner.zero_grad(set_to_none=set_to_none)
        case.train(case.batches(k)).backward()
        case.inner.step()
    torch.testing.assert_close(case.gradient(), expected, rtol=1e-10, atol=1e-13)


def test_learning_rate_schedulers_on_either_optimizer():
    case = Cleaning("unrolled")
    on_inner = torch.optim.lr_scheduler.StepLR(case.optimizer, 1, gamma=0.5)
    on_outer = torch.optim.lr_scheduler.StepLR(case.optimizer.outer, 1, gamma=0.5)
    for k in range(4):
        case.optimizer.zero_grad()
        case.train(case.batches(k)).backward()
        case.optimizer.step()
        on_inner.step()
    assert case.inner.param_groups[0]["lr"] == 0.1 / 16
    assert tb.check_hypergradient(case.optimizer).relative_error < 1e-6
    before = case.weights.detach().clone()
    case.optimizer.hypergradient()
    case.optimizer.outer.step()
    on_outer.step()
    assert not torch.equal(before, case.weights) and case.optimizer.outer_steps == 1
    assert case.optimizer.outer.param_groups[0]["lr"] == 0.05


@BOTH
@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping_that_is_declared(estimator, by):
    def clip(case):
        if by == "norm":
            nn.utils.clip_grad_norm_(case.model.parameters(), 0.05)
        else:
            nn.utils.clip_grad_value_(case.model.parameters(), 0.01)

    declared = tb.clip_grad_norm(0.05) if by == "norm" else tb.clip_grad_value(0.01)
    case = reference(estimator, prepare=clip)
    case.optimizer.gradient_transform(declared)
    found = case.gradient()
    if estimator.startswith("unrolled"):
        assert tb.check_hypergradient(case.optimizer).relative_error < 1e-6
    else:  # the implicit system does not see it: the same as without, at the same point
        plain = Cleaning(estimator)
        plain.model.load_state_dict(case.model.state_dict())
        with torch.no_grad():
            plain.inner.param_groups[0]["lr"] = 1e-30
        for k in range(4):
            plain.optimizer.zero_grad()
            plain.train(plain.batches(k)).backward()
            plain.optimizer.step()
        torch.testing.assert_close(found, plain.gradient(), rtol=1e-6, atol=1e-9)


@BOTH
def test_two_inner_optimizers_are_one_inner_problem(estimator):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    expected = reference(estimator).gradient()
    case = Cleaning(estimator)
    case.optimizer.remove()
    a = torch.optim.SGD(case.model.layers[0].parameters(), **options)
    b = torch.optim.SGD(case.model.layers[2].parameters(), **options)
    optimizer = tb.BilevelOptimizer(
        [a, b], case.optimizer.outer, modules=case.model, estimator=estimator
    )
    train = optimizer.inner_loss(case.train_loss)
    optimizer.outer_loss(case.valid_loss)
    for k in range(4):
        optimizer.zero_grad()
        train(case.batches(k)).backward()
        if k % 2:
            optimizer.step()
        else:
            a.step()
            assert len(optimizer._recorder.window) == k
            b.step()
    found = flat(optimizer.hypergradient())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert len(optimizer.param_groups) == 2
    if estimator.startswith("unrolled"):
        assert tb.check_hypergradient(optimizer).relative_error < 1e-6


@pytest.mark.parametrize(
    "estimator", ["cg(max_steps=40)", "unrolled", "unrolled(keep_graph=True)"]
)
def test_autocast_bfloat16(estimator):
    torch.set_default_dtype(torch.float32)

    def run(enabled):
        case = Cleaning(
            estimator, inner=lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.2)
        )
        for k in range(4):
            case.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = case.train(case.batches(k))
            loss.backward()
            case.optimizer.step()
        return case

    exact, mixed = run(False), run(True)
    g, m = exact.gradient(), mixed.gradient()
    assert m.dtype == torch.float32
    assert float((g - m).norm() / g.norm()) < 0.05
    assert not torch.equal(g, m)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("through", ["wrapper", "inner"])
@BOTH
def test_grad_scaler_with_one_forced_overflow(estimator, through, fused):
    def make(parameters):
        return torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, weight_decay=0.05, fused=fused
        )

    expected = reference(estimator, make).gradient()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    case = Cleaning(estimator, make, grad_scaler=scaler)
    target = case.optimizer if through == "wrapper" else case.inner
    for k in [0, 1, "overflow", 2, 3]:
        case.optimizer.zero_grad()
        loss = case.train(case.batches(0 if k == "overflow" else k))
        if k == "overflow":
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(target)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert len(case.optimizer._recorder.window) == 4
    torch.testing.assert_close(case.gradient(), expected, rtol=1e-9, atol=1e-12)


@BOTH
def test_an_inner_step_inside_paused_does_not_count(estimator):
    expected = reference(estimator).gradient()
    case = Cleaning(estimator)
    with case.optimizer.paused():
        case.train(case.batches(0)).backward()
        case.optimizer.zero_grad()
    for k in range(4):
        case.optimizer.zero_grad()
        case.train(case.batches(k)).backward()
        case.optimizer.step()
    assert torch.equal(case.gradient(), expected)


@BOTH
def test_modules_are_found_without_being_named(estimator):
    expected = reference(estimator).gradient()
    case = Cleaning(estimator, modules=False)
    for k in range(4):
        case.optimizer.zero_grad()
        case.train(case.batches(k)).backward()
        case.optimizer.step()
    assert torch.equal(case.gradient(), expected)
    assert any(m is case.model for m in case.optimizer._modules.members.values())


def test_arguments_are_shallow_copied_and_popped_freely():
    case = Cleaning("unrolled")

    def pops(batch):
        index = batch["nested"].pop("index")
        batch["list"].append(1)
        return case.train_loss(index)

    train = case.optimizer.inner_loss(pops)
    for k in range(4):
        case.optimizer.zero_grad()
        train({"nested": {"index": case.batches(k)}, "list": []}).backward()
        case.optimizer.step()
    assert torch.equal(case.gradient(), reference("unrolled").gradient())


def test_an_outer_parameter_may_be_an_argument():
    case = Cleaning("cg")
    train = case.optimizer.inner_loss(
        lambda w, index: (
            w[index].exp()
            * F.cross_entropy(
                case.model(case.X[index]), case.t[index], reduction="none"
            )
        ).mean()
    )
    train(case.weights, case.batches(0)).backward()
    case.optimizer.step()
    with torch.no_grad():
        case.weights.add_(0.0)  # live: exempt from the check that batches are unchanged
    assert (case.gradient()[:8] != 0).all()


def test_lbfgs_steps_are_opaque():
    """The closure runs many times: implicit uses the last call, unrolled refuses."""
    problem = Quadratic()
    inner = torch.optim.LBFGS(
        problem.y, max_iter=50, tolerance_grad=1e-14, tolerance_change=1e-16
    )
    optimizer = problem.optimizer(inner=inner, estimator="cg(max_steps=40, rtol=1e-12)")

    def closure():
        optimizer.zero_grad()
        loss = problem.train()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, problem.exact(), rtol=1e-7, atol=1e-8)
    with pytest.raises(tb.NoUpdateRule, match="LBFGS"):
        optimizer.hypergradient(estimator="unrolled")


def test_a_step_that_runs_its_closure_twice_cannot_be_unrolled():
    class Twice(torch.optim.SGD):
        """Like SAM: evaluates its closure at two points. It has a rule by inheritance."""

    case = Cleaning("unrolled", inner=lambda p: Twice(p, lr=0.1))

    def closure():
        case.optimizer.zero_grad()
        loss = case.train(case.batches(0))
        loss.backward()
        return loss

    case.inner.register_step_pre_hook(
        lambda o, args, kwargs: ((args[0], lambda: [args[1](), args[1]()][1]), kwargs)
    )
    case.inner.step(closure)
    with pytest.raises(tb.OpaqueStep, match="several times.*implicit"):
        case.gradient()
    case.optimizer.hypergradient(estimator="cg")


# --- windows, restarts, memory ----------------------------------------------------------------


def test_records_never_cross_an_outer_step():
    problem = Quadratic()
    optimizer = problem.optimizer(
        estimator="unrolled", outer=torch.optim.SGD(problem.x, lr=0.0)
    )
    problem.steps(optimizer, 5)
    optimizer.outer_step()
    problem.steps(optimizer, 2)
    optimizer.hypergradient()
    assert optimizer.last_report.steps == 2
    assert tb.check_hypergradient(optimizer).relative_error < 1e-7


def test_nothing_is_reset_between_outer_steps_and_restart_resets():
    problem = Quadratic()
    inner = torch.optim.SGD(problem.y, lr=0.05, momentum=0.9)
    optimizer = problem.optimizer(inner=inner, estimator="cg")
    problem.steps(optimizer, 3)
    optimizer.outer_step()
    assert inner.state and optimizer._memories[("valid_loss",)].adjoint is not None
    y = flat(problem.y).detach().clone()
    optimizer.restart()
    assert not inner.state and not optimizer._memories
    assert torch.equal(flat(problem.y), y)
    with pytest.raises(tb.NoInnerStep):
        optimizer.hypergradient()


def test_warm_start_saves_products_on_a_slowly_moving_problem():
    def products(warm):
        torch.manual_seed(0)
        problem = Quadratic(shapes_y=((40,),))
        optimizer = problem.optimizer(
            estimator=f"cg(max_steps=100, rtol=1e-6, warm_start={warm})",
            outer=torch.optim.SGD(problem.x, lr=1e-4),
        )
        problem.solve()
        for _ in range(5):
            problem.steps(optimizer)
            optimizer.outer_step()
        return sum(r.products for r in list(optimizer.history)[1:])

    assert products(True) < products(False)


@pytest.mark.parametrize(
    "options",
    ["window=3", "checkpoint_every=3", "checkpoint_every=4, window=5", "offload='cpu'"],
)
def test_ways_to_keep_fewer_iterates(options):
    full = reference("unrolled", num_steps=9)
    expected = full.gradient()
    case = reference(f"unrolled({options})", num_steps=9)
    found = case.gradient()
    if "window" in options:
        last = int(options.split("window=")[1])
        plain = reference(f"unrolled(window={last})", num_steps=9)
        assert torch.equal(found, plain.gradient())
        assert not torch.equal(found, expected)
        assert case.optimizer.last_report.steps == last
    else:
        assert torch.equal(found, expected)
    kept = sum(r.has_iterate for r in case.optimizer._recorder.window)
    assert kept == {"window=3": 3, "checkpoint_every=3": 3, "offload='cpu'": 9}.get(
        options, 2
    )


@pytest.mark.parametrize("options", ["", "window=13"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 16, 33, 60])
def test_automatic_checkpoints_equal_unrolled_bit_for_bit(num_steps, options):
    """At most about 1.4 √K iterates are kept, and few exist when stepped through again."""
    full = reference(f"unrolled({options})", num_steps=num_steps).gradient()
    case = reference(f"checkpointed({options})", num_steps=num_steps)
    assert torch.equal(case.gradient(), full)
    window = case.optimizer._recorder.window
    kept = sum(record.has_iterate for record in window)
    assert kept <= 2 * window.interval + 1
    assert kept <= 1.5 * num_steps**0.5 + 2
    case.optimizer.outer_step()
    assert window.interval == 1  # the next window begins anew


@pytest.mark.parametrize("room", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 35, 36, 90])
def test_going_back_with_little_room_takes_the_fewest_steps(count, room):
    """`split` against the recursion it solves in closed form."""

    @functools.cache
    def fewest(n, c):
        if n == 1:
            return 0
        if c == 0:
            return math.inf
        return min(m + fewest(n - m, c - 1) + fewest(m, c) for m in range(1, n))

    def taken(n, c):
        if n == 1:
            return 0
        m = split(n, c)
        assert 1 <= m < n and c > 0
        return m + taken(n - m, c - 1) + taken(m, c)

    assert taken(count, room) == fewest(count, room)


def test_few_points_exist_between_checkpoints(monkeypatch):
    """Room for about √c of them, each reproduced bit for bit from the checkpoint."""
    full = reference("unrolled", num_steps=50).gradient()
    case = reference("unrolled(checkpoint_every=16)", num_steps=50)
    pools = []

    class Watched(Pool):
        def __init__(self, *args):
            super().__init__(*args)
            pools.append(self)

    monkeypatch.setattr("torch_bilevel.inner.replay.Pool", Watched)
    assert torch.equal(case.gradient(), full)
    first = case.optimizer._recorder.window.records[16]
    size = sum(t.nbytes for t in tensors_of(first.values(), first.states()))
    (pool,) = pools
    # four points, the values of a last one, and one while it is being made
    assert pool.allocated <= 6 * size


KEPT = "unrolled(keep_graph=True)"


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("layout", ["own", "shared", "strided"])
def test_a_kept_graph_equals_replay_bit_for_bit(kind, layout):
    """With dropout, BatchNorm, accumulation and clipping; also after the window's end."""

    def run(estimator):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)
        )
        W = torch.randn(6, 3)
        if layout == "shared":  # two parameters in one storage
            flat_W = torch.randn(24)
            net[0].bias = nn.Parameter(flat_W[18:])
            W = flat_W[:18].view(6, 3)
        elif layout == "strided":
            W = torch.randn(3, 6).t()
        W.requires_grad_()
        weights = torch.zeros(20, requires_grad=True)
        options = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = tb.BilevelOptimizer(
            getattr(torch.optim, kind)([*net.parameters(), W], lr=0.05, **options),
            torch.optim.SGD([weights], lr=1.0),
            estimator=estimator,
        )
        X, t = torch.randn(20, 5), torch.randint(0, 3, (20,))

        @optimizer.inner_loss
        def train(x, y, scale=0.5):
            losses = F.cross_entropy(net(x) @ W, y, reduction="none")
            return scale * (weights.sigmoid() * losses).mean(), losses

        @optimizer.outer_loss
        def valid(x, y):
            return F.cross_entropy(net(x) @ W, y)

        optimizer.gradient_transform(tb.clip_grad_norm(0.1))
        found = []
        for _ in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                train(X, t)[0].backward()
                (train(X.flip(0), t.flip(0), scale=1.0)[0] / 2).backward()
                nn.utils.clip_grad_norm_([*net.parameters(), W], 0.1)
                optimizer.step()
            first = optimizer.hypergradient(X, t, write=False)[0]
            assert torch.equal(first, optimizer.hypergradient(X, t)[0])
            optimizer.outer.step()
            found += [first, W.detach().clone()]
        return found

    for a, b in zip(run("unrolled"), run(KEPT), strict=True):
        assert torch.equal(a, b)


def test_a_kept_graph_evaluates_nothing_twice():
    calls = 0

    def count(estimator):
        nonlocal calls
        y, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        optimizer = tb.BilevelOptimizer(
            torch.optim.SGD([y], lr=0.1),
            torch.optim.SGD([x], lr=0.1),
            estimator=estimator,
        )

        @optimizer.inner_loss
        def train():
            nonlocal calls
            calls += 1
            return (x * y**4).sum()

        optimizer.outer_loss(lambda: (y**2).sum())
        for _ in range(2):  # the first window is verified, at one evaluation
            calls = 0
            for _ in range(5):
                optimizer.zero_grad()
                train().backward()
                optimizer.step()
            optimizer.outer_step()
        return calls

    assert count("unrolled") == 10 and count(KEPT) == 5


def test_a_kept_graph_with_a_window_counts_its_memory():
    replayed = reference("unrolled(window=3)", num_steps=9)
    case = reference("unrolled(window=3, keep_graph=True)", num_steps=9)
    window, without = (c.optimizer._recorder.window for c in (case, replayed))
    assert len(window) == 3 and window.nbytes() > without.nbytes()
    full = replayed.gradient()
    assert torch.equal(case.gradient(), full)
    assert torch.equal(case.gradient(), full)  # the graphs are still there


@pytest.mark.parametrize("every", ["None", "2", "'auto'"])
def test_a_byte_budget_for_iterates(every):
    full = reference("unrolled", num_steps=40).gradient()
    case = reference(
        f"unrolled(checkpoint_every={every}, iterate_bytes=10000)", num_steps=40
    )
    assert torch.equal(case.gradient(), full)
    window = case.optimizer._recorder.window
    kept = [record for record in window if record.has_iterate]
    size = sum(t.nbytes for t in tensors_of(kept[-1].values(), kept[-1].states()))
    needed = len(kept) + math.isqrt(window.interval) + 1
    assert 2 < len(kept) and needed * size <= 10000
    with pytest.raises(tb.TrajectoryTooLong, match="iterate_bytes"):
        reference("unrolled(iterate_bytes=3000)", num_steps=40)


def test_a_window_is_a_truncation():
    """window=K differentiates the last K steps from a constant start."""
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="unrolled(window=4)")
    problem.steps(optimizer, 9)
    y = flat(problem.y).detach()
    to_x, to_y = problem.partials(y)
    eye = torch.eye(len(y))
    M = torch.linalg.matrix_power(eye - 0.05 * problem.A, 4)
    exact = to_x - problem.C @ torch.linalg.solve(problem.A, (eye - M) @ to_y)
    torch.testing.assert_close(problem.hypergradient(optimizer), exact)


def test_the_estimator_changes_at_run_time():
    case = reference("unrolled")
    unrolled = case.gradient()
    case.optimizer.estimator = "cg(max_steps=30)"
    case.gradient()
    assert case.optimizer.last_report.estimator == "cg(max_steps=30)"
    case.optimizer.estimator = tb.Unrolled()
    assert torch.equal(case.gradient(), unrolled)
    case.optimizer.outer_step()
    case.optimizer.estimator = tb.CG()
    assert str(case.optimizer.estimator) == "cg"


def test_memory_is_flat_over_a_thousand_outer_steps():
    import gc

    problem = DataWeights(batch=6)
    optimizer = problem.optimizer(estimator="unrolled", inner_steps=2, history=5)
    optimizer.outer_losses["valid_loss"].data = None
    counts = []
    for k in range(2000):
        problem.steps(optimizer, 1)
        if k in (200, 1999):
            gc.collect()
            counts.append(
                sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
            )
    assert optimizer.outer_steps == 1000
    assert counts[1] <= counts[0] + 5


# --- being an optimizer --------------------------------------------------------------------------


def test_it_is_an_optimizer_whose_groups_are_the_inner_ones():
    case = Cleaning("cg")
    optimizer = case.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0] is case.inner.param_groups[0]
    assert (
        optimizer.state is case.inner.state
        and optimizer.defaults is case.inner.defaults
    )
    case.inner.load_state_dict(case.inner.state_dict())
    assert optimizer.param_groups[0] is case.inner.param_groups[0]
    for function in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="state_dict"):
            function(optimizer)
    seen = []
    handle = optimizer.register_step_post_hook(lambda *_: seen.append(1))
    case.train(case.batches(0)).backward()
    optimizer.step()
    handle.remove()
    assert seen == [1]


def test_added_parameter_groups_are_followed():
    case = Cleaning("unrolled")
    extra = torch.zeros(3, requires_grad=True)
    case.optimizer.add_param_group({"params": [extra], "lr": 0.3})
    train = case.optimizer.inner_loss(
        lambda index: (
            case.train_loss(index) + ((extra - case.weights[index][:3]) ** 2).sum()
        )
    )
    outer = case.optimizer.outer_loss(lambda: case.valid_loss() + extra.sum())
    for k in range(3):
        case.optimizer.zero_grad()
        train(case.batches(k)).backward()
        case.optimizer.step()
    assert tb.check_hypergradient(case.optimizer, loss=outer).relative_error < 1e-6


def test_remove_takes_every_hook_off():
    case = Cleaning("cg")
    case.optimizer.remove()
    assert (
        not case.inner._optimizer_step_pre_hooks
        and not case.inner._optimizer_step_post_hooks
    )
    assert not case.optimizer.outer._optimizer_step_post_hooks
    assert not case.weights._post_accumulate_grad_hooks


def test_outer_step_hooks_and_reports():
    case = Cleaning("cg", inner_steps=2)
    case.optimizer.remove()
    case = Cleaning("cg", inner_steps=2)
    case.optimizer.outer_losses.clear()
    case.optimizer.outer_loss(case.valid_loss)
    seen = []
    handle = case.optimizer.register_outer_step_post_hook(
        lambda o, r: seen.append((o, r))
    )
    for k in range(4):
        case.optimizer.zero_grad()
        case.train(case.batches(k)).backward()
        case.optimizer.step()
    handle.remove()
    assert [r.outer_step for _, r in seen] == [1, 2]
    assert all(o is case.optimizer for o, _ in seen)
    report = seen[-1][1]
    assert isinstance(report.loss, torch.Tensor) and report.loss.ndim == 0
    text = str(report)
    assert "\n" not in text
    for part in ("outer step 2", "loss", "norm", "residual", "products", "cg"):
        assert part in text
    assert report.as_dict()["steps"] == 2


def test_the_history_keeps_no_small_tensors():
    """They would lie between the large buffers of training and keep gaps from being reused."""
    case = Cleaning("cg(max_steps=5)", inner_steps=1)
    for k in range(3):
        case.optimizer.zero_grad()
        case.train(case.batches(k)).backward()
        case.optimizer.step()
    report = case.optimizer.last_report
    assert isinstance(report.loss, torch.Tensor)
    for kept in case.optimizer.history:
        values = [*vars(kept).values(), *kept.zeros.values()]
        assert not any(isinstance(value, torch.Tensor) for value in values)
    assert kept.as_dict() == report.as_dict() and str(kept) == str(report)


def test_explain():
    case = Cleaning("cg(max_steps=5)", inner_steps=7)
    text = case.optimizer.explain()
    for part in (
        "estimator 'cg(max_steps=5)'",
        "moved by your SGD",
        "after every 7 inner steps",
        "averaged over all steps",
        "weight decay is part of H",
        "double backward",
        "train_loss",
        "valid_loss",
    ):
        assert part in text, part
    case.optimizer.estimator = "unrolled(window=5)"
    assert (
        "last 5 steps" in case.optimizer.explain() and "sgd" in case.optimizer.explain()
    )


def test_outer_data_iterables_iterators_and_callables():
    case = Cleaning("cg")
    batch = (case.Xv, case.tv)

    def loss(x, y):
        return F.cross_entropy(case.model(x), y)

    for source in ([batch], iter([batch] * 2), lambda: batch):
        case.optimizer.outer_losses.clear()
        case.optimizer.outer_loss(loss, data=source)
        case.optimizer.zero_grad()
        case.train(case.batches(0)).backward()
        case.optimizer.step()
        for _ in range(2):
            case.optimizer.hypergradient()
    with contextlib.suppress(tb.OuterDataExhausted):
        case.optimizer.outer_losses.clear()
        case.optimizer.outer_loss(loss, data=iter([batch]))
        case.optimizer.hypergradient()
        case.optimizer.hypergradient()
        pytest.fail("an iterator that ended was restarted")


def test_outer_data_leaves_the_generators_alone_and_reshuffles():
    case = Cleaning("cg")
    seen = []

    def loss(x):
        seen.append(x.tolist())
        return F.cross_entropy(case.model(case.Xv[x]), case.tv[x])

    loader = DataLoader(torch.arange(12), 12, shuffle=True)
    case.optimizer.outer_losses.clear()
    case.optimizer.outer_loss(loss, data=loader)
    case.train(case.batches(0)).backward()
    case.optimizer.step()
    state = torch.get_rng_state()
    for _ in range(3):
        case.optimizer.hypergradient()
    assert torch.equal(state, torch.get_rng_state())
    assert len({tuple(order) for order in seen}) == 3
