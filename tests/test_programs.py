"""Programs users write that once gave wrong numbers or left something behind."""

import contextlib
import copy
import dataclasses
import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import Quadratic, flat
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import torch_bilevel as tb
from torch_bilevel.problem.known import KnownFunctions

SGD = torch.optim.SGD
BOTH = pytest.mark.parametrize(
    "estimator",
    ["cg(max_steps=50, rtol=1e-13)", "unrolled", "unrolled(keep_graph=True)"],
)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tb.NegativeCurvatureWarning)
        yield


class Toy:
    """g = Σ eˣ(y − b)²/2 in three coordinates; f = Σ (y − 2)²."""

    def __init__(self, estimator="unrolled", **options):
        torch.manual_seed(0)
        self.y = torch.randn(3, requires_grad=True)
        self.x = torch.randn(3, requires_grad=True)
        self.inner = SGD([self.y], lr=0.1, momentum=0.9)
        self.outer = SGD([self.x], lr=0.1)
        self.o = tb.BilevelOptimizer(
            self.inner, self.outer, estimator=estimator, **options
        )

    def g(self, b=1.0):
        return (self.x.exp() * (self.y - b) ** 2).sum() / 2

    def f(self):
        return ((self.y - 2) ** 2).sum()

    def run(self, train, steps=3):
        for _ in range(steps):
            self.o.zero_grad()
            train().backward()
            self.o.step()


@BOTH
def test_a_registered_inner_loss_used_as_the_outer_loss(estimator):
    """Stacked decorators: ∂_x f is not lost."""
    a, b = Toy(estimator), Toy(estimator)
    train = a.o.inner_loss(a.g)
    a.o.outer_loss(train)
    a.run(train)
    b.o.outer_loss(b.g)
    b.run(b.o.inner_loss(b.g))
    assert torch.equal(a.o.hypergradient()[0], b.o.hypergradient()[0])
    assert not a.o._recorder.pending
    if estimator == "unrolled":
        assert tb.check_hypergradient(a.o).relative_error < 1e-6


@BOTH
def test_registered_losses_that_call_registered_losses(estimator):
    found = []
    for registered in (True, False):
        t = Toy(estimator)
        part = lambda t=t: ((t.y - 1) ** 2).sum() / 2  # noqa: E731
        whole = t.f
        if registered:
            part, whole = t.o.inner_loss(part), t.o.outer_loss(t.f)
        else:
            t.o.outer_loss(t.f)
        train = t.o.inner_loss(
            lambda t=t, p=part, w=whole: (
                (t.x * t.y**2).sum() * 0.1 * (1 + p()) + 0.1 * w()
            )
        )
        t.run(train)
        found.append(t.o.hypergradient()[0])
    assert torch.equal(*found)


def test_autograd_grad_of_a_registered_loss_is_not_consumed():
    a, b = Toy(), Toy()
    for t in (a, b):
        t.o.outer_loss(t.f)
        train = t.o.inner_loss(t.g)
        for _ in range(3):
            t.o.zero_grad()
            train().backward()
            if t is a:
                torch.autograd.grad(train(5.0), [t.y])
            t.o.step()
    assert torch.equal(a.o.hypergradient()[0], b.o.hypergradient()[0])


def test_outer_groups_added_later_are_watched_and_constant():
    t = Toy()
    z = torch.zeros(3, requires_grad=True)
    train = t.o.inner_loss(lambda: t.g() + (z.exp() * t.y**2).sum())
    t.o.outer_loss(t.f)
    t.outer.add_param_group({"params": [z]})
    t.run(train)
    assert z.grad is None
    assert tb.check_hypergradient(t.o).relative_error < 1e-6
    t.o.zero_grad()
    with pytest.raises(tb.OuterOutsideLoss, match=r"outer\[1\]"):
        (z.sum() * train()).backward()


def test_a_backward_that_raises_leaves_outer_variables_variable():
    t = Toy()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, g):
            raise MemoryError

    train = t.o.inner_loss(lambda: Fails.apply(t.g()))
    with pytest.raises(MemoryError):
        train().backward()
    gc.collect()
    assert t.x.requires_grad


def test_a_step_that_raises_does_not_wedge_the_optimizer():
    t = Toy()
    t.o.outer_loss(t.f)
    train = t.o.inner_loss(t.g)
    fail = [True]

    def hook(*_):
        if fail.pop():
            raise MemoryError

    fail += [False] * 10
    t.inner.register_step_pre_hook(lambda *_: hook() if len(fail) == 1 else None)
    fail[:] = [True]
    train().backward()
    with pytest.raises(MemoryError):
        t.o.step()
    fail[:] = [0, 0]
    t.run(train)
    assert len(t.o._recorder.window) == 3
    assert tb.check_hypergradient(t.o).relative_error < 1e-6


