"""Stochastic solvers, samples and estimators: means, variances, rates and hand-written loops."""

import pytest
import torch
from problems import FiniteSum, Quadratic, flat, spd

import torch_bilevel as tb
from torch_bilevel.solvers import Memory, Operator


def system(n=6, noise=0.0, seed=0):
    """A, b, and an operator whose samples are A times a random factor and a random rotation."""
    g = torch.Generator().manual_seed(seed)
    A, b = spd(n, 0.5, 2.0, generator=g), torch.randn(n, generator=g)

    def sample(number):
        part = torch.randn(n, n, generator=g)
        S = noise * (part + part.mT) / 2
        return Operator((A + S).mv, n)

    return A, b, Operator(A.mv, n, sample=sample if noise else None)


def series(A, b, eta, K):
    """A⁻¹(I − (I − ηA)^K) b."""
    M = torch.linalg.matrix_power(torch.eye(len(b)) - eta * A, K)
    return torch.linalg.solve(A, b - M @ b)


# --- solvers ------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 4, 9])
def test_stocbios_sum_is_the_papers(K):
    A, b, operator = system()
    found = tb.StochasticNeumann(K, step_size=0.4).solve(operator, b)
    torch.testing.assert_close(found.value, series(A, b, 0.4, K))
    # The authors' code multiplies one term by η and leaves out the first (ALGORITHMS finding 2)
    M = torch.eye(6) - 0.4 * A
    powers = [torch.linalg.matrix_power(M, q) @ b for q in range(K)]
    theirs = 0.4 * powers[-1] + sum(powers[1:])
    assert K == 1 or (found.value - theirs).norm() > 0.1 * found.value.norm()


def test_random_truncation_has_exactly_the_mean_of_the_sum():
    K, eta = 7, 0.4
    A, b, _ = system()
    values = [
        tb.RandomTruncatedNeumann(K, step_size=eta)
        .solve(Operator(A.mv, 6, integer=lambda below, q=q: q), b)
        .value
        for q in range(K)
    ]
    torch.testing.assert_close(torch.stack(values).mean(0), series(A, b, eta, K))


def test_random_truncation_pays_with_variance():
    """Second moment against the sum's: grows with K (the docs say so)."""
    A, b, _ = system()
    ratios = []
    for K in (4, 16, 64):
        values = [
            tb.RandomTruncatedNeumann(K, step_size=0.4)
            .solve(Operator(A.mv, 6, integer=lambda below, q=q: q), b)
            .value
            for q in range(K)
        ]
        second = torch.stack(values).square().sum(1).mean()
        ratios.append(float(second / series(A, b, 0.4, K).square().sum()))
    assert ratios[0] < ratios[1] < ratios[2] and ratios[2] > 4, ratios


def mse(solver, noise, b_seed=0, runs=60):
    A, b, operator = system(noise=noise, seed=b_seed)
    x = torch.linalg.solve(A, b)
    errors = [
        (solver.solve(operator, b, None, Memory()).value - x).square().sum()
        for _ in range(runs)
    ]
    return float(torch.stack(errors).mean())


def test_decreasing_steps_give_one_over_k_and_constant_ones_a_plateau():
    counts = [50, 100, 200, 400]
    falling = [
        mse(tb.StochasticRichardson(K, step_size=0.5, decay=8.0), 0.3) for K in counts
    ]
    slope = torch.tensor(falling).log().diff() / torch.tensor(counts).log().diff()
    assert -1.25 < slope[1:].mean() < -0.75, (falling, slope)
    level = [mse(tb.StochasticRichardson(K, step_size=0.5), 0.3) for K in counts]
    assert level[-1] > 0.5 * level[-3] and level[-1] > 10 * falling[-1], level
    # without noise the constant step is linear
    assert mse(tb.StochasticRichardson(200, step_size=0.5), 0.0, runs=1) < 1e-20


def test_the_stationary_covariance_of_a_constant_step_is_that_of_theory():
    """Additive noise S: E e eᵀ = M E M + η² Σ, one Kronecker system (ALGORITHMS 4.8)."""
    n, eta, sigma = 3, 0.4, 0.2
    g = torch.Generator().manual_seed(1)
    A, b = spd(n, 0.5, 2.0, generator=g), torch.randn(n, generator=g)
    x = torch.linalg.solve(A, b)

    def sample(number):
        z = sigma * torch.randn(n, generator=g)
        return Operator(lambda v: A @ v + z, n)

    M = torch.eye(n) - eta * A
    covariance = torch.linalg.solve(
        torch.eye(n * n) - torch.kron(M, M), (eta * sigma) ** 2 * torch.eye(n).flatten()
    ).view(n, n)
    solver = tb.StochasticRichardson(80, step_size=eta)
    operator = Operator(A.mv, n, sample=sample)
    errors = torch.stack([solver.solve(operator, b).value - x for _ in range(1500)])
    measured = errors.T @ errors / len(errors)
    assert (measured - covariance).norm() < 0.1 * covariance.norm()


