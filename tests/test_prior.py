"""The prior is a bijection between codes and noise whose density is the one its determinant says."""

from itertools import product
from math import prod

import pytest
import scipy.stats
import torch
import zuko
from tiny import seen, shaken
from torch import Tensor
from torch.autograd.functional import jacobian

from vlae.flow import Flow, Made
from vlae.layers import normal_log_prob
from vlae.prior import AFPrior, ConvAFPrior, MapMade

Code = int | tuple[tuple[int, int, int], str]  # flat, or maps and the window on them
MAPS: list[Code] = [((2, 1, 1), "3x2"), ((1, 3, 4), "4x2"), ((3, 2, 3), "1x1"), ((2, 5, 3), "7x3")]
FLAT: list[Code] = [1, 2, 7]
CASES = [
    (code, depth, width, scale)
    for code, width in [(1, 8), (2, 8), (7, 24), (7, 3), (5, 1), *zip(MAPS, (8, 5, 1, 12), strict=True)]
    for depth in range(4)
    for scale in (False, True)
]
over_cases = pytest.mark.parametrize(("code", "depth", "width", "scale"), CASES)


def fresh(code: Code, depth: int, width: int, scale: bool) -> Flow:
    if isinstance(code, int):
        return AFPrior(code=code, depth=depth, width=width, scale=scale)
    maps, window = code
    return ConvAFPrior(code=list(maps), depth=depth, width=width, scale=scale, receptive_field=window)


def prior_of(code: Code, depth: int, width: int, scale: bool, size: float = 0.3) -> Flow:
    return shaken(fresh(code, depth, width, scale), size)  # type: ignore[return-value]


def numbers(code: Code) -> int:
    return code if isinstance(code, int) else prod(code[0])


def codes(code: Code, count: int = 5) -> Tensor:
    return 2 * torch.randn(count, numbers(code), dtype=torch.float64)


