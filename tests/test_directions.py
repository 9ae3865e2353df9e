"""Directions that remember, where one may go wrong in silence: each with what it must equal."""

import io
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb

SGD = torch.optim.SGD


def regression(n=32, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, generator=g)


# --- batches ------------------------------------------------------------------------------


def test_loops_over_the_same_batches_do_not_disturb_each_other():
    batches = tb.Batches((torch.arange(10.0),), 2)
    outer = 0
    for _ in batches:
        outer += 1
        assert sum(1 for _ in batches) == 5
    assert outer == 5
    next(iter(batches))
    source = tb.problem.DataSource(batches, "all", "loss")
    assert len(source.draw(torch.device("cpu"))) == 5


def test_a_batch_on_another_device_is_known_by_its_number():
    batches = tb.Batches((torch.arange(10.0),), 2)
    source = tb.problem.DataSource(batches, 1, "loss")
    (moved,) = source.draw(torch.device("meta"))
    assert moved[0].is_meta and batches.number(moved) is not None
    there = tb.Batches((torch.arange(10.0),), 2, device="meta")
    assert there[3][0].is_meta and there.number(there[3]) == 3


def test_batches_are_nearly_equal():
    sizes = [len(x) for (x,) in tb.Batches((torch.arange(17.0),), 16)]
    assert sorted(sizes) == [8, 9]
    assert [len(x) for (x,) in tb.Batches((torch.arange(6.0),), 16)] == [6]


# --- full passes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batches", "loader"])
def test_a_full_pass_is_over_all_data(kind):
    A, t = regression()
    data = (
        tb.Batches((A, t), 8)
        if kind == "batches"
        else DataLoader(TensorDataset(A, t), 8, shuffle=True)
    )
    y, x = torch.zeros(5, requires_grad=True), torch.ones(5, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.0), SGD([x], lr=0.0), estimator="vrbo"
    )

    def loss(a, b):
        return ((a @ y - b) ** 2).mean() / 2 + ((y - x) ** 2).sum() / 2

    train = optimizer.inner_loss(loss, data=data)
    valid = optimizer.outer_loss(lambda a, b: ((a @ y - b) ** 2).mean(), data=data)
    assert valid is not None
    train(A[:8], t[:8]).backward()
    optimizer.step()
    torch.testing.assert_close(y.grad, A.T @ (A @ y - t).detach() / 32 + y - x.detach())
    found = optimizer.outer_step()
    assert found.norm > 0
    # f's part of the first direction is that of all data, whatever batch was drawn
    calls = optimizer._sampler.outer(
        [(optimizer.outer_losses["<lambda>"].record((A[:8], t[:8]), {}), 1.0)]
    )
    assert len(calls) == 4 and sum(weight for _, weight in calls) == 1.0


@pytest.mark.parametrize("data", [None, lambda: (torch.ones(2), torch.ones(2))])
def test_a_full_pass_over_what_cannot_be_passed_over_is_refused(data):
    y, x = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.VRBO(SGD([y], lr=0.1), SGD([x], lr=0.1))
    train = optimizer.inner_loss(lambda a, b: ((y - x) ** 2).sum(), data=data)
    optimizer.outer_loss(lambda: (y**2).sum())
    train(torch.ones(2), torch.ones(2)).backward()
    with pytest.raises(tb.BilevelError, match="tb.Batches"):
        optimizer.step()


def test_a_loss_without_arguments_is_its_own_full_pass():
    y, x = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.SRBA(SGD([y], lr=0.2), SGD([x], lr=0.05))
    train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum())
    optimizer.outer_loss(lambda: ((y - 3) ** 2).sum())
    for _ in range(800):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    torch.testing.assert_close(x.detach(), torch.full((2,), 3.0))


# --- transforms ---------------------------------------------------------------------------