@pytest.mark.parametrize("optimizer, lr", [("SGD", 0.5), ("Adam", 0.05)])
def test_any_torch_optimizer_solves_the_quadratic(optimizer, lr):
    A, b, operator = system()
    found = tb.SGDSolver(3000, lr=lr, optimizer=optimizer).solve(operator, b)
    assert (found.value - torch.linalg.solve(A, b)).norm() < 1e-6 * b.norm()
    again = tb.SGDSolver(1, lr=lr, optimizer=optimizer)
    warm = again.solve(operator, b, torch.linalg.solve(A, b))
    assert float(warm.residual) < 1e-12


def test_sgd_is_constant_step_richardson():
    A, b, operator = system()
    one = tb.SGDSolver(7, lr=0.3).solve(operator, b).value
    torch.testing.assert_close(
        one, tb.StochasticRichardson(7, 0.3).solve(operator, b).value
    )


@pytest.mark.parametrize(
    "make", [tb.StochasticNeumann, tb.RandomTruncatedNeumann, tb.StochasticRichardson]
)
def test_a_large_step_is_noticed_and_a_safe_one_named(make):
    A, b, operator = system()
    memory = Memory()
    found = make(5, step_size=0.9).solve(operator, b, None, memory)
    assert found.risky_step and operator.num_products <= 10 + 5
    assert abs(float(found.safe_step) - 0.5) < 0.05  # λ_max = 2
    again = make(5, step_size=0.9).solve(operator, b, None, memory)
    assert not again.risky_step  # looked at once
    assert not make(5, step_size=0.4).solve(operator, b, None, Memory()).risky_step


# --- samples ------------------------------------------------------------------------------


def test_batches_partition_the_data_and_are_reproducible():
    data = torch.arange(10), torch.arange(10) * 2
    batches = tb.Batches(data, 4, seed=3)
    assert len(batches) == 3 and [len(batches[k][0]) for k in range(3)] == [4, 3, 3]
    seen = torch.cat([x for x, _ in batches])
    assert sorted(seen.tolist()) == list(range(10))
    again = tb.Batches(data, 4, seed=3)
    assert torch.equal(seen, torch.cat([x for x, _ in again]))
    first = next(iter(batches))
    state = batches.state_dict()
    rest = [x for x, _ in batches] + [x for x, _ in batches.draw(5)]
    assert len(rest) == 3 + 5  # every loop is a whole epoch
    batches.load_state_dict(state)
    left = [x for x, _ in batches]
    assert len(left) == 2 and not torch.equal(left[0], first[0])
    batches.load_state_dict(state)
    torch.testing.assert_close(left, [x for x, _ in batches])
    x, y = batches[2]
    assert batches.number((y,)) == 2 and batches.number((first[0].clone(),)) is None


def test_batches_collate_a_map_style_data_set():
    items = [{"x": torch.tensor([float(i)]), "y": i} for i in range(5)]
    pairs = tb.Batches([(item["x"], item["y"]) for item in items], 2)
    x, y = pairs[0]
    assert x.shape == (2, 1) and torch.equal(x[:, 0].long(), y)
    assert pairs.number((x, y)) == 0


@pytest.mark.parametrize("data", [(), (torch.arange(3), torch.arange(4))])
def test_batches_of_nothing_or_of_unequal_tensors_are_refused(data):
    with pytest.raises((ValueError, IndexError)):
        tb.Batches(data, 2)


def test_drawing_leaves_the_users_generators_alone():
    problem, optimizer, batches = finite("stocbio(step_size=0.2)")
    (index,) = next(iter(batches))
    step(problem, optimizer, index)
    before = torch.get_rng_state()
    optimizer.hypergradient(torch.arange(8), write=False)
    assert torch.equal(before, torch.get_rng_state())


# --- estimators ---------------------------------------------------------------------------


