"""What bad input gets: one table of (call, exception, message); the state is unchanged."""

import collections
import copy
import dataclasses
import inspect
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import DataWeights, Quadratic, Ridge, flat

import torch_bilevel as tb
from torch_bilevel.inner import RULES

SGD = torch.optim.SGD


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


class Setup:
    """A ridge problem with one recorded step, to be broken in one way."""

    def __init__(self, estimator="cg", steps=1, **options):
        self.problem = Ridge()
        self.w, self.lam = self.problem.w, self.problem.lam
        self.optimizer = self.problem.optimizer(estimator=estimator, **options)
        self.problem.steps(self.optimizer, steps)

    def go(self):
        return self.optimizer.outer_step()


def plain(inner=None, outer=None, **options):
    return tb.BilevelOptimizer(
        SGD([leaf(2)], lr=0.1) if inner is None else inner,
        SGD([leaf(2)], lr=0.1) if outer is None else outer,
        **options,
    )


# --- the rows: each is a function that must raise -------------------------------------------------


def no_inner_loss():
    optimizer = plain()
    optimizer.outer_loss(lambda: leaf(1).sum())
    optimizer.outer_step()


def no_inner_loss_explicit():
    y = leaf(2)
    optimizer = plain(inner=SGD([y], lr=0.1))
    valid = optimizer.outer_loss(lambda: y.sum())
    valid().backward()


def no_outer_loss():
    plain().outer_step()


def no_outer_data():
    setup = Setup()
    setup.optimizer.outer_losses.clear()
    setup.optimizer.outer_loss(lambda x: (x * setup.w).sum())
    setup.go()


def which_outer_loss():
    setup = Setup()
    setup.optimizer.outer_loss(lambda x: (x * setup.w).sum())
    setup.optimizer.outer_step(torch.ones(6))


def inner_loss_is_a_vector():
    y = leaf(2)
    plain(inner=SGD([y], lr=0.1)).inner_loss(lambda: y * 2)()


def outer_loss_is_a_number():
    setup = Setup()
    setup.optimizer.outer_loss(lambda: 3.0)()


def outer_loss_is_not_finite():
    setup = Setup()
    setup.optimizer.outer_losses.clear()
    setup.optimizer.outer_loss(lambda: (setup.w / 0).sum())
    setup.go()


def inner_loss_ignores_the_model():
    y, x, other = leaf(2), leaf(2), leaf(2)
    optimizer = tb.BilevelOptimizer(SGD([y], lr=0.1), SGD([x], lr=0.1))
    first = optimizer.inner_loss(lambda: (x * y**2).sum())
    second = optimizer.inner_loss(lambda: (x * other).sum())
    optimizer.outer_loss(lambda: y.sum())
    (first() + second()).backward()
    optimizer.step()
    optimizer.outer_step()


def gradients_by_autograd_grad():
    y, x = leaf(2), leaf(2)
    optimizer = tb.BilevelOptimizer(SGD([y], lr=0.1), SGD([x], lr=0.1))
    train = optimizer.inner_loss(lambda: (x * y**2).sum())
    optimizer.outer_loss(lambda: y.sum())
    (y.grad,) = torch.autograd.grad(train(), [y])
    optimizer.step()
    optimizer.outer_step()


def no_zero_grad():
    problem = Ridge()
    optimizer = problem.optimizer()
    for _ in range(2):
        problem.train().backward()
        optimizer.step()
    optimizer.outer_step()


def outer_does_not_require_grad():
    plain(outer=SGD([torch.zeros(2)], lr=0.1))


def batch_of_a_wrong_shape():
    setup = Setup()
    setup.optimizer.outer_losses.clear()
    data = (torch.ones(6), torch.ones(6))
    setup.optimizer.outer_loss(lambda x, y: (x * y * setup.w).sum(), data=data)
    setup.go()


def data_as_the_function():
    plain().outer_loss([1, 2])


def loss_argument_is_no_loss():
    setup = Setup()
    setup.optimizer.hypergradient(loss=3.0)


def inside_inference_mode():
    setup = Setup()
    with torch.inference_mode():
        setup.optimizer.hypergradient()


def unrolled_after_steps_of_another_estimator():
    setup = Setup("unrolled")
    setup.optimizer.estimator = "cg"
    setup.problem.steps(setup.optimizer)
    setup.optimizer.estimator = "unrolled"
    setup.problem.steps(setup.optimizer)
    setup.go()


def outer_loss_ignores_the_model():
    setup = Setup()
    setup.optimizer.outer_losses.clear()
    setup.optimizer.outer_loss(lambda: (setup.lam**2).sum())
    setup.go()


def outer_loss_has_no_graph():
    setup = Setup()
    setup.optimizer.outer_losses.clear()
    setup.optimizer.outer_loss(lambda: setup.w.detach().sum())
    setup.go()


def outer_variable_in_neither_loss():
    problem = Ridge()
    outer = SGD([problem.lam, leaf(4)], lr=0.1)
    optimizer = problem.optimizer(outer=outer)
    problem.steps(optimizer)
    optimizer.outer_step()


def no_inner_step():
    problem = Ridge()
    problem.optimizer().outer_step()


def no_inner_step_after_an_outer_one():
    setup = Setup()
    setup.go()
    setup.go()


