"""Update rules: value equals torch.optim, derivative equals finite differences."""

import inspect
from dataclasses import replace

import pytest
import torch
from cases import ADAFACTOR, ADAM, ADAMW, MUON, RULES, SGD, rule_id

import torch_bilevel as tb
from torch_bilevel.inner import RULES as REGISTERED
from torch_bilevel.inner import find_rule
from torch_bilevel.inner.adjoint import differentiable as has_adjoint
from torch_bilevel.inner.adjoint import pull_back


def build(case, parameters, **extra):
    kind, options = case
    fixed = {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}
    return kind(parameters, **fixed, **extra)


@pytest.fixture
def full_precision(monkeypatch):
    """Muon orthogonalises in bfloat16, of which there are no finite differences."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


SHAPES = {MUON: [(3, 2), (2, 4), (3, 3)]}  # matrices only
MODES = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_value_equals_torch_optim(case, mode):
    """Step by step from the first, and from a state loaded into a new optimizer."""
    kind, options = case
    known = inspect.signature(kind).parameters
    extra = {key: value for key, value in MODES[mode].items() if key in known}
    if mode != "single" and not extra:
        pytest.skip(f"{kind.__name__} has no {mode} mode")
    if (
        mode == "foreach"
        and kind in (SGD, ADAM, ADAMW)
        and torch.is_tensor(options["lr"])
    ):
        pytest.skip("torch refuses a tensor lr with foreach")
    parameters = [torch.randn(shape) for shape in SHAPES.get(kind, [(3, 2), (), (4,)])]
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = build(case, parameters, **extra)
    rule = find_rule(optimizer, REGISTERED)
    for step in range(7):
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = build(case, parameters, **extra)
            optimizer.load_state_dict(saved)
        before = [
            (p.detach().clone(), {k: copied(v) for k, v in optimizer.state[p].items()})
            for p in parameters
        ]
        for p in parameters:
            p.grad = torch.randn_like(p)
        gradients = [p.grad.clone() for p in parameters]  # foreach writes into .grad
        optimizer.step()
        group = optimizer.param_groups[0]
        for p, g, (value, state) in zip(parameters, gradients, before, strict=True):
            new, new_state = rule.step(value, g, clean(state), group)
            assert torch.allclose(new, p.detach(), rtol=1e-13, atol=1e-14)
            if mode == "single":
                assert torch.equal(new, p.detach())
            assert new_state.keys() >= clean(optimizer.state[p]).keys()
            for key, expected in clean(optimizer.state[p]).items():
                expected = torch.as_tensor(expected, dtype=torch.float64)
                found = torch.as_tensor(new_state[key], dtype=torch.float64)
                torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def copied(value):
    return value.clone() if torch.is_tensor(value) else value


def clean(state):
    return {k: v for k, v in state.items() if v is not None}


def program(case, x, num_steps, library=None):
    """An inner loop on two tensors of different shapes; returns the validation loss."""
    torch.manual_seed(1)
    a, b = torch.randn(3, 2), torch.randn(1, 2)
    A, target = torch.randn(5, 3), torch.randn(5, 2)
    a, b = a.requires_grad_(), b.requires_grad_()
    inner = build(case, [{"params": [a]}, {"params": [b], "lr": 0.03}])
    sign = -1 if case[1].get("maximize") else 1

    def train_loss(scale):
        fit = (torch.tanh(A @ a + b) - target) ** 2
        return scale * sign * ((x.exp() * fit).mean() + (x[0] - x[1] * b).pow(2).sum())

    def valid_loss():
        return (torch.sin(a) ** 2).sum() + (b * x).sum()

    if library:
        optimizer = tb.BilevelOptimizer(
            inner, torch.optim.SGD([x], lr=0.1), estimator=library
        )
        train_loss = optimizer.inner_loss(train_loss)
        optimizer.outer_loss(valid_loss)
    for k in range(num_steps):
        inner.zero_grad()
        train_loss(1.0 + 0.1 * k).backward(inputs=None if library else [a, b])
        inner.step()
    return optimizer if library else valid_loss().item()


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("num_steps", [1, 2, 6])
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_unrolled_equals_finite_differences_of_a_plain_program(case, num_steps):
    x = torch.tensor([0.2, -0.4], requires_grad=True)
    optimizer = program(case, x, num_steps, library="unrolled")
    (found,) = optimizer.hypergradient()
    difference = torch.zeros(2)
    for i, e in enumerate(torch.eye(2)):
        ends = [program(case, (x + s * 1e-5 * e).detach(), num_steps) for s in (1, -1)]
        difference[i] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(found, difference, rtol=2e-6, atol=2e-8)
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_no_nan_where_a_gradient_is_exactly_zero(case):
    """Unused embedding rows: v = 0, and √v has no derivative."""
    table = torch.randn(4, 3, requires_grad=True)
    x = torch.tensor(0.5, requires_grad=True)
    inner = build(case, [table])
    optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator="unrolled")
    train = optimizer.inner_loss(lambda: ((table[:2] - x) ** 4).sum())
    optimizer.outer_loss(lambda: (table**3).sum() + x**2)
    for _ in range(3):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    (found,) = optimizer.hypergradient()
    assert torch.isfinite(found)
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


SCALARS = ["lr", "weight_decay", "momentum", "dampening", "alpha", "rho", "lambd"]
SCALARS += ["momentum_decay", "lr_decay"]
PAIRS = ["betas", "etas"]


def differentiable(group):
    """What of a parameter group can be differentiated: (key, place in a pair) → number.

    Not a momentum of 0, with which there is no buffer.
    """
    keys = [key for key in SCALARS if key in group]
    keys = [key for key in keys if key != "momentum" or group[key]]
    single = {(key, None): float(group[key]) for key in keys}
    pairs = [(key, i) for key in PAIRS if key in group for i in (0, 1)]
    return {**single, **{(key, i): group[key][i] for key, i in pairs}}


def replaced(group, values):
    group = dict(group)
    for (key, place), value in values.items():
        if place is None:
            group[key] = value
        else:
            group[key] = (*group[key][:place], value, *group[key][place + 1 :])
    return group


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("num_steps", [2, 6])
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_derivative_in_hyperparameters_equals_finite_differences(case, num_steps):
    """Of parameter and state after some steps whose gradient depends on the parameter."""
    start, shift = torch.randn(3, 2), torch.randn(num_steps, 3, 2)
    optimizer = build(case, [start.clone().requires_grad_()])
    rule, group = find_rule(optimizer, REGISTERED), optimizer.param_groups[0]

    def outcome(values):
        y, state = start, {}
        for k in range(num_steps):
            y, state = rule.step(y, y.sin() + shift[k], state, replaced(group, values))
        state.pop("step", None)
        return sum(v.sin().sum() for v in [y, *state.values()])

    values = differentiable(group)
    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}
    found = torch.autograd.grad(
        outcome(leaves), list(leaves.values()), materialize_grads=True
    )
    difference = []
    for key, value in values.items():
        ends = [
            float(outcome({**values, key: value + k * 2e-6})) for k in (-2, -1, 1, 2)
        ]
        difference.append((ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / 24e-6)
    difference = torch.tensor(difference)
    torch.testing.assert_close(torch.stack(found), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_the_rule_stands_still_where_stationarity_says(case):
    """±∇_y g + D y = 0, moments at rest, late enough that corrections for bias are over."""
    gradient = torch.randn(3, 2)
    optimizer = build(case, [torch.zeros(3, 2, requires_grad=True)])
    rule, group = find_rule(optimizer, REGISTERED), optimizer.param_groups[0]
    mixes = rule in (REGISTERED[MUON], REGISTERED[ADAFACTOR])
    if mixes and group["weight_decay"]:
        with pytest.raises(tb.NoUpdateRule, match="gradient balances.*weight_decay=0"):
            rule.stationarity(gradient, None, {}, group)
        return
    _, state = rule.step(torch.zeros(3, 2), gradient, {}, group)
    state["step"] = 5000
    for key in SQUARES & state.keys():
        state[key] = gradient**2
    sign, decay, frozen = rule.stationarity(gradient, None, state, group)
    assert sign == (-1 if group.get("maximize") else 1)
    y = torch.randn(3, 2)
    if torch.is_tensor(decay) or decay:
        y = -sign * gradient / decay
    else:
        gradient.zero_()
    for key in MEANS & state.keys():  # the decay is part of the mean, or is decoupled
        state[key] = frozen * sign * gradient
    if "mu_product" in state:
        state["mu_product"] = torch.zeros(())
    new, _ = rule.step(y, gradient, state, group)
    torch.testing.assert_close(new, y, rtol=0, atol=2e-6)


SQUARES = {"square_avg", "exp_avg_sq", "max_exp_avg_sq"}
MEANS = {"exp_avg", "momentum_buffer", "grad_avg"}


@pytest.mark.parametrize("shape", [(3, 2), (8, 32)], ids=str)
def test_muon_rounds_its_value_as_torch_and_not_its_derivative(shape, monkeypatch):
    y, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
    optimizer = MUON([y], lr=0.1)
    rule, group = find_rule(optimizer, REGISTERED), optimizer.param_groups[0]
    weight = torch.randn(shape)

    def at(gradient):
        leaf = gradient.clone().requires_grad_()
        new, _ = rule.step(y.detach(), leaf, {}, group)
        return new.detach(), *torch.autograd.grad((weight * new).sum(), leaf)

    before, y.grad = y.detach().clone(), g
    rounded, derivative = at(g)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        exact, expected = at(g)
        u = torch.randn(shape)
        ends = [(weight * at(g + s * 1e-5 * u)[0]).sum() for s in (1, -1)]
    assert torch.equal(derivative, expected)
    difference = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close((derivative * u).sum(), difference, rtol=1e-7, atol=0)
    optimizer.step()
    torch.testing.assert_close(rounded, y.detach(), rtol=1e-13, atol=1e-14)
    off = torch.linalg.vector_norm(rounded - exact)
    assert 1e-3 < off / torch.linalg.vector_norm(rounded - before) < 0.1


def test_a_parameter_without_gradient_is_skipped_as_torch_does():
    """Weight decay does not touch it; it passes the adjoint through."""
    used, unused = (
        torch.randn(3, requires_grad=True),
        torch.randn(2, requires_grad=True),
    )
    x = torch.randn(3, requires_grad=True)
    inner = SGD([used, unused], lr=0.1, momentum=0.9, weight_decay=0.5)
    optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=1.0), estimator="unrolled")
    train = optimizer.inner_loss(lambda: torch.cosh(used - x).sum())
    optimizer.outer_loss(lambda: (used.sin() * unused.sum()).sum())
    for _ in range(3):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


def test_subclasses():
    class Renamed(SGD):
        pass

    class Changed(SGD):
        def step(self, closure=None):
            return super().step(closure)

    y = torch.zeros(2, requires_grad=True)
    x = torch.zeros(2, requires_grad=True)
    outer = SGD([x], lr=0.1)
    assert find_rule(Renamed([y], lr=0.1), REGISTERED) is REGISTERED[SGD]
    with pytest.raises(tb.NoUpdateRule, match="Changed.*implicit estimator"):
        tb.BilevelOptimizer(Changed([y], lr=0.1), outer, estimator="unrolled")
    # an implicit estimator works, unless weight decay enters in an unknown way
    tb.BilevelOptimizer(Changed([y], lr=0.1), outer).remove()
    with pytest.raises(tb.NoUpdateRule, match="weight_decay=0.1"):
        tb.BilevelOptimizer(Changed([y], lr=0.1, weight_decay=0.1), outer)


@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_large_parameters_are_taken_in_pieces(case, monkeypatch):
    """Pieces change rounding only, from the first step and with a learned learning rate too."""

    def gradients(num_steps):
        x = torch.tensor([0.2, -0.4], requires_grad=True)
        optimizer = program(case, x, num_steps, "unrolled")
        plain = optimizer.hypergradient()[0]
        optimizer.restart()
        optimizer.inner_hyperparameters(lambda: {"lr": 0.01 * x[0].exp()})
        (train,) = optimizer.inner_losses.values()
        for _ in range(num_steps):
            optimizer.zero_grad()
            train(1.0).backward()
            optimizer.step()
        return torch.stack([plain, optimizer.hypergradient()[0]])

    for num_steps in (1, 3):
        whole = gradients(num_steps)
        monkeypatch.setattr("torch_bilevel.inner.adjoint.PIECE", 2)
        pieces = gradients(num_steps)
        monkeypatch.undo()
        torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("every", ["None", "3"])
def test_adam_at_a_minimum_is_not_taken_for_another_program(every):
    """It divides by |g|, which is all rounding there; a real mismatch is still one."""
    torch.manual_seed(0)
    model, X = torch.nn.Linear(4, 1), torch.randn(30, 4)
    target = X @ torch.randn(4, 1) + 0.3 * torch.randn(30, 1)
    x = torch.tensor(-2.0, requires_grad=True)

    def loss():
        return torch.nn.functional.mse_loss(model(X), target)

    decay = x.exp().item()
    plain = SGD(model.parameters(), lr=0.1, weight_decay=decay)
    for _ in range(400):
        plain.zero_grad()
        loss().backward()
        plain.step()
    inner = ADAM(model.parameters(), lr=0.05, weight_decay=decay)
    estimator = f"unrolled(checkpoint_every={every})"
    optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator=estimator)
    optimizer.inner_hyperparameters(lambda: {"weight_decay": x.exp()})
    train = optimizer.inner_loss(loss)
    optimizer.outer_loss(lambda: model(X[:5]).pow(2).sum())
    for _ in range(20):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    optimizer.hypergradient()
    optimizer.zero_grad()
    train().backward()
    model.weight.grad[0, 0] *= 1.1
    optimizer.step()
    with pytest.raises(tb.ReplayMismatch, match="inner step 20"):
        optimizer.hypergradient()


OWN = [case for case in RULES if REGISTERED[case[0]].transpose is not None]


def test_sgd_and_adam_have_transposes_of_their_own():
    assert {case[0] for case in OWN} == {SGD, ADAM, ADAMW}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("case", OWN, ids=rule_id)
def test_a_transpose_of_its_own_is_that_of_the_differentiated_rule(case, known):
    """From the first step on, with entries that never had a gradient.

    Args:
        known: adjoints of the state came back from later steps.
    """
    p = torch.randn(3, 4, requires_grad=True)
    inner = build(case, [p])
    rule = REGISTERED[case[0]]
    for _ in range(3):
        p.grad = torch.randn(3, 4)
        p.grad[0, :2] = 0.0
        state = dict(inner.state.get(p, {}))
        state = {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}
        point, hyper = (
            (p.detach().clone(), p.grad.clone(), state),
            inner.param_groups[0],
        )
        inner.step()
        _, after = rule.step(*point, hyper)
        keys = [k for k, v in after.items() if has_adjoint(k, v)]
        starts = [torch.randn(12) for _ in range(2 + len(keys))]

        def pulled(rule, point=point, hyper=hyper, starts=starts, keys=keys):
            y_bar, g_bar, *rest = (t.clone() for t in starts)
            bars = dict(zip(keys, rest, strict=True)) if known else {}
            before, off = pull_back(rule, hyper, point, p.detach(), y_bar, g_bar, bars)
            return y_bar, g_bar, before, torch.stack(off)

        expected = pulled(replace(rule, transpose=None))
        torch.testing.assert_close(pulled(rule), expected, rtol=1e-12, atol=1e-13)


def test_a_transpose_takes_either_side_where_amsgrad_has_a_tie():
    """As autograd: half to each of two equal numbers."""
    rule = REGISTERED[ADAM]
    hyper = torch.optim.Adam([torch.zeros(1)], amsgrad=True).defaults
    g = torch.tensor([0.5, -2.0, 0.3])
    v = torch.tensor([0.1, 0.2, 0.3])
    new = 0.999 * v + 0.001 * g**2
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn(3), "exp_avg_sq": v}
    state["max_exp_avg_sq"] = torch.stack([new[0], new[1] + 1, new[2] - 0.1])
    _, after = rule.step(torch.zeros(3), g, state, hyper)
    state["max_exp_avg_sq"][0] = after["exp_avg_sq"][0]  # to the last bit
    found = []
    for one in (rule, replace(rule, transpose=None)):
        bars = {k: torch.ones(3) for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
        y_bar, g_bar = torch.ones(3), torch.empty(3)
        point = torch.zeros(3), g, state
        before, _ = pull_back(one, hyper, point, torch.zeros(3), y_bar, g_bar, bars)
        found.append((y_bar, g_bar, before))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    assert 0.4 < float(found[0][2]["max_exp_avg_sq"][0]) < 0.6