def finite(estimator, lr=0.05, data=True, inner=torch.optim.SGD, **options):
    """A finite-sum problem with its optimizer; `data` registers the inner loss with batches."""
    torch.manual_seed(0)
    problem = FiniteSum(**options)
    batches = problem.data()
    optimizer = tb.BilevelOptimizer(
        inner(problem.y, lr=lr),
        torch.optim.SGD(problem.x, lr=0.02),
        estimator=estimator,
    )
    problem.train = optimizer.inner_loss(
        problem.train_loss, data=batches if data else None
    )
    problem.valid = optimizer.outer_loss(problem.valid_loss, data=problem.data(seed=1))
    return problem, optimizer, batches


def step(problem, optimizer, index):
    optimizer.zero_grad()
    problem.train(index).backward()
    optimizer.step()


ALL = torch.arange(8)


def test_stocbio_is_unbiased_for_the_truncated_series():
    problem, optimizer, batches = finite("stocbio(num_steps=4, step_size=0.2)")
    step(problem, optimizer, ALL)
    to_x, to_y = problem.partials(flat(problem.y).detach())
    expected = to_x - problem.C @ series(problem.A, to_y, 0.2, 4)
    found = torch.stack(
        [flat(optimizer.hypergradient(ALL, write=False)) for _ in range(600)]
    )
    error = (found.mean(0) - expected).norm()
    deviation = (found.var(0).sum() / len(found)).sqrt()
    assert error < 3 * deviation and deviation < 0.08 * expected.norm()


def test_cross_batches_divide_the_variance():
    """With exact v the mean squared error of ĝ is var/J (SID's third term)."""
    torch.manual_seed(0)
    errors = []
    counts = (1, 4, 16)
    for J in counts:
        problem, optimizer, _ = finite(
            f"stocbio(num_steps=1, step_size=0.5, cross_batches={J})"
        )
        problem.A = 2 * torch.eye(4)  # no noise in H, and one term is exact
        problem.As = problem.A.expand(8, -1, -1)
        step(problem, optimizer, ALL)
        to_x, to_y = problem.partials(flat(problem.y).detach())
        v = torch.linalg.solve(problem.A, to_y)
        exact = to_x - problem.C @ v
        found = [
            (flat(optimizer.hypergradient(ALL, write=False)) - exact).square().sum()
            for _ in range(300)
        ]
        variance = ((problem.Cs - problem.C) @ v).square().sum(1).mean()
        errors.append(float(torch.stack(found).mean() / variance))
    for J, ratio in zip(counts, errors, strict=True):
        assert abs(ratio * J - 1) < 0.25, errors


def test_sids_error_halves_when_k_and_j_double():
    """A simulation with the matrices gives slope −1, and the library the simulation's error."""
    K, runs = 120, 24
    problem, optimizer, _ = finite(
        f"sid(num_steps={K}, step_size=0.2, decay=10.0, cross_batches={K})", noise=0.2
    )
    problem.solve()
    step(problem, optimizer, ALL)  # at y*: the step does not move
    exact = problem.exact()
    to_x, to_y = problem.partials(flat(problem.y).detach())

    def simulated(K, runs=600):
        v = torch.zeros(runs, 4)
        for k in range(K):
            A = problem.As[torch.randint(8, (runs,))]
            v = v + 2 / (10 + k) * (to_y - torch.einsum("rij,rj->ri", A, v))
        C = problem.Cs[torch.randint(8, (runs, K))].mean(1)
        return (to_x - torch.einsum("rdp,rp->rd", C, v) - exact).square().sum(1)

    errors = torch.stack([simulated(n).mean() for n in (K, 2 * K, 4 * K)])
    slope = float(errors.log().diff().mean() / torch.tensor(2.0).log())
    assert -1.15 < slope < -0.85, (errors, slope)
    found = torch.stack(
        [
            (flat(optimizer.hypergradient(ALL, write=False)) - exact).square().sum()
            for _ in range(runs)
        ]
    )
    deviation = float(simulated(K).std()) / runs**0.5
    assert abs(float(found.mean() - errors[0])) < 3 * deviation, (found.mean(), errors)


