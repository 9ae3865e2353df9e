"""Tasks and learned initialisations: closed forms, other packages, and everything put back."""

import copy

import higher
import pytest
import torch
import torchopt
from cases import ADAM, META_ALGORITHMS, RULES, SGD, rule_id
from problems import flat
from torch import nn

import torch_bilevel as tb


class QuadraticTasks:
    """ℓ_S = ½ wᵀAw − bᵀw and ℓ_T = ½‖w − t‖² for three tasks (A, b, t); w is the initialisation."""

    def __init__(self, estimator="unrolled", d=4, **options):
        torch.manual_seed(0)
        self.w = torch.randn(d, requires_grad=True)
        roots = torch.randn(3, d, d)
        self.A = roots @ roots.mT / d + 0.5 * torch.eye(d)
        self.b, self.t = torch.randn(3, d), torch.randn(3, d)
        self.optimizer = tb.BilevelOptimizer(
            SGD([self.w], lr=0.1), SGD([self.w], lr=0.5), estimator=estimator, **options
        )
        self.support = self.optimizer.inner_loss(
            lambda A, b: self.w @ A @ self.w / 2 - b @ self.w
        )
        self.query = self.optimizer.outer_loss(lambda t: ((self.w - t) ** 2).sum() / 2)

    def adapt(self, i, num_steps):
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            self.support(self.A[i], self.b[i]).backward()
            self.optimizer.step()

    def exact(self, i, num_steps):
        """(I − αA)^N ∇ℓ_T(w_N), w_N = A⁻¹b + (I − αA)^N (w − A⁻¹b)."""
        M = torch.linalg.matrix_power(
            torch.eye(len(self.w)) - 0.1 * self.A[i], num_steps
        )
        best = torch.linalg.solve(self.A[i], self.b[i])
        end = best + M @ (self.w.detach() - best)
        return M @ (end - self.t[i])


@pytest.mark.parametrize(
    "estimator", ["unrolled", "checkpointed", "forward", "unrolled(window=9)"]
)
def test_maml_on_quadratic_tasks(estimator):
    """Tasks of different lengths; the outer step is along their mean."""
    problem = QuadraticTasks(estimator)
    w, lengths = problem.w.detach().clone(), (1, 5, 3)
    for i, num_steps in enumerate(lengths):
        with problem.optimizer.task():
            problem.adapt(i, num_steps)
            problem.query(problem.t[i]).backward()
        assert torch.equal(problem.w, w)
    exact = [problem.exact(i, n) for i, n in enumerate(lengths)]
    torch.testing.assert_close(problem.w.grad, sum(exact), rtol=1e-10, atol=1e-12)
    report = problem.optimizer.outer_step()
    assert "steps" in str(report) and problem.w.grad is None
    torch.testing.assert_close(problem.w.detach(), w - 0.5 * sum(exact) / 3)
    with problem.optimizer.task():  # and anew
        problem.adapt(0, 2)
        problem.query(problem.t[0]).backward()
    torch.testing.assert_close(problem.w.grad, problem.exact(0, 2))
    problem.optimizer.outer.step()


@pytest.mark.parametrize(
    "estimator, options",
    [
        ("unrolled", {}),
        ("checkpointed", {}),
        ("unrolled", {"proximal_term": 0.7}),
        ("cg(rtol=1e-12)", {"proximal_term": 0.7}),
    ],
)
def test_check_hypergradient_inside_a_task(estimator, options):
    problem = QuadraticTasks(estimator, **options)
    with problem.optimizer.task():
        problem.adapt(0, 300 if "cg" in estimator else 3)
        found = tb.check_hypergradient(problem.optimizer, problem.t[0])
        problem.query(problem.t[0]).backward()
    assert found.relative_error < 1e-6 and found.settled
    assert abs(found.finite_difference[1]) > 1e-2