def test_groups_added_between_steps_before_the_first_hypergradient():
    t = Toy()
    z = torch.zeros(2, requires_grad=True)
    train = t.o.inner_loss(lambda: t.g() + ((z - t.x[:2]) ** 2).sum())
    t.o.outer_loss(lambda: t.f() + z.sum())
    t.run(train, 1)
    t.o.add_param_group({"params": [z]})
    with pytest.warns(tb.NoOuterStepWarning, match="groups changed: 1 recorded"):
        t.run(train, 2)
    assert tb.check_hypergradient(t.o).relative_error < 1e-6


def test_restart_verifies_anew():
    t = Toy()
    t.o.outer_loss(t.f)
    train = t.o.inner_loss(t.g)
    t.run(train)
    t.x.data.fill_(0.5)
    t.o.restart()
    t.run(train)
    t.o.hypergradient()


def test_modules_behind_helper_functions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x, X = torch.zeros(8, requires_grad=True), torch.randn(8, 3)

    def compute(batch):
        return model(batch)

    def second(batch):
        return compute(batch).squeeze(-1)

    o = tb.BilevelOptimizer(SGD(model.parameters(), lr=0.1), SGD([x], lr=0.1))
    train = o.inner_loss(lambda: (x.exp() * second(X) ** 2).mean())
    valid = o.outer_loss(lambda: ((second(X) - 1) ** 2).mean())
    train().backward()
    o.step()
    model.eval()
    valid().backward()
    assert not model.training and x.grad is not None


def test_a_layer_frozen_within_the_window():
    t = Toy()
    z = torch.ones(3, requires_grad=True)
    t.o.add_param_group({"params": [z]})
    train = t.o.inner_loss(lambda: t.g() + (z * t.y * t.x).sum())
    t.o.outer_loss(lambda: t.f() + (z**2).sum())
    t.run(train, 2)
    z.requires_grad_(False)
    t.run(train, 2)
    t.o.hypergradient()
    assert not z.requires_grad


