"""Constraints: each map against an independent characterisation; what outer steps do with it."""

from dataclasses import dataclass

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, Quadratic, flat, leaves

import torch_bilevel as tb
from torch_bilevel.optim.constraints import REGISTRY, parse

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
ALL = [text for texts in cases.CONSTRAINTS.values() for text in texts]
PROXIMAL = [text for text in ALL if parse(text).proximal]
PROJECTIONS = [text for text in ALL if not parse(text).proximal]
EPS = torch.finfo(torch.float64).eps

numbers = st.floats(-100, 100, allow_subnormal=False)


@st.composite
def points(draw, count=1):
    """Tensors of one shape, (n,) or (2, n)."""
    n = draw(st.integers(1, 9))
    shape = draw(st.sampled_from([(n,), (2, n)]))
    size = n * (2 if len(shape) == 2 else 1)
    values = st.lists(numbers, min_size=size, max_size=size)
    return [
        torch.tensor(draw(values), dtype=torch.float64).view(shape)
        for _ in range(count)
    ]


def feasible_points(constraint, shape, count=400):
    """Random members of the set, corners and edges among them."""
    random = torch.randn(count, *shape)
    match constraint:
        case tb.NonNegative():
            return random.abs() * (torch.rand(count, *shape) < 0.7)
        case tb.Box(lower, upper):
            low = -3.0 if lower is None else lower
            high = 3.0 if upper is None else upper
            return low + (high - low) * (0.5 + random).clamp(0, 1)
        case tb.Simplex(total):
            return total * (8 * random).softmax(-1)
        case tb.Ball(radius, p):
            flat = random.reshape(count, -1)
            if p == 1:
                sizes = (8 * random.abs()).reshape(count, -1).softmax(-1)
                flat = sizes * flat.sign()
            flat = flat / torch.linalg.vector_norm(flat, p, dim=1, keepdim=True)
            return (radius * torch.rand(count, 1) ** 0.2 * flat).view(count, *shape)


def is_feasible(constraint, x, slack=1e-12):
    match constraint:
        case tb.NonNegative():
            return bool((x >= 0).all())
        case tb.Box(lower, upper):
            low = lower is None or bool((x >= lower).all())
            return low and (upper is None or bool((x <= upper).all()))
        case tb.Simplex(total):
            return bool((x >= 0).all() and ((x.sum(-1) - total).abs() < slack).all())
        case tb.Ball(radius, p):
            return bool(torch.linalg.vector_norm(x, p) <= radius * (1 + slack))


def penalty(constraint, x):
    """h by its definition."""
    if isinstance(constraint, tb.L1):
        return constraint.weight * x.abs().sum()
    return constraint.weight * (x**2).sum(constraint.dim).sqrt().sum()


# --- names ------------------------------------------------------------------------------


def test_every_constraint_has_a_row():
    assert {cls.name for cls in REGISTRY.values()} == set(REGISTRY)
    assert set(cases.CONSTRAINTS) == set(REGISTRY)


@pytest.mark.parametrize("text", ALL)
def test_names_round_trip(text):
    made = parse(text)
    assert str(made) == text and parse(str(made)) == made
    assert parse(made) is made and hash(made) == hash(parse(text))


# --- the maps ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", PROJECTIONS)
@given(given_points=points())
def test_a_projection_is_the_nearest_point_of_the_set(text, given_points):
    """y = P(x) iff y ∈ C and ⟨x − y, z − y⟩ ≤ 0 for every z ∈ C."""
    constraint, (x,) = parse(text), given_points
    torch.manual_seed(0)
    y = constraint.apply(x, 0.3)
    assert is_feasible(constraint, y)
    assert torch.equal(constraint.apply(y, 0.3), y)
    for z in feasible_points(constraint, x.shape):
        assert is_feasible(constraint, z)
        assert ((x - y) * (z - y)).sum() <= 1e-11 * (1 + x.abs().max())


@pytest.mark.parametrize("total", [0.01, 1.0, 30.0])
def test_the_projection_onto_the_simplex_satisfies_its_kkt_conditions(total):
    """x − y = τ where y > 0 and x ≤ τ where y = 0, in every row."""
    scales = torch.logspace(-3, 2, 300).unsqueeze(1)
    x = scales * torch.randn(300, 12)
    x[::3] += (total - x[::3].sum(1, keepdim=True)) / 12  # the right sum, wrong signs
    y = tb.Simplex(total).apply(x, 0.3)
    counts = set()
    for row, found in zip(x, y, strict=True):
        counts.add(int((found > 0).sum()))
        tau = (row - found)[found > 0]
        assert (found >= 0).all() and abs(float(found.sum()) - total) <= 1e-13 * total
        assert (tau - tau[0]).abs().max() < 1e-12
        assert (row[found == 0] <= tau[0] + 1e-12).all()
    assert len(counts) > 6