def test_first_order_maml_drops_the_product():
    problem = QuadraticTasks("first_order")
    with problem.optimizer.task():
        problem.adapt(0, 3)
        end = problem.w.detach().clone()
        (found,) = problem.optimizer.hypergradient(problem.t[0])
    assert torch.equal(found, end - problem.t[0]) and torch.equal(problem.w.grad, found)


def test_forward_gradient_of_an_initialisation_is_unbiased():
    problem = QuadraticTasks("forward_gradient(directions=4)")
    samples = []
    for _ in range(500):
        with problem.optimizer.task():
            problem.adapt(0, 2)
            samples.append(
                problem.optimizer.hypergradient(problem.t[0], write=False)[0]
            )
    samples = torch.stack(samples)
    exact = problem.exact(0, 2)
    law = 3 / 4 * exact.pow(2).sum()  # (d − 1)/b ‖w‖²
    assert (samples.mean(0) - exact).norm() < 4 * (law / 500).sqrt()


@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_an_initialisation_through_every_rule(case):
    """Against finite differences of a plain loop that starts at w."""
    kind, options = case

    def program(w, library=None):
        w = w.clone().requires_grad_()
        inner = kind([w], **options)
        sign = -1 if options.get("maximize") else 1

        def support(c):
            return sign * (c * torch.cosh(w - 0.3)).sum()

        if library:
            optimizer = tb.BilevelOptimizer(inner, SGD([w], lr=0.1), estimator=library)
            support = optimizer.inner_loss(support)
            optimizer.outer_loss(lambda: (w**3).sum())
            with optimizer.task():
                for k in range(3):
                    optimizer.zero_grad()
                    support(1.0 + k).backward()
                    optimizer.step()
                return optimizer.hypergradient()[0]
        for k in range(3):
            inner.zero_grad()
            support(1.0 + k).backward()
            inner.step()
        return (w**3).sum().item()

    start = torch.tensor([[0.7, -0.4, 1.5]])
    found = program(start, "unrolled")
    if (
        kind is torch.optim.Muon
    ):  # bfloat16 steps have no finite differences: test_rules.py
        torch.testing.assert_close(found, program(start, "forward"))
        return
    expected = torch.zeros_like(start)
    for i in range(3):
        e = torch.zeros_like(start)
        e[0, i] = 1e-5
        expected[0, i] = (program(start + e) - program(start - e)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


class FewShot:
    """A small convnet on random images, as an ANIL or MAML problem."""

    def __init__(self, head_only=False, estimator="unrolled", inner=SGD, norm=True):
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(24, 3)
        self.model = nn.Sequential(self.features, self.head)
        adapted = self.head if head_only else self.model
        self.optimizer = tb.BilevelOptimizer(
            inner(adapted.parameters(), lr=0.1),
            torch.optim.Adam(self.model.parameters(), lr=1e-2),
            estimator=estimator,
        )
        self.support = self.optimizer.inner_loss(self.loss)
        self.query = self.optimizer.outer_loss(lambda x, y: self.loss(x, y))
        self.tasks = [
            (torch.randn(6, 1, 10, 10), torch.randint(0, 3, (6,))) for _ in range(4)
        ]

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.model(x), y)

    def adapt(self, task, num_steps=5):
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            self.support(*task).backward()
            self.optimizer.step()


def by_hand(problem, head_only, num_steps=5):
    """Σ over two tasks by one graph through plain gradient steps."""
    names = [n for n, _ in problem.model.named_parameters()]
    start = [p.detach().clone().requires_grad_() for p in problem.model.parameters()]
    total = 0.0
    for support, query in ((0, 1), (2, 3)):
        now = dict(zip(names, start, strict=True))

        def loss(values, task):
            out = torch.func.functional_call(problem.model, values, (task[0],))
            return nn.functional.cross_entropy(out, task[1])

        moved = [n for n in names if not head_only or n.startswith("1.")]
        for _ in range(num_steps):
            grads = torch.autograd.grad(
                loss(now, problem.tasks[support]),
                [now[n] for n in moved],
                create_graph=True,
            )
            now |= {n: now[n] - 0.1 * g for n, g in zip(moved, grads, strict=True)}
        total = total + loss(now, problem.tasks[query])
    return torch.autograd.grad(total, start)


