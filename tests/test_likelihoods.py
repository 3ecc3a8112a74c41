"""Likelihoods are distributions over integers, and their samples follow them."""

from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from vlae.likelihoods import Bernoulli, Likelihood, LogisticMixture

LIKELIHOODS = [
    Bernoulli(channels=1, levels=2),
    *(LogisticMixture(channels=1, levels=v, components=m) for v in (2, 17, 256) for m in (1, 4)),
    *(LogisticMixture(channels=c, levels=v, components=m) for c in (2, 3) for v in (2, 5) for m in (1, 4)),
]


def name(likelihood: Likelihood) -> str:
    return f"{type(likelihood).__name__}-{likelihood.channels}-{likelihood.levels}-{likelihood.num_params}"


over_likelihoods = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=name)
PIXELS = [(), (3,), (2, 3)]


def parameters(likelihood: Likelihood, *pixels: int, size: float = 2.0) -> Tensor:
    return size * torch.randn(4, likelihood.num_params, *pixels, dtype=torch.float64)


def every_value(likelihood: Likelihood, params: Tensor) -> Tensor:
    """log p of each value of a pixel, [B, V^C, *n], by one call a value; the first channel changes slowest."""
    columns = []
    for values in product(range(likelihood.levels), repeat=likelihood.channels):
        x = torch.tensor(values).view(1, -1, *[1] * (params.ndim - 2)).expand(len(params), -1, *params.shape[2:])
        columns.append(likelihood.log_prob(params, x))
    return torch.stack(columns, 1)


@pytest.mark.usefixtures("unchecked")
@over_likelihoods
@pytest.mark.parametrize("pixels", PIXELS)
def test_probabilities_sum_to_one(likelihood: Likelihood, pixels: tuple[int, ...]) -> None:
    params = parameters(likelihood, *pixels)
    one = torch.ones(4, *pixels, dtype=torch.float64)
    torch.testing.assert_close(every_value(likelihood, params).exp().sum(1), one, rtol=1e-12, atol=1e-12)
    x = torch.randint(likelihood.levels, (4, likelihood.channels, *pixels))
    for c in range(likelihood.channels):
        torch.testing.assert_close(likelihood.pmf(params, x[:, :c]).sum(1), one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, LogisticMixture(channels=3, levels=256, components=3)], ids=name)
