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
]
over_likelihoods = pytest.mark.parametrize(
    "likelihood", LIKELIHOODS, ids=lambda one: f"{type(one).__name__}-{one.levels}-{one.num_params}"
)
PIXELS = [(), (3,), (2, 3)]


def parameters(likelihood: Likelihood, *pixels: int, size: float = 2.0) -> Tensor:
    return size * torch.randn(4, likelihood.num_params, *pixels, dtype=torch.float64)


def every_value(likelihood: Likelihood, params: Tensor) -> Tensor:
    """log p of each value, [B, V, *n], by one call a value."""
    shape = (len(params), 1, *params.shape[2:])
    columns = [likelihood.log_prob(params, torch.full(shape, v)) for v in range(likelihood.levels)]
    return torch.stack(columns, 1)


@over_likelihoods
@pytest.mark.parametrize("pixels", PIXELS)
def test_probabilities_sum_to_one(likelihood: Likelihood, pixels: tuple[int, ...]) -> None:
    params = parameters(likelihood, *pixels)
    one = torch.ones(4, *pixels, dtype=torch.float64)
    torch.testing.assert_close(every_value(likelihood, params).exp().sum(1), one, rtol=1e-12, atol=1e-12)
    none = torch.empty(4, 0, *pixels, dtype=torch.long)
    torch.testing.assert_close(likelihood.pmf(params, none).sum(1), one, rtol=1e-12, atol=1e-12)


@over_likelihoods
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
    logistic = scipy.stats.logistic(means, np.exp(log_scales))
    for v in range(levels):
        # from the nearer tail, where a difference of cdfs keeps its digits
        below = logistic.cdf(edges[v + 1]) - logistic.cdf(edges[v])
        above = logistic.sf(edges[v]) - logistic.sf(edges[v + 1])
        mass = np.where(edges[v] + edges[v + 1] < 2 * means, below, above)
        got = likelihood.log_prob(params, torch.full((4, 1, 3), v)).exp()
        np.testing.assert_allclose(got, (weights * mass).sum(1), rtol=1e-8, atol=1e-300)


def test_bernoulli_is_a_coin() -> None:
    params = parameters(LIKELIHOODS[0], 3)
    for v in (0, 1):
        got = LIKELIHOODS[0].log_prob(params, torch.full((4, 1, 3), v))
        expected = scipy.stats.bernoulli(1 / (1 + np.exp(-params[:, 0].numpy()))).logpmf(v)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@over_likelihoods
def test_samples_are_the_inverse_cdf(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 6)
    uniform = torch.rand(4, 1, 6, dtype=torch.float64)
    drawn = likelihood.sample(params, uniform)
    assert drawn.shape == (4, 1, 6)
    mass = every_value(likelihood, params).exp().numpy()
    for b in range(4):
        for n in range(6):
            value, below = 0, mass[b, 0, n]
            while below <= uniform[b, 0, n].item() and value < likelihood.levels - 1:
                value += 1
                below += mass[b, value, n]
            assert drawn[b, 0, n] == value


@over_likelihoods
def test_frequencies_are_probabilities(likelihood: Likelihood) -> None:
    count = 5_000
    params = parameters(likelihood)[:1]
    grid = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[None, None]  # each strip of [0, 1) once
    drawn = likelihood.sample(params[..., None].expand(-1, -1, count), grid)
    frequency = torch.bincount(drawn.flatten(), minlength=likelihood.levels) / count
    torch.testing.assert_close(frequency.double(), every_value(likelihood, params).exp()[0], rtol=0, atol=1.01 / count)


@over_likelihoods
def test_samples_stay_in_range_at_the_ends(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 50, size=30.0).float()
    for uniform in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        drawn = likelihood.sample(params, torch.full((4, 1, 50), uniform))
        assert drawn.min() >= 0
        assert drawn.max() < likelihood.levels


@over_likelihoods
def test_finite_in_float32_at_extremes(likelihood: Likelihood) -> None:
    corners = torch.tensor(list(product([-100.0, 0.0, 100.0], repeat=min(3, likelihood.num_params))))
    params = corners.repeat_interleave(likelihood.num_params // corners.shape[1], 1)
    random = 100 * torch.sign(torch.randn(64, likelihood.num_params))
    params = torch.cat([params, random])[..., None].expand(-1, -1, likelihood.levels).clone().requires_grad_()
    x = torch.arange(likelihood.levels).expand(len(params), 1, -1)
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
    x = torch.randint(likelihood.levels, (4, 1, 20))
    exact, single = likelihood.log_prob(params, x), likelihood.log_prob(params.float(), x)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@over_likelihoods
def test_gradients_are_those_of_the_value(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 5, size=1.0).requires_grad_()
    x = torch.randint(likelihood.levels, (4, 1, 5))
    x[:, :, 0], x[:, :, 1] = 0, likelihood.levels - 1
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, x), params)


@over_likelihoods
def test_half_precision_parameters_give_float32_densities(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 3).bfloat16()
    x = torch.randint(likelihood.levels, (4, 1, 3))
    assert likelihood.log_prob(params, x).dtype == torch.float32
    assert likelihood.pmf(params, x[:, :0]).dtype == torch.float32


@over_likelihoods
def test_bytes_are_integers_too(likelihood: Likelihood) -> None:
    params = parameters(likelihood, 3)
    x = torch.randint(likelihood.levels, (4, 1, 3))
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
        (lambda: LogisticMixture(channels=3, levels=256, components=2), "channel, got 3"),
        (lambda: LogisticMixture(channels=1, levels=256, components=0), "components=0"),
    ],
)
def test_refuses_what_it_cannot_model(make, found: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert found in str(caught.value)