def places(maps: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Channel, row and column of each number of a code, in the order in which a step makes them."""
    return [(c, i, j) for i in range(maps[1]) for j in range(maps[2]) for c in range(maps[0])]


def order(code: Code) -> list[int]:
    """The numbers of a code in that order."""
    if isinstance(code, int):
        return list(range(code))
    _, height, width = code[0]
    return [(c * height + i) * width + j for c, i, j in places(code[0])]


def sees(code: Code) -> Tensor:
    """Whether the noise of each number may change with each number: itself and those that it sees."""
    if isinstance(code, int):
        return torch.ones(code, code, dtype=torch.bool).tril()
    maps, window = code
    found = torch.zeros(*maps, *maps, dtype=torch.bool)
    for c, i, j in places(maps):
        found[c, i, j, : c + 1, i, j] = True
        for a, b in seen(window, i, j, *maps[1:]):
            found[c, i, j, :, a, b] = True
    return found.view(prod(maps), -1)


def plain_conditioner(
    step: Made, z: list[float], context: list[float] | None = None
) -> tuple[list[float], list[float]]:
    """Shifts and log-scales of one code, unit by unit, by the rule that a unit of degree m sees z_1..z_m."""
    code, width = len(z), step.first.out_features
    if context is None:
        degree, context = [unit * (code - 1) // width + 1 for unit in range(width)], [0.0] * width
    else:
        degree = [unit * code // width for unit in range(width)]  # from 0: a unit of it sees the context alone

    def layer(linear, inputs, allowed, outputs):
        sums = []
        for o in range(outputs):
            total = linear.bias[o].item()
            for k, value in enumerate(inputs):
                if allowed(o, k):
                    total += linear.weight[o, k].item() * value
            sums.append(total)
        return sums

    h = layer(step.first, z, lambda o, k: k + 1 <= degree[o], width)
    h = [max(0.0, own + given) for own, given in zip(h, context, strict=True)]
    h = [max(0.0, a) for a in layer(step.second, h, lambda o, k: degree[k] <= degree[o], width)]
    shift = layer(step.shift, h, lambda o, k: degree[k] < o + 1, code)
    if step.scale is None:
        return shift, [0.0] * code
    raw = torch.tensor(layer(step.scale, h, lambda o, k: degree[k] < o + 1, code), dtype=torch.float64)
    return shift, (2 * torch.tanh(raw / 2)).tolist()


def plain_map_conditioner(step: MapMade, maps: tuple[int, int, int], window: str, z: list[float]) -> Tensor:
    """The same for a code of maps, the window gathered position by position: [shift or log-scale, number]."""
    values, found = torch.tensor(z, dtype=torch.float64).view(maps), torch.zeros(2, *maps, dtype=torch.float64)
    offsets = sorted((a - 50, b - 50) for a, b in seen(window, 50, 50, 100, 100))
    for i, j in product(range(maps[1]), range(maps[2])):
        looked = [
            values[c, i + down, j + right].item() if i + down >= 0 and 0 <= j + right < maps[2] else 0.0
            for c in range(maps[0])
            for down, right in offsets
        ]
        context = [
            sum(weight * value for weight, value in zip(row, looked, strict=True)) for row in step.look.weight.tolist()
        ]
        here = plain_conditioner(step.channels, values[:, i, j].tolist(), context)
        found[:, :, i, j] = torch.tensor(here, dtype=torch.float64)
    return found.flatten(1)


def slow_inverse(prior: Flow, eps: Tensor, ordered: list[int]) -> Tensor:
    """One dimension after the other, each by a whole pass through the step."""
    for k in range(len(prior.steps) - 1, -1, -1):
        z = torch.zeros_like(eps)
        for i in ordered:
            shift, log_scale = prior.steps[k](z)
            z[:, i] = shift[:, i] + torch.exp(log_scale[:, i]) * eps[:, i]
        eps = z.flip(1) if k > 0 else z
    return eps.detach()


@over_cases
def test_inverse_is_inverse(code: Code, depth: int, width: int, scale: bool) -> None:
    prior, z = prior_of(code, depth, width, scale), codes(code)
    torch.testing.assert_close(prior.inverse(prior(z)[0]), z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior(prior.inverse(z))[0], z, rtol=1e-9, atol=1e-9)


@over_cases
def test_inverse_computes_what_whole_passes_compute(code: Code, depth: int, width: int, scale: bool) -> None:
    prior, eps = prior_of(code, depth, width, scale), codes(code)
    torch.testing.assert_close(prior.inverse(eps), slow_inverse(prior, eps, order(code)), rtol=1e-9, atol=1e-9)


@over_cases
def test_log_det_is_that_of_the_jacobian(code: Code, depth: int, width: int, scale: bool) -> None:
    prior, z = prior_of(code, depth, width, scale), codes(code)
    for one, log_det in zip(z, prior(z)[1], strict=True):
        matrix = jacobian(lambda v: prior(v[None])[0][0], one)
        sign, expected = torch.linalg.slogdet(matrix)
        assert abs(sign) == 1  # orders are reversed between steps
        torch.testing.assert_close(log_det, expected, rtol=1e-10, atol=1e-10)
        if not scale:
            assert log_det == 0


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("code", [2, 3, 7, *MAPS])
def test_a_step_sees_earlier_numbers_and_the_next_step_the_code_in_reverse(code: Code, scale: bool) -> None:
    def support(depth: int) -> Tensor:
        prior, z = prior_of(code, depth, 64, scale), codes(code, 64)
        total = jacobian(lambda v: prior(v)[0].sum(0), z)  # [eps, B, z]
        return total.abs().amax(1) > 0

    once = sees(code)
    assert not once[order(code)][:, order(code)].triu(1).any()
    assert torch.equal(support(1), once)
    assert torch.equal(support(2), (once.double() @ once.double().flip(0)) > 0)


@pytest.mark.parametrize(("code", "width"), [(1, 4), (2, 6), (7, 12), (7, 3), *zip(MAPS, (3, 5, 7, 4), strict=True)])
@pytest.mark.parametrize("scale", [False, True])
def test_a_step_agrees_with_plain_loops(code: Code, width: int, scale: bool) -> None:
    step = prior_of(code, 1, width, scale).steps[0]
    z = codes(code, 3)
    found = torch.stack(step(z), 1)
    for row, one in zip(found, z.tolist(), strict=True):
        expected = plain_conditioner(step, one) if isinstance(code, int) else plain_map_conditioner(step, *code, one)
        torch.testing.assert_close(row, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("code", [*FLAT, *MAPS])
def test_agrees_with_zuko_given_the_same_conditioner(code: Code, depth: int, scale: bool) -> None:
    prior, size, ordered = prior_of(code, depth, 16, scale), numbers(code), torch.tensor(order(code))
    back = ordered.argsort()  # zuko's codes have one order: of maps, [h w C]

    def transform(step: Made | MapMade):
        def affine(z: Tensor) -> torch.distributions.AffineTransform:
            shift, log_scale = (part[:, ordered] for part in step(z[:, back]))
            return torch.distributions.AffineTransform(-shift * torch.exp(-log_scale), torch.exp(-log_scale))

        independent = lambda z: torch.distributions.IndependentTransform(affine(z), 1)  # noqa: E731
        return zuko.transforms.AutoregressiveTransform(independent, passes=size)

    reverse = zuko.transforms.PermutationTransform(torch.arange(size - 1, -1, -1))
    steps = [part for step in prior.steps for part in (reverse, transform(step))][1:]
    flow = torch.distributions.TransformedDistribution(
        torch.distributions.Independent(torch.distributions.Normal(torch.zeros(size).double(), 1.0), 1),
        [part.inv for part in reversed(steps)],
    )
    z = codes(code)
    eps, log_det = prior(z)
    torch.testing.assert_close(normal_log_prob(eps) + log_det, flow.log_prob(z[:, ordered]), rtol=1e-9, atol=1e-9)
    expected = eps[:, ordered]
    for part in reversed(steps):
        expected = part.inv(expected)
    torch.testing.assert_close(prior.inverse(eps)[:, ordered], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("code", [2, ((2, 1, 1), "3x2"), ((1, 1, 2), "3x2")])
def test_integrates_to_one(code: Code, depth: int, scale: bool) -> None:
    prior = prior_of(code, depth, 8, scale, 0.15)
    axis = torch.linspace(-16, 16, 641, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        eps, log_det = prior(z)
        density = torch.exp(normal_log_prob(eps) + log_det)
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-4)
    assert density.view(641, 641)[[0, -1]].max() < 1e-6  # nothing is cut off


@over_cases
def test_a_fresh_prior_of_any_depth_is_the_standard_normal(code: Code, depth: int, width: int, scale: bool) -> None:
    prior, z = fresh(code, depth, width, scale).double(), codes(code)
    eps, log_det = prior(z)
    expected = scipy.stats.norm.logpdf(z.numpy()).sum(1)
    torch.testing.assert_close(normal_log_prob(eps) + log_det, torch.from_numpy(expected))


@pytest.mark.parametrize("code", [7, MAPS[3]])
def test_depth_zero_is_the_identity_and_has_no_parameters(code: Code) -> None:
    prior, z = prior_of(code, 0, 8, True), codes(code)
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


@pytest.mark.parametrize("code", [7, MAPS[3]])
def test_autocast_does_not_reach_the_flow(code: Code) -> None:
    prior, z = prior_of(code, 2, 16, True).float(), codes(code).float()
    with torch.autocast("cpu", torch.bfloat16):
        eps, log_det = prior(z)
        back = prior.inverse(z)
    assert torch.equal(eps, prior(z)[0])
    assert torch.equal(log_det, prior(z)[1])
    assert torch.equal(back, prior.inverse(z))


@pytest.mark.parametrize(
    ("code", "depth", "width", "found"),
    [
        *((code, *sizes) for code in (3, MAPS[0]) for sizes in ((-1, 8, "depth=-1"), (2, 0, "width=0"))),
        (((2, 3, 3), "none"), 1, 8, "receptive_field=none"),
        (((2, 3, 3), "3"), 1, 8, "receptive_field=3:"),
    ],
)
def test_refuses_what_is_no_prior(code: Code, depth: int, width: int, found: str) -> None:
    with pytest.raises(ValueError) as caught:
        fresh(code, depth, width, False)
    assert found in str(caught.value)