@pytest.mark.parametrize("pixels", PIXELS)
def test_chain_of_pmfs_is_log_prob(likelihood: Likelihood, pixels: tuple[int, ...]) -> None:
    params = parameters(likelihood, *pixels, size=1.0)  # pmfs above exp's underflow
    x = torch.randint(likelihood.levels, (4, likelihood.channels, *pixels))
    chain = torch.zeros(4, *pixels, dtype=torch.float64)
    for c in range(likelihood.channels):
        chain += likelihood.pmf(params, x[:, :c]).gather(1, x[:, c : c + 1])[:, 0].log()
    torch.testing.assert_close(likelihood.log_prob(params, x), chain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("components", [1, 3, 5])
def test_mixture_is_differences_of_logistic_cdfs(levels: int, components: int) -> None:
    likelihood = LogisticMixture(channels=1, levels=levels, components=components)
    params = parameters(likelihood, 3)
    logits, means, log_scales = params.numpy().reshape(4, 3, components, 3).transpose(1, 0, 2, 3)
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    means = means + (np.linspace(-1, 1, components) if components > 1 else np.zeros(1))[:, None]
    step = 2 / (levels - 1)
    edges = [-np.inf, *(-1 + step * (v + 0.5) for v in range(levels - 1)), np.inf]
    logistic = scipy.stats.logistic(means, np.exp(log_scales) / components)
    for v in range(levels):
        # from the nearer tail, where a difference of cdfs keeps its digits
        below = logistic.cdf(edges[v + 1]) - logistic.cdf(edges[v])
        above = logistic.sf(edges[v]) - logistic.sf(edges[v + 1])
        mass = np.where(edges[v] + edges[v + 1] < 2 * means, below, above)
        got = likelihood.log_prob(params, torch.full((4, 1, 3), v)).exp()
        np.testing.assert_allclose(got, (weights * mass).sum(1), rtol=1e-8, atol=1e-300)


@pytest.mark.parametrize("components", [1, 4])
def test_colour_is_a_mixture_of_pixels(components: int) -> None:
    """Red, green given red, blue given both, from each component by itself."""
    likelihood = LogisticMixture(channels=3, levels=9, components=components)
    params = parameters(likelihood, 3, size=1.0)
    logits, *rest = params.numpy().reshape(4, 10, components, 3).transpose(1, 0, 2, 3)
    means, log_scales, (red_green, red_blue, green_blue) = rest[:3], rest[3:6], np.tanh(rest[6:])
    spread = (np.linspace(-1, 1, components) if components > 1 else np.zeros(1))[:, None]
    x = torch.randint(9, (4, 3, 3))
    x[:, :, 0], x[:, :, 1] = 0, 8
    red, green, blue = (x.numpy() / 4 - 1)[:, :, None].transpose(1, 0, 2, 3)
    mass = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for u, mean, log_scale in zip(
        (red, green, blue),
        (means[0], means[1] + red_green * red, means[2] + red_blue * red + green_blue * green),
        log_scales,
        strict=True,
    ):
        logistic = scipy.stats.logistic(mean + spread, np.exp(log_scale) / components)
        low, high = np.where(u == -1, -np.inf, u - 1 / 8), np.where(u == 1, np.inf, u + 1 / 8)
        mass = mass * (logistic.cdf(high) - logistic.cdf(low))
    np.testing.assert_allclose(likelihood.log_prob(params, x), np.log(mass.sum(1)), rtol=1e-6)  # float32 means


def test_bernoulli_is_a_coin() -> None:
    params = parameters(LIKELIHOODS[0], 3)
    for v in (0, 1):
        got = LIKELIHOODS[0].log_prob(params, torch.full((4, 1, 3), v))
        expected = scipy.stats.bernoulli(1 / (1 + np.exp(-params[:, 0].numpy()))).logpmf(v)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@over_likelihoods
def test_samples_are_the_inverse_cdf(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 6)
    uniform = torch.rand(4, likelihood.channels, 6, dtype=torch.float64)
    drawn = likelihood.sample(params, uniform)
    assert drawn.shape == uniform.shape
    mass = every_value(likelihood, params).exp().numpy()
    for b, n in product(range(4), range(6)):
        joint = mass[b, :, n].reshape([likelihood.levels] * likelihood.channels)
        for u, x in zip(uniform[b, :, n], drawn[b, :, n], strict=True):
            ahead = joint.sum(tuple(range(1, joint.ndim)))  # of this channel, the later ones summed out
            value, below = 0, ahead[0]
            while below <= u.item() * ahead.sum() and value < likelihood.levels - 1:
                value += 1
                below += ahead[value]
            assert x == value
            joint = joint[value]


@pytest.mark.parametrize("likelihood", [one for one in LIKELIHOODS if one.channels == 1], ids=name)
def test_frequencies_are_probabilities(likelihood: Likelihood) -> None:
    count = 5_000
    params = parameters(likelihood)[:1]
    grid = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[None, None]  # each strip of [0, 1) once
    drawn = likelihood.sample(params[..., None].expand(-1, -1, count), grid)
    frequency = torch.bincount(drawn.flatten(), minlength=likelihood.levels) / count
    torch.testing.assert_close(frequency.double(), every_value(likelihood, params).exp()[0], rtol=0, atol=1.01 / count)


def conditional(params: np.ndarray, earlier: list[int], levels: int) -> np.ndarray:
    """P(value at most v) for all v of a pixel's next channel, from one column [3 channels, M components] of params."""
    kinds = params.reshape(10, -1)
    means, log_scales, coefficients = kinds[1:4], np.clip(kinds[4:7] - np.log(len(kinds[0])), -7, 7), np.tanh(kinds[7:])
    spread = np.linspace(-1, 1, kinds.shape[1]) if kinds.shape[1] > 1 else np.zeros(1)
    level = np.linspace(-1, 1, levels)
    edges = np.array([-np.inf, *(level[1:] + level[:-1]) / 2, np.inf])
    weight = np.exp(kinds[0] - kinds[0].max())
    for c in range(len(earlier) + 1):
        moved = {0: 0.0, 1: coefficients[0], 2: coefficients[1]}[c] * (level[earlier[0]] if c else 0.0)
        moved = moved + (coefficients[2] * level[earlier[1]] if c == 2 else 0.0)
        logistic = scipy.stats.logistic(means[c] + spread + moved, np.exp(log_scales[c]))
        if c == len(earlier):
            return (weight / weight.sum() * logistic.cdf(edges[1:, None])).sum(1)
        low, high = edges[earlier[c]], edges[earlier[c] + 1]
        below, above = logistic.cdf(high) - logistic.cdf(low), logistic.sf(low) - logistic.sf(high)
        weight = weight * np.maximum(below, above)  # from the nearer tail, where a difference keeps its digits
    raise AssertionError


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("levels", [2, 3, 5, 17, 128, 255, 256])
@pytest.mark.parametrize("components", [1, 4])
def test_bisection_finds_the_value_at_which_the_cdf_passes(levels: int, components: int) -> None:
    """Also at uniforms next to both ends, and at parameters that leave most values all but impossible."""
    likelihood = LogisticMixture(channels=3, levels=levels, components=components)
    last = float(np.nextafter(1, 0))
    uniform = torch.cat([torch.rand(3, 20, dtype=torch.float64), torch.tensor([[0.0, 1e-9, 1 - 1e-9, last]] * 3)], 1)
    for size in (0.5, 3.0):
        params = size * torch.randn(1, likelihood.num_params, uniform.shape[1], dtype=torch.float64)
        drawn = likelihood.sample(params, uniform[None])[0]
        for n, (value, u) in enumerate(zip(drawn.T.tolist(), uniform.T.tolist(), strict=True)):
            for c in range(3):
                below = conditional(params[0, :, n].numpy(), value[:c], levels)
                expected = int((below[:-1] <= u[c]).sum())
                if value[c] != expected:  # where rounding decides
                    assert abs(below[min(value[c], expected)] - u[c]) < 1e-12
                    assert abs(value[c] - expected) == 1 or u[c] > 1 - 1e-8


@pytest.mark.parametrize(
    "likelihood", [*LIKELIHOODS, *(LogisticMixture(channels=3, levels=v, components=4) for v in (100, 256))], ids=name
)
def test_samples_stay_in_range_at_the_ends(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 50, size=30.0).float()
    for uniform in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        drawn = likelihood.sample(params, torch.full((4, likelihood.channels, 50), uniform))
        assert drawn.min() >= 0
        assert drawn.max() < likelihood.levels


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, LogisticMixture(channels=3, levels=256, components=2)], ids=name)
def test_finite_in_float32_at_extremes(likelihood: Likelihood) -> None:
    kinds = sum(likelihood.sizes) if isinstance(likelihood, LogisticMixture) else 1
    corners = torch.tensor(list(product([-100.0, 0.0, 100.0], repeat=min(5, kinds))))
    corners = torch.cat([corners, corners.new_zeros(len(corners), kinds - corners.shape[1])], 1)
    params = corners.repeat_interleave(likelihood.num_params // kinds, 1)
    random = 100 * torch.sign(torch.randn(64, likelihood.num_params))
    params = torch.cat([params, random])[..., None].expand(-1, -1, likelihood.levels).clone().requires_grad_()
    x = torch.arange(likelihood.levels).expand(len(params), likelihood.channels, -1)
    value = likelihood.log_prob(params, x)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert (value <= 1e-6).all()
    assert params.grad is not None
    assert torch.isfinite(params.grad).all()
    pmf = likelihood.pmf(params[..., :1], torch.empty(len(params), 0, 1, dtype=torch.long))
    torch.testing.assert_close(pmf.sum(1), torch.ones(len(params), 1), rtol=1e-4, atol=1e-4)


@over_likelihoods
def test_float32_agrees_with_float64(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 20, size=4.0)
    x = torch.randint(likelihood.levels, (4, likelihood.channels, 20))
    exact, single = likelihood.log_prob(params, x), likelihood.log_prob(params.float(), x)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
@over_likelihoods
def test_gradients_are_those_of_the_value(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 3, size=1.0)[:2].requires_grad_()
    x = torch.randint(likelihood.levels, (2, likelihood.channels, 3))
    x[:, :, 0], x[:, :, 1] = 0, likelihood.levels - 1
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, x), params)


