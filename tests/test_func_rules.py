"""Update rules as pure functions: torch.optim's values, differences' derivatives, in lanes."""

import pytest
import torch
import torchopt
from cases import MUON, RULES, rule_id
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils._pytree import tree_map

import torch_bilevel as tb
from torch_bilevel.func.rules import rule
from torch_bilevel.func.unrolling import unroll

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def close(found, expected, rtol=1e-12, atol=1e-13):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def fixed(options):
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}


def leaves_of(tree):
    return tree_map(lambda t: t.clone().requires_grad_(), tree)


@pytest.fixture
def full_precision(monkeypatch):
    """Muon orthogonalises in bfloat16, of which there are no finite differences."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


A, B = torch.linspace(-1, 2, 15).sin().reshape(5, 3).double(), torch.ones(5, 2).double()


def curved(y, x):
    fit = (torch.tanh(A @ y["w"] + y["b"]) - B) ** 2
    return (x.exp() * fit).mean() + (x[0] - x[1] * y["b"]).pow(2).sum()


def start():
    ramp = torch.arange(8.0).mul(1.7).cos()
    return {"w": ramp[:6].reshape(3, 2), "b": ramp[6:].reshape(1, 2)}


def valid(y, x):
    return (y["w"].sin() ** 2).sum() + (y["b"] * x).sum()


def written_out(case, x, num_steps):
    """The same loop with the optimizer itself."""
    kind, options = case
    y = leaves_of(start())
    optimizer = kind(list(y.values()), **fixed(options))
    for _ in range(num_steps):
        optimizer.zero_grad()
        curved(y, x.detach()).backward()
        optimizer.step()
    return tree_map(torch.Tensor.detach, y)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("num_steps", [1, 2, 6])
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_every_rule_equals_the_optimizer_and_its_differences(case, num_steps):
    x = torch.tensor([0.2, -0.4])
    train = unroll(rule(case[0], **fixed(case[1])), num_steps)(curved)
    close(train(start(), x), written_out(case, x, num_steps))
    found = grad(lambda x: valid(train(start(), x), x))(x)
    difference = []
    for e in torch.eye(2):
        ends = [x + k * 1e-5 * e for k in (-2, -1, 1, 2)]
        ends = [valid(written_out(case, at, num_steps), at) for at in ends]
        difference.append((ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / 12e-5)
    difference = torch.stack(difference)
    close(found, difference, rtol=2e-6, atol=2e-8)
    again = x.clone().requires_grad_()
    valid(train(start(), again), again).backward()
    close(again.grad, found)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_every_rule_in_forward_mode_and_in_lanes(case):
    train = unroll(rule(case[0], **fixed(case[1])), 6)(curved)

    def outcome(x):
        return valid(train(start(), x), x)

    x, lanes = torch.tensor([0.2, -0.4]), torch.randn(3, 2)
    found = vmap(grad(outcome))(lanes)
    close(found, torch.stack([grad(outcome)(lane) for lane in lanes]))
    close(jacfwd(outcome)(x), grad(outcome)(x))
    close(jvp(grad(outcome), (x,), (lanes[0],))[1], hessian(outcome)(x) @ lanes[0])
    in_forward = unroll(rule(case[0], **fixed(case[1])), 6, mode="forward")(curved)
    close(grad(lambda x: valid(in_forward(start(), x), x))(x), grad(outcome)(x))


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_a_learned_learning_rate(case):
    """One for all, and one for each lane."""
    options = fixed(case[1])
    options.pop("damping", None)

    def learned(outer, step):
        return rule(case[0], **{**options, "lr": outer})

    x = torch.tensor([0.2, -0.4])
    train = unroll(learned, 4)(lambda y, lr: curved(y, x))

    def outcome(lr):
        return valid(train(start(), lr), x)

    rates = torch.tensor([0.02, 0.03])
    found, h = vmap(grad(outcome))(rates), 1e-6
    for lr, slope in zip(rates, found, strict=True):
        close(slope, (outcome(lr + h) - outcome(lr - h)) / (2 * h), 1e-5, 1e-7)
        close(slope, grad(outcome)(lr))
    close(vmap(outcome)(rates), torch.stack([outcome(lr) for lr in rates]))
    memory = [{"checkpoint_every": 2}, {"mode": "forward"}]
    for how in memory[:1] if case[0] is MUON else memory:
        train = unroll(learned, 4, **how)(lambda y, lr: curved(y, x))
        close(vmap(grad(outcome))(rates), found)


def test_clipping_of_torchopt_is_refused():
    """It takes the norm for a constant: values would be right, and no derivative."""
    clip, sgd = torchopt.clip.clip_grad_norm(0.5), torchopt.sgd(0.1, 0.9)
    for clipped in (clip, torchopt.chain(clip, sgd), torchopt.chain(sgd, clip, sgd)):
        with pytest.raises(tb.NoUpdateRule, match="norm of the gradients for a const"):
            unroll(clipped, 1)


def test_a_rule_that_follows_a_schedule():
    def scheduled(outer, step):
        return rule(SGD, lr=0.1 if step < 2 else 0.01)

    y = unroll(scheduled, 3)(lambda y, x: x * y)(torch.tensor(1.0), torch.tensor(2.0))
    close(y, torch.tensor(1 - 2 * 0.21))


def test_registered_rules(monkeypatch):
    class Halving(SGD):
        pass

    monkeypatch.setitem(
        tb.inner.RULES,
        Halving,
        tb.inner.UpdateRule(Halving, lambda y, g, s, hyper: (y / 2, s)),
    )
    train = unroll(rule("halving(lr=1)"), 3)(lambda y, x: (y * x).sum())
    close(train(torch.ones(2), torch.ones(2)), torch.ones(2) / 8)


def test_what_is_no_rule():
    def square(y, x):
        return (y * x) ** 2

    one = torch.ones(())
    with pytest.raises(tb.UnknownName, match="'smd'.*Did you mean 'sgd'"):
        unroll("smd", 3)
    with pytest.raises(tb.UnknownName, match="no option 'lrr'. Did you mean 'lr'"):
        rule(SGD, lrr=one)
    with pytest.raises(tb.UnknownName, match="no option 'lrr'. Did you mean 'lr'"):
        rule("sgd(lrr=0.1)")
    with pytest.raises(ValueError, match="learning rate"):
        rule(SGD, lr=-1.0)
    with pytest.raises(tb.NoUpdateRule, match="LBFGS"):
        rule(torch.optim.LBFGS)
    with pytest.raises(TypeError, match="write a class"):
        rule(SGD([one.clone().requires_grad_()], lr=0.1))
    for wrong in (SGD, SGD([one.clone().requires_grad_()], lr=0.1)):
        with pytest.raises(TypeError, match=r"write rule\(torch.optim.SGD, lr="):
            unroll(wrong, 3)
    with pytest.raises(TypeError, match="the int 3 for a rule"):
        unroll(3, 3)
    with pytest.raises(TypeError, match="NoneType None for a rule"):
        unroll(lambda outer, step: None, 3)(square)(one, one)


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.NAdam])
def test_numbers_that_torch_keeps_in_float32_do_not_round_under_transforms(kind):
    with torch.random.fork_rng():
        y0, x = torch.randn(3), torch.randn(3)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # of the scalars of optimizer state
    try:
        train = unroll(rule(kind, lr=0.1), 5)(lambda y, x: ((y - x) ** 2).sum())
        plain = train(y0, x)
        (value, _) = torch.func.vjp(train, y0, x)
        torch.testing.assert_close(value, plain, rtol=1e-14, atol=1e-14)
        lanes = torch.func.vmap(train)(y0[None], x[None])[0]
        torch.testing.assert_close(lanes, plain, rtol=1e-14, atol=1e-14)
    finally:
        torch.set_default_dtype(previous)