def batch_changed_in_place():
    problem = DataWeights()
    optimizer = problem.optimizer()
    problem.steps(optimizer)
    problem.batches[0][0].mul_(2)
    optimizer.outer_step()


def batch_changed_in_place_unrolled():
    problem = DataWeights()
    optimizer = problem.optimizer(estimator="unrolled")
    problem.steps(optimizer)
    problem.batches[0][0].mul_(2)
    optimizer.outer_step()


CONTAINERS = [
    collections.OrderedDict,
    collections.UserDict,
    lambda pairs: collections.namedtuple("Batch", [k for k, _ in pairs])(
        *dict(pairs).values()
    ),
    lambda pairs: dataclasses.make_dataclass(
        "Batch", [k for k, _ in pairs], frozen=True
    )(**dict(pairs)),
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("estimator", ["cg", "unrolled", "unrolled(keep_graph=True)"])
def test_a_batch_in_any_container_that_is_written_to(container, estimator):
    w, x, batch = leaf(3), leaf(1), torch.randn(5, 3)
    o = tb.BilevelOptimizer(SGD([w], lr=0.1), SGD([x], lr=0.1), estimator=estimator)

    @o.inner_loss
    def train(data):
        a = data["a"] if hasattr(data, "keys") else data.a
        return ((a[0] @ w - 1) ** 2).mean() + x.exp().sum() * (w**2).sum()

    o.outer_loss(lambda: (w - 1).square().sum())
    for _ in range(2):
        for _ in range(2):
            o.zero_grad()
            train(container([("a", [batch]), ("b", None)])).backward()
            o.step()
        o.outer_step()
    train(container([("a", [batch])])).backward()
    o.step()
    batch.mul_(2)
    with pytest.raises(tb.BatchChanged):
        o.outer_step()


class ReadOnly(collections.OrderedDict):
    """As the outputs of some libraries' models are."""

    def update(self, *args, **kwargs):
        raise TypeError("cannot be updated")

    def __reduce__(self):
        raise TypeError("cannot be copied")


@dataclasses.dataclass
class Tree:
    """With a cycle, and a field that is not set yet."""

    a: torch.Tensor
    parent: "Tree | None" = None
    late: int = dataclasses.field(init=False)


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "unrolled(keep_graph=True)"])
def test_containers_of_other_classes_are_the_users_own(estimator):
    w, x = leaf(3), leaf(1)
    o = tb.BilevelOptimizer(SGD([w], lr=0.1), SGD([x], lr=0.1), estimator=estimator)
    log, counts = [], collections.Counter(a=2)
    outputs, tree = ReadOnly(a=torch.randn(5, 3)), Tree(torch.randn(5, 3))
    tree.parent = tree

    @o.inner_loss
    def train(outputs, tree, counts, log):
        log.append(1)
        fit = ((outputs["a"] + tree.parent.a) @ w - counts["a"]) ** 2
        return fit.mean() + x.exp().sum() * (w**2).sum()

    o.outer_loss(lambda: (w - 1).square().sum())
    for _ in range(3):
        o.zero_grad()
        train(outputs, tree, counts, log).backward()
        o.step()
    assert counts == {"a": 2} and log == [1, 1, 1]
    if estimator != "cg":
        assert tb.check_hypergradient(o).relative_error < 1e-6
    tree.a.mul_(2)
    with pytest.raises(tb.BatchChanged):
        o.outer_step()


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "unrolled(keep_graph=True)"])
def test_arrays_are_copied(estimator):
    found = []
    for written in (False, True):
        torch.manual_seed(0)
        w, x, batch = leaf(3), leaf(1), torch.randn(5, 3).numpy()
        o = tb.BilevelOptimizer(SGD([w], lr=0.1), SGD([x], lr=0.1), estimator=estimator)

        @o.inner_loss
        def train(a, w=w, x=x):
            fit = (torch.from_numpy(a) @ w - 1) ** 2
            return fit.mean() + x.exp().sum() * (w**2).sum()

        o.outer_loss(lambda w=w: (w - 1).square().sum())
        for _ in range(3):
            o.zero_grad()
            train(batch).backward()
            o.step()
        if written:
            batch *= 2
        found.append(o.hypergradient()[0])
    assert torch.equal(*found)


def negative_curvature_strict():
    problem = Quadratic(A=torch.diag(torch.linspace(-1, 4, 11)))
    optimizer = problem.optimizer(strict=True)
    problem.steps(optimizer)
    optimizer.outer_step()


def neumann_diverges():
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="neumann(num_steps=40, step_size=5.)")
    problem.steps(optimizer)
    optimizer.outer_step()


def richardson_diverges():
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="richardson(max_steps=40, step_size=5.)")
    problem.steps(optimizer)
    optimizer.outer_step()


def product_is_not_finite(estimator="cg"):
    y, x = torch.zeros(2, requires_grad=True), leaf(2)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.1), estimator=estimator
    )
    train = optimizer.inner_loss(lambda: (x.exp() * (y**2 + y.abs() ** 1.5)).sum())
    optimizer.outer_loss(lambda: (y - 1).pow(2).sum())
    train().backward()
    optimizer.step()
    optimizer.outer_step()


def sparse_parameter():
    plain(inner=SGD([torch.eye(3).to_sparse().requires_grad_()], lr=0.1))


def complex_parameter():
    plain(outer=SGD([torch.zeros(2, dtype=torch.cfloat, requires_grad=True)], lr=0.1))