@over_likelihoods
def test_half_precision_parameters_give_float32_densities(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 3).bfloat16()
    x = torch.randint(likelihood.levels, (4, likelihood.channels, 3))
    assert likelihood.log_prob(params, x).dtype == torch.float32
    assert likelihood.pmf(params, x[:, :0]).dtype == torch.float32


@over_likelihoods
def test_bytes_are_integers_too(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 3)
    x = torch.randint(likelihood.levels, (4, likelihood.channels, 3))
    assert torch.equal(likelihood.log_prob(params, x.byte()), likelihood.log_prob(params, x))


def test_fresh_components_differ() -> None:
    likelihood = LogisticMixture(channels=1, levels=17, components=4)
    params = torch.zeros(1, 12, requires_grad=True)
    likelihood.log_prob(params, torch.tensor([[3]])).sum().backward()
    for gradient in params.grad.view(3, 4):
        assert len(set(gradient.tolist())) == 4


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Bernoulli(channels=1, levels=17), "17"),
        (lambda: Bernoulli(channels=3, levels=2), "3"),
        (lambda: LogisticMixture(channels=1, levels=1, components=2), "levels, got 1"),
        (lambda: LogisticMixture(channels=1, levels=257, components=2), "levels, got 257"),
        (lambda: LogisticMixture(channels=1, levels=256, components=0), "components=0"),
    ],
)
def test_refuses_what_it_cannot_model(make, found: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert found in str(caught.value)