def test_the_projection_onto_the_ball_of_p_1_by_brute_force():
    """At every x of a grid no point of a fine grid of the ball is nearer."""
    angles = torch.linspace(0, 2 * torch.pi, 4001)
    edge = torch.stack([angles.cos(), angles.sin()], 1)
    edge = edge / edge.abs().sum(1, keepdim=True)
    for x in torch.randn(200, 2):
        y = tb.Ball(1.0, p=1).apply(x, 0.1)
        nearest = (edge - x).norm(dim=1).min() if x.abs().sum() > 1 else torch.zeros(())
        assert 0 <= nearest - (y - x).norm() + 1e-14 < 1e-3


@pytest.mark.parametrize("text", ALL)
@given(given_points=points(2))
def test_maps_do_not_expand(text, given_points):
    """‖P(x) − P(z)‖² ≤ ⟨P(x) − P(z), x − z⟩ (firmly), hence ≤ ‖x − z‖²."""
    constraint, (x, z) = parse(text), given_points
    moved = constraint.apply(x, 0.3) - constraint.apply(z, 0.3)
    assert (moved**2).sum() <= (moved * (x - z)).sum() + 1e-10
    assert moved.norm() <= (x - z).norm() + 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", PROJECTIONS)
def test_projecting_twice_changes_no_bit(text, dtype):
    constraint = parse(text)
    for shape in [(1,), (7,), (3, 50), (10000,)]:
        for scale in (1e-3, 1.0, 1e4):
            x = (scale * torch.randn(shape)).to(dtype)
            y = constraint.apply(x, 0.1)
            again = constraint.apply(y, 0.1)
            assert y.dtype == again.dtype == dtype and torch.equal(y, again)


@pytest.mark.parametrize("text", PROJECTIONS)
def test_feasible_points_keep_their_bits(text):
    constraint = parse(text)
    for z in feasible_points(constraint, (3, 4)):
        assert torch.equal(
            constraint.apply(z, 0.1).view(torch.int64), z.view(torch.int64)
        )
    # a simplex in single precision, as softmax leaves it
    weights = (5 * torch.randn(200, 1000)).float().softmax(-1)
    assert torch.equal(tb.Simplex().apply(weights, 0.1), weights)


@pytest.mark.parametrize("text", ALL)
def test_maps_are_pure_and_keep_shape_dtype_and_nan(text):
    constraint = parse(text)
    for shape in [(), (1,), (0, 3), (2, 0, 3), (4,), (2, 3)]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x = (3 * torch.randn(shape)).to(dtype)
            before = x.clone()
            for beta in (0.1, torch.tensor(0.1), torch.tensor(0.1).float()):
                y = constraint.apply(x, beta)
                assert y.shape == x.shape and y.dtype == x.dtype
            assert torch.equal(x, before)
    broken = torch.tensor([1.0, float("nan"), -2.0])
    found = constraint.apply(broken, 0.1).isnan()
    assert found[1] and (
        found.all() or not text.startswith(("simplex", "ball", "group"))
    )


@pytest.mark.parametrize("text", ALL)
def test_low_precision_is_the_rounded_result(text):
    """As in float64 from the same numbers: sums over many entries do not suffer."""
    constraint = parse(text)
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (1e-3, 1.0):
            x = (scale * torch.randn(3, 3000)).to(dtype)
            exact = constraint.apply(x.double(), 0.1)
            found, eps = constraint.apply(x, 0.1).double(), torch.finfo(dtype).eps
            size = x.double().abs() + exact.abs()
            assert ((found - exact).abs() <= 2 * eps * size).all()


def test_scalars_and_empty_tensors():
    one = torch.tensor(-3.0)
    expected = {
        "non_negative": 0.0,
        "box(lower=-0.5, upper=0.25)": -0.5,
        "simplex(total=3.0)": 3.0,
        "ball(radius=1.5)": -1.5,
        "ball(radius=1.5, p=1)": -1.5,
        "l1(weight=0.7)": -2.93,
        "group(weight=0.7, dim=-1)": -2.93,
    }
    for text, value in expected.items():
        torch.testing.assert_close(parse(text).apply(one, 0.1), torch.tensor(value))
    assert tb.Ball(1.0, p=1).apply(torch.zeros(0), 0.1).shape == (0,)
    assert tb.Group(1.0, dim=0).apply(torch.zeros(0), 0.1).shape == (0,)
    with pytest.raises(ValueError, match=r"shape \(3, 0\) has no entries"):
        tb.Simplex().apply(torch.zeros(3, 0), 0.1)