TRAINED = {
    "one is frozen": lambda k: (k < 2, True),
    "in turns": lambda k: (k % 2 == 0, k % 2 == 1),
    "thawed": lambda k: (k > 1, True),
}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(
    "estimator",
    [
        "unrolled",
        "unrolled(checkpoint_every=2)",
        "unrolled(keep_graph=True)",
        "forward",
    ],
)
def test_parameters_frozen_for_a_while(estimator, trained, to_none):
    """They are where earlier steps took them: a function of x for later steps and for f."""

    def run(x, estimator=None):
        torch.manual_seed(0)
        y, z, c = (torch.randn(3, requires_grad=True) for _ in range(3))
        inner = SGD([y, z, c], lr=0.1, momentum=0.5, weight_decay=0.1)
        coupling = lambda: (y * z * c).sum() + (y * z).square().sum() / 4  # noqa: E731
        g = lambda k: (x.exp() * (y - k) ** 2).sum() / 2 + (z - y).square().sum()  # noqa: E731
        loss = lambda k: g(k) + coupling() + (c - x).square().sum()  # noqa: E731
        f = lambda: (y - 2).square().sum() + (y * z).sum() + (z * c).sum()  # noqa: E731
        o = None
        if estimator:
            o = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator=estimator)
            loss, f = o.inner_loss(loss), o.outer_loss(f)
        for k in range(4):
            first, second = TRAINED[trained](k)
            inner.zero_grad(set_to_none=to_none)
            y.requires_grad_(first)
            z.requires_grad_(second)
            loss(0.5 * k).backward()
            z.requires_grad_(True)  # frozen for one of two terms of a step
            loss(1.0).backward()
            inner.step()
        y.requires_grad_(False)
        return f()

    x = torch.randn(3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run(x, estimator).backward()
    for i in range(3):
        h = 1e-6 * torch.eye(3)[i]
        with torch.no_grad():
            points = (x + h).requires_grad_(), (x - h).requires_grad_()
        high, low = (float(run(point).detach()) for point in points)
        assert abs(float(x.grad[i]) - (high - low) / 2e-6) < 1e-7


@pytest.mark.parametrize(
    "estimator", ["cg", "unrolled", "unrolled(keep_graph=True)", "forward"]
)
@pytest.mark.parametrize("changes", [False, True])
def test_backward_hooks_of_modules(estimator, changes):
    """A factor two in the backward is there once in ∇_y g, and twice in double backward."""
    found, seen = [], []

    def hook(module, into, out):
        seen.append(module)
        return (2 * into[0],) if changes else None

    for hooked in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        x, t = torch.zeros(8, requires_grad=True), torch.randn(8, 4)
        o = tb.BilevelOptimizer(
            SGD(net.parameters(), lr=0.1), SGD([x], lr=0.1), estimator=estimator
        )
        train = o.inner_loss(lambda net=net, x=x, t=t: (net(t) ** 2).sum(1) @ x.exp())
        o.outer_loss(lambda net=net, t=t: (net(t) - 1).square().mean())
        if hooked:
            net[1].register_full_backward_hook(hook)
        refused = pytest.raises(tb.ReplayMismatch, match="or modules have hooks")
        with refused if hooked and changes else contextlib.nullcontext():
            for _ in range(3):
                o.zero_grad()
                train().backward()
                o.step()
            found += o.hypergradient()
    if not changes:
        torch.testing.assert_close(*found)
    assert len(seen) == 3 or "keep_graph" in estimator  # its graph is the user's


@pytest.mark.parametrize("estimator", ["unrolled", "unrolled(checkpoint_every=2)"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_step_whose_gradients_were_dropped(estimator, at):
    """After a bad batch: torch skips every parameter, and so does the step's transpose."""
    found = []
    for skip in (True, False):
        t = Toy(estimator)
        train = t.o.inner_loss(t.g)
        t.o.outer_loss(t.f)
        for k in range(3):
            t.o.zero_grad()
            if k != at:
                train(0.1 * k).backward()
            elif not skip:
                continue
            else:
                train(1.0).backward()
                t.o.zero_grad()
            t.o.step()
        found.append(t.o.hypergradient()[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "estimator", ["unrolled", "unrolled(keep_graph=True)", "forward", "pzobo", "cg"]
)
def test_what_was_frozen_from_the_start_is_a_constant(estimator):
    """Its gradient may be sparse, or have no second derivative."""
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    x, index = torch.zeros(8, requires_grad=True), torch.arange(8) % 5
    o = tb.BilevelOptimizer(
        SGD(net.parameters(), lr=0.1), SGD([x], lr=0.1), estimator=estimator
    )
    train = o.inner_loss(lambda: net(index).square().sum(1) @ x.exp())
    o.outer_loss(lambda: (net(index) - 1).square().mean())
    evaluations = []
    net[2].register_forward_hook(lambda *_: evaluations.append(1))
    for _ in range(2):
        for _ in range(3):
            o.zero_grad()
            train().backward()
            o.step()
        evaluations.clear()
        o.outer_step()
        assert x.grad.count_nonzero() == 8
    if "keep_graph" in estimator:  # only the outer loss
        assert len(evaluations) == 1


@pytest.mark.parametrize("estimator", ["unrolled", "forward"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_of_a_scaler_is_no_foreign_hand_on_the_state(estimator, fused):
    torch.manual_seed(0)
    y, x = torch.randn(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    o = tb.BilevelOptimizer(
        torch.optim.Adam([y], lr=0.1, fused=fused),
        SGD([x], lr=0.1),
        estimator=estimator,
        grad_scaler=scaler,
    )
    train = o.inner_loss(lambda c: c * (x.exp() * (y - 1) ** 2).sum())
    o.outer_loss(lambda: (y - 2).square().sum())
    for c in (1.0, 1.0, float("inf"), 1.0):
        o.zero_grad()
        scaler.scale(train(c)).backward()
        scaler.step(o)
        scaler.update()
    (found,) = o.hypergradient()
    assert found.isfinite().all() and o.last_report.steps == 3


def test_carried_tangents_end_where_the_window_begins_anew():
    found = []
    for estimator in ("forward(carry=True)", "forward"):
        t = Toy(estimator, warm_start=False)
        train, _ = t.o.inner_loss(t.g), t.o.outer_loss(t.f)
        for _ in range(2):
            t.run(train)
            t.o.outer_step()
        found.append(t.x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("estimator", ["unrolled", "forward"])
def test_a_refusal_is_over_once_its_cause_is(estimator):
    """Other weights for a moment: a hypergradient there is refused, and then it is not."""
    a, b = Toy(estimator), Toy(estimator)
    for t in (a, b):
        t.o.outer_loss(t.f)
        t.run(t.o.inner_loss(t.g))
    saved = a.y.detach().clone()
    with torch.no_grad():
        a.y.zero_()
    with pytest.raises(tb.ReplayMismatch, match="written to"):
        a.o.hypergradient()
    with torch.no_grad():
        a.y.copy_(saved)
    assert torch.equal(a.o.hypergradient()[0], b.o.hypergradient()[0])


def test_hyperparameters_that_are_numbers_may_come_and_go():
    t = Toy("unrolled")
    train, _ = t.o.inner_loss(t.g), t.o.outer_loss(t.f)
    t.o.inner_hyperparameters(
        lambda k: {"lr": t.x[0].exp() / 9, **({"momentum": 0.5} if k < 2 else {})}
    )
    t.run(train)
    assert tb.check_hypergradient(t.o).relative_error < 1e-6


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "forward", "soba"])
def test_hooks_that_look_on_see_the_users_gradients_only(estimator):
    found, seen = [], []
    for hooked in (False, True):
        t = Toy(estimator)
        t.o.outer_loss(t.f)
        if hooked:
            t.y.register_hook(lambda g: seen.append(g.clone()))
            t.y.register_hook(lambda g: None)
        t.run(t.o.inner_loss(t.g))
        found.append(t.o.hypergradient()[0])
    assert torch.equal(*found)
    assert len(seen) == 3 and len(t.y._backward_hooks) == 2


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "forward", "soba"])
@pytest.mark.parametrize("hook", [lambda g: g.clamp(-0.1, 0.1), lambda g: 0.5 * g])
def test_hooks_that_change_gradients_are_refused(estimator, hook):
    """They would change rows of H v as well."""
    t = Toy(estimator)
    t.o.outer_loss(t.f)
    t.y.register_hook(hook)
    with pytest.raises(tb.ReplayMismatch, match=r"1 inner parameters or modules"):
        t.run(t.o.inner_loss(t.g))
        t.o.hypergradient()


def test_an_ambient_autocast_region_changes_nothing():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, x = nn.Linear(16, 4), torch.zeros(32, requires_grad=True)
    X = torch.randn(32, 16)
    o = tb.BilevelOptimizer(SGD(model.parameters(), lr=0.1), SGD([x], lr=0.1))
    exact = lambda f: torch.autocast("cpu", enabled=False)(f)  # noqa: E731
    train = o.inner_loss(exact(lambda: (x.exp() * model(X).pow(2).sum(1)).mean()))
    o.outer_loss(exact(lambda: (model(X) - 1).pow(2).mean()))
    train().backward()
    o.step()
    (plain,) = o.hypergradient()
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = o.hypergradient()
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("estimator", ["unrolled", "cg", "soba(adjoint_lr=0.1)"])
def test_what_a_loss_casts_inside_a_disabled_region_is_not_used_again(estimator):
    """PyTorch keeps casts until the outermost region ends, here the caller's."""
    torch.set_default_dtype(torch.float32)
    found = {}
    for outside in (True, False):
        torch.manual_seed(0)
        model, x = nn.Linear(8, 1), torch.zeros(8, requires_grad=True)
        X, Y = torch.randn(16, 8), torch.randn(16, 1)
        inner, outer = SGD(model.parameters(), lr=0.1), SGD([x], lr=0.1)
        o = tb.BilevelOptimizer(inner, outer, modules=model, estimator=estimator)

        def error(model=model, X=X, Y=Y):
            with torch.autocast("cpu", torch.bfloat16):
                return (model(X).float() - Y).pow(2).mean()

        penalty = lambda model=model, x=x: (x.exp() * model.weight[0] ** 2).sum()  # noqa: E731
        train = o.inner_loss(lambda error=error, penalty=penalty: error() + penalty())
        valid = o.outer_loss(error)
        for _ in range(2):
            for _ in range(2):
                o.zero_grad()
                train().backward()
                o.step()
            region = torch.autocast("cpu", enabled=False)
            with contextlib.nullcontext() if outside else region:
                valid().backward()
        found[outside] = x.grad
    assert torch.equal(*found.values())


def test_warm_up_inside_paused_does_not_touch_outer_gradients():
    t = Toy()
    train = t.o.inner_loss(t.g)
    with t.o.paused():
        train().backward()
    assert t.x.grad is None and t.x.requires_grad


def test_a_second_opinion_does_not_enter_the_history():
    t = Toy("cg")
    valid, train = t.o.outer_loss(t.f), t.o.inner_loss(t.g)
    t.run(train)
    valid().backward()
    t.o.hypergradient(estimator="identity", write=False)
    assert t.o.last_report.estimator == "identity"
    t.outer.step()
    assert t.o.history[-1].estimator == "cg" and t.o.last_report.outer_step == 1


def test_it_is_not_kept_alive_by_what_it_watches():
    t = Toy()
    reference = weakref.ref(t.o)
    t.o.inner_loss(t.g)
    t.o = None
    gc.collect()
    assert reference() is None
    t.inner.step()


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "unrolled(keep_graph=True)"])
def test_losses_registered_for_every_task_are_let_go(estimator):
    t = Toy(estimator)
    t.o.outer_loss(t.f)
    references = []
    for _ in range(4):
        data = torch.randn(3)
        references.append(weakref.ref(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tb.BilevelWarning)

            @t.o.inner_loss
            def train(data=data):
                return t.g() + (data * t.y).sum()

        t.run(train, 2)
        t.o.outer_step()
    del train, data
    gc.collect()
    assert [r() is not None for r in references] == [False, False, False, True]


def test_functions_are_known_by_identity():
    known = KnownFunctions()
    assert len not in known
    for function in (len, print, lambda: 1):
        known.add(function)
        assert function in known
    place = id(function)
    del function
    gc.collect()
    assert place not in known._references
    slotted = type("Slotted", (), {"__slots__": (), "__call__": lambda self: 1})()
    known.add(slotted)  # has no weak references
    assert slotted in known


def test_a_checkpoint_that_recomputes_at_moved_parameters():
    """Under keep_graph it does so for H v, long after the step."""

    def run(estimator):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        x, t = torch.zeros(8, requires_grad=True), torch.randn(8, 4)
        o = tb.BilevelOptimizer(
            SGD(net.parameters(), lr=0.5), SGD([x], lr=0.1), estimator=estimator
        )
        hidden = lambda z: net[1](net[0](z))  # noqa: E731
        output = lambda: net[2](checkpoint(hidden, t, use_reentrant=False))  # noqa: E731
        train = o.inner_loss(lambda: (x.exp() * output().square().sum(1)).mean())
        o.outer_loss(lambda: (net(t) - 1).square().mean())
        for _ in range(3):
            o.zero_grad()
            train().backward()
            o.step()
        (found,) = o.hypergradient(write=False)
        torch.testing.assert_close(
            tb.check_hypergradient(o).relative_error, 0.0, rtol=0, atol=1e-6
        )
        return found

    assert run("unrolled").isfinite().all()
    with pytest.raises(tb.ReplayMismatch, match=r"another H v.*use_reentrant=False"):
        run("unrolled(keep_graph=True)")


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "unrolled(keep_graph=True)"])
@pytest.mark.parametrize("registers", [True, False])
def test_the_cache_of_parametrizations_is_the_callers(estimator, registers):
    """Inside `cached()` a weight's graph is shared: it must not be freed with a hypergradient."""
    found = []
    for region in (contextlib.nullcontext, parametrize.cached):
        torch.manual_seed(0)
        net = weight_norm(nn.Linear(4, 3))
        x, t = torch.zeros(3, requires_grad=True), torch.randn(8, 4)
        o = tb.BilevelOptimizer(
            SGD(net.parameters(), lr=0.1), SGD([x], lr=0.1), estimator=estimator
        )
        train = o.inner_loss(lambda net=net, x=x, t=t: (net(t) ** 2 @ x.exp()).mean())
        valid = o.outer_loss(lambda net=net, t=t: (net(t) - 1).square().mean())
        for _ in range(2):
            o.zero_grad()
            with region():
                train().backward()
            o.step()
        with region():
            weight = net.weight
            valid().backward() if registers else o.hypergradient()
            assert (net.weight is weight) == (region is parametrize.cached)
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "forward"])
def test_a_gradient_transform_may_work_in_place(estimator):
    found = []
    for transform in (
        lambda gs: [g.mul_(0.5) for g in gs],
        lambda gs: [g * 0.5 for g in gs],
    ):
        t = Toy(estimator)
        train, _ = t.o.inner_loss(t.g), t.o.outer_loss(t.f)
        t.o.gradient_transform(transform)
        for _ in range(3):
            t.o.zero_grad()
            train().backward()
            t.y.grad.mul_(0.5)
            t.o.step()
        found.append(t.o.hypergradient()[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "loss",
    [
        lambda net, t: torch.func.jvp(net, (t,), (t,))[1].square().sum(),
        lambda net, t: torch.func.grad(lambda z: net(z).square().sum())(t).sum(),
    ],
)
def test_transforms_in_a_loss_whose_graph_is_to_be_kept(loss):
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    t = torch.randn(8, 4)
    x = torch.zeros(1, requires_grad=True)
    o = tb.BilevelOptimizer(
        SGD(net.parameters(), lr=0.1),
        SGD([x], lr=0.1),
        estimator="unrolled(keep_graph=True)",
    )
    train = o.inner_loss(lambda: loss(net, t) * x.exp().sum())
    with pytest.raises(tb.InvalidLoss, match=r"torch\.func.*leave keep_graph=True out"):
        train()


def test_a_kept_loss_back_propagated_after_a_step():
    t = Toy("unrolled(keep_graph=True)")
    train = t.o.inner_loss(lambda: (t.x.exp() * t.y * t.y).sum())
    stale = train()
    t.run(train, 1)
    with pytest.raises(tb.StalePoint, match="without a step in between"):
        stale.backward()


@pytest.mark.parametrize("steps", [1, 3, 6, 12])
def test_kept_graphs_of_losses_that_enter_autocast_by_themselves(steps):
    torch.set_default_dtype(torch.float32)
    found = []
    for estimator in ("unrolled", "unrolled(keep_graph=True)"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
        x, t = torch.zeros(16, requires_grad=True), torch.randn(16, 6)
        y = torch.arange(16) % 3
        inner, outer = SGD(net.parameters(), lr=0.1), SGD([x], lr=0.1)
        o = tb.BilevelOptimizer(inner, outer, modules=net, estimator=estimator)

        def losses(net=net, t=t, y=y):
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(net(t), y, reduction="none").float()

        train = o.inner_loss(lambda losses=losses, x=x: (x.exp() * losses()).mean())
        o.outer_loss(lambda losses=losses: losses().mean())
        for _ in range(steps):
            o.zero_grad()
            train().backward()
            o.step()
        found += o.hypergradient()
    torch.testing.assert_close(*found, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("end", ["outer_step", "restart"])
def test_kept_graphs_are_freed_with_their_window(end):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, t = torch.zeros(8, requires_grad=True), torch.randn(8, 4)
    optimizer = tb.BilevelOptimizer(
        SGD(net.parameters(), lr=0.1),
        SGD([x], lr=0.1),
        estimator="unrolled(keep_graph=True)",
    )
    train = optimizer.inner_loss(lambda: (x.exp() * net(t).square().sum(1)).mean())
    optimizer.outer_loss(lambda: net(t).square().mean())

    def window():
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        kept = [c.kept for step in optimizer._recorder.window for c, _ in step.calls]
        getattr(optimizer, end)()
        return [weakref.ref(part) for k in kept for part in k.parts]

    parts = [part for _ in range(2) for part in window()]
    gc.collect()
    assert parts
    assert not any(part() is not None for part in parts)


def test_wrapping_again_takes_over():
    """A notebook cell that is run twice."""
    t = Toy("cg", inner_steps=2)
    with pytest.warns(tb.BilevelWarning, match="already wrapped"):
        again = tb.BilevelOptimizer(t.inner, t.outer, inner_steps=2)
    train = again.inner_loss(t.g)
    again.outer_loss(t.f)
    for _ in range(4):
        again.zero_grad()
        train().backward()
        again.step()
    assert again.outer_steps == 2 and t.o.outer_steps == 0


def test_after_remove_losses_are_plain_functions():
    t = Toy()
    train = t.o.inner_loss(t.g)
    t.o.remove()
    train().backward()
    assert t.x.grad is not None and not t.o._recorder.pending


def test_a_module_that_holds_registered_losses_can_be_copied():
    model = nn.Linear(2, 1)
    x = torch.zeros(1, requires_grad=True)
    o = tb.BilevelOptimizer(SGD(model.parameters(), lr=0.1), SGD([x], lr=0.1))
    model.train_loss = o.inner_loss(lambda: (x * model.weight).sum())
    model.valid_loss = o.outer_loss(lambda: model.weight.sum())
    clone = copy.deepcopy(model)
    assert clone.valid_loss is model.valid_loss


def test_scalar_variables_and_a_converged_start():
    y, x = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    for estimator in ("cg", "minres", "direct", "neumann", "richardson"):
        o = tb.BilevelOptimizer(SGD([y], lr=0.5), SGD([x], lr=0.1), estimator=estimator)
        train, valid = (
            o.inner_loss(lambda: (y - x) ** 2),
            o.outer_loss(lambda: (y - 3) ** 2),
        )
        train().backward()
        o.step()
        x.grad = None
        valid().backward()
        torch.testing.assert_close(x.grad, torch.tensor(-4.0))
        o.remove()


def test_every_estimator_at_the_first_iteration_of_a_quadratic():
    problem = Quadratic(shapes_y=((1,),), shapes_x=((1,),))
    optimizer = problem.optimizer(estimator="cg")
    problem.steps(optimizer)
    assert torch.isfinite(flat(optimizer.hypergradient())).all()


def test_defining_a_loss_again_replaces_it():
    t = Toy("cg")
    for factor in (1000.0, 1.0):  # a cell that is edited and run again

        def valid_loss(factor=factor):
            return factor * t.f()

        if factor == 1.0:
            with pytest.warns(
                tb.BilevelWarning, match="'valid_loss' was registered before"
            ):
                t.o.outer_loss(valid_loss)
        else:
            t.o.outer_loss(valid_loss)
    t.run(t.o.inner_loss(t.g))
    t.o.hypergradient()
    torch.testing.assert_close(t.o.last_report.loss, t.f().detach())


def test_outer_step_without_a_hypergradient_says_so():
    t = Toy("cg")
    t.o.outer_loss(t.f)
    t.run(t.o.inner_loss(t.g))
    with pytest.warns(
        tb.NoOuterStepWarning, match="3 recorded inner steps.*were dropped"
    ) as seen:
        t.outer.step()
    assert seen[0].filename == __file__  # the user's line, not the library's


def test_no_outer_step_in_a_thousand_says_so():
    t = Toy("cg")
    t.o.outer_loss(t.f, data=[()])
    train = t.o.inner_loss(t.g)
    with pytest.warns(
        tb.NoOuterStepWarning, match="1,000 inner steps.*inner_steps=None"
    ):
        t.run(train, 1000)


def test_outer_values_are_part_of_the_state():
    a, b = Toy("cg"), Toy("cg")
    a.o.outer_loss(a.f)
    a.run(a.o.inner_loss(a.g))
    a.o.outer_step()
    assert not torch.equal(a.x, b.x)
    b.o.load_state_dict(a.o.state_dict())
    assert torch.equal(a.x, b.x)


def test_restart_forgives_a_forgotten_zero_grad():
    t = Toy()
    train, _ = t.o.inner_loss(t.g), t.o.outer_loss(t.f)
    for _ in range(2):
        train().backward()
        t.o.step()
    with pytest.raises(tb.UnregisteredTerm, match="zero_grad"):
        t.o.hypergradient()
    t.o.restart()
    t.run(train)
    assert tb.check_hypergradient(t.o).relative_error < 1e-6


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize(
    "dtype, mixed, bar",
    [
        (torch.float64, False, 1e-6),
        (torch.float32, False, 1e-3),
        (torch.float32, True, 0.05),
    ],
    ids=["float64", "float32", "bfloat16"],
)
def test_everything_at_once(dtype, mixed, bar, keep_graph):
    """Dropout, BatchNorm, accumulation, clipping, autocast and a scheduler in one inner loop."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(16, 3),
    )
    penalty = torch.tensor(-1.0, requires_grad=True)
    inner = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, 8)
    optimizer = tb.BilevelOptimizer(
        inner,
        torch.optim.SGD([penalty], lr=0.1),
        estimator=f"unrolled(keep_graph={keep_graph})",
    )
    optimizer.gradient_transform(tb.clip_grad_norm(1.0))
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))

    @optimizer.inner_loss
    def train(x, y):
        size = (net[0].weight ** 2).sum() + (net[4].weight ** 2).sum()
        return F.cross_entropy(net(x), y) + penalty.exp() * size

    @optimizer.outer_loss
    def valid(x, y):
        return F.cross_entropy(net(x), y)

    for _ in range(6):
        optimizer.zero_grad()
        for half in (slice(0, 32), slice(32, 64)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = train(x[half], y[half])
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        check = tb.check_hypergradient(optimizer, x, y)
    assert check.relative_error < bar


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "forward", "soba"])
@pytest.mark.parametrize("later", [True, False])
def test_step_hooks_that_change_gradients_are_seen_whenever_registered(
    estimator, later
):
    t = Toy(estimator)

    def decay(*_):
        t.y.grad += 3 * t.y.detach()

    if not later:
        t.inner = SGD([t.y], lr=0.1)
        t.inner.register_step_pre_hook(decay)
        t.o = tb.BilevelOptimizer(t.inner, t.outer, estimator=estimator)
    else:
        t.inner.register_step_pre_hook(decay)
    train = t.o.inner_loss(t.g)
    t.o.outer_loss(t.f)
    with pytest.raises(tb.UnregisteredTerm, match="not parallel"):
        t.run(train)
        t.o.hypergradient()


def test_step_hooks_that_are_described():
    """A clipping hook, registered after, with its description, as clipping in the loop."""
    found = []
    for hooked in (True, False):
        t = Toy("unrolled")
        train = t.o.inner_loss(t.g)
        t.o.outer_loss(t.f)
        t.o.gradient_transform(tb.clip_grad_norm(0.5))

        def clip(*_, y=t.y):
            nn.utils.clip_grad_norm_([y], 0.5)

        if hooked:
            t.inner.register_step_pre_hook(clip)
        for _ in range(4):
            t.o.zero_grad()
            train().backward()
            if not hooked:
                clip()
            t.o.step()
        found += t.o.hypergradient()
        assert tb.check_hypergradient(t.o).relative_error < 1e-6
    assert torch.equal(*found)


@pytest.mark.parametrize("noisy", [(0,), (1,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "estimator", ["unrolled", "unrolled(keep_graph=True)", "forward"]
)
def test_weights_perturbed_around_the_loss_are_refused(estimator, noisy):
    """Weight noise, adversarial weights, SAM's second point; at some steps only."""
    t = Toy(estimator)
    train = t.o.inner_loss(lambda: (t.x.exp() * t.y**4).sum())
    t.o.outer_loss(t.f)
    with pytest.raises(tb.ReplayMismatch):
        for k in range(4):
            noise = 0.3 * torch.randn(3) * (k in noisy)
            t.o.zero_grad()
            with torch.no_grad():
                t.y.add_(noise)
            train().backward()
            with torch.no_grad():
                t.y.sub_(noise)
            t.o.step()
        t.o.hypergradient()


@pytest.mark.parametrize("shapes", [[()] * 3, [(), (1,), (), (2,)]], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.ASGD, partial(torch.optim.Adam, eps=1.0)])
def test_neighbouring_scalars(kind, shapes):
    """A state of one number a parameter looks like a scalar parameter's own."""
    inner = [torch.rand(s).add(1).requires_grad_() for s in shapes]
    x = torch.ones(1, requires_grad=True)
    o = tb.BilevelOptimizer(
        kind(inner, lr=0.05), SGD([x], lr=0.1), estimator="unrolled"
    )
    train = o.inner_loss(lambda: x * sum((y**4).sum() for y in inner))
    o.outer_loss(lambda: sum(y.sum() for y in inner))
    for _ in range(3):
        o.zero_grad()
        train().backward()
        o.step()
    assert tb.check_hypergradient(o).relative_error < 1e-6


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: torch.Tensor
    logits: torch.Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    loss: torch.Tensor
    logits: torch.Tensor


class Locked:
    def __init__(self, loss, logits):
        self.parts = [loss, logits]

    @property
    def loss(self):
        return self.parts[0]


@dataclasses.dataclass
class Scaled:
    """What is made in `__post_init__` is not made again."""

    loss: torch.Tensor
    logits: torch.Tensor
    total: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.total = self.logits.sum()
        self.loss = self.loss * 1.0
        self.extra = "kept"


@pytest.mark.parametrize("estimator", ["cg", "unrolled(keep_graph=True)"])
@pytest.mark.parametrize("kind", [Frozen, Slots, Locked, Scaled])
def test_losses_inside_objects_that_cannot_be_written_to(kind, estimator):
    t = Toy(estimator)
    train = t.o.inner_loss(lambda: kind(t.g(), t.y * 2))
    valid = t.o.outer_loss(lambda: kind(t.f(), t.y * 2))
    if kind is Locked:
        with pytest.raises(tb.InvalidLoss, match=r"Locked whose \.loss cannot be set"):
            t.run(lambda: train().loss)
            valid()
        return
    t.run(lambda: train().loss)
    result = valid()
    result.loss.backward()
    assert type(result) is kind and not result.logits.requires_grad
    if kind is Scaled:
        assert result.extra == "kept" and not result.total.requires_grad
    plain = Toy(estimator)
    plain.run(plain.o.inner_loss(plain.g))
    plain.o.outer_loss(plain.f)().backward()
    assert torch.equal(t.x.grad, plain.x.grad)


def test_one_method_of_several_objects():
    """Also of objects whose == gives a tensor, or is always true."""

    @dataclasses.dataclass
    class Task:
        target: torch.Tensor

        def valid(self):
            return ((t.y - self.target) ** 2).sum()

    t = Toy("cg")
    tasks = [Task(torch.zeros(3)), Task(torch.ones(3))]
    losses = [t.o.outer_loss(task.valid) for task in tasks]
    assert len(t.o.outer_losses) == 2
    for loss, task in zip(losses, tasks, strict=True):
        assert torch.equal(loss().detach(), task.valid().detach())
    with pytest.warns(tb.BilevelWarning, match="registered before"):
        t.o.outer_loss(tasks[0].valid)


@pytest.mark.parametrize("estimator", ["forward", "forward_gradient", "unrolled", "cg"])
def test_gradients_set_by_hand_are_named(estimator):
    t = Toy(estimator)
    train = t.o.inner_loss(t.g)
    t.o.outer_loss(t.f)
    with pytest.raises(tb.UnregisteredTerm, match="no call of a registered inner loss"):
        (t.y.grad,) = torch.autograd.grad(train(), [t.y])
        t.o.step()
        t.o.hypergradient()