def test_growing_batches_are_counted():
    """|B_q| = ⌈B·ratio^q⌉: the calls made are those of theory."""
    problem, optimizer, _ = finite(
        "stocbio(num_steps=4, step_size=0.2, hessian_batches=8, hessian_ratio=0.5, "
        "cross_batches=1)"
    )
    counted = []
    original = problem.train_loss
    problem.train_loss = None
    optimizer.inner_losses.clear()
    problem.train = optimizer.inner_loss(
        lambda index: counted.append(len(index)) or original(index), data=problem.data()
    )
    for _ in range(2):  # these verify their steps and look at the curvature
        step(problem, optimizer, ALL)
        optimizer.outer_step(ALL)
    step(problem, optimizer, ALL)
    counted.clear()
    optimizer.hypergradient(ALL, write=False)
    assert len(counted) == 8 + 4 + 2 + 1  # and J; no power iteration


def test_without_data_the_window_is_drawn_from_and_the_report_says_so():
    problem, optimizer, _ = finite("stocbio(num_steps=3, step_size=0.2)", data=False)
    for k in range(4):
        step(problem, optimizer, torch.tensor([k]))
    optimizer.hypergradient(ALL)
    assert "window" in str(optimizer.last_report)
    assert optimizer.last_report.steps == 4  # J: the whole window once
    problem, optimizer, _ = finite("stocbio(num_steps=3, step_size=0.2)")
    step(problem, optimizer, ALL)
    optimizer.hypergradient(ALL)
    assert "window" not in str(optimizer.last_report)


def test_weight_decay_and_damping_are_part_of_the_system():
    torch.manual_seed(0)
    problem = Quadratic()
    inner = torch.optim.SGD(problem.y, lr=0.05, weight_decay=0.3)
    optimizer = problem.optimizer(inner, estimator="stocbio(num_steps=3000)")
    problem.steps(optimizer, 1)
    found = problem.hypergradient(optimizer, write=False)
    implicit = problem.hypergradient(optimizer, write=False, estimator="direct")
    torch.testing.assert_close(found, implicit, rtol=1e-8, atol=1e-8)


# --- memories -----------------------------------------------------------------------------


def trajectory(
    estimator, steps=12, inner_steps=1, noise=0.0, outer_noise=0.0, **options
):
    problem, optimizer, batches = finite(
        estimator, noise=noise, outer_noise=outer_noise, **options
    )
    optimizer.inner_steps = inner_steps
    points = []
    for _ in range(steps):
        for (index,) in batches:
            step(problem, optimizer, index)
            points.append(
                torch.cat([flat(problem.x), flat(problem.y)]).detach().clone()
            )
    return torch.stack(points), problem, optimizer


NESTED = "stochastic_neumann(num_steps=5, step_size=0.2, memory={!r})"


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize(
    "memory", ["storm", "storm(weight=0.3, power=0.0)", "sarah(period=5)", "page"]
)
@pytest.mark.parametrize("form", [NESTED, "joint(memory={!r})"])
def test_without_noise_memories_do_not_matter(form, memory, inner_steps):
    """The zero-noise law; it fails if the two points of a difference see other samples."""
    found, *_ = trajectory(form.format(memory), 4, inner_steps)
    same, *_ = trajectory(form.format("storm(weight=1.0, power=0.0)"), 4, inner_steps)
    torch.testing.assert_close(found, same, rtol=1e-10, atol=1e-10)
    assert (found[-1] - found[0]).norm() > 0.1


def test_without_noise_saga_with_one_batch_is_plain():
    def run(memory):
        torch.manual_seed(0)
        problem = Quadratic()
        optimizer = problem.optimizer(
            estimator=f"joint(memory={memory!r})", inner_steps=1
        )
        problem.steps(optimizer, 25)
        return flat(problem.x), flat(problem.y)

    torch.testing.assert_close(run("saga"), run("plain"), rtol=1e-10, atol=1e-10)


def test_joint_without_memory_is_storm_of_weight_one_with_noise_too():
    found, *_ = trajectory("joint", noise=0.3)
    same, *_ = trajectory("joint(memory='storm(weight=1.0, power=0.0)')", noise=0.3)
    torch.testing.assert_close(found, same)