def expanded_parameter():
    plain(outer=SGD([torch.zeros(1).expand(3).requires_grad_()], lr=0.1))


def inference_parameter():
    with torch.inference_mode():
        tensor = torch.zeros(2)
    optimizer = SGD([leaf(2)], lr=0.1)
    optimizer.param_groups[0]["params"] = [tensor]
    plain(inner=optimizer)


def outer_data_exhausted():
    setup = Setup()
    setup.optimizer.outer_losses.clear()
    setup.optimizer.outer_loss(
        lambda x: (x * setup.w).sum(), data=iter([torch.ones(6)])
    )
    setup.optimizer.hypergradient()
    setup.go()


def outer_data_empty():
    setup = Setup()
    setup.optimizer.outer_losses.clear()
    setup.optimizer.outer_loss(lambda x: (x * setup.w).sum(), data=[])
    setup.go()


def outer_data_is_a_number():
    plain().outer_loss(lambda: 0, data=3)


def all_batches_of_an_iterator():
    plain().outer_loss(lambda: 0, data=iter([]), batches="all")


def unknown_estimator():
    plain(estimator="neuman")


def unknown_option():
    plain(estimator="cg(max_step=3)")


def unreadable_estimator():
    plain(estimator="cg(3)")


def estimator_of_a_wrong_type():
    plain(estimator=3)


def bad_option_value():
    plain(estimator="cg(max_steps=0)")


def term_outside_the_loss(estimator="cg"):
    problem = Ridge()
    optimizer = problem.optimizer(estimator=estimator)
    optimizer.zero_grad()
    (problem.train() + 0.1 * problem.w.abs().sum()).backward()
    optimizer.step()
    optimizer.outer_step()


def term_outside_the_loss_unrolled():
    term_outside_the_loss("unrolled")


def clipping_not_declared(estimator="cg"):
    problem = Ridge()
    optimizer = problem.optimizer(estimator=estimator)
    problem.train().backward()
    torch.nn.utils.clip_grad_norm_(problem.y, 1e-2)
    optimizer.step()
    optimizer.outer_step()


def clipping_not_declared_unrolled():
    clipping_not_declared("unrolled")


def clipping_in_a_later_step_unrolled():
    problem = Ridge()
    optimizer = problem.optimizer(estimator="unrolled")
    for k in range(3):
        optimizer.zero_grad()
        problem.train().backward()
        if k == 1:
            torch.nn.utils.clip_grad_norm_(problem.y, 1e-2)
        optimizer.step()
    optimizer.outer_step()