def test_a_simplex_of_many_numbers_far_apart():
    """Sorting in single precision would lose these: partial sums of 1e5 equal numbers."""
    for other in (-1e6, -1.0001, -0.99998):
        x = torch.full((100_000,), other).float()
        x[0] = 0
        y = tb.Simplex().apply(x, 0.1).double()
        tau = (x.double() - y)[y > 0]
        assert abs(float(y.sum()) - 1) < 1e-6 and float(tau.max() - tau.min()) < 1e-6


@pytest.mark.parametrize("text", [*PROXIMAL, "group(weight=2.0, dim=(0, 1))"])
@given(given_points=points(), beta=st.floats(0.001, 10))
def test_a_proximal_map_minimises_its_objective(text, given_points, beta):
    """F(z) = ½‖z − x‖² + β h(z) is 1-strongly convex: F(z) − F(p) ≥ ½‖z − p‖² for every z."""
    constraint, (x,) = parse(text), given_points
    x = x.reshape(-1, x.shape[-1])
    torch.manual_seed(0)
    p = constraint.apply(x, beta)

    def objective(z):
        return ((z - x) ** 2).sum() / 2 + beta * penalty(constraint, z)

    least = objective(p)
    for scale in (1e-3, 1e-1, 1.0, 100.0):
        for direction in [*torch.randn(20, *x.shape), x, p]:
            z = p + scale * direction * (torch.rand(x.shape) < 0.6)
            value = objective(z)
            assert value - least - ((z - p) ** 2).sum() / 2 >= -1e-13 * (1 + value)