def test_storm_with_a_clipped_gradient_is_the_loop_by_hand():
    """Both points of a difference go through the declared transform."""
    y, x = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1),
        SGD([x], lr=0.0),
        estimator="stochastic_neumann(memory='storm(weight=0.5, power=0.0)')",
    )
    train = optimizer.inner_loss(lambda: 10 * ((y - x) ** 2).sum())
    optimizer.outer_loss(lambda: ((y - 2) ** 2).sum())
    optimizer.gradient_transform(tb.clip_grad_norm(1.0))

    def clipped(point):
        g = 20 * (point - 1.0)
        return g / max(1.0, float(g.norm()) + 1e-6)

    hand, before, d = torch.zeros(3), None, None
    for _ in range(4):
        optimizer.zero_grad()
        train().backward()
        torch.nn.utils.clip_grad_norm_([y], 1.0)
        optimizer.step()
        new = clipped(hand)
        d = new if before is None else new + 0.5 * (d - clipped(before))
        before, hand = hand, hand - 0.1 * d
        torch.testing.assert_close(y.detach(), hand, rtol=1e-6, atol=1e-6)


# --- SAGA tables --------------------------------------------------------------------------


def saba(**options):
    A, t = regression()
    B, s = regression(seed=1)
    y, x = torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    optimizer = tb.SABA(SGD([y], lr=0.1), SGD([x], lr=0.1))
    inner, outer = tb.Batches((A, t), 4, seed=1), tb.Batches((B, s), 4, seed=2)
    train = optimizer.inner_loss(
        lambda a, b: ((a @ y - b) ** 2).mean() / 2 + ((y - x) ** 2).sum() / 2,
        data=inner,
    )

    def valid(a, b):
        return ((a @ y - b) ** 2).mean() / 2 + (x**2).sum() / 20

    optimizer.outer_loss(valid, data=outer, **options)

    def run(steps):
        while steps > 0:
            for batch in inner:
                optimizer.zero_grad()
                train(*batch).backward()
                optimizer.step()
                steps -= 1

    def error():
        H, F = A.T @ A / 32 + torch.eye(5), B.T @ B / 32
        at = torch.linalg.solve(H, A.T @ t / 32 + x.detach())
        return (torch.linalg.solve(H, F @ at - B.T @ s / 32) + 0.1 * x.detach()).norm()

    return optimizer, run, error


def test_saba_with_all_outer_batches_in_every_step_is_linear():
    _, run, error = saba(batches="all")
    run(900)
    assert error() < 1e-9


def test_saba_refuses_to_average_over_outer_batches():
    _, run, _ = saba(batches=2)
    with pytest.raises(tb.BilevelError, match="averages over 2"):
        run(1)


def test_a_table_is_as_it_was_when_an_outer_step_raises():
    y, x = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.01), estimator="saba"
    )
    train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum() / 2)
    factor = 1.0
    optimizer.outer_loss(
        lambda c: ((y - c) ** 2).sum() / 2 * factor,
        data=tb.Batches((torch.arange(3.0),), 1),
    )

    def step():
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
        return optimizer.outer_step()

    for _ in range(3):
        step()
    factor = float("inf")
    with pytest.raises(tb.BilevelError):
        step()
    factor = 1.0
    for _ in range(4):
        assert torch.isfinite(torch.as_tensor(step().norm))


def test_asking_twice_gives_the_same():
    optimizer, run, _ = saba()
    run(9)
    optimizer.inner_steps = None
    batch = optimizer.inner_losses["<lambda>"].data.source[2]
    optimizer.zero_grad()
    optimizer.inner_losses["<lambda>"](*batch).backward()
    optimizer.step()
    outer = optimizer.outer_losses["valid"].data.source[1]
    one, two = (optimizer.hypergradient(*outer, write=False)[0] for _ in range(2))
    assert torch.equal(one, two)


