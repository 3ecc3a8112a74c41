"""The decoder's window is exactly the declared one, and `at` is `forward` at a few pixels."""

from math import prod
from typing import Any, Literal

import pytest
import torch
from tiny import SHAPE, WINDOWS, images, maps_for, seen, shaken
from torch import Tensor

from vlae.decoder import MapPixelCNN, PixelCNN, Windowed
from vlae.layers import PixelBlock
from vlae.likelihoods import Bernoulli, Likelihood, LogisticMixture
from vlae.window import window

SIZES = [(3, 3), (8, 8), (13, 17)]


Code = int | list[int] | Literal["maps"]
MAPS = [("maps", 1, {}), ("maps", 3, {"grey": True})]
over_codes = pytest.mark.parametrize("code", [2, "maps"])


def fresh(receptive_field: str, shape: tuple[int, int, int] = SHAPE, code: Code = 2, **changed: Any) -> Windowed:
    sizes = {"num_params": 2, "features": 5, "width": 8, "depth": 2, "widths": [4, 6]} | changed
    if isinstance(code, int):
        return PixelCNN(shape=shape, receptive_field=receptive_field, **{"code": code, "hidden": 10} | sizes)
    halvings = len(sizes["widths"]) - 1
    code = maps_for(shape, 2, halvings) if code == "maps" else code
    own = {"code": code, "blocks": [1] * (halvings + 1), "grey": False, "dropout": 0.0}
    return MapPixelCNN(shape=shape, receptive_field=receptive_field, **own | sizes)


def decoder(receptive_field: str, shape: tuple[int, int, int] = SHAPE, code: Code = 2, **changed: Any) -> Windowed:
    return shaken(fresh(receptive_field, shape, code, **changed))  # type: ignore[return-value]


def inputs(model: Windowed, batch: int = 3) -> tuple[Tensor, Tensor]:
    u = torch.rand(batch, *model.shape, dtype=torch.float64) * 2 - 1
    first = model.trunk[0]
    numbers = prod(first.unflattened_size) if isinstance(model, MapPixelCNN) else first.in_features
    return u, torch.randn(batch, 0 if getattr(model, "constant", False) else numbers, dtype=torch.float64)


def support(model: Windowed, pixels: list[tuple[int, int]]) -> Tensor:
    """Whether the parameters of each of `pixels` change with u: [pixel, C, H, W]."""
    u, z = inputs(model, batch=1)
    u = u.repeat(len(pixels), 1, 1, 1).requires_grad_()
    params = model(u, model.features(z).expand(len(pixels), -1, -1, -1))
    # images of a batch do not mix, so that one backward pass gives a row of the Jacobian from each
    own = torch.stack([params[k, :, i, j].sum() for k, (i, j) in enumerate(pixels)])
    return torch.autograd.grad(own.sum(), u, materialize_grads=True)[0] != 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("receptive_field", WINDOWS)
@over_codes
def test_jacobian_support_is_the_window(code: Code, receptive_field: str, size: tuple[int, int]) -> None:
    height, width = size
    pixels = [(i, j) for i in range(height) for j in range(width)]
    expected = torch.zeros(len(pixels), 1, height, width, dtype=torch.bool)
    for k, (i, j) in enumerate(pixels):
        for a, b in seen(receptive_field, i, j, height, width):
            expected[k, 0, a, b] = True
    assert torch.equal(support(decoder(receptive_field, (1, height, width), code=code), pixels), expected)


@over_codes
def test_window_shows_all_channels_of_other_pixels_and_none_of_its_own(code: Code) -> None:
    pixels = [(i, j) for i in range(5) for j in range(6)]
    got = support(decoder("3x2", (3, 5, 6), code=code), pixels)
    for k, (i, j) in enumerate(pixels):
        for c in range(3):
            assert set(map(tuple, got[k, c].nonzero().tolist())) == seen("3x2", i, j, 5, 6)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(("receptive_field", "count"), [("4x2", 10), ("5x3", 17), ("7x4", 31)])
def test_an_inner_pixel_of_colours_sees_as_many_as_the_window_shows(
    receptive_field: str, count: int, grey: bool
) -> None:
    got = support(decoder(receptive_field, (3, 9, 11), code="maps", grey=grey), [(6, 5)])[0]
    assert got.sum((1, 2)).tolist() == [count] * 3