def scaler_not_declared():
    problem = Ridge()
    optimizer = problem.optimizer()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(problem.train()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.outer_step()


def step_without_a_registered_loss():
    problem = Ridge()
    optimizer = problem.optimizer()
    problem.train_loss().backward()
    optimizer.step()
    optimizer.outer_step()


def outer_variable_outside_the_loss():
    problem = Ridge()
    problem.optimizer()
    (problem.lam.sum() * problem.train()).backward()


def outer_variable_outside_the_loss_in_a_sum():
    problem = Ridge()
    problem.optimizer()
    (problem.train() + (problem.lam * problem.w).sum()).backward()


def argument_carries_graph():
    problem = DataWeights()
    problem.optimizer()
    X, t, index = problem.batches[0]
    problem.train(X * problem.logits.exp()[:, None], t, index)


class Unknown(SGD):
    def step(self, closure=None):
        return super().step(closure)


def no_update_rule():
    plain(inner=Unknown([leaf(2)], lr=0.1), estimator="unrolled")


def lbfgs_unrolled():
    plain(inner=torch.optim.LBFGS([leaf(2)], lr=0.1), estimator="unrolled")


def decay_of_an_unknown_optimizer():
    plain(inner=Unknown([leaf(2)], lr=0.1, weight_decay=0.1))


def rule_of_an_instance():
    tb.register_update_rule(SGD([leaf(2)], lr=0.1), lambda *_: None)  # type: ignore


def rule_without_a_function():
    tb.register_update_rule(Unknown, None)  # type: ignore


def with_hyperparameters(values, estimator="unrolled"):
    setup = Setup(estimator)
    setup.optimizer.inner_hyperparameters(lambda step: values(setup.lam))
    setup.problem.steps(setup.optimizer, 1)
    setup.go()


def hyperparameter_that_does_not_exist():
    with_hyperparameters(lambda lam: {"learning_rate": lam[0]})


def hyperparameter_of_another_shape():
    with_hyperparameters(lambda lam: {"lr": torch.ones(3)})


def hyperparameters_of_too_many_groups():
    with_hyperparameters(lambda lam: [{"lr": 0.1}, {"lr": 0.1}])


def an_outer_variable_that_is_constant():
    setup = Setup()
    setup.lam.requires_grad_(False)
    setup.problem.steps(setup.optimizer)
    setup.go()


def hyperparameters_that_come_and_go():
    setup = Setup("unrolled")
    lam = setup.lam
    setup.optimizer.inner_hyperparameters(
        lambda step: {"lr": lam[0].exp() / 9} if step < 2 else {"momentum": 0.5}
    )
    setup.problem.steps(setup.optimizer, 2)


def hyperparameter_that_is_an_outer_variable():
    lr = torch.tensor(0.1, requires_grad=True)
    plain(inner=SGD([leaf(2)], lr=lr), outer=SGD([lr], lr=0.1))


def parameters_clamped_after_the_step(estimator="forward", at=1):
    problem = Ridge()
    optimizer = problem.optimizer(estimator=estimator)
    for k in range(3):
        problem.steps(optimizer)
        if k == at:
            with torch.no_grad():
                problem.w.clamp_(-1e-3, 1e-3)
    optimizer.outer_step()


def parameters_clamped_at_the_end():
    parameters_clamped_after_the_step(at=2)


def momentum_set_to_zero(estimator="unrolled"):
    setup = Setup(estimator)
    setup.optimizer.param_groups[0]["momentum"] = 0.9
    setup.problem.steps(setup.optimizer, 2)
    for state in setup.optimizer.inners[0].state.values():
        state["momentum_buffer"].zero_()
    setup.problem.steps(setup.optimizer, 1)
    setup.go()


def momentum_replaced_in_forward_mode():
    setup = Setup("forward")
    setup.optimizer.param_groups[0]["momentum"] = 0.9
    setup.problem.steps(setup.optimizer, 2)
    inner = setup.optimizer.inners[0]
    inner.load_state_dict(copy.deepcopy(inner.state_dict()))
    setup.problem.steps(setup.optimizer, 1)


def a_step_inside_paused(estimator="forward"):
    problem = Ridge()
    optimizer = problem.optimizer(estimator=estimator)
    problem.steps(optimizer)
    with optimizer.paused():
        problem.steps(optimizer)
    problem.steps(optimizer)
    optimizer.outer_step()


def a_step_inside_paused_unrolled():
    a_step_inside_paused("unrolled")


def hyperparameters_that_are_none():
    with_hyperparameters(lambda lam: None)


def hyperparameters_as_a_value():
    plain().inner_hyperparameters({"lr": 0.1})


def check_of_forward_mode():
    setup = Setup("forward")
    tb.check_hypergradient(setup.optimizer)


def forward_mode_with_many_outer_numbers():
    Setup("forward(max_outer=2)")


def forward_mode_that_did_not_follow():
    Setup().optimizer.hypergradient(estimator="forward")


def iterates_beyond_their_budget():
    Setup("unrolled(iterate_bytes=200)", steps=9)


def checkpoints_of_kept_graphs():
    tb.Unrolled(keep_graph=True, checkpoint_every=3)


def kept_graph_of_a_third_party():
    y, x, z = leaf(2), leaf(2), leaf(2)
    optimizer = plain(
        inner=SGD([y], lr=0.1),
        outer=SGD([x], lr=0.1),
        estimator="unrolled(keep_graph=True)",
    )
    optimizer.inner_loss(lambda: (x * y * z).sum())().backward()


def batch_changed_under_a_kept_graph():
    y, x, batch = leaf(2), leaf(2), torch.ones(2)
    optimizer = plain(
        inner=SGD([y], lr=0.1),
        outer=SGD([x], lr=0.1),
        estimator="unrolled(keep_graph=True)",
    )
    optimizer.outer_loss(lambda: (y**2).sum())
    optimizer.inner_loss(lambda: (x * (y * batch).sin()).sum())().backward()
    optimizer.step()
    optimizer._recorder.to_verify = None
    batch += 1
    optimizer.outer_step()


def checkpoints_at_a_word():
    tb.Unrolled(checkpoint_every="sometimes")


def learning_rate_with_an_implicit_estimator():
    with_hyperparameters(lambda lam: {"lr": lam.sum() * 0 + 0.1}, "cg")


def trajectory_too_long():
    Setup("unrolled", steps=50, max_record_bytes=2000)


def batches_too_large():
    problem = DataWeights(batch=1)
    problem.batches = [tuple(v.clone() for v in batch) for batch in problem.batches]
    optimizer = problem.optimizer(max_record_bytes=500)
    problem.steps(optimizer, 20)


def unrolled_without_iterates():
    setup = Setup("cg")
    setup.optimizer.hypergradient(estimator="unrolled")


def direct_too_large():
    Setup("direct(max_bytes=100)").go()


def inner_is_outer():
    y = leaf(2)
    same = SGD([y], lr=0.1)
    tb.BilevelOptimizer(same, same)


def initialisation(estimator="unrolled", **options):
    """One recorded step on a parameter that is in both optimizers; no task around it."""
    y = leaf(2)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([y], lr=0.1), estimator=estimator, **options
    )
    train = optimizer.inner_loss(lambda: (y**2).sum())
    valid = optimizer.outer_loss(lambda: (y**4).sum())

    def step():
        train().backward()
        optimizer.step()

    return optimizer, step, valid


def initialisation_without_a_task():
    _, step, valid = initialisation()
    step()
    valid().backward()


def initialisation_without_a_task_explicit():
    optimizer, step, _ = initialisation()
    step()
    optimizer.hypergradient(write=False)


def initialisation_with_an_implicit_estimator():
    optimizer, step, valid = initialisation("cg")
    with optimizer.task():
        step()
        valid().backward()


def outer_step_without_a_task():
    initialisation()[0].outer_step()


def outer_step_by_the_library_inside_a_task():
    optimizer, step, valid = initialisation()
    with optimizer.task():
        step()
        valid().backward()
        optimizer.outer_step()


def outer_loss_where_nothing_is_recorded():
    optimizer, step, valid = initialisation()
    with optimizer.task(record=False):
        step()
        valid().backward()