# --- samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["stocbio(num_steps=300)", "sid(num_steps=3000)"])
def test_losses_that_alternate_all_count(estimator):
    """g = ½ [(y − x)² + (y − 3)²] in the mean over steps: ∇Φ = ½ · 2 (2 − 5) = −3 at x = 1."""
    y, x = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.01), SGD([x], lr=0.0), estimator=estimator
    )
    losses = [
        optimizer.inner_loss(lambda: ((y - x) ** 2).sum()),
        optimizer.inner_loss(lambda: ((y - 3) ** 2).sum()),
    ]
    optimizer.outer_loss(lambda: ((y - 5) ** 2).sum())
    for k in range(1500):
        optimizer.zero_grad()
        losses[k % 2]().backward()
        optimizer.step()
    (found,) = optimizer.hypergradient()
    assert abs(float(found) + 3) < 0.1


def test_differences_use_the_same_samples_when_a_solver_starts_again():
    """The curvature grows fourfold, so the new point runs the solver twice."""
    y, x = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=1e-3),
        SGD([x], lr=0.0),
        estimator="stochastic_neumann(num_steps=4, memory='storm', cross_batches=3)",
    )
    batches, factor, asked = tb.Batches((torch.arange(12.0),), 1), 1.0, []

    def train_loss(i):
        asked.append(int(i))
        return factor * ((y - x) ** 2).sum()

    train = optimizer.inner_loss(train_loss, data=batches)
    optimizer.outer_loss(lambda: ((y - 2) ** 2).sum())
    for k in range(3):
        optimizer.zero_grad()
        train(*batches[k]).backward()
        optimizer.step()
        asked.clear()
        optimizer.outer_step()
        factor *= 4
    # the last three are those of J at the old point, which the new point had used for J before
    end = asked[-3:]
    assert any(asked[k : k + 3] == end for k in range(len(asked) - 5))


# --- single loops -------------------------------------------------------------------------


def test_an_outer_batch_without_gradient_is_no_divergence():
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.1), estimator="soba"
    )
    train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum() / 2)
    optimizer.outer_loss(lambda m: (m * y).clamp(min=0).sum() + 0 * x.sum())
    for m in (1.0, 1.0, -10.0):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
        assert optimizer.outer_step(torch.tensor(m)).residual <= 1


def test_learned_weight_decay_moves_with_the_others():
    """D_x is taken with the old v at the old y."""
    y = torch.tensor([1.0], requires_grad=True)
    x = torch.tensor([0.0], requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.5, weight_decay=1.0), SGD([x], lr=0.0), estimator="soba"
    )
    train = optimizer.inner_loss(lambda: ((y - 4) ** 2).sum() / 2)
    optimizer.outer_loss(lambda: ((y - 3) ** 2).sum() / 2)
    optimizer.inner_hyperparameters(lambda step: {"weight_decay": x.exp()})
    v = 0.0
    for _ in range(3):
        start = float(y.detach())
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
        (found,) = optimizer.hypergradient()
        assert float(found) == pytest.approx(-start * v, abs=1e-14)
        v = v - 0.5 * (2 * v - (start - 3))
        optimizer.outer.step()


# --- what is refused or passed on ---------------------------------------------------------


def test_implicit_refuses_solvers_made_for_samples():
    with pytest.raises(tb.UnknownName, match="Stochastic"):
        tb.Implicit(tb.StochasticNeumann(4))


def test_the_certificate_refuses_what_it_does_not_know():
    y, x = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1, weight_decay=1.0),
        SGD([x], lr=0.0),
        estimator="direct(certify=True)",
    )
    train = optimizer.inner_loss(lambda: ((y - 10) ** 2).sum() / 2)
    optimizer.outer_loss(lambda: ((y - 3) ** 2).sum() / 2)
    optimizer.inner_hyperparameters(lambda step: {"weight_decay": x.exp()})
    optimizer.smoothness(lambda: tb.Smoothness(strong_convexity=2.0, outer=1.0))
    train().backward()
    optimizer.step()
    with pytest.raises(tb.BilevelError, match="weight decay"):
        optimizer.hypergradient()