def test_soba_is_the_hand_written_loop():
    """Two steps tell Jacobi from Gauss–Seidel: all directions are of the old point."""
    found, problem, optimizer = trajectory("soba", steps=3, noise=0.3, outer_noise=0.3)
    torch.manual_seed(0)
    problem = FiniteSum(noise=0.3, outer_noise=0.3)
    batches, outer = problem.data(), tb.Batches((ALL,), 1, seed=1)
    x, y, v = flat(problem.x).detach(), flat(problem.y).detach(), torch.zeros(4)
    rho, gamma, points = 0.05, 0.02, []
    for _ in range(3):
        for (index,) in batches:
            i = int(index)
            (j,) = outer.draw(1)[0]
            j = int(j)
            A, C, a = problem.As[i], problem.Cs[i], problem.as_[i]
            to_y = problem.F @ y + problem.K.T @ x + problem.fs[j]
            to_x = problem.H @ x + problem.K @ y + problem.hs[j]
            D_y, D_v, D_x = A @ y + C.T @ x + a, A @ v - to_y, to_x - C @ v
            x, y, v = x - gamma * D_x, y - rho * D_y, v - rho * D_v
            points.append(torch.cat([x, y]))
    torch.testing.assert_close(found, torch.stack(points), rtol=1e-10, atol=1e-10)
    (memory,) = [m for names, m in optimizer._memories.items() if names]
    torch.testing.assert_close(memory.adjoint, v)


def test_the_moving_average_is_its_recursion():
    found, *_ = trajectory(
        "joint(outer_memory='moving_average(weight=0.3)')", 1, noise=0.3
    )
    torch.manual_seed(0)
    problem = FiniteSum(noise=0.3, outer_noise=0.0)
    x, y, v, h = (
        flat(problem.x).detach(),
        flat(problem.y).detach(),
        torch.zeros(4),
        None,
    )
    for (index,) in problem.data():
        i = int(index)
        A, C, a = problem.As[i], problem.Cs[i], problem.as_[i]
        to_y = problem.F @ y + problem.K.T @ x + problem.f1
        D_y, D_v = A @ y + C.T @ x + a, A @ v - to_y
        D_x = problem.H @ x + problem.K @ y + problem.h1 - C @ v
        h = D_x if h is None else 0.7 * h + 0.3 * D_x
        x, y, v = x - 0.02 * h, y - 0.05 * D_y, v - 0.05 * D_v
    torch.testing.assert_close(found[-1], torch.cat([x, y]), rtol=1e-10, atol=1e-10)


def test_mrbo_is_the_hand_written_loop():
    """STORM on y and x, both points of a difference on the same drawn batches."""
    torch.manual_seed(0)
    problem = FiniteSum(noise=0.3, outer_noise=0.3)
    drawn, generator = [], torch.Generator().manual_seed(5)

    def source():
        drawn.append(int(torch.randint(8, (), generator=generator)))
        return (torch.tensor([drawn[-1]]),)

    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(problem.y, lr=0.05),
        torch.optim.SGD(problem.x, lr=0.02),
        estimator="mrbo(num_steps=3, step_size=0.2, cross_batches=2)",
        inner_steps=1,
    )
    train = optimizer.inner_loss(problem.train_loss, data=source)
    outer = iter([(torch.tensor([k]),) for k in (3, 1, 7, 0, 2)])
    optimizer.outer_loss(problem.valid_loss, data=outer)
    x, y = flat(problem.x).detach(), flat(problem.y).detach()
    own = [4, 2, 6, 5, 1]  # batches of the loop
    for k in own:
        optimizer.zero_grad()
        train(torch.tensor([k])).backward()
        optimizer.step()
    assert len(drawn) == 5 * (2 + 2)  # H twice, J twice

    def inner(x, y, k):
        return problem.As[k] @ y + problem.Cs[k].T @ x + problem.as_[k]

    def outer_direction(x, y, k, ticket):
        to_y = problem.F @ y + problem.K.T @ x + problem.fs[k]
        to_x = problem.H @ x + problem.K @ y + problem.hs[k]
        q1, q2, j1, j2 = ticket
        w0 = to_y
        w1 = w0 - 0.2 * problem.As[q1] @ w0
        w2 = w1 - 0.2 * problem.As[q2] @ w1
        v = 0.2 * (w0 + w1 + w2)
        return to_x - (problem.Cs[j1] + problem.Cs[j2]) @ v / 2

    before = None
    for k, (i, j) in enumerate(zip(own, (3, 1, 7, 0, 2), strict=True)):
        ticket = drawn[4 * k : 4 * k + 4]
        a = 0.9 * (10 / (10 + k)) ** (2 / 3)
        u_new, w_new = inner(x, y, i), outer_direction(x, y, j, ticket)
        if before is None:
            u, w = u_new, w_new
        else:
            u = u_new + (1 - a) * (u - inner(*before, i))
            w = w_new + (1 - a) * (w - outer_direction(*before, j, ticket))
        before = x, y
        x, y = x - 0.02 * w, y - 0.05 * u
    torch.testing.assert_close(flat(problem.x).detach(), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flat(problem.y).detach(), y, rtol=1e-10, atol=1e-10)