def backward_after_the_task():
    optimizer, step, valid = initialisation()
    with optimizer.task():
        step()
        optimizer.hypergradient()
        loss = valid()
    loss.backward()


def hyperparameter_that_is_not_finite():
    with_hyperparameters(lambda lam: {"lr": lam.sum() * float("nan")})


def own_rule(rule):
    class Mine(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["m"] = p.grad.clone()
                    p.data.sub_(p.grad, alpha=group["lr"])

    tb.register_update_rule(Mine, rule)
    try:
        y, x = leaf(2), leaf(2)
        optimizer = plain(Mine([y], lr=0.1), SGD([x], lr=0.1), estimator="unrolled")
        train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum())
        optimizer.outer_loss(lambda: (y**2).sum())
        for _ in range(2):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        optimizer.hypergradient()
    finally:
        RULES.pop(Mine)


def rule_that_returns_the_parameter_only():
    own_rule(lambda p, g, s, h: p - h["lr"] * g)


def rule_that_forgets_its_state():
    own_rule(lambda p, g, s, h: (p - h["lr"] * g, {}))


def outer_step_inside_a_task():
    optimizer, step, valid = initialisation()
    with optimizer.task():
        step()
        valid().backward()
        optimizer.outer.step()


def nested_tasks():
    optimizer, _, _ = initialisation()
    with optimizer.task(), optimizer.task():
        pass


def task_with_automatic_outer_steps():
    initialisation(inner_steps=3)[0].task()


def saved_inside_a_task():
    optimizer, _, _ = initialisation()
    with optimizer.task():
        optimizer.state_dict()


def maml_that_does_not_learn_everything():
    tb.MAML(SGD([leaf(2), leaf(3)], lr=0.1), SGD([leaf(2)], lr=0.1))


def anil_without_features():
    y = leaf(2)
    tb.ANIL(SGD([y], lr=0.1), SGD([y], lr=0.1))


def negative_proximal_term():
    initialisation(proximal_term=-1.0)


def not_an_optimizer():
    tb.BilevelOptimizer([leaf(2)], SGD([leaf(2)], lr=0.1))


def no_inner_optimizer():
    tb.BilevelOptimizer([], SGD([leaf(2)], lr=0.1))


def nested():
    plain(inner=plain())


def bad_inner_steps():
    plain(inner_steps=0)


def bad_unused():
    plain(unused="ignore")


def no_second_derivative():
    y, x = leaf(4, 3), leaf(5, 3)
    optimizer = tb.BilevelOptimizer(SGD([y], lr=0.1), SGD([x], lr=0.1))
    train = optimizer.inner_loss(lambda: torch.cdist(y, x).sum())
    optimizer.outer_loss(lambda: y.pow(2).sum())
    train().backward()
    optimizer.step()
    optimizer.outer_step()


def linearization_at_another_point():
    setup = Setup()
    problem = setup.optimizer.problem
    at = problem.linearize(setup.optimizer._recorder.window.steps()[0].calls)
    with torch.no_grad():
        setup.w.add_(1)
    at.hvp(torch.ones(6))


def linearization_after_an_invisible_move():
    setup = Setup()
    problem = setup.optimizer.problem
    at = problem.linearize(setup.optimizer._recorder.window.steps()[0].calls)
    with problem.inner.swapped():
        problem.inner.overwrite([torch.zeros(6)])
        at.hvp(torch.ones(6))


def minimised_and_maximised():
    a, b, x = leaf(2), leaf(2), leaf(2)
    inner = SGD([{"params": [a]}, {"params": [b], "maximize": True}], lr=0.1)
    optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1))
    train = optimizer.inner_loss(lambda: (a**2 * x - b**2 + a * b).sum())
    optimizer.outer_loss(lambda: (a + b).sum())
    train().backward()
    optimizer.step()
    optimizer.outer_step()


def one_of_two_steps_twice():
    a, b = leaf(2), leaf(2)
    first, second = SGD([a], lr=0.1), SGD([b], lr=0.1)
    optimizer = tb.BilevelOptimizer([first, second], SGD([leaf(2)], lr=0.1))
    train = optimizer.inner_loss(lambda: (a * b).sum())
    train().backward()
    first.step()
    first.step()


def ambiguous_group():
    optimizer = plain(inner=[SGD([leaf(2)], lr=0.1), SGD([leaf(2)], lr=0.1)])
    optimizer.add_param_group({"params": [leaf(1)]})


def rng_outside_the_recorded_ones():
    problem = Ridge()
    generator = torch.Generator()
    own = problem.train_loss
    problem.train_loss = lambda: own() * (1 + torch.rand((), generator=generator))
    optimizer = problem.optimizer()
    problem.steps(optimizer)
    optimizer.outer_step()