def test_a_grey_window_shows_luminance_alone() -> None:
    model = decoder("3x2", (3, 5, 7), code="maps", grey=True)
    u, z = inputs(model)
    h = model.features(z).detach()
    params = model(u.requires_grad_(), h)
    (gradient,) = torch.autograd.grad((params * torch.randn_like(params)).sum(), u)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    assert (gradient[:, :, :-1] != 0).all()
    # the weights are kept in float32
    torch.testing.assert_close(gradient, gradient.sum(1, keepdim=True) * weights, rtol=1e-6, atol=0)
    with torch.no_grad():
        other = torch.rand_like(u)
        kept = other + ((u - other) * weights).sum(1, keepdim=True)  # other colours of the same luminance
        assert (kept - u).abs().amin() < 0.1 < (kept - u).abs().amax()
        torch.testing.assert_close(model(kept, h), params, rtol=0, atol=1e-6)
        assert (model(u + 0.1, h) - params).abs().amax() > 1e-2


@pytest.mark.parametrize(("code", "channels", "grey"), [(2, 1, {}), *MAPS])
def test_autocast_does_not_reach_the_look_at_the_window(code: Code, channels: int, grey: dict[str, bool]) -> None:
    model = decoder("5x3", (channels, 6, 5), code, **grey).float()
    u, z = (part.float() for part in inputs(model))
    looked: list[Tensor] = []
    assert model.look is not None
    model.look.register_forward_hook(lambda _, given, made: looked.extend([given[0], made]))
    model(u, model.features(z))
    with torch.autocast("cpu", torch.bfloat16):
        model(u, model.features(z))
    given, made, given_again, made_again = looked
    assert torch.equal(given_again, given)
    assert torch.equal(made_again, made)


def test_a_grey_window_hides_no_earlier_channel_of_the_pixel_itself() -> None:
    likelihood = LogisticMixture(channels=3, levels=256, components=2)
    model = decoder("3x2", (3, 5, 7), code="maps", grey=True, num_params=likelihood.num_params)
    u, z = inputs(model, batch=1)
    params = model(u, model.features(z))
    dark, light = (torch.full((1, 1, 5, 7), value) for value in (0, 255))
    assert (likelihood.pmf(params, dark) != likelihood.pmf(params, light)).any(1).all()
    for first in (dark, light):
        pmfs = [likelihood.pmf(params, torch.cat([first, second], 1)) for second in (dark, light)]
        assert (pmfs[0] != pmfs[1]).any(1).all()