def test_the_random_length_is_the_same_at_both_points():
    found, *_ = trajectory(
        "sustain(num_steps=6, step_size=0.2)", 4, noise=0.0, outer_noise=0.0
    )
    torch.manual_seed(0)
    problem = FiniteSum(noise=0.0, outer_noise=0.0)
    # the generator of lengths starts from the program's, as it is after construction
    torch.manual_seed(0)
    FiniteSum(noise=0.0)
    assert torch.isfinite(found).all()
    # on a fixed point the recursion telescopes: the direction is the mean-free plain one
    problem, optimizer, _ = finite("sustain(num_steps=6, step_size=0.2)", noise=0.0)
    for group in (*optimizer.param_groups, *optimizer.outer.param_groups):
        group["lr"] = 0.0
    to_x, to_y = problem.partials(flat(problem.y).detach())
    lengths, directions = [], []
    M = torch.eye(4) - 0.2 * problem.A
    possible = [
        to_x - problem.C @ (0.2 * 6 * torch.linalg.matrix_power(M, q) @ to_y)
        for q in range(6)
    ]
    for _ in range(6):
        step(problem, optimizer, ALL)
        optimizer.outer_step(ALL)
        directions.append(flat([x.grad for x in problem.x]).clone())
    # d_k = new + (1 − a)(d − old) with new = old: d_k = a d(ℓ_k) + (1 − a) d_{k−1} ... only if
    # lengths agree is new − (1 − a) old = a·new for every k
    d = directions[0]
    lengths.append(min(range(6), key=lambda q: float((possible[q] - d).norm())))
    assert float((possible[lengths[0]] - d).norm()) < 1e-10
    for k, new in enumerate(directions[1:], 1):
        a = 0.9 * (10 / (10 + k)) ** (2 / 3)
        options = [float((a * p + (1 - a) * d - new).norm()) for p in possible]
        assert min(options) < 1e-10
        d = new


def distance(estimator, steps, lr, outer_lr):
    """‖x − x*‖ along the run, once an epoch."""
    problem, optimizer, batches = finite(estimator, lr=lr, noise=0.3, coupling=0.2, n=4)
    optimizer.inner_steps = 1
    for group in optimizer.outer.param_groups:
        group["lr"] = outer_lr
    best, hessian = problem.minimiser()
    assert torch.linalg.eigvalsh(hessian)[0] > 0.3  # Φ is strongly convex
    errors = []
    for _ in range(steps):
        for (index,) in batches:
            step(problem, optimizer, index)
        errors.append(float((flat(problem.x).detach() - best).norm()))
    return errors


@pytest.mark.parametrize("name", ["saba", "srba"])
def test_saba_and_srba_are_linear_where_soba_stands_still(name):
    good = distance(name, 100, lr=0.15, outer_lr=0.1)
    plain = distance("soba", 60, lr=0.15, outer_lr=0.1)
    assert good[-1] < 1e-12, (name, good[::10])
    assert min(plain[-30:]) > 1e-3, plain[::10]
    # a straight line in the logarithm: the rate of the second half is that of the first
    slopes = torch.tensor(good[10:90:20]).log().diff()
    assert slopes.max() < 0.4 * slopes.min(), slopes


def test_storms_variance_falls_at_a_fixed_point():
    """At rest d_k is an average of what was seen: its error falls below the plain one's."""
    problem, optimizer, batches = finite(
        "mrbo(num_steps=3, step_size=0.2, memory='storm(weight=0.1, power=0.0)')"
    )
    for group in (*optimizer.param_groups, *optimizer.outer.param_groups):
        group["lr"] = 0.0
    directions = []
    for _ in range(30):
        for (index,) in batches:
            step(problem, optimizer, index)
            optimizer.outer_step()
            directions.append(flat([x.grad for x in problem.x]).clone())
    to_x, to_y = problem.partials(flat(problem.y).detach())
    exact = to_x - problem.C @ series(problem.A, to_y, 0.2, 3)
    error = [float((d - exact).square().sum()) for d in directions]
    assert sum(error[-100:]) / 100 < 0.25 * sum(error[:8]) / 8