TABLE = [
    (no_inner_loss, tb.LossNotRegistered, r"@optimizer\.inner_loss"),
    (no_inner_loss_explicit, tb.LossNotRegistered, r"@optimizer\.inner_loss"),
    (no_outer_loss, tb.LossNotRegistered, r"@optimizer\.outer_loss"),
    (no_outer_data, tb.LossNotRegistered, r"outer_loss\(data=.*outer_step\(x, y\)"),
    (which_outer_loss, tb.LossNotRegistered, r"2 outer losses.*loss="),
    (inner_loss_is_a_vector, tb.InvalidLoss, r"shape \(2,\).*\.mean\(\)"),
    (outer_loss_is_a_number, tb.InvalidLoss, r"'float'.*scalar tensor"),
    (
        outer_loss_is_not_finite,
        tb.NonFinite,
        r"outer loss is (nan|inf|-inf).*learning rate",
    ),
    (inner_loss_ignores_the_model, tb.Disconnected, r"inner loss.*any inner parameter"),
    (gradients_by_autograd_grad, tb.UnregisteredTerm, r"autograd\.grad does not count"),
    (no_zero_grad, tb.UnregisteredTerm, r"zero_grad\(\) before every backward"),
    (outer_does_not_require_grad, tb.UnsupportedParameter, r"requires_grad=True"),
    (batch_of_a_wrong_shape, tb.BilevelError, r"tb\.Batches.*data=\[\(x, y\)\]"),
    (data_as_the_function, TypeError, r"outer_loss\(data=loader\)"),
    (loss_argument_is_no_loss, tb.LossNotRegistered, r"loss=3\.0 is not a registered"),
    (inside_inference_mode, tb.BilevelError, r"inference_mode"),
    (unrolled_after_steps_of_another_estimator, tb.NoInnerStep, r"keeps no iterates"),
    (outer_loss_ignores_the_model, tb.Disconnected, r"outer loss.*any inner parameter"),
    (outer_loss_has_no_graph, tb.Disconnected, r"no graph.*no_grad"),
    (outer_variable_in_neither_loss, tb.UnusedOuter, r"outer\[1\].*unused='zero'"),
    (no_inner_step, tb.NoInnerStep, r"No inner step.*paused"),
    (no_inner_step_after_an_outer_one, tb.NoInnerStep, r"since the last outer step"),
    (batch_changed_in_place, tb.BatchChanged, r"changed in place.*clone\(\)"),
    (batch_changed_in_place_unrolled, tb.BatchChanged, r"changed in place.*clone\(\)"),
    (negative_curvature_strict, tb.NegativeCurvature, r"curvature -.*minres.*unrolled"),
    (neumann_diverges, tb.Diverged, r"λ_max.*about (3|4)\..*step_size=0\.2"),
    (richardson_diverges, tb.Diverged, r"diverged.*step_size=0\.2.*cg"),
    *(
        (
            partial(product_is_not_finite, name),
            tb.NonFinite,
            r"hypergradient is not finite.*det",
        )
        for name in ("cg", "minres", "neumann", "richardson", "direct")
    ),
    (sparse_parameter, tb.UnsupportedParameter, r"inner parameter.*sparse.*dense"),
    (
        complex_parameter,
        tb.UnsupportedParameter,
        r"outer parameter.*complex.*view_as_real",
    ),
    (expanded_parameter, tb.UnsupportedParameter, r"expanded.*clone\(\)"),
    (inference_parameter, tb.UnsupportedParameter, r"inference-mode"),
    (outer_data_exhausted, tb.OuterDataExhausted, r"iterator.*has ended.*DataLoader"),
    (outer_data_empty, tb.OuterDataExhausted, r"is empty"),
    (outer_data_is_a_number, tb.BilevelError, r"data=int.*iterable"),
    (all_batches_of_an_iterator, tb.BilevelError, r"iterated again"),
    (unknown_estimator, tb.UnknownName, r"'neuman'. Did you mean 'neumann'"),
    (unknown_option, tb.UnknownName, r"no option 'max_step'. Did you mean 'max_steps'"),
    (unreadable_estimator, tb.UnknownName, r"name=value.*max_steps=20"),
    (estimator_of_a_wrong_type, tb.UnknownName, r"estimator=3"),
    (bad_option_value, ValueError, r"max_steps=0.*whole number"),
    (
        term_outside_the_loss,
        tb.UnregisteredTerm,
        r"not parallel.*registered inner loss",
    ),
    (term_outside_the_loss_unrolled, tb.UnregisteredTerm, r"not parallel"),
    (clipping_not_declared, tb.ReplayMismatch, r"parallel.*tb\.clip_grad_norm"),
    (
        clipping_not_declared_unrolled,
        tb.ReplayMismatch,
        r"parallel.*tb\.clip_grad_norm",
    ),
    (
        clipping_in_a_later_step_unrolled,
        tb.ReplayMismatch,
        r"step 1.*gradient_transform",
    ),
    (scaler_not_declared, tb.ReplayMismatch, r"parallel.*grad_scaler=scaler"),
    (step_without_a_registered_loss, tb.UnregisteredTerm, r"no call.*paused\(\)"),
    (
        outer_variable_outside_the_loss,
        tb.OuterOutsideLoss,
        r"outer\[0\].*whole expression",
    ),
    (outer_variable_outside_the_loss_in_a_sum, tb.OuterOutsideLoss, r"outer\[0\]"),
    (
        argument_carries_graph,
        tb.ArgumentCarriesGraph,
        r"MulBackward0.*inside the registered",
    ),
    (no_update_rule, tb.NoUpdateRule, r"Unknown.*'cg'.*register_update_rule"),
    (lbfgs_unrolled, tb.NoUpdateRule, r"LBFGS.*closure.*'cg'"),
    (rule_of_an_instance, TypeError, r"not an instance"),
    (rule_without_a_function, TypeError, r"Unknown, None.*step\(parameter"),
    (
        hyperparameter_that_does_not_exist,
        tb.InvalidHyperparameters,
        r"'learning_rate', which no group has.*lr, momentum",
    ),
    (
        hyperparameter_of_another_shape,
        tb.InvalidHyperparameters,
        r"'lr' to a tensor of shape \(3,\)",
    ),
    (
        hyperparameters_of_too_many_groups,
        tb.InvalidHyperparameters,
        r"a list of 2.*1 dictionaries",
    ),
    (an_outer_variable_that_is_constant, tb.UnusedOuter, r"requires_grad is False"),
    (
        hyperparameters_that_come_and_go,
        tb.InvalidHyperparameters,
        r"'lr' at earlier steps and not at this one.*same keys",
    ),
    (
        hyperparameter_that_is_an_outer_variable,
        tb.InvalidHyperparameters,
        r"'lr' of inner parameter group 0.*inner_hyperparameters",
    ),
    (parameters_clamped_after_the_step, tb.ReplayMismatch, r"step 1.*written to"),
    (parameters_clamped_at_the_end, tb.ReplayMismatch, r"step 2.*written to"),
    (momentum_set_to_zero, tb.ReplayMismatch, r"before inner step 3.*restart\(\)"),
    (momentum_replaced_in_forward_mode, tb.ReplayMismatch, r"before inner step 3"),
    (a_step_inside_paused, tb.ReplayMismatch, r"step 0.*inside paused\(\)"),
    (a_step_inside_paused_unrolled, tb.ReplayMismatch, r"step 0.*inside paused\(\)"),
    (hyperparameters_that_are_none, tb.InvalidHyperparameters, r"returned None"),
    (hyperparameters_as_a_value, TypeError, r"pass a function"),
    (check_of_forward_mode, tb.BilevelError, r"keeps no steps.*'unrolled'"),
    (
        forward_mode_with_many_outer_numbers,
        tb.SolverLimit,
        r"outer ones.*products for every inner step.*forward_gradient",
    ),
    (
        forward_mode_that_did_not_follow,
        tb.NoInnerStep,
        r"optimizer\.estimator = 'forward'",
    ),
    (iterates_beyond_their_budget, tb.TrajectoryTooLong, r"raise iterate_bytes"),
    (checkpoints_of_kept_graphs, ValueError, r"keep_graph=True.*Leave out"),
    (kept_graph_of_a_third_party, tb.InvalidLoss, r"in neither optimizer"),
    (batch_changed_under_a_kept_graph, tb.BatchChanged, r"keep_graph=True nothing"),
    (checkpoints_at_a_word, ValueError, r"checkpoint_every.*'sometimes'"),
    (
        learning_rate_with_an_implicit_estimator,
        tb.InvalidHyperparameters,
        r"lr depend.*'unrolled'",
    ),
    (decay_of_an_unknown_optimizer, tb.NoUpdateRule, r"weight_decay=0\.1"),
    (trajectory_too_long, tb.TrajectoryTooLong, r"MiB a step.*checkpoint_every"),
    (batches_too_large, tb.TrajectoryTooLong, r"max_record_bytes"),
    (unrolled_without_iterates, tb.NoInnerStep, r"keeps no iterates"),
    (direct_too_large, tb.SolverLimit, r"6 × 6 matrix.*max_bytes"),
    (inner_is_outer, tb.BilevelError, r"the same optimizer"),
    (
        initialisation_without_a_task,
        tb.BilevelError,
        r"inner\[0\]|outer\[0\].*task\(\)",
    ),
    (
        initialisation_without_a_task_explicit,
        tb.BilevelError,
        r"initialisation.*task\(\)",
    ),
    (
        initialisation_with_an_implicit_estimator,
        tb.BilevelError,
        r"where the inner loop began.*proximal_term",
    ),
    (outer_step_inside_a_task, tb.BilevelError, r"inside a task.*after the"),
    (outer_step_without_a_task, tb.BilevelError, r"no task since the last outer step"),
    (
        outer_step_by_the_library_inside_a_task,
        tb.BilevelError,
        r"inside a task.*after the",
    ),
    (outer_loss_where_nothing_is_recorded, tb.NoInnerStep, r"record=False.*no_grad"),
    (backward_after_the_task, tb.StalePoint, r"end of a task.*inside it"),
    (hyperparameter_that_is_not_finite, tb.InvalidHyperparameters, r"'lr' to nan"),
    (
        rule_that_returns_the_parameter_only,
        tb.ReplayMismatch,
        r"Mine.*\(parameter, state\)",
    ),
    (rule_that_forgets_its_state, tb.ReplayMismatch, r"Mine.*without 'm'"),
    (nested_tasks, tb.BilevelError, r"cannot be nested"),
    (
        task_with_automatic_outer_steps,
        tb.BilevelError,
        r"inner_steps=3.*outer_step\(\)",
    ),
    (saved_inside_a_task, tb.BilevelError, r"Save between tasks"),
    (maml_that_does_not_learn_everything, tb.BilevelError, r"2 of the 2 inner"),
    (anil_without_features, tb.BilevelError, r"head only.*MAML"),
    (negative_proximal_term, ValueError, r"proximal_term"),
    (
        not_an_optimizer,
        TypeError,
        r"inner= must be a torch\.optim optimizer, got Tensor",
    ),
    (no_inner_optimizer, TypeError, r"empty list"),
    (nested, TypeError, r"itself a BilevelOptimizer"),
    (bad_inner_steps, ValueError, r"inner_steps=0"),
    (bad_unused, ValueError, r"'error' or 'zero'"),
    (no_second_derivative, tb.NoSecondDerivative, r"cdist.*expanded square"),
    (linearization_at_another_point, tb.StalePoint, r"another point"),
    (linearization_after_an_invisible_move, tb.StalePoint, r"another point"),
    (minimised_and_maximised, tb.NonSymmetricSystem, r"'direct'"),
    (one_of_two_steps_twice, tb.BilevelError, r"stepped twice.*optimizer\.step\(\)"),
    (ambiguous_group, tb.BilevelError, r"ambiguous.*inner\[i\]"),
    (rng_outside_the_recorded_ones, tb.ReplayMismatch, r"parallel"),
]