def test_the_soft_threshold_is_a_numerical_argmin():
    """Golden section on ½(z − x)² + β w |z| for every entry."""
    x, beta, weight = 3 * torch.randn(50), 0.7, 1.3
    found = tb.L1(weight).apply(x, beta)
    low, high, ratio = -x.abs() - 1, x.abs() + 1, (5**0.5 - 1) / 2

    def objective(z):
        return (z - x) ** 2 / 2 + beta * weight * z.abs()

    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left = objective(a) < objective(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    assert (found == 0).any() and (found != 0).any()
    assert (found - (low + high) / 2).abs().max() < 1e-7


def test_the_block_soft_threshold_is_a_numerical_argmin():
    """Zooming grids on ½‖z − x‖² + β w ‖z‖ in two dimensions."""
    constraint, beta = tb.Group(1.1, dim=0), 0.9
    zeros = 0
    for x in 2 * torch.randn(20, 2):
        found = constraint.apply(x, beta)
        zeros += bool((found == 0).all())
        best, width = torch.zeros(2), float(x.norm())
        while width > 1e-9:
            line = torch.linspace(-width, width, 31)
            z = best + torch.cartesian_prod(line, line)
            value = ((z - x) ** 2).sum(1) / 2 + beta * 1.1 * z.norm(dim=1)
            best, width = z[value.argmin()], width / 4
        assert (found - best).norm() < 1e-7
    assert 0 < zeros < 20


def test_a_weight_of_zero_changes_no_number():
    x = torch.randn(5, 4)
    assert torch.equal(tb.L1(0.0).apply(x, 0.3), x)
    assert torch.equal(tb.Group(0.0, dim=1).apply(x, 0.3), x)
    zero = torch.zeros(2, 2)
    assert torch.equal(tb.Group(0.0, dim=1).apply(zero, 0.3), zero)  # 0/0 inside


# --- closed forms -----------------------------------------------------------------------


class Separable(Problem):
    """g = ½ Σ a_i (y_i − c_i x_i)²,  f = ½ Σ (y_i − t_i)²,  so  Φ = ½ Σ (c_i x_i − t_i)².

    y* = c x; ∇Φ = c (c x − t). With h = w‖x‖₁ every coordinate has its own problem, and the
    derivative c²x − c t + w sign x vanishes at x* = sign(c t) max(|c t| − w, 0)/c². From exact
    hypergradients the iterates are x ← S(x − β c (c x − t), β w), S the soft threshold.
    """

    def __init__(self, n=8):
        self.y, self.x = leaves((n,), (n,))
        self.y, self.x = [self.y], [self.x]
        signs = torch.tensor([1.0, -1.0]).repeat(n // 2)
        self.a, self.c = torch.linspace(1, 2, n), torch.linspace(1.0, 1.6, n) * signs
        self.t = torch.linspace(2.0, -1.0, n)

    def train_loss(self):
        return (self.a * (self.y[0] - self.c * self.x[0]) ** 2).sum() / 2

    def valid_loss(self):
        return ((self.y[0] - self.t) ** 2).sum() / 2

    def solution(self):
        return self.c * self.x[0].detach()

    def exact(self):
        return self.c * (self.solution() - self.t)

    def lasso(self, weight):
        ct = self.c * self.t
        return ct.sign() * (ct.abs() - weight).clamp(min=0) / self.c**2


def soft(x, threshold):
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def build(make, problem, outer=None, **options):
    optimizer = make(
        SGD(problem.y, lr=options.pop("inner_lr", 0.3)),
        outer or SGD(problem.x, lr=0.3),
        **options,
    )
    problem.train = optimizer.inner_loss(problem.train_loss)
    problem.valid = optimizer.outer_loss(problem.valid_loss)
    return optimizer


@pytest.mark.parametrize("weight", [0.05, 0.5, 5.0])
def test_iterates_converge_to_the_soft_threshold_solution(weight):
    problem = Separable()
    optimizer = build(
        tb.ProxBiO,
        problem,
        constraints=tb.L1(weight),
        estimator="nesterov(max_steps=10, rtol=0)",
        inner_lr=0.6,
        inner_steps=5,
    )
    problem.steps(optimizer, 450)
    expected = problem.lasso(weight)
    assert optimizer.outer_steps == 90
    assert (problem.x[0] - expected).abs().max() < 1e-10
    assert torch.equal(problem.x[0] == 0, expected == 0)  # zeros are exact
    # the reported loss is f, not f + h
    f = ((problem.c * expected - problem.t) ** 2).sum() / 2
    torch.testing.assert_close(optimizer.last_report.loss, f)


def test_every_iterate_is_that_of_proximal_gradient_descent():
    problem, beta, weight = Separable(), 0.3, 0.8
    optimizer = build(
        tb.BilevelOptimizer,
        problem,
        constraints="l1(weight=0.8)",
        estimator="cg(max_steps=30, rtol=1e-14)",
    )
    x, worst = problem.x[0].detach().clone(), 0.0
    for _ in range(25):
        problem.solve()
        problem.steps(optimizer)  # leaves y at y*
        optimizer.outer_step()
        x = soft(x - beta * problem.c * (problem.c * x - problem.t), beta * weight)
        worst = max(worst, float((problem.x[0].detach() - x).abs().max()))
    assert worst < 1e-12 and (x == 0).any()


@pytest.mark.parametrize(
    "constraints", [None, "l1(weight=0)", "group(weight=0, dim=0)"]
)
def test_without_a_penalty_it_is_aid_with_the_same_solver(constraints):
    def run(make, **options):
        torch.manual_seed(4)
        problem = Quadratic()
        optimizer = build(make, problem, SGD(problem.x, lr=0.02), **options)
        problem.steps(optimizer, 100)
        return flat(problem.x).detach(), optimizer

    if constraints and "group" in constraints:
        constraints = [constraints, "group(weight=0, dim=1)"]
    x, optimizer = run(tb.ProxBiO, constraints=constraints)
    expected, _ = run(tb.AIDBiO, estimator="nesterov(max_steps=10)")
    assert torch.equal(x, expected) and optimizer.outer_steps == 10
    assert "chen2023" in tb.citation(optimizer)


def lipschitz(problem):
    """The largest eigenvalue of the Hessian of Φ, which is quadratic."""
    x = [t.detach().clone() for t in problem.x]
    columns = []
    with torch.no_grad():
        for one in torch.eye(flat(x).numel()):
            values = []
            for sign in (1, -1):
                parts = (sign * one).split([t.numel() for t in x])
                for t, part in zip(problem.x, parts, strict=True):
                    t.copy_(part.view(t.shape))
                values.append(problem.exact())
            columns.append((values[0] - values[1]) / 2)
        for t, value in zip(problem.x, x, strict=True):
            t.copy_(value)
    return float(torch.linalg.eigvalsh(torch.stack(columns)).abs().max())


@pytest.mark.parametrize(
    "constraints",
    [
        ["l1(weight=0.5)", "group(weight=2.0, dim=1)"],
        ["simplex", "ball(radius=0.7)"],
        ["box(lower=-0.1, upper=0.2)", "non_negative"],
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_the_potential_falls_with_the_step_size_of_the_theory(constraints, exact):
    """β = 1/L:  Φ(x⁺) + h(x⁺) ≤ Φ(x) + h(x) − ‖x⁺ − x‖²/(2β)  for exact hypergradients.

    The decrease is exactly that much at least, so the test would notice a wrong step size in the
    proximal map. With 20 steps of Nesterov's method y and v are inexact, and it still falls.
    """
    problem = Quadratic()
    problem.H += 40 * torch.eye(len(problem.H))  # Φ convex
    beta = 1 / lipschitz(problem)
    maps = [parse(text) for text in constraints]
    with torch.no_grad():  # begin in the sets
        for t, one in zip(problem.x, maps, strict=True):
            t.copy_(one.apply(t, beta))
    optimizer = build(
        tb.ProxBiO,
        problem,
        SGD(problem.x, lr=beta),
        constraints=constraints,
        estimator="cg(max_steps=60, rtol=1e-13)" if exact else "nesterov(rtol=0)",
        inner_steps=None,
        inner_lr=0.25,
    )

    def potential():
        y = [t.detach().clone() for t in problem.y]
        with torch.no_grad():
            problem.solve()
            value = problem.valid_loss()
            for t, before in zip(problem.y, y, strict=True):
                t.copy_(before)
            for one, t in zip(maps, problem.x, strict=True):
                value = value + (penalty(one, t) if one.proximal else 0)
        return float(value)

    value, x, moves = potential(), flat(problem.x).detach(), []
    for _ in range(20):
        if exact:
            problem.solve()
        problem.steps(optimizer, 1 if exact else 20)
        optimizer.outer_step()
        next_value, next_x = potential(), flat(problem.x).detach()
        move = float(((next_x - x) ** 2).sum())
        needed = move / (2 * beta) if exact else 0.0
        assert next_value <= value - needed + 1e-12 * (1 + abs(value))
        value, x = next_value, next_x
        moves.append(move)
    assert moves[0] > 1e-4 and moves[-1] < 1e-3 * moves[0]


def test_a_box_by_its_closed_form():
    """The separable problem in a box: x* = clip(t/c), reached by plain SGD."""
    problem = Separable()
    optimizer = build(
        tb.BilevelOptimizer,
        problem,
        constraints="box(lower=-0.5, upper=0.5)",
        estimator="cg(max_steps=10, rtol=1e-13)",
        inner_lr=0.6,
        inner_steps=5,
    )
    problem.steps(optimizer, 450)
    expected = (problem.t / problem.c).clamp(-0.5, 0.5)
    assert (problem.x[0] - expected).abs().max() < 1e-10


# --- when it is applied -----------------------------------------------------------------

OUTERS = {
    "sgd": lambda p: SGD(p, lr=0.5),
    "momentum": lambda p: SGD(p, lr=0.2, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: ADAM(p, lr=0.5),
}
WAYS = ["automatic", "outer_step", "backward and step", "hypergradient and step"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outer", OUTERS)
def test_every_outer_step_is_followed_by_the_constraint(way, outer):
    """The same as an unconstrained run whose loop projects by hand."""

    def run(constraints, by_hand):
        torch.manual_seed(2)
        problem = Quadratic(shapes_x=((3,), (2, 2)))
        optimizer = build(
            tb.BilevelOptimizer,
            problem,
            OUTERS[outer](problem.x),
            constraints=constraints,
            inner_steps=3 if way == "automatic" else None,
            inner_lr=0.05,
        )
        visited = []
        for _ in range(5):
            problem.steps(optimizer, 3)
            if way == "outer_step":
                optimizer.outer_step()
            elif way == "backward and step":
                optimizer.outer.zero_grad()
                problem.valid().backward()
                optimizer.outer.step()
            elif way == "hypergradient and step":
                optimizer.hypergradient()
                optimizer.outer.step()
            if by_hand:
                with torch.no_grad():
                    problem.x[0].copy_(tb.Simplex().apply(problem.x[0], 0.0))
                    problem.x[1].copy_(tb.Ball(0.4).apply(problem.x[1], 0.0))
            visited.append(flat(problem.x).detach().clone())
        assert optimizer.outer_steps == 5
        return torch.stack(visited)

    found = run(["simplex", tb.Ball(0.4)], by_hand=False)
    assert torch.equal(found, run(None, by_hand=True))
    assert (found[:, :3].sum(1) - 1).abs().max() < 1e-14 and (found[:, :3] >= 0).all()
    assert found[:, 3:].norm(dim=1).max() <= 0.4 * (1 + 1e-14)
    assert not torch.equal(found, run(None, by_hand=False))


def test_hooks_and_reports_see_the_constrained_values():
    problem = Quadratic()
    optimizer = problem.optimizer(constraints="non_negative")
    seen = []
    optimizer.register_outer_step_post_hook(
        lambda o, report: seen.append((flat(problem.x).detach().min(), report))
    )
    problem.steps(optimizer)
    before = problem.valid_loss().detach()
    report = optimizer.outer_step()
    assert seen[0][0] == 0 and seen[0][1] is report
    torch.testing.assert_close(report.loss, before)


def test_one_for_all_and_one_for_each():
    problem = Quadratic()
    optimizer = problem.optimizer(constraints=tb.NonNegative())
    problem.steps(optimizer)
    optimizer.outer_step()
    assert all((t >= 0).all() for t in problem.x)
    assert "constraints: non_negative on every outer tensor" in optimizer.explain()

    problem = Quadratic()
    with torch.no_grad():
        problem.x[0].fill_(-5.0)
    optimizer = problem.optimizer(constraints=(None, "ball(radius=0.1)"))
    problem.steps(optimizer)
    optimizer.outer_step()
    assert (problem.x[0] < 0).any() and problem.x[1].norm() < 0.1 + 1e-15
    assert "constraints: outer[1]: ball(radius=0.1)" in optimizer.explain()
    assert "constraints: none" in Quadratic().optimizer().explain()


def test_names_of_modules_are_used():
    net = torch.nn.Linear(2, 1)
    y = torch.zeros(1, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1),
        SGD(net.parameters(), lr=0.1),
        modules=net,
        constraints=["group(weight=0.1, dim=0)", None],
    )
    assert "constraints: weight: group(weight=0.1, dim=0)\n" in optimizer.explain()


@pytest.mark.parametrize("tensors", [False, True])
def test_every_group_has_its_own_step_size(tensors):
    """Soft thresholds β_1 w and β_2 w of one problem, also after a scheduler."""
    problem = Quadratic()
    rates = [0.02, 0.3]
    written = [torch.tensor(r) if tensors else r for r in rates]
    groups = [{"params": [t], "lr": r} for t, r in zip(problem.x, written, strict=True)]
    optimizer = problem.optimizer(outer=SGD(groups), constraints="l1(weight=0.5)")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.outer, 0.5)
    for k in range(3):
        problem.steps(optimizer)
        before = [t.detach().clone() for t in problem.x]
        optimizer.outer_step()
        for t, x, rate in zip(problem.x, before, rates, strict=True):
            beta = rate * 0.5**k
            expected = soft(x - beta * t.grad, beta * 0.5)
            torch.testing.assert_close(t.detach(), expected, rtol=0, atol=1e-14)
        schedule.step()


def test_over_tasks():
    torch.manual_seed(1)
    w, penalties = leaves((3,), (3,))
    optimizer = tb.BilevelOptimizer(
        SGD([w], lr=0.1),
        SGD([w, penalties], lr=1.0),
        estimator="unrolled",
        constraints=["box(lower=-0.2, upper=0.2)", "non_negative"],
    )
    support = optimizer.inner_loss(
        lambda target: ((w - target) ** 2 * (1 + penalties**2)).sum()
    )
    query = optimizer.outer_loss(lambda target: ((w - target) ** 2).sum())
    start = w.detach().clone()
    for target in (2.0, 3.0):
        with optimizer.task():
            support(target).backward()
            optimizer.step()
            query(target).backward()
        assert torch.equal(w, start)
    optimizer.outer_step()
    assert torch.equal(w.detach(), torch.full((3,), 0.2)) and (penalties >= 0).all()


@pytest.mark.parametrize("estimator", ["unrolled", "forward", "soba", "mrbo", "pzobo"])
def test_with_other_estimators(estimator):
    problem = Quadratic(shapes_x=((4,),))
    optimizer = problem.optimizer(
        estimator=estimator, constraints="simplex", inner_steps=2
    )
    for _ in range(6):
        problem.steps(optimizer, 2)
        x = problem.x[0].detach()
        assert (x >= 0).all() and abs(float(x.sum()) - 1) < 1e-14
    assert optimizer.outer_steps == 6


def test_meta_sgd_constrains_the_rates_it_adds():
    w = torch.tensor([4.0, -4.0], requires_grad=True)
    optimizer = tb.MetaSGD(
        SGD([w], lr=0.25), SGD([w], lr=0.05), constraints="box(upper=1.01)"
    )
    support = optimizer.inner_loss(lambda: (w**2).sum())
    query = optimizer.outer_loss(lambda: (w**2).sum())
    with optimizer.task():
        support().backward()
        optimizer.step()
        query().backward()
    optimizer.outer_step()
    assert w.detach().max() == 1.01 and optimizer.rates[0].detach().max() == 1.01


def test_tensors_added_later():
    problem, extra = Quadratic(), torch.full((2,), -1.0, requires_grad=True)
    each = problem.optimizer(constraints=["non_negative", "non_negative"])
    each.outer.add_param_group({"params": [extra]})
    each.outer.step()
    assert (extra == -1).all()

    problem, extra = Quadratic(), torch.full((2,), -1.0, requires_grad=True)
    every = problem.optimizer(constraints="non_negative")
    every.outer.add_param_group({"params": [extra]})
    every.outer.step()
    assert (extra == 0).all()


def test_a_proximal_map_passes_over_a_tensor_without_a_gradient():
    problem = Quadratic()
    optimizer = problem.optimizer(constraints="l1(weight=0.5)")
    before = [t.detach().clone() for t in problem.x]
    problem.x[0].grad = torch.zeros_like(problem.x[0])
    optimizer.outer.step()
    assert torch.equal(problem.x[0], soft(before[0], 0.05))
    assert torch.equal(problem.x[1], before[1])


def test_a_step_that_a_scaler_skips_is_no_step():
    """As `GradScaler.step` calls a fused optimizer."""
    problem = Quadratic()
    outer = SGD(problem.x, lr=0.1, fused=True)
    optimizer = problem.optimizer(outer=outer, constraints="l1(weight=0.5)")
    before = flat(problem.x).detach().clone()
    for t in problem.x:
        t.grad = torch.ones_like(t)
    outer.grad_scale, outer.found_inf = torch.ones(()).float(), torch.ones(()).float()
    optimizer.outer.step()
    assert torch.equal(flat(problem.x), before)
    del outer.grad_scale, outer.found_inf
    optimizer.outer.step()
    assert torch.equal(flat(problem.x), soft(before - 0.1, 0.05))


def test_remove_takes_constraints_off():
    problem = Quadratic()
    optimizer = problem.optimizer(constraints="non_negative")
    optimizer.remove()
    for t in problem.x:
        t.grad = torch.ones_like(t)
    optimizer.outer.step()
    assert (flat(problem.x) < 0).any()


@dataclass(frozen=True)
class HardThreshold(tb.Constraint):
    """h(x) = weight · number of non-zeros, as in the docstring."""

    weight: float
    name = "l0"
    proximal = True

    def apply(self, tensor, step_size):
        return torch.where(tensor**2 > 2 * step_size * self.weight, tensor, 0.0)


def test_a_constraint_of_ones_own():
    """Every coordinate of the separable problem: x* = t/c or 0, whichever is cheaper locally."""
    problem = Separable()
    optimizer = build(
        tb.ProxBiO,
        problem,
        constraints=HardThreshold(0.4),
        estimator="nesterov(max_steps=10, rtol=0)",
        inner_lr=0.6,
        inner_steps=5,
    )
    problem.steps(optimizer, 450)
    x = problem.x[0].detach()
    kept = x != 0
    assert 0 < int(kept.sum()) < len(x)
    assert (x - problem.t / problem.c)[kept].abs().max() < 1e-10
    # fixed points: |x*|² ≥ 2βw where kept, |β c t|² ≤ 2βw where not
    assert (x[kept] ** 2 >= 0.24).all()
    assert ((0.3 * problem.c * problem.t)[~kept] ** 2 <= 0.24 + 1e-12).all()
    assert "constraints: l0(weight=0.4)" in optimizer.explain()


@pytest.mark.parametrize("constraints", ["l1(weight=0.3)", ["simplex", None]])
@pytest.mark.parametrize("stop", [6, 7])
def test_resume_is_bit_exact(constraints, stop):
    def start():
        torch.manual_seed(6)
        problem = Quadratic()
        options = {"constraints": constraints, "inner_steps": 3}
        optimizer = build(
            tb.BilevelOptimizer, problem, SGD(problem.x, lr=0.02), **options
        )
        return problem, optimizer

    problem, optimizer = start()
    problem.steps(optimizer, 15)
    expected = flat(problem.x + problem.y).detach()

    first, optimizer = start()
    first.steps(optimizer, stop)
    saved = optimizer.state_dict()
    second, optimizer = start()
    with torch.no_grad():
        for mine, theirs in zip(second.y, first.y, strict=True):
            mine.copy_(theirs)
    optimizer.load_state_dict(saved)
    assert torch.equal(flat(second.x), flat(first.x))  # loading constrains nothing
    second.steps(optimizer, 15 - stop)
    assert torch.equal(flat(second.x + second.y).detach(), expected)


# --- errors -----------------------------------------------------------------------------


def plain(constraints, outer=None, make=tb.BilevelOptimizer, **options):
    x = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    outer = SGD(x, lr=0.1) if outer is None else outer(x)
    y = torch.zeros(1, requires_grad=True)
    return make(SGD([y], lr=0.1), outer, constraints=constraints, **options)


@pytest.mark.parametrize(
    "constraints, error, message",
    [
        ("simplx", tb.UnknownName, "Did you mean 'simplex'"),
        ("box(low=1)", tb.UnknownName, "no option 'low'. Did you mean 'lower'"),
        ("box(0, 1)", tb.UnknownName, r"such as 'box\(lower=0, upper=1\)'"),
        ("l1", tb.UnknownName, r"needs the option 'weight': write 'l1\(weight=...\)'"),
        ("group(weight=1.0)", tb.UnknownName, "needs the option 'dim'"),
        (3, tb.UnknownName, r"contains 3, no constraint. Write a name such as"),
        (tb.Simplex, tb.UnknownName, r"an object such as tb.Simplex\(\)"),
        ([torch.relu, None], tb.UnknownName, "no constraint"),
        ({"x": "simplex"}, tb.UnknownName, "a list with one of these, or None"),
        (["simplex"], tb.BilevelError, r"has 1 entries.*2 tensors \(outer\[0\], out"),
        ([None] * 3, tb.BilevelError, "has 3 entries.*Write one entry for each"),
        ("box", ValueError, "write one bound or two"),
        ("box(lower=1, upper=0)", ValueError, "lower ≤ upper"),
        ("box(lower='a')", ValueError, "finite numbers"),
        ("simplex(total=0)", ValueError, "total must be a number > 0"),
        ("ball(radius=-1)", ValueError, "radius must be a number > 0"),
        ("ball(radius=1.0, p=3)", ValueError, r"Box\(lower=-1.0, upper=1.0\)"),
        ("l1(weight=-1)", ValueError, "weight must be a number ≥ 0"),
        ("group(weight=1, dim='rows')", ValueError, "dim must be a whole number"),
        ("group(weight=1, dim=())", ValueError, "dim must be a whole number"),
        ("group(weight=1, dim=1)", ValueError, r"shape \(3,\) has no such dimension"),
        ([None, tb.Group(1, (0, 0))], ValueError, r"\(2, 2\) has no such dimension"),
    ],
)
def test_what_is_no_constraint_is_refused(constraints, error, message):
    with pytest.raises(error, match=message):
        plain(constraints)


@pytest.mark.parametrize(
    "outer, seen",
    [
        (lambda p: SGD(p, lr=0.1, momentum=0.9), "SGD, momentum=0.9"),
        (lambda p: SGD(p, lr=0.1, weight_decay=0.1), "weight_decay=0.1"),
        (lambda p: SGD(p, lr=0.1, maximize=True), "maximize=True"),
        (lambda p: ADAM(p, lr=0.1), "the outer optimizer is Adam"),
    ],
)
def test_proximal_maps_need_plain_sgd(outer, seen):
    for constraints in ("l1(weight=0.1)", [None, "group(weight=0.1, dim=0)"]):
        with pytest.raises(tb.BilevelError, match=seen) as caught:
            plain(constraints, outer)
        assert "outer=torch.optim.SGD(" in str(caught.value)
    plain("simplex", outer)  # a projection works with any
    with pytest.raises(tb.BilevelError, match=seen):
        plain(None, outer, make=tb.ProxBiO)


def test_what_the_estimator_moves_on_cannot_be_constrained():
    with pytest.raises(tb.BilevelError, match="extrapolated point.*use 'cg'"):
        plain("simplex", estimator="accelerated(base='cg')")
    problem = Quadratic()
    optimizer = problem.optimizer(constraints="non_negative")
    problem.steps(optimizer)
    optimizer.estimator = "accelerated(base='cg')"
    before = flat(problem.x).detach().clone()
    with pytest.raises(tb.BilevelError, match="Leave constraints= out"):
        optimizer.outer_step()
    assert torch.equal(flat(problem.x), before)


def test_momentum_that_comes_later_is_refused_before_the_step():
    """A cyclic schedule of the momentum, say."""
    problem = Quadratic()
    optimizer = problem.optimizer(constraints="l1(weight=0.1)")
    problem.steps(optimizer)
    optimizer.outer.param_groups[0]["momentum"] = 0.9
    before = flat(problem.x).detach().clone()
    with pytest.raises(tb.BilevelError, match="momentum=0.9"):
        optimizer.outer_step()
    with pytest.raises(tb.BilevelError, match="momentum=0.9"):
        optimizer.outer.step()
    assert torch.equal(flat(problem.x), before) and not optimizer.outer.state


def test_a_refused_constraint_leaves_nothing_behind():
    y, x = leaves((2,), (2,))
    inner, outer = SGD([y], lr=0.1), ADAM([x], lr=0.1)
    with pytest.raises(tb.BilevelError):
        tb.BilevelOptimizer(inner, outer, constraints="l1(weight=0.1)")
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks
    assert not outer._optimizer_step_pre_hooks and not outer._optimizer_step_post_hooks