def test_vrbo_with_a_full_pass_always_is_full_batch():
    found, problem, _ = trajectory(
        "vrbo(num_steps=3, step_size=0.2, memory='sarah(period=1)')",
        2,
        noise=0.3,
        outer_noise=0.3,
    )
    torch.manual_seed(0)
    problem = FiniteSum(noise=0.3, outer_noise=0.3)
    x, y = flat(problem.x).detach(), flat(problem.y).detach()
    for _ in range(16):
        to_x = problem.H @ x + problem.K @ y + problem.h1
        to_y = problem.F @ y + problem.K.T @ x + problem.f1
        w = to_x - problem.C @ series(problem.A, to_y, 0.2, 3)
        u = problem.A @ y + problem.C.T @ x + problem.a
        x, y = x - 0.02 * w, y - 0.05 * u
    torch.testing.assert_close(found[-1], torch.cat([x, y]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["stocbio", "mrbo", "vrbo", "soba", "saba", "sid", "sustain"]
)
def test_a_resumed_run_is_bit_exact(name):
    def run(stop=None, saved=None):
        problem, optimizer, batches = finite(name)
        optimizer.inner_steps = 2
        torch.manual_seed(1)
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
            with torch.no_grad():
                problem.y[0].copy_(saved["y"])
            batches.load_state_dict(saved["batches"])
        done = 0 if saved is None else 10
        while True:
            for (index,) in batches:
                step(problem, optimizer, index)
                done += 1
                if done == (stop or 24):
                    return problem, optimizer, batches

    problem, optimizer, batches = run(stop=10)
    saved = {
        "optimizer": optimizer.state_dict(),
        "y": problem.y[0].detach().clone(),
        "batches": batches.state_dict(),
    }
    resumed, *_ = run(saved=saved)
    whole, *_ = run()
    assert torch.equal(resumed.x[0], whole.x[0]) and torch.equal(
        resumed.y[0], whole.y[0]
    )


def test_everything_is_put_back():
    problem, optimizer, batches = finite("mrbo(step_size=0.2)")
    for (index,) in batches:
        step(problem, optimizer, index)
        x, y = flat(problem.x).clone(), flat(problem.y).clone()
        grad = problem.y[0].grad.clone()
        optimizer.hypergradient(ALL, write=False)
        assert torch.equal(x, flat(problem.x)) and torch.equal(y, flat(problem.y))
        assert torch.equal(grad, problem.y[0].grad) and problem.x[0].grad is None
        optimizer.outer_step(ALL)
        problem.x[0].grad = None


def test_an_exception_puts_everything_back():
    problem, optimizer, batches = finite("soba")
    step(problem, optimizer, ALL)
    y = flat(problem.y).clone()
    problem.H = None
    with pytest.raises(TypeError) as caught:
        optimizer.hypergradient(ALL, write=False)
    assert torch.equal(y, flat(problem.y)) and caught


@pytest.mark.parametrize(
    "estimator",
    [
        "stocbio(num_steps=90)",
        "sid(num_steps=90, decay=None)",
        "darts",
        "accelerated(base='cg(rtol=1e-12)')",
    ],
)
def test_check_hypergradient_runs_until_rest(estimator):
    torch.manual_seed(0)
    problem = Quadratic()
    optimizer = problem.optimizer(
        torch.optim.SGD(problem.y, lr=0.2), estimator=estimator
    )
    problem.solve()
    problem.steps(optimizer, 10)
    check = tb.check_hypergradient(optimizer)
    assert check.settled
    assert (check.relative_error < 1e-5) == (estimator != "darts"), check


# --- refusals -----------------------------------------------------------------------------


def test_a_solver_that_is_not_made_for_samples_is_refused():
    with pytest.raises(tb.UnknownName, match="Implicit"):
        tb.Stochastic(tb.CG())
    with pytest.raises(tb.UnknownName, match="memory"):
        tb.estimator("joint(memory='stom')")
    with pytest.raises(tb.UnknownName, match="Did you mean 'stocbio'"):
        tb.estimator("stocbo")


def test_saga_needs_numbered_batches_and_says_what_to_paste():
    problem, optimizer, _ = finite("saba", data=False)
    optimizer.zero_grad()
    problem.train(ALL).backward()
    with pytest.raises(tb.errors.BilevelError, match=r"tb\.Batches\(\(x, y\)"):
        optimizer.step()
    problem, optimizer, _ = finite("saba")
    optimizer.zero_grad()
    problem.train(torch.tensor([1])).backward()  # not from the Batches
    with pytest.raises(tb.errors.BilevelError, match="did not|not tensors"):
        optimizer.step()


def test_a_table_over_the_limit_is_refused_with_its_size():
    problem, optimizer, batches = finite("joint(memory='saga(max_bytes=100)')")
    optimizer.zero_grad()
    problem.train(*next(iter(batches))).backward()
    with pytest.raises(tb.errors.BilevelError, match="8 batches and 4 numbers"):
        optimizer.step()


def test_several_inner_optimizers_and_scalers_are_refused():
    y = [torch.ones(1, requires_grad=True) for _ in range(2)]
    x = torch.ones(1, requires_grad=True)
    inner = [torch.optim.SGD([one], lr=0.1) for one in y]
    with pytest.raises(tb.errors.BilevelError, match="2 inner optimizers"):
        tb.BilevelOptimizer(inner, torch.optim.SGD([x], lr=0.1), estimator="mrbo")


def test_the_warning_about_the_step_size_comes_once():
    problem, optimizer, _ = finite("stocbio(num_steps=3, step_size=0.3)")
    step(problem, optimizer, ALL)
    with pytest.warns(tb.errors.StepSizeWarning, match="would be safe"):
        optimizer.outer_step(ALL)
    step(problem, optimizer, ALL)
    optimizer.outer_step(ALL)


def three_numbers(estimator):
    """y and x, three ones each, and an optimizer of both."""
    y, x = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.1),
        torch.optim.SGD([x], lr=0.1),
        estimator=estimator,
    )
    return optimizer, y, x


