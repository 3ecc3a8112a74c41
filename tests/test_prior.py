"""The prior is a bijection between codes and noise whose density is the one its determinant says."""

import pytest
import scipy.stats
import torch
import zuko
from tiny import shaken
from torch import Tensor
from torch.autograd.functional import jacobian

from vlae.layers import normal_log_prob
from vlae.prior import AFPrior, Made

CASES = [
    (code, depth, width, scale)
    for code, width in [(1, 8), (2, 8), (7, 24), (7, 3), (5, 1)]
    for depth in range(4)
    for scale in (False, True)
]
over_cases = pytest.mark.parametrize(("code", "depth", "width", "scale"), CASES)


def prior_of(code: int, depth: int, width: int, scale: bool) -> AFPrior:
    return shaken(AFPrior(code=code, depth=depth, width=width, scale=scale))


def codes(code: int, count: int = 5) -> Tensor:
    return 2 * torch.randn(count, code, dtype=torch.float64)


def plain_conditioner(step: Made, z: list[float]) -> tuple[list[float], list[float]]:
    """Shifts and log-scales of one code, unit by unit, by the rule that a unit of degree m sees z_1..z_m."""
    code, width = len(z), step.first.out_features
    degree = [unit * (code - 1) // width + 1 for unit in range(width)]

    def layer(linear, inputs, allowed, outputs):
        sums = []
        for o in range(outputs):
            total = linear.bias[o].item()
            for k, value in enumerate(inputs):
                if allowed(o, k):
                    total += linear.weight[o, k].item() * value
            sums.append(total)
        return sums

    h = [max(0.0, a) for a in layer(step.first, z, lambda o, k: k + 1 <= degree[o], width)]
    h = [max(0.0, a) for a in layer(step.second, h, lambda o, k: degree[k] <= degree[o], width)]
    shift = layer(step.shift, h, lambda o, k: degree[k] < o + 1, code)
    if step.scale is None:
        return shift, [0.0] * code
    raw = torch.tensor(layer(step.scale, h, lambda o, k: degree[k] < o + 1, code), dtype=torch.float64)
    return shift, (2 * torch.tanh(raw / 2)).tolist()


def slow_inverse(prior: AFPrior, eps: Tensor) -> Tensor:
    """One dimension after the other, each by a whole pass through the step."""
    for k in range(len(prior.steps) - 1, -1, -1):
        z = torch.zeros_like(eps)
        for i in range(eps.shape[1]):
            shift, log_scale = prior.steps[k](z)
            z[:, i] = shift[:, i] + torch.exp(log_scale[:, i]) * eps[:, i]
        eps = z.flip(1) if k > 0 else z
    return eps.detach()


@over_cases
def test_inverse_is_inverse(code: int, depth: int, width: int, scale: bool) -> None:
    prior, z = prior_of(code, depth, width, scale), codes(code)
    torch.testing.assert_close(prior.inverse(prior(z)[0]), z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior(prior.inverse(z))[0], z, rtol=1e-9, atol=1e-9)


@over_cases
def test_inverse_computes_what_whole_passes_compute(code: int, depth: int, width: int, scale: bool) -> None:
    prior, eps = prior_of(code, depth, width, scale), codes(code)
    torch.testing.assert_close(prior.inverse(eps), slow_inverse(prior, eps), rtol=1e-9, atol=1e-9)


@over_cases
def test_log_det_is_that_of_the_jacobian(code: int, depth: int, width: int, scale: bool) -> None:
    prior, z = prior_of(code, depth, width, scale), codes(code)
    for one, log_det in zip(z, prior(z)[1], strict=True):
        matrix = jacobian(lambda v: prior(v[None])[0][0], one)
        sign, expected = torch.linalg.slogdet(matrix)
        assert abs(sign) == 1  # orders are reversed between steps
        torch.testing.assert_close(log_det, expected, rtol=1e-10, atol=1e-10)
        if not scale:
            assert log_det == 0


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("code", [2, 3, 7])
def test_a_step_is_triangular_and_two_are_not(code: int, scale: bool) -> None:
    def matrix(depth: int) -> Tensor:
        prior, z = prior_of(code, depth, 64, scale), codes(code, 64)
        total = jacobian(lambda v: prior(v)[0].sum(0), z)  # [eps, B, z]
        return total.abs().amax(1)

    once, twice = matrix(1), matrix(2)
    assert (once.triu(1) == 0).all()
    assert (once.tril() > 0)[torch.ones(code, code).tril().bool()].all()
    assert (twice > 0).all()  # the second step sees the code in reverse


@pytest.mark.parametrize(("code", "width"), [(1, 4), (2, 6), (7, 12), (7, 3)])
@pytest.mark.parametrize("scale", [False, True])
def test_a_step_agrees_with_plain_loops(code: int, width: int, scale: bool) -> None:
    step = shaken(Made(code, width, scale))
    z = codes(code, 3)
    shift, log_scale = step(z)
    for row, one in enumerate(z.tolist()):
        expected = plain_conditioner(step, one)
        torch.testing.assert_close(shift[row].tolist(), expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(log_scale[row].tolist(), expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("code", [1, 2, 7])
def test_agrees_with_zuko_given_the_same_conditioner(code: int, depth: int, scale: bool) -> None:
    prior = prior_of(code, depth, 16, scale)

    def transform(step: Made):
        def affine(z: Tensor) -> torch.distributions.AffineTransform:
            shift, log_scale = step(z)
            return torch.distributions.AffineTransform(-shift * torch.exp(-log_scale), torch.exp(-log_scale))

        independent = lambda z: torch.distributions.IndependentTransform(affine(z), 1)  # noqa: E731
        return zuko.transforms.AutoregressiveTransform(independent, passes=code)

    reverse = zuko.transforms.PermutationTransform(torch.arange(code - 1, -1, -1))
    steps = [part for step in prior.steps for part in (reverse, transform(step))][1:]
    flow = torch.distributions.TransformedDistribution(
        torch.distributions.Independent(torch.distributions.Normal(torch.zeros(code).double(), 1.0), 1),
        [part.inv for part in reversed(steps)],
    )
    z = codes(code)
    eps, log_det = prior(z)
    torch.testing.assert_close(normal_log_prob(eps) + log_det, flow.log_prob(z), rtol=1e-9, atol=1e-9)
    expected = eps
    for part in reversed(steps):
        expected = part.inv(expected)
    torch.testing.assert_close(prior.inverse(eps), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [False, True])
def test_integrates_to_one(depth: int, scale: bool) -> None:
    prior = shaken(AFPrior(code=2, depth=depth, width=8, scale=scale), 0.15)
    axis = torch.linspace(-16, 16, 641, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        eps, log_det = prior(z)
        density = torch.exp(normal_log_prob(eps) + log_det)
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-4)
    assert density.view(641, 641)[[0, -1]].max() < 1e-6  # nothing is cut off


@over_cases
def test_a_fresh_prior_of_any_depth_is_the_standard_normal(code: int, depth: int, width: int, scale: bool) -> None:
    prior, z = AFPrior(code=code, depth=depth, width=width, scale=scale).double(), codes(code)
    eps, log_det = prior(z)
    expected = scipy.stats.norm.logpdf(z.numpy()).sum(1)
    torch.testing.assert_close(normal_log_prob(eps) + log_det, torch.from_numpy(expected))


def test_depth_zero_is_the_identity_and_has_no_parameters() -> None:
    prior, z = prior_of(7, 0, 8, True), codes(7)
    eps, log_det = prior(z)
    assert torch.equal(eps, z)
    assert torch.equal(prior.inverse(z), z)
    assert (log_det == 0).all()
    assert not list(prior.parameters())


def test_log_scales_are_bounded() -> None:
    step = shaken(Made(7, 24, True))
    _, log_scale = step(1e4 * codes(7, 50))
    assert log_scale.abs().max() <= 2
    assert log_scale.abs().max() > 1.9


@pytest.mark.parametrize("scale", [False, True])
def test_an_empty_code_has_an_empty_flow(scale: bool) -> None:
    prior = AFPrior(code=0, depth=3, width=8, scale=scale)
    eps, log_det = prior(torch.zeros(4, 0))
    assert eps.shape == prior.inverse(eps).shape == (4, 0)
    assert torch.equal(log_det, torch.zeros(4))
    assert not list(prior.parameters())


def test_autocast_does_not_reach_the_flow() -> None:
    prior, z = prior_of(7, 2, 16, True).float(), codes(7).float()
    with torch.autocast("cpu", torch.bfloat16):
        eps, log_det = prior(z)
        back = prior.inverse(z)
    assert torch.equal(eps, prior(z)[0])
    assert torch.equal(log_det, prior(z)[1])
    assert torch.equal(back, prior.inverse(z))


@pytest.mark.parametrize(("depth", "width", "key"), [(-1, 8, "depth"), (2, 0, "width")])
def test_refuses_bad_sizes(depth: int, width: int, key: str) -> None:
    with pytest.raises(ValueError) as caught:
        AFPrior(code=3, depth=depth, width=width, scale=False)
    assert key in str(caught.value)
