"""Waves give the pixels that raster order gives, and samples follow the density."""

import pytest
import torch
from scipy.stats import chi2
from tiny import WINDOWS, images, seen, tiny
from torch import Tensor

from vlae.decoder import window
from vlae.model import VLAE
from vlae.sampling import decode, reconstruct, sample, scan, waves

over_windows = pytest.mark.parametrize("receptive_field", WINDOWS)


def noise(model: VLAE, count: int) -> tuple[Tensor, Tensor]:
    eps = torch.randn(count, model.prior.code, dtype=torch.float64)
    return eps, torch.rand(count, *model.decoder.shape, dtype=torch.float64)


@torch.no_grad()
def raster(model: VLAE, z: Tensor, uniform: Tensor) -> Tensor:
    """One pass over the whole image for each pixel, from the top left to the bottom right."""
    x = torch.zeros_like(uniform, dtype=torch.long)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            params = model.decoder(model.unit(x), model.decoder.features(z))
            here = (..., slice(i, i + 1), slice(j, j + 1))
            x[here] = model.likelihood.sample(params[here], uniform[here])
    return x


@over_windows
@pytest.mark.parametrize("size", [(3, 3), (8, 8), (13, 17), (28, 28), (2, 40), (40, 2)])
def test_windows_lie_in_earlier_waves(receptive_field: str, size: tuple[int, int]) -> None:
    height, width = size
    number = torch.full(size, -1)
    for wave, (i, j) in enumerate(waves(window(receptive_field), height, width)):
        assert len(i) == len(j) > 0
        assert (number[i, j] == -1).all()  # no pixel is drawn twice
        number[i, j] = wave
    assert (number >= 0).all()
    for i in range(height):
        for j in range(width):
            assert all(number[a, b] < number[i, j] for a, b in seen(receptive_field, i, j, height, width))


@pytest.mark.parametrize(
    ("receptive_field", "size", "count"),
    [
        ("7x4", (28, 28), 136),
        ("7x4", (32, 32), 156),
        ("3x2", (8, 8), 22),
        ("15x8", (3, 3), 9),
        ("1x1", (28, 28), 28),
        ("none", (28, 28), 1),
    ],
)
def test_number_of_waves(receptive_field: str, size: tuple[int, int], count: int) -> None:
    assert sum(1 for _ in waves(window(receptive_field), *size)) == count


@over_windows
@pytest.mark.parametrize("size", [(3, 3), (5, 8)])
@pytest.mark.parametrize(("likelihood", "levels"), [("Bernoulli", 2), ("LogisticMixture", 17)])
@pytest.mark.parametrize("code", [0, 2])
def test_scan_is_raster_order(
    receptive_field: str, size: tuple[int, int], likelihood: str, levels: int, code: int
) -> None:
    model = tiny((1, *size), levels, code=code, window=receptive_field, likelihood=likelihood)
    z, uniform = noise(model, 4)
    x = decode(model, z, uniform)
    assert torch.equal(x, raster(model, z, uniform))
    assert len(x.unique()) == levels or levels > 2  # not all alike


def test_scan_is_raster_order_on_a_larger_image() -> None:
    model = tiny((1, 13, 17), 2, window="7x4")
    z, uniform = noise(model, 2)
    assert torch.equal(decode(model, z, uniform), raster(model, z, uniform))


@over_windows
@pytest.mark.parametrize("code", [0, 2])
def test_scan_meets_the_parameters_of_forward(receptive_field: str, code: int) -> None:
    model = tiny((1, 5, 7), 17, code=code, window=receptive_field, likelihood="LogisticMixture")
    x = torch.randint(17, (3, 1, 5, 7))
    h = model.decoder.features(torch.randn(3, code, dtype=torch.float64))
    met = torch.full((3, model.likelihood.num_params, 5, 7), torch.nan, dtype=torch.float64)

    def look_up(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
        met[:, :, i, j] = params
        return x[:, :, i, j]

    assert torch.equal(scan(model, h, look_up, 3), x)
    torch.testing.assert_close(met, model.decoder(model.unit(x), h).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_images_do_not_depend_on_their_batch(code: int, cut: int) -> None:
    model = tiny((1, 5, 7), 17, code=code, likelihood="LogisticMixture")
    eps, uniform = noise(model, 5)
    x = torch.randint(17, (5, 1, 5, 7))
    sampled, rebuilt = sample(model, eps, uniform), reconstruct(model, x, eps, uniform)
    for part in (slice(cut), slice(cut, None)):
        if len(eps[part]):
            assert torch.equal(sample(model, eps[part], uniform[part]), sampled[part])
            assert torch.equal(reconstruct(model, x[part], eps[part], uniform[part]), rebuilt[part])


def test_sample_and_reconstruct_decode_the_codes_of_prior_and_posterior() -> None:
    model = tiny((1, 5, 7), 2)
    eps, uniform = noise(model, 4)
    x = torch.randint(2, (4, 1, 5, 7))
    z = model.prior.inverse(eps)
    torch.testing.assert_close(model.prior(z)[0], eps)
    assert torch.equal(sample(model, eps, uniform), raster(model, z, uniform))
    q = model.encode(x)
    z = q.mean + q.log_scale.exp() * eps
    assert torch.equal(reconstruct(model, x, eps, uniform), raster(model, z, uniform))
    assert torch.equal(reconstruct(model, x.byte(), eps, uniform), raster(model, z, uniform))


def test_sampling_keeps_no_gradients() -> None:
    model = tiny()
    eps, uniform = noise(model, 2)
    for x in (sample(model, eps, uniform), reconstruct(model, images()[:2], eps, uniform)):
        assert x.dtype == torch.long
        assert not x.requires_grad


def test_frequencies_of_samples_are_their_probabilities() -> None:
    model, count = tiny(code=0), 40_000
    drawn = sample(model, *noise(model, count))
    places = drawn.flatten(1) @ (1 << torch.arange(9))
    observed = torch.bincount(places, minlength=512).double()
    with torch.no_grad():
        expected = count * model(images(), torch.zeros(512, 0, dtype=torch.float64)).elbo.exp()
    common = expected >= 5  # chi-square's rule; the rare ones count as one cell
    cells = [torch.cat([v[common], v[~common].sum()[None]]) for v in (observed, expected)]
    statistic = ((cells[0] - cells[1]).square() / cells[1].clamp(min=1e-9)).sum().item()
    assert chi2.sf(statistic, int(common.sum())) > 1e-4