def test_dropout_acts_in_training_alone() -> None:
    dropped, plain = (decoder("3x2", code="maps", dropout=dropout) for dropout in (0.5, 0.0))
    u, z = inputs(plain)
    dropped.load_state_dict(plain.state_dict())
    expected = plain(u, plain.features(z))
    assert torch.equal(dropped.eval()(u, dropped.features(z)), expected)
    dropped.train()
    draws = torch.stack([dropped(u, dropped.features(z)) for _ in range(2)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(dropped.features(z), plain.features(z))  # the code itself is never hidden


@pytest.mark.parametrize("dropout", [0.25, 0.5])
def test_dropout_keeps_the_mean(dropout: float) -> None:
    """Of one block, which is linear after it."""
    block, x = shaken(PixelBlock(6, dropout)), torch.randn(6, dtype=torch.float64)
    draws = block(x.expand(20_000, 6))
    expected = block.eval()(x)
    error = (draws.mean(0) - expected) / (draws.std(0) / 20_000**0.5)
    assert error.abs().max() < 4.5
    assert draws.std(0).min() > 0


@pytest.mark.parametrize(
    ("receptive_field", "count"),
    [("none", 0), ("1x1", 1), ("2x1", 3), ("3x2", 7), ("4x2", 10), ("5x3", 17), ("7x4", 31), ("15x8", 127)],
)
def test_window_counts(receptive_field: str, count: int) -> None:
    offsets = window(receptive_field)
    assert len(offsets) == len(set(offsets)) == count
    assert offsets == sorted(offsets)
    assert {(50 + i, 50 + j) for i, j in offsets} == seen(receptive_field, 50, 50, 100, 100)


@over_codes
def test_none_ignores_x(code: Code) -> None:
    model = decoder("none", (1, 8, 8), code=code)
    u, z = inputs(model)
    assert torch.equal(model(u, model.features(z)), model(torch.full_like(u, torch.nan), model.features(z)))


@pytest.mark.parametrize("size", [*SIZES, (64, 3), (5, 31)])
@pytest.mark.parametrize("widths", [[4], [4, 6], [4, 6, 3, 5]])
@over_codes
def test_the_code_reaches_every_pixel(code: Code, size: tuple[int, int], widths: list[int]) -> None:
    model = decoder("none", (1, *size), code, widths=widths)
    u, z = inputs(model, batch=2)
    rows = torch.autograd.functional.jacobian(lambda v: model(u, model.features(v)).sum((0, 1)), z, vectorize=True)
    assert rows.shape == (*size, *z.shape)
    assert (rows != 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("receptive_field", WINDOWS)
@pytest.mark.parametrize(("code", "channels", "grey"), [(0, 1, {}), (2, 1, {}), *MAPS])
def test_at_is_forward(
    receptive_field: str, size: tuple[int, int], code: Code, channels: int, grey: dict[str, bool]
) -> None:
    model = decoder(receptive_field, (channels, *size), code, **grey)
    u, z = inputs(model)
    h = model.features(z)
    everywhere = model(u, h)
    assert everywhere.shape == (3, 2, *size)
    i, j = (each.flatten() for each in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    order = torch.randperm(len(i))
    some = model.at(u, h, i[order], j[order])
    torch.testing.assert_close(some, everywhere.flatten(2)[..., order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("receptive_field", WINDOWS)
@pytest.mark.parametrize(("code", "channels", "grey"), [(2, 1, {}), *MAPS])
def test_at_needs_the_window_alone(receptive_field: str, code: Code, channels: int, grey: dict[str, bool]) -> None:
    model = decoder(receptive_field, (channels, 5, 7), code, **grey)
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
@pytest.mark.parametrize("code", [0, 2, "maps"])
@pytest.mark.parametrize("receptive_field", WINDOWS)
def test_total_probability_of_all_images_is_one(receptive_field: str, code: Code, likelihood: Likelihood) -> None:
    model = decoder(receptive_field, code=code, num_params=likelihood.num_params)
    x, z = images(), inputs(model, batch=1)[1].expand(512, -1)
    with torch.no_grad():
        log_px = likelihood.log_prob(model(2.0 * x.double() - 1, model.features(z)), x)
    assert log_px.flatten(1).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("receptive_field", ["none", "2x1", "3x2"])
def test_total_probability_of_all_colour_images_is_one(receptive_field: str, grey: bool) -> None:
    """All images of 2x2 pixels, each with three channels of two levels."""
    likelihood = LogisticMixture(channels=3, levels=2, components=2)
    model = decoder(receptive_field, (3, 2, 2), "maps", num_params=likelihood.num_params, grey=grey)
    x = (torch.arange(2**12)[:, None] >> torch.arange(12) & 1).view(-1, 3, 2, 2)
    with torch.no_grad():
        params = model(2.0 * x.double() - 1, model.features(inputs(model, batch=1)[1]))
    assert likelihood.log_prob(params, x).flatten(1).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


@over_codes
def test_a_fresh_decoder_gives_zeros(code: Code) -> None:
    model = fresh("3x2", code=code).double()
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
    ("code", "changed", "key"),
    [
        *(
            (code, {name: size}, f"{name}={size}")
            for code in (2, "maps")
            for name, size in (("features", 0), ("width", 0), ("depth", -1), ("widths", [4, 0]))
        ),
        (2, {"widths": []}, "widths"),
        (2, {"hidden": -1}, "hidden=-1"),
        *(("maps", {"dropout": dropout}, f"dropout={dropout}") for dropout in (-0.1, 1.0, float("nan"))),
        ("maps", {"grey": True}, "grey=true: needs images of 3 channels, these have 1"),
        ("maps", {"blocks": [1]}, "blocks=[1]"),
        ("maps", {"blocks": [1, -1]}, "blocks=[1, -1]"),
        ("maps", {"widths": []}, "widths"),
        ([2, 3, 3], {}, "model.code=[2, 3, 3]: 2 widths on images [1, 3, 3] need maps such as [2, 2, 2]"),
    ],
)
def test_refuses_bad_sizes(code: Code, changed: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError) as caught:
        fresh("3x2", code=code, **changed)
    assert key in str(caught.value)