@pytest.mark.parametrize("head_only", [False, True])
def test_maml_and_anil_equal_a_hand_written_loop(head_only):
    problem = FewShot(head_only)
    expected = by_hand(problem, head_only)
    for support, query in ((0, 1), (2, 3)):
        with problem.optimizer.task():
            problem.adapt(problem.tasks[support])
            problem.query(*problem.tasks[query]).backward()
    for p, g in zip(problem.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_maml_equals_torchopt():
    """With SGD; the gradient of its MetaAdam is NaN where a unit is dead."""
    problem = FewShot(norm=False)
    plain = copy.deepcopy(problem.model)
    start = list(plain.parameters())
    step = torchopt.MetaSGD(plain, lr=0.1)
    for _ in range(5):
        x, y = problem.tasks[0]
        step.step(nn.functional.cross_entropy(plain(x), y))
    x, y = problem.tasks[1]
    expected = torch.autograd.grad(nn.functional.cross_entropy(plain(x), y), start)
    with problem.optimizer.task():
        problem.adapt(problem.tasks[0])
        problem.query(*problem.tasks[1]).backward()
    for p, g in zip(problem.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


def test_maml_equals_higher():
    problem = FewShot(norm=False)
    plain = copy.deepcopy(problem.model)
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    with higher.innerloop_ctx(plain, inner, copy_initial_weights=False) as (net, step):
        for _ in range(5):
            x, y = problem.tasks[0]
            step.step(nn.functional.cross_entropy(net(x), y))
        x, y = problem.tasks[1]
        nn.functional.cross_entropy(net(x), y).backward()
    with problem.optimizer.task():
        problem.adapt(problem.tasks[0])
        problem.query(*problem.tasks[1]).backward()
    for p, q in zip(problem.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


def snapshot(problem):
    inner, outer = problem.optimizer.inners[0], problem.optimizer.outer
    return {
        "model": copy.deepcopy(problem.model.state_dict()),
        "inner": copy.deepcopy(inner.state_dict()),
        "outer": copy.deepcopy(outer.state_dict()),
        "grads": [
            None if p.grad is None else p.grad.clone()
            for p in problem.model.parameters()
        ],
        "rng": torch.get_rng_state(),
        "position": problem.optimizer._recorder.position,
    }


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("moment", ["adapt", "query", "after the query"])
@pytest.mark.parametrize("head_only", [False, True])
def test_an_exception_inside_a_task_restores_everything(moment, head_only):
    problem = FewShot(head_only, inner=ADAM)
    for p in problem.model.parameters():
        p.grad = torch.randn_like(p)
    before = snapshot(problem)
    identities = [id(p) for p in problem.model.parameters()]
    with pytest.raises(ZeroDivisionError):
        with problem.optimizer.task():
            problem.adapt(problem.tasks[0], 2)
            problem.optimizer.param_groups[0]["lr"] = 7.0
            if moment == "adapt":
                raise ZeroDivisionError
            loss = problem.query(*problem.tasks[1])
            if moment == "query":
                raise ZeroDivisionError
            loss.backward()
            raise ZeroDivisionError
    assert same(before, snapshot(problem))
    assert identities == [id(p) for p in problem.model.parameters()]
    assert problem.optimizer._task is None and problem.optimizer._tasks_done == 0
    with problem.optimizer.task():
        problem.adapt(problem.tasks[0], 1)
        problem.query(*problem.tasks[1]).backward()


def test_buffers_per_task_or_shared_and_test_time_adaptation():
    problem = FewShot()
    norm = problem.features[1]
    before = norm.running_mean.clone()
    warns = pytest.warns(
        tb.NoOuterStepWarning, match="2 recorded inner steps.*record=False"
    )
    with warns, problem.optimizer.task():
        problem.adapt(problem.tasks[0], 2)
        assert not torch.equal(norm.running_mean, before)
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 0
    with problem.optimizer.task(share_buffers=True):
        problem.adapt(problem.tasks[0], 2)
        problem.query(*problem.tasks[1]).backward()
    assert not torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 2
    grads = [p.grad.clone() for p in problem.model.parameters()]
    values = [p.detach().clone() for p in problem.model.parameters()]
    with problem.optimizer.task(record=False):
        problem.adapt(problem.tasks[2])
        assert len(problem.optimizer._recorder.window) == 0
        with torch.no_grad():
            adapted = problem.query(*problem.tasks[2])
    with torch.no_grad():
        assert adapted < problem.query(*problem.tasks[2])
    for p, g, v in zip(problem.model.parameters(), grads, values, strict=True):
        assert torch.equal(p.grad, g) and torch.equal(p, v)
    assert problem.optimizer._tasks_done == 1


def test_adam_inside_starts_anew_in_every_task():
    problem = FewShot(inner=ADAM)
    gradients = []
    for _ in range(2):
        with problem.optimizer.task():
            assert not problem.optimizer.state
            problem.adapt(problem.tasks[0], 3)
            problem.query(*problem.tasks[1]).backward()
        gradients.append([p.grad for p in problem.model.parameters()])
        problem.optimizer.outer.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_learned_rates_and_initialisation_together():
    """Meta-SGD with one rate for each tensor: both are outer variables of the same tasks."""
    torch.manual_seed(0)
    w = [torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)]
    rates = torch.tensor([-2.0, -1.0], requires_grad=True)
    inner = SGD([{"params": [v]} for v in w], lr=0.1)
    optimizer = tb.BilevelOptimizer(
        inner, SGD([*w, rates], lr=0.1), estimator="unrolled"
    )
    support = optimizer.inner_loss(
        lambda: sum((v**4).sum() for v in w) + w[0][0] * w[1][1]
    )
    query = optimizer.outer_loss(lambda: sum((v.sin() ** 2).sum() for v in w))
    optimizer.inner_hyperparameters(lambda: [{"lr": r.exp()} for r in rates])
    with optimizer.task():
        for _ in range(3):
            optimizer.zero_grad()
            support().backward()
            optimizer.step()
        query().backward()
    assert inner.param_groups[0]["lr"] == 0.1  # put back
    leaves = [v.detach().clone().requires_grad_() for v in (*w, rates)]
    a, b, r = leaves
    for _ in range(3):
        loss = (a**4).sum() + (b**4).sum() + a[0] * b[1]
        ga, gb = torch.autograd.grad(loss, [a, b], create_graph=True)
        a, b = a - r[0].exp() * ga, b - r[1].exp() * gb
    expected = torch.autograd.grad((a.sin() ** 2).sum() + (b.sin() ** 2).sum(), leaves)
    for p, g in zip([*w, rates], expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_adagrad_restarts():
    """It fills its state when constructed, and cannot step without."""
    w = torch.ones(2, requires_grad=True)
    inner = torch.optim.Adagrad([w], lr=0.1, initial_accumulator_value=0.3)
    optimizer = tb.BilevelOptimizer(inner, SGD([w], lr=0.1), estimator="unrolled")
    support = optimizer.inner_loss(lambda: (w**2).sum())
    query = optimizer.outer_loss(lambda: (w**2).sum())
    for _ in range(2):
        with optimizer.task():
            support().backward()
            optimizer.step()
            query().backward()
    optimizer.restart()
    assert inner.state[w]["sum"][0] == 0.3


@pytest.mark.parametrize(
    "estimator", ["cg(rtol=1e-13)", "direct", "minres(rtol=1e-13)"]
)
def test_imaml_on_quadratic_tasks(estimator):
    """y* = (A + λI)⁻¹(λw + b), ∇Φ = λ(A + λI)⁻¹∇ℓ_T(y*), reached by the user's own steps."""
    problem = QuadraticTasks(estimator, proximal_term=0.7)
    w, exact = problem.w.detach().clone(), torch.zeros(4)
    for i in range(3):
        with problem.optimizer.task():
            problem.adapt(i, 400)
            M = problem.A[i] + 0.7 * torch.eye(4)
            best = torch.linalg.solve(M, 0.7 * w + problem.b[i])
            torch.testing.assert_close(problem.w.detach(), best, rtol=1e-9, atol=1e-10)
            problem.query(problem.t[i]).backward()
        exact += 0.7 * torch.linalg.solve(M, best - problem.t[i])
    torch.testing.assert_close(problem.w.grad, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("query", [False, True])
def test_reptile_is_the_displacement(query):
    """Σ (w − w_N) over tasks, with and without an outer loss; the mean in an outer step."""
    problem = QuadraticTasks("displacement")
    w, exact = problem.w.detach().clone(), torch.zeros(4)
    for i, num_steps in enumerate((1, 3, 2)):
        with problem.optimizer.task():
            problem.adapt(i, num_steps)
            exact += w - problem.w.detach()
            if query:
                problem.query(problem.t[i]).backward()
        assert torch.equal(problem.w, w)
    torch.testing.assert_close(problem.w.grad, exact, rtol=1e-14, atol=0)
    with problem.optimizer.task(record=False):
        problem.adapt(0, 2)
    with pytest.raises(ZeroDivisionError), problem.optimizer.task():
        problem.adapt(0, 2)
        raise ZeroDivisionError
    torch.testing.assert_close(problem.w.grad, exact, rtol=1e-14, atol=0)
    report = problem.optimizer.outer_step()
    torch.testing.assert_close(problem.w.detach(), w - 0.5 * exact / 3)
    assert report.steps == 2 and "Reptile" in str(report)


def test_reptile_asks_for_no_outer_loss():
    w = torch.tensor([4.0], requires_grad=True)
    optimizer = tb.Reptile(SGD([w], lr=0.25), SGD([w], lr=0.5))
    loss = optimizer.inner_loss(lambda: (w**2).sum())
    for target in (3.0, 2.25):
        with optimizer.task():
            loss().backward()
            optimizer.step()
        optimizer.outer_step()
        assert w.item() == target


@pytest.mark.parametrize("head_only", [False, True])
def test_tasks_with_kept_graphs_equal_replay(head_only):
    found = []
    for estimator in ("unrolled", "unrolled(keep_graph=True)"):
        problem = FewShot(head_only, estimator)
        for i in range(3):
            with problem.optimizer.task():
                problem.adapt(problem.tasks[i], 1 + i)
                problem.query(*problem.tasks[3]).backward()
        found.append(flat(p.grad for p in problem.model.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize("estimator", ["unrolled", "checkpointed", "forward"])
@pytest.mark.parametrize(
    "kind, options",
    [
        (SGD, {"momentum": 0.5, "weight_decay": 0.1}),
        (ADAM, {}),
        (SGD, {"maximize": True}),
    ],
)
def test_a_proximal_term_through_the_steps(estimator, kind, options):
    """Equals the same loop with the term in the loss and the initialisation by hand."""

    def run(start, library=None):
        w = start.clone().requires_grad_()
        inner = kind([w], lr=0.05, **options)

        def support(c):
            return (c * torch.cosh(w - 0.3)).sum()

        if library:
            optimizer = tb.BilevelOptimizer(
                inner, SGD([w], lr=0.1), estimator=library, proximal_term=0.4
            )
            optimizer.gradient_transform(tb.clip_grad_norm(2.0))
            support = optimizer.inner_loss(support)
            optimizer.outer_loss(lambda: (w**3).sum())
        with optimizer.task() if library else torch.enable_grad():
            for k in range(4):
                inner.zero_grad()
                support(1.0 + k).backward()
                nn.utils.clip_grad_norm_([w], 2.0)
                if not library:
                    w.grad += 0.4 * (w.detach() - start)
                inner.step()
            return optimizer.hypergradient()[0] if library else (w**3).sum().item()

    start = torch.tensor([0.7, -0.4, 1.5])
    expected = torch.zeros(3)
    for i, e in enumerate(torch.eye(3)):
        expected[i] = (run(start + 1e-5 * e) - run(start - 1e-5 * e)) / 2e-5
    torch.testing.assert_close(run(start, estimator), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::torch_bilevel.NegativeCurvatureWarning")
@pytest.mark.parametrize("name", META_ALGORITHMS)
def test_named_algorithms_only_choose_parts(name):
    estimator, options = META_ALGORITHMS[name]

    def run(make):
        torch.manual_seed(0)
        body, head = nn.Linear(4, 3), nn.Linear(3, 2)
        adapted = (
            head.parameters()
            if name == "ANIL"
            else [*body.parameters(), *head.parameters()]
        )
        optimizer = make(
            SGD(adapted, lr=0.1),
            torch.optim.Adam([*body.parameters(), *head.parameters()], lr=0.01),
        )

        def loss(x, y):
            return ((head(body(x).tanh()) - y) ** 2).mean()

        support = optimizer.inner_loss(loss)
        query = optimizer.outer_loss(lambda x, y: loss(x, y))
        for _ in range(2):
            for _ in range(3):
                with optimizer.task():
                    for _ in range(2):
                        optimizer.zero_grad()
                        support(torch.randn(5, 4), torch.randn(5, 2)).backward()
                        optimizer.step()
                    query(torch.randn(5, 4), torch.randn(5, 2)).backward()
            optimizer.outer_step()
        parameters = [*body.parameters(), *head.parameters()]
        return torch.cat([p.detach().reshape(-1) for p in parameters]), optimizer

    named, optimizer = run(getattr(tb, name))

    def generic(inner, outer):
        optimizer = tb.BilevelOptimizer(inner, outer, estimator=estimator, **options)
        if name == "MetaSGD":
            optimizer.learn_rates()
        return optimizer

    plain, _ = run(generic)
    assert torch.equal(named, plain) and optimizer.outer_steps == 2
    assert tb.citation(optimizer).startswith("@")
    assert "differs" in type(optimizer).__doc__.replace("\n    ", " ")


def test_an_inner_step_of_anil_does_not_reach_the_features():
    for head_only in (False, True):
        problem = FewShot(head_only)
        with problem.optimizer.task():
            problem.adapt(problem.tasks[0], 1)
            grads = [p.grad for p in problem.features.parameters()]
            problem.query(*problem.tasks[1]).backward()
            assert all((g is None) == head_only for g in grads)


def test_resume_between_the_tasks_of_one_outer_step():
    def task(problem, i):
        with problem.optimizer.task():
            problem.adapt(i, 3)
            problem.query(problem.t[i]).backward()

    whole, half, again = QuadraticTasks(), QuadraticTasks(), QuadraticTasks()
    for i in range(3):
        task(whole, i)
    for i in range(2):
        task(half, i)
    again.optimizer.load_state_dict(half.optimizer.state_dict())
    task(again, 2)
    for problem in (whole, again):
        problem.optimizer.outer_step()
    assert torch.equal(whole.w, again.w)


def test_dropping_the_outer_gradients_drops_the_tasks():
    problem = QuadraticTasks()
    w = problem.w.detach().clone()
    for i in range(3):
        if i == 2:
            problem.optimizer.outer.zero_grad()
        with problem.optimizer.task():
            problem.adapt(i, 2)
            problem.query(problem.t[i]).backward()
    exact = problem.exact(2, 2)
    problem.optimizer.outer_step()
    torch.testing.assert_close(problem.w.detach(), w - 0.5 * exact)