@pytest.mark.parametrize(
    "call, error, message", TABLE, ids=lambda v: getattr(v, "__name__", "")
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match="(?s)" + message) as caught:
        call()
    assert caught.type is error or not issubclass(error, tb.BilevelError)


def test_every_error_is_in_the_table_or_tested_elsewhere():
    elsewhere = {"OpaqueStep", "BilevelError"}  # test_loop.py; the base class
    elsewhere |= {"CaptureFailed", "NoThirdDerivative"}  # test_engines.py, test_ops.py
    elsewhere |= {"KernelUnavailable"}  # test_kernels.py
    elsewhere |= {"NeedsLoop", "UnnamedClosure"}  # test_func.py, test_func_root.py
    elsewhere |= {"ForwardOverForward", "UnsupportedTransform"}
    classes = {
        name
        for name, value in vars(tb.errors).items()
        if inspect.isclass(value) and issubclass(value, tb.BilevelError)
    }
    assert classes - elsewhere == {e.__name__ for _, e, _ in TABLE} & (
        classes - elsewhere
    )


@pytest.mark.parametrize(
    "call",
    [
        outer_variable_in_neither_loss,
        negative_curvature_strict,
        neumann_diverges,
        clipping_not_declared,
        term_outside_the_loss_unrolled,
        product_is_not_finite,
    ],
    ids=lambda c: c.__name__,
)
def test_nothing_is_half_stepped(call, monkeypatch):
    """The outer optimizer does not step and the outer gradient stays empty."""
    stepped = []
    original = tb.BilevelOptimizer.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.outer.register_step_post_hook(lambda *_: stepped.append(1))
        stepped.append(self)

    monkeypatch.setattr(tb.BilevelOptimizer, "__init__", watched)
    with pytest.raises(tb.BilevelError):
        call()
    (optimizer,) = stepped
    assert all(
        p.grad is None for g in optimizer.outer.param_groups for p in g["params"]
    )
    assert optimizer.outer_steps == 0 and len(optimizer._recorder.window) == 1


