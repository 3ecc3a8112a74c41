"""The decoder's window is exactly the declared one, and `at` is `forward` at a few pixels."""

from typing import Any

import pytest
import torch
from tiny import SHAPE, WINDOWS, images, seen, shaken
from torch import Tensor

from vlae.decoder import PixelCNN, window
from vlae.likelihoods import Bernoulli, Likelihood, LogisticMixture

SIZES = [(3, 3), (8, 8), (13, 17)]


def decoder(receptive_field: str, shape: tuple[int, int, int] = SHAPE, code: int = 2, **changed: Any) -> PixelCNN:
    sizes = {"num_params": 2, "features": 5, "width": 8, "depth": 2, "widths": [4, 6], "hidden": 10} | changed
    return shaken(PixelCNN(shape=shape, code=code, receptive_field=receptive_field, **sizes))


def inputs(model: PixelCNN, code: int = 2, batch: int = 3) -> tuple[Tensor, Tensor]:
    u = torch.rand(batch, *model.shape, dtype=torch.float64) * 2 - 1
    return u, torch.randn(batch, code, dtype=torch.float64)


def support(model: PixelCNN, pixels: list[tuple[int, int]]) -> Tensor:
    """Whether the parameters of each of `pixels` change with u: [pixel, C, H, W]."""
    u, z = inputs(model, batch=1)
    u = u.repeat(len(pixels), 1, 1, 1).requires_grad_()
    params = model(u, model.features(z).expand(len(pixels), -1, -1, -1))
    # images of a batch do not mix, so that one backward pass gives a row of the Jacobian from each
    own = torch.stack([params[k, :, i, j].sum() for k, (i, j) in enumerate(pixels)])
    return torch.autograd.grad(own.sum(), u, materialize_grads=True)[0] != 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("receptive_field", WINDOWS)
def test_jacobian_support_is_the_window(receptive_field: str, size: tuple[int, int]) -> None:
    height, width = size
    pixels = [(i, j) for i in range(height) for j in range(width)]
    expected = torch.zeros(len(pixels), 1, height, width, dtype=torch.bool)
    for k, (i, j) in enumerate(pixels):
        for a, b in seen(receptive_field, i, j, height, width):
            expected[k, 0, a, b] = True
    assert torch.equal(support(decoder(receptive_field, (1, height, width)), pixels), expected)


def test_window_shows_all_channels_of_other_pixels_and_none_of_its_own() -> None:
    pixels = [(i, j) for i in range(5) for j in range(6)]
    got = support(decoder("3x2", (3, 5, 6)), pixels)
    for k, (i, j) in enumerate(pixels):
        for c in range(3):
            assert set(map(tuple, got[k, c].nonzero().tolist())) == seen("3x2", i, j, 5, 6)


@pytest.mark.parametrize(
    ("receptive_field", "count"),
    [("none", 0), ("1x1", 1), ("2x1", 3), ("3x2", 7), ("4x2", 10), ("5x3", 17), ("7x4", 31), ("15x8", 127)],
)
def test_window_counts(receptive_field: str, count: int) -> None:
    offsets = window(receptive_field)
    assert len(offsets) == len(set(offsets)) == count
    assert offsets == sorted(offsets)
    assert {(50 + i, 50 + j) for i, j in offsets} == seen(receptive_field, 50, 50, 100, 100)


def test_none_ignores_x() -> None:
    model = decoder("none", (1, 8, 8))
    u, z = inputs(model)
    assert torch.equal(model(u, model.features(z)), model(torch.full_like(u, torch.nan), model.features(z)))


@pytest.mark.parametrize("size", [*SIZES, (64, 3), (5, 31)])
@pytest.mark.parametrize("widths", [[4], [4, 6], [4, 6, 3, 5]])
def test_the_code_reaches_every_pixel(size: tuple[int, int], widths: list[int]) -> None:
    model = decoder("none", (1, *size), code=3, widths=widths)
    u, z = inputs(model, 3, batch=2)
    rows = torch.autograd.functional.jacobian(lambda v: model(u, model.features(v)).sum((0, 1)), z, vectorize=True)
    assert rows.shape == (*size, 2, 3)
    assert (rows != 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("receptive_field", WINDOWS)
@pytest.mark.parametrize("code", [0, 2])
def test_at_is_forward(receptive_field: str, size: tuple[int, int], code: int) -> None:
    model = decoder(receptive_field, (1, *size), code)
    u, z = inputs(model, code)
    h = model.features(z)
    everywhere = model(u, h)
    assert everywhere.shape == (3, 2, *size)
    i, j = (each.flatten() for each in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    order = torch.randperm(len(i))
    some = model.at(u, h, i[order], j[order])
    torch.testing.assert_close(some, everywhere.flatten(2)[..., order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("receptive_field", WINDOWS)
def test_at_needs_the_window_alone(receptive_field: str) -> None:
    model = decoder(receptive_field, (1, 5, 7))
    u, z = inputs(model)
    h = model.features(z)
    for i, j in [(0, 0), (0, 6), (2, 3), (4, 0), (4, 6)]:
        hidden = torch.full_like(u, torch.nan)
        for a, b in seen(receptive_field, i, j, 5, 7):
            hidden[:, :, a, b] = u[:, :, a, b]
        got = model.at(hidden, h, torch.tensor([i]), torch.tensor([j]))
        torch.testing.assert_close(got[..., 0], model(u, h)[:, :, i, j], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "likelihood", [Bernoulli(channels=1, levels=2), LogisticMixture(channels=1, levels=2, components=2)]
)
@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("receptive_field", WINDOWS)
def test_total_probability_of_all_images_is_one(receptive_field: str, code: int, likelihood: Likelihood) -> None:
    model = decoder(receptive_field, code=code, num_params=likelihood.num_params)
    x = images()
    z = torch.randn(1, code, dtype=torch.float64).expand(len(x), -1)
    with torch.no_grad():
        log_px = likelihood.log_prob(model(2.0 * x.double() - 1, model.features(z)), x)
    assert log_px.flatten(1).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_a_fresh_decoder_gives_zeros() -> None:
    model = PixelCNN(
        shape=SHAPE, code=2, num_params=6, receptive_field="3x2", features=5, width=8, depth=2, widths=[4], hidden=10
    ).double()
    u, z = inputs(model)
    assert (model(u, model.features(z)) == 0).all()


@pytest.mark.parametrize(
    "bad", ["", "7", "7x", "x4", "0x2", "7x0", "-1x2", "7X4", "7x4 ", "7x4\n", "7x4x2", "None", "1.5x2"]
)
def test_refuses_bad_windows(bad: str) -> None:
    with pytest.raises(ValueError) as caught:
        window(bad)
    assert f"receptive_field={bad}" in str(caught.value)
    assert "none" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"features": 0}, "features=0"),
        ({"width": 0}, "width=0"),
        ({"hidden": -1}, "hidden=-1"),
        ({"depth": -1}, "depth"),
        ({"widths": []}, "widths"),
        ({"widths": [4, 0]}, "widths=[4, 0]"),
    ],
)
def test_refuses_bad_sizes(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError) as caught:
        decoder("3x2", **changed)
    assert key in str(caught.value)
