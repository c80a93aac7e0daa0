"""What a batch can be: empty, time-major, of several scores; and functions that fail on it."""

import oracles
import pytest
import torch
from torch import nn

import gpkit


def net(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grads(value, module):
    found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


EMPTY = {
    "r1": lambda n, x: gpkit.r1()(n, real=x),
    "wgan_gp": lambda n, x: gpkit.wgan_gp()(n, real=x, fake=x),
    "finite differences": lambda n, x: gpkit.r1(estimator="finite_difference")(n, real=x),
    "curvature": lambda n, x: gpkit.curvature()(n, x),
    "projection": lambda n, x: gpkit.curvature(estimator="projection")(n, x),
    "taylor": lambda n, x: gpkit.curvature(estimator="taylor")(n, x),
    "spectral": lambda n, x: gpkit.spectral_jacobian()(n, x),
    "maximum": lambda n, x: gpkit.r1(reduce="max")(n, real=x),
    "path length": lambda n, x: gpkit.path_length()(n, x),
    "dragan": lambda n, x: gpkit.dragan()(n, real=x),
    "duq": lambda n, x: gpkit.duq()(n, x),
    "eikonal": lambda n, x: gpkit.eikonal()(n, x),
    "cure": lambda n, x: gpkit.cure()(n, x),
    "per sample": lambda n, x: gpkit.per_sample_grad_norm()(lambda: n(x).squeeze(1), n),
    "a graph": lambda n, x: (lambda z: gpkit.r1()(n(z), z))(x.clone().requires_grad_()),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_batch_costs_nothing_and_trains_nothing(kind):
    # a field whose mask leaves no points: zero with a graph, not NaN, which would end the training
    module = net()
    value = EMPTY[kind](module, data(0, 3))
    assert value.item() == 0
    assert not grads(value, module).any()
    again = EMPTY[kind](module, data(5, 3))  # the empty batch taught it nothing
    assert again.item() > 0
    assert grads(again, module).isfinite().all()


@pytest.mark.parametrize("given", ["list", "of=list"])
@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_scores_at_several_scales_are_summed(given, estimator):
    # (‖∇s₁‖ - 1)² + (‖∇s₂‖ - 1)², each a mean over the samples; not of the slope of a sum
    module, x = net(2), data(4, 3)

    def scores(z):
        y = module(z)
        parts = [y[:, :1], y[:, 1] * y[:, 0]]
        return parts if given == "list" else tuple(parts)

    if estimator == "finite_difference":
        estimator = gpkit.finite_difference(1e-6, side="central")
    of = {} if given == "list" else {"of": list}
    penalty = gpkit.GradientPenalty(
        form=gpkit.two_sided(1.0), estimator=estimator, weight=3.0, **of
    )
    value = penalty(scores, x)

    def truth(params):
        def one(i):
            def f(z):
                y = torch.func.functional_call(module, params, (z[None],))[0]
                return y[0] if i == 0 else y[1] * y[0]

            return 3 * (oracles.input_norms(f, 1, x) - 1).square().mean()

        return one(0) + one(1)

    params = {k: v.detach() for k, v in module.named_parameters()}
    true = torch.func.grad(truth)(params)
    torch.testing.assert_close(value, truth(params), rtol=1e-5, atol=0)
    true = torch.cat([g.flatten() for g in true.values()])
    torch.testing.assert_close(grads(value, module), true, rtol=1e-4, atol=1e-7)


def test_a_list_of_tensors_with_graphs():
    module, x = net(2), data(4, 3).requires_grad_()
    y = module(x)
    found = gpkit.r1()([y[:, :1], y[:, 1:]], x)
    parts = [gpkit.r1()(y[:, i], x) for i in (0, 1)]
    torch.testing.assert_close(found, sum(parts))


def test_a_tuple_says_how_all_of_it_is_meant():
    module = net()
    with pytest.raises(TypeError, match=r"of=lambda output: output\[0\]`, or all .* `of=list`"):
        gpkit.r1()(lambda z: (module(z), module(z)), real=data(4, 3))


@pytest.mark.parametrize("steps", [5, 4])
def test_the_batch_may_be_another_dimension(steps):
    # with as many steps as samples a time-major batch was grouped by time, without a word
    torch.manual_seed(0)
    rnn, head = nn.GRU(3, 6).double(), nn.Linear(6, 1).double()

    def critic(x):
        return head(rnn(x)[0][-1])

    real, fake = data(steps, 4, 3), data(steps, 4, 3, seed=2)
    time_major = gpkit.wgan_gp(seed=0, wrt=gpkit.inputs(batch_dim=1))
    batch_major = gpkit.wgan_gp(seed=0)
    found = time_major(critic, real=real, fake=fake)
    true = batch_major(
        lambda x: critic(x.transpose(0, 1)), real=real.transpose(0, 1), fake=fake.transpose(0, 1)
    )
    torch.testing.assert_close(found, true, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads(found, rnn), grads(true, rnn), rtol=1e-10, atol=1e-14)
    n = gpkit.input_grad_norm(wrt=gpkit.inputs(batch_dim=1)).terms(critic, real).norms
    with torch.backends.cudnn.flags(enabled=False):
        slopes = [torch.func.grad(lambda z: critic(z[:, None]).sum())(s) for s in real.unbind(1)]
    torch.testing.assert_close(n, torch.stack([s.norm() for s in slopes]))


def test_a_batch_that_is_not_first_is_asked_for():
    module = net()
    with pytest.raises(ValueError, match=r"is the batch the first dimension\? .*batch_dim=1"):
        gpkit.r1()(lambda z: module(z).mean((0, 2)), real=data(5, 6, 3))
    x = data(5, 6, 3).requires_grad_()
    with pytest.raises(ValueError, match="needs a callable, whose inputs it rearranges"):
        gpkit.r1(wrt=gpkit.inputs(batch_dim=1))(module(x).mean((0, 2)), x)
    with pytest.raises(ValueError, match="inputs with more than 1 dimensions; got"):
        gpkit.r1(wrt=gpkit.inputs(batch_dim=1))(module, real=data(5))


def test_labels_in_a_closure_must_follow_the_points():
    module, labels = net(4), torch.arange(5) % 4
    x, y = data(5, 3), data(5, 3, seed=2)

    def critic(z):
        return module(z).gather(1, labels[:, None])

    with pytest.raises(
        ValueError, match=r"labels or latents, let them follow the points, labels.repeat\(2\)"
    ):
        gpkit.r1_r2()(critic, real=x, fake=y)
    with pytest.raises(RuntimeError, match=r"10 points, 2 for each of the 5 .*labels.repeat\(2\)"):
        gpkit.r1_r2()(lambda z: module(z) * labels[:, None], real=x, fake=y)
    labels = labels.repeat(2)  # the advice
    gpkit.r1_r2()(critic, real=x, fake=y).backward()


def test_another_dtype_is_named():
    module = net()
    with pytest.raises(RuntimeError, match=r"torch.float32 and .* torch.float64: .*x.to\(torch.fl"):
        gpkit.r1()(module, real=data(4, 3).float())
    said = "on the meta device have a shape and no values"
    with pytest.raises(RuntimeError, match=said):
        gpkit.r1()(module.to("meta"), real=data(4, 3))
    with pytest.raises(ValueError, match=said):
        gpkit.r1()(module, real=data(4, 3).to("meta"))


def test_errors_of_the_users_own_are_left_alone():
    class MineError(Exception):
        pass

    def broken(x):
        raise MineError("as it was")

    with pytest.raises(MineError, match="as it was"):
        gpkit.r1()(broken, real=data(4, 3))
    with pytest.raises(ValueError, match=r"^as it was$"):
        gpkit.r1()(lambda x: (_ for _ in ()).throw(ValueError("as it was")), real=data(4, 3))


def test_a_sparse_gradient_is_named_and_finite_differences_take_it():
    torch.manual_seed(0)
    table, ids = nn.Embedding(6, 3, sparse=True).double(), torch.tensor([0, 2, 2])

    def loss():
        return table(ids).tanh().square().mean()

    with pytest.raises(RuntimeError, match=r"sparse gradient, .*nn.Embedding\(sparse=False\)"):
        gpkit.weight_grad_norm()(loss, table)
    found = gpkit.weight_grad_norm(
        weight=1.0, estimator=gpkit.finite_difference(1e-6, side="central")
    )(loss, table)
    dense = nn.Embedding(6, 3, _weight=table.weight.detach().clone()).double()
    true = gpkit.weight_grad_norm(weight=1.0)(lambda: dense(ids).tanh().square().mean(), dense)
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(grads(found, table), grads(true, dense), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [1, 3])
def test_r1_r2_of_unequal_batches_is_the_sum_of_both(scale):
    module, x, y = net(), data(2, 3), data(2 * scale, 3, seed=2)
    found = gpkit.r1_r2(weight=3.0)(module, real=x, fake=y)

    def truth(params):
        def f(z):
            return torch.func.functional_call(module, params, (z[None],))[0, 0]

        return 1.5 * sum(oracles.input_norms(f, 1, z).square().mean() for z in (x, y))

    params = {k: v.detach() for k, v in module.named_parameters()}
    true = torch.cat([g.flatten() for g in torch.func.grad(truth)(params).values()])
    torch.testing.assert_close(found, truth(params))
    slopes = grads(found, module)
    torch.testing.assert_close(slopes, true[: len(slopes)])


class Graphs(nn.Module):
    """A net on the nodes of graphs, with one score for each graph."""

    def __init__(self):
        super().__init__()
        self.node, self.head = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()

    def forward(self, x, index, count):
        h = self.node(x).tanh()
        return self.head(h.new_zeros(count, 5).index_add(0, index, h).tanh())


INDEX = torch.tensor([1, 0, 0, 2, 1, 0])


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
@pytest.mark.parametrize("form", ["squared", "two_sided"])
def test_groups_have_one_norm_over_all_of_their_rows(norm, form):
    torch.manual_seed(0)
    module, x = Graphs(), data(6, 3)
    form = gpkit.squared(norm=norm) if form == "squared" else gpkit.two_sided(0.3, norm=norm)
    penalty = gpkit.GradientPenalty(of=lambda y: y[:, 0], form=form, weight=2.0)
    found = penalty(lambda z: module(z, INDEX, 3), x, groups=INDEX)

    def truth(params):
        def score(z, g):
            return torch.func.functional_call(module, params, (z, INDEX, 3))[g, 0]

        total = 0.0
        for g in range(3):  # the whole gradient of each graph's score
            slope = torch.func.grad(score)(x, g)
            assert not slope[g != INDEX].any()
            n = torch.linalg.vector_norm(slope.flatten(), oracles.ORDS[norm])
            total = total + (n**2 if isinstance(form, gpkit.squared) else (n - 0.3) ** 2)
        return 2.0 * total / 3

    params = {k: v.detach() for k, v in module.named_parameters()}
    true = torch.func.grad(truth)(params)
    torch.testing.assert_close(found, truth(params))
    found.backward()
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, true[name], rtol=1e-9, atol=1e-12)


def test_groups_of_a_graph_that_is_there_with_weights_and_projections():
    torch.manual_seed(0)
    module, x = Graphs(), data(6, 3).requires_grad_()
    y = module(x, INDEX, 3)
    jacobian = torch.func.jacrev(lambda z: module(z, INDEX, 3))(x.detach())  # [3, 2, 6, 3]
    n2 = jacobian.square().sum((1, 2, 3))
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    found = gpkit.GradientPenalty()(y, x, groups=INDEX, sample_weight=weights)
    torch.testing.assert_close(found, (n2 * weights).sum() / 3)
    many = gpkit.GradientPenalty(estimator=gpkit.projection(3000), seed=0)
    estimate = many(y, x, groups=INDEX).item()
    assert estimate == pytest.approx(n2.mean().item(), rel=0.05)


@pytest.mark.parametrize(
    ("groups", "options", "error", "said"),
    [
        ([0, 1], {}, TypeError, r"must be an index tensor \[N\].*; got list"),
        (INDEX.double(), {}, TypeError, r"index tensor \[N\], .*got torch.float64"),
        (INDEX[:4], {}, ValueError, r"for each of 6 rows, .* has 3 groups; got 4 numbers from 0"),
        (INDEX + 1, {}, ValueError, r"a number from 0 to 2 .*; got 6 numbers from 1 to 3"),
        (INDEX, {"order": 2}, ValueError, "groups= takes order=1"),
        (INDEX, {"estimator": "finite_difference"}, ValueError, "groups= takes order=1, .*exact"),
        (INDEX, {"at": gpkit.perturb(0.1)}, ValueError, "make the points of each group first"),
    ],
)
def test_groups_that_do_not_fit(groups, options, error, said):
    module = Graphs()
    penalty = gpkit.GradientPenalty(of=lambda y: y[:, 0], **options)
    with pytest.raises(error, match=said):
        penalty(lambda z: module(z, INDEX, 3), data(6, 3), groups=groups)


def test_time_major_inputs_with_as_many_steps_as_samples_are_warned_of():
    torch.manual_seed(0)
    rnn, head = nn.GRU(3, 6).double(), nn.Linear(6, 1).double()
    with pytest.warns(UserWarning, match=r"depend on each other .*wrt=gpkit.inputs\(batch_dim=1\)"):
        gpkit.r1()(lambda x: head(rnn(x)[0][-1]), real=data(4, 4, 3))


@pytest.mark.filterwarnings("ignore::Warning")  # of Dynamo, which reads attributes
def test_a_penalty_inside_of_a_compiled_loss():
    module, x = net(), data(4, 3)
    penalty = gpkit.r1(weight=3.0)
    whole = module(x).square().mean() + penalty(module, real=x)
    true = grads(whole, module)

    def loss_of(penalty):
        return torch.compile(
            lambda z: module(z).square().mean() + penalty(module, real=z), backend="aot_eager"
        )

    fused = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with pytest.raises(RuntimeError, match=r"no double backward: .*torch.compiler.disable\(pen"):
        loss_of(penalty)(x)
    torch._dynamo.reset()
    # what Dynamo traces and leaves by an error must not leave the kernels switched
    assert fused == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )
    found = loss_of(torch.compiler.disable(penalty))(x)  # the advice
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(grads(found, module), true)
    torch._dynamo.reset()