@pytest.mark.parametrize("base", ["forward", "soba", "unrolled", "displacement"])
def test_extrapolation_is_as_its_base(base):
    around, inside = tb.Accelerated(base), tb.estimator(base)
    for flag in ("needs_outer_loss", "unrolls", "follows", "partial"):
        assert getattr(around, flag) == getattr(inside, flag)
    assert tb.estimator(str(around)) == around


def test_extrapolated_forward_mode_equals_extrapolated_unrolling():
    def run(base):
        y, x = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
        optimizer = tb.BilevelOptimizer(
            SGD([y], lr=0.1),
            SGD([x], lr=0.1),
            estimator=tb.Accelerated(base),
            inner_steps=3,
        )
        train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum() / 2)
        optimizer.outer_loss(lambda: ((y - 3) ** 2).sum() / 2)
        for _ in range(12):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        return x.detach()

    torch.testing.assert_close(run("forward"), run("unrolled"))


@pytest.mark.parametrize("estimator", ["saba", "vrbo", "mrbo", "srba"])
def test_resume_through_a_file_with_unequal_batches(estimator):
    A, t = regression(n=19)

    def build():
        y, x = torch.zeros(5, requires_grad=True), torch.ones((), requires_grad=True)
        optimizer = tb.BilevelOptimizer(
            SGD([y], lr=0.05, momentum=0.5),
            SGD([x], lr=0.05),
            estimator=estimator,
            inner_steps=2,
        )
        batches = tb.Batches((A, t), 4, seed=1)
        train = optimizer.inner_loss(
            lambda a, b: ((a @ y - b) ** 2).mean() + x.exp() * (y**2).sum(),
            data=batches,
        )
        optimizer.outer_loss(
            lambda a, b: ((a @ y - b) ** 2).mean(), data=tb.Batches((A, t), 6, seed=2)
        )

        def run(steps):
            while True:
                for batch in batches:
                    optimizer.zero_grad()
                    train(*batch).backward()
                    optimizer.step()
                    steps -= 1
                    if not steps:
                        return

        return optimizer, y, x, run

    optimizer, y, x, run = build()
    run(7)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "y": y.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, y2, x2, run2 = build()
    with torch.no_grad():
        y2.copy_(saved["y"])
    again.load_state_dict(saved["optimizer"])
    third, y3, x3, run3 = build()
    with torch.no_grad():
        y3.copy_(saved["y"])
    third.load_state_dict(saved["optimizer"])
    run2(9)
    run3(9)
    assert torch.equal(y2, y3) and torch.equal(x2, x3)


# --- what goes wrong is told --------------------------------------------------------------


STOCHASTIC = ["stocbio", "bsa", "sid", "bsgm", "amigo"]


@pytest.mark.parametrize("estimator", STOCHASTIC)
def test_stochastic_solvers_stop_at_negative_curvature(estimator):
    """A saddle: what is used is the last iterate whose residual had not grown."""
    D = torch.tensor([1.0, 2.0, -0.5])
    w, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([w], lr=0.01), SGD([x], lr=0.0), estimator=estimator
    )
    train = optimizer.inner_loss(lambda: (D * w**2).sum() + (x * w).sum())
    optimizer.outer_loss(lambda: ((w - 2) ** 2).sum())
    with pytest.warns(tb.NegativeCurvatureWarning) as seen:
        for _ in range(
            8
        ):  # a random length, or a short warm solve, may not see it at once
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
            assert optimizer.outer_step().norm < 40  # bsa scales a term by their number
    assert "curvature 0 " not in str(seen[0].message)


@pytest.mark.parametrize("step", [0.9, 2.0])
def test_the_step_of_v_is_compared_once(step):
    y, x = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.0), estimator=f"soba(adjoint_lr={step})"
    )
    calls = 0

    def train_loss():
        nonlocal calls
        calls += 1
        return ((y - x) ** 2).sum() / 2  # λ = 1

    train = optimizer.inner_loss(train_loss)
    optimizer.outer_loss(lambda: ((y - 3) ** 2).sum())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
            optimizer.outer_step()
    risky = [w for w in seen if issubclass(w.category, tb.StepSizeWarning)]
    assert len(risky) == (step > 1)
    assert all("adjoint_lr=1 would be safe." in str(w.message) for w in risky)