def test_outer_outside_loss_does_not_pollute():
    problem = Ridge()
    optimizer = problem.optimizer()
    for expression in (
        lambda: problem.lam.sum() * problem.train(),
        lambda: problem.train() + (problem.lam * problem.w).sum(),
    ):
        with pytest.raises(tb.OuterOutsideLoss):
            expression().backward()
        assert problem.lam.grad is None
        optimizer.zero_grad()
    problem.steps(optimizer)
    optimizer.outer_step()


def test_unused_zero():
    problem = Ridge()
    extra = leaf(4)
    optimizer = problem.optimizer(
        outer=SGD([problem.lam, extra], lr=0.1), unused="zero"
    )
    problem.steps(optimizer)
    with pytest.warns(tb.ZeroHypergradientWarning, match=r"outer\[1\]"):
        optimizer.outer_step()
    assert torch.equal(extra.grad, torch.zeros(4))


@pytest.mark.parametrize("estimator", ["cg", "neumann", "richardson"])
def test_negative_curvature_warns_once_and_goes_on(estimator):
    problem = Quadratic(A=torch.diag(torch.linspace(-1, 4, 11)))
    optimizer = problem.optimizer(estimator=estimator)
    problem.steps(optimizer)
    with pytest.warns(
        tb.NegativeCurvatureWarning, match="negative curvature -.*damping"
    ):
        optimizer.outer_step()
    assert optimizer.last_report.status == "negative curvature"
    assert all(torch.isfinite(x).all() for x in problem.x)
    problem.steps(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.outer_step()
    assert "negative curvature" in str(optimizer.last_report)


def test_an_automatic_step_size_recovers_when_the_curvature_grows():
    """λ̂ from the first use is stale; the divergence is seen and λ̂ estimated again."""
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="richardson(max_steps=500, rtol=1e-10)")
    problem.solve()
    problem.steps(optimizer)
    optimizer.outer_step()
    problem.A *= 30
    problem.solve()
    problem.steps(optimizer)
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, problem.exact(), rtol=1e-7, atol=1e-8)


def test_a_loss_that_raises_is_the_users_own_error():
    problem = Ridge()
    optimizer = problem.optimizer()
    problem.steps(optimizer)

    def broken():
        raise KeyError("mine")

    optimizer.outer_losses.clear()
    optimizer.outer_loss(broken)
    with pytest.raises(KeyError, match="mine"):
        optimizer.outer_step()
    assert problem.lam.requires_grad and F is not None and flat(problem.x).requires_grad