@pytest.mark.parametrize("how", ["keyword", "position"])
@pytest.mark.parametrize(
    "estimator, tolerance",
    [
        ("direct", 1e-12),
        ("stochastic_neumann(num_steps=300, step_size=0.1)", 1e-9),
        ("stochastic_richardson(num_steps=300, step_size=0.1)", 1e-9),
        ("sgd(num_steps=300, lr=0.1)", 1e-9),
    ],
)
def test_samples_keep_the_other_arguments_of_a_call(estimator, tolerance, how):
    """g = ‖y − x‖²/2 + l2 ‖y‖²/2, called with l2 = 4 on data that knows nothing of it."""
    X, (optimizer, y, x) = torch.eye(3), three_numbers(estimator)

    @optimizer.inner_loss(data=[(X,)])
    def train(X, l2=0.0):
        return ((X @ (y - x)) ** 2).sum() / 2 + l2 * (y**2).sum() / 2

    optimizer.outer_loss(lambda: ((y - 3) ** 2).sum() / 2)
    (train(X, l2=4.0) if how == "keyword" else train(X, 4.0)).backward()
    optimizer.step()
    (found,) = optimizer.hypergradient()
    torch.testing.assert_close(
        found, (y.detach() - 3) / 5, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("memory", ["sarah(period=1)", "storm", "plain"])
def test_directions_keep_the_other_arguments_of_a_call(memory):
    optimizer, y, x = three_numbers(f"joint(memory={memory!r})")

    @optimizer.inner_loss(data=[(torch.eye(3),)])
    def train(X, l2=0.0):
        return ((X @ (y - x)) ** 2).sum() / 2 + l2 * (y**2).sum() / 2

    @optimizer.outer_loss(data=[(torch.ones(3),)])
    def valid(target, scale=1.0):
        return scale * ((y - target) ** 2).sum() / 2

    train(X=torch.eye(3), l2=4.0).backward()
    optimizer.step()
    torch.testing.assert_close(y.detach(), torch.full((3,), 0.6))
    optimizer.outer_step(target=torch.ones(3), scale=2.0)


def test_an_outer_variable_as_an_argument_beside_data():
    optimizer, y, x = three_numbers("stochastic_neumann(num_steps=300, step_size=0.1)")
    train = optimizer.inner_loss(
        lambda X, x: ((X @ (y - x)) ** 2).sum(), data=[(torch.eye(3),)]
    )
    optimizer.outer_loss(lambda: (y**2).sum())
    train(torch.eye(3), x).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.hypergradient()[0], 2 * y.detach())


def test_a_further_tensor_beside_data_is_refused():
    optimizer, y, x = three_numbers("stochastic_neumann(num_steps=3, step_size=0.1)")
    train = optimizer.inner_loss(
        lambda X, w: (w * (X @ (y - x)) ** 2).sum(), data=[(torch.eye(3),)]
    )
    optimizer.outer_loss(lambda: (y**2).sum())
    train(torch.eye(3), torch.rand(3)).backward()
    optimizer.step()
    with pytest.raises(
        tb.BilevelError, match=r"more than the 1 argument.*shape \(3,\)"
    ):
        optimizer.hypergradient()