def test_a_step_that_is_not_finite_is_no_mismatch():
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=1e200), SGD([x], lr=0.0), estimator="unrolled"
    )
    train = optimizer.inner_loss(lambda: ((y - x) ** 4).sum() + (y**2).sum())
    optimizer.outer_loss(lambda: (y**2).sum())
    for _ in range(4):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    with pytest.raises(tb.NonFinite, match="diverged"):
        optimizer.hypergradient()


def test_bad_data_and_constants_are_explained():
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.0), estimator="cg(certify=True)"
    )
    with pytest.raises(tb.BilevelError, match=r"data=tb.Batches\(\(x, y\)"):
        optimizer.inner_loss(lambda a, b: None, data=(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match="loader.dataset"):
        tb.Batches({"x": torch.ones(3)}, 2)
    train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum())
    optimizer.outer_loss(lambda: (y**2).sum())
    train().backward()
    optimizer.step()
    for wrong in (1.0, tb.Smoothness(strong_convexity=torch.ones(2))):
        optimizer.smoothness(lambda wrong=wrong: wrong)
        with pytest.raises(tb.BilevelError, match="Smoothness"):
            optimizer.hypergradient()


def test_batches_of_another_number_are_refused_at_load():
    data = torch.arange(8.0)
    state = tb.Batches((data,), 2).state_dict()
    with pytest.raises(tb.BilevelError, match="4 batches"):
        tb.Batches((data,), 4).load_state_dict(state)


def test_options_of_the_solvers_optimizer_are_checked():
    with pytest.raises(tb.UnknownName, match="momentum"):
        tb.SGDSolver(options={"momentun": 0.9})
    with pytest.raises(tb.UnknownName, match="lr has its own place"):
        tb.SGDSolver(options={"lr": 0.1})
    assert isinstance(hash(tb.SGDSolver(options={"momentum": 0.3})), int)
    with pytest.raises(tb.UnknownName, match="nan is not a literal"):
        tb.estimator("cg(damping=nan)")
    with pytest.raises(tb.UnknownName, match="'mrbo'"):
        tb.estimator("MRBO")


def test_consecutive_batches_are_told():
    A, t = regression()
    y, x = torch.zeros(5, requires_grad=True), torch.ones(5, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.0), estimator="stocbio"
    )
    train = optimizer.inner_loss(
        lambda a, b: ((a @ y - b) ** 2).mean() + ((y - x) ** 2).sum(),
        data=DataLoader(TensorDataset(A, t), 8),
    )
    optimizer.outer_loss(lambda: (y**2).sum())
    train(A, t).backward()
    optimizer.step()
    assert any("not independent" in note for note in optimizer.outer_step().notes)


@pytest.mark.filterwarnings("ignore::torch_bilevel.errors.ZeroHypergradientWarning")
@pytest.mark.parametrize("estimator", ["cg", "stocbio", "soba", "unrolled"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_penalty_left_out_is_noticed_from_a_start_at_zero(estimator, inner_steps):
    """At w = 0 its gradient is zero in the first step."""
    A, t = regression()
    w, x = torch.zeros(5, requires_grad=True), torch.ones(5, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([w], lr=0.1),
        SGD([x], lr=0.01),
        estimator=estimator,
        inner_steps=inner_steps,
    )
    train = optimizer.inner_loss(
        lambda: ((A @ w - t) ** 2).mean() + (x.exp() * w**2).sum()
    )
    optimizer.outer_loss(lambda: (w**2).sum())
    with pytest.raises(tb.ReplayMismatch):  # or its subclass UnregisteredTerm
        for _ in range(2 * inner_steps):
            optimizer.zero_grad()
            (train() + 0.1 * (w**2).sum()).backward()
            optimizer.step()
