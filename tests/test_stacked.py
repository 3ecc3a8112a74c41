"""The paper's decoder: one window for every pixel, and `at` is `forward`."""

import math

import pytest
import torch
from tiny import images, settings, shaken

from vlae.likelihoods import LogisticMixture
from vlae.model import VLAE, build
from vlae.sampling import decode
from vlae.stacked import StackedPixelCNN
from vlae.window import waves


def model_of(shape: tuple[int, int, int], layers: int, code: int = 2) -> VLAE:
    sizes = {"features": 3, "filters": 5, "layers": layers, "widths": [4, 6], "hidden": 10}
    section = settings(code=code) | {"decoder": {"_target_": "vlae.stacked.StackedPixelCNN", **sizes}}
    return build(section, shape, 2)


def reached(layers: int, i: int, j: int, width: int) -> set[tuple[int, int]]:
    """The pixels that (i, j) sees, layer by layer on the grid: a masked 3x3 reads its row's left and three above."""
    own = {(i, j)}
    for layer in range(layers):
        near = {(a, b - 1) for a, b in own} | {(a - 1, b + right) for a, b in own for right in (-1, 0, 1)}
        own = {(a, b) for a, b in near | (own if layer else set()) if a >= 0 and 0 <= b < width}
    return own


@pytest.mark.parametrize(("layers", "size"), [(2, (3, 7)), (3, (9, 8)), (6, (13, 17))])
def test_support_is_the_window(layers: int, size: tuple[int, int]) -> None:
    model: StackedPixelCNN = shaken(model_of((1, *size), layers)).decoder  # type: ignore[assignment]
    u = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True)
    params = model(u, model.features(torch.randn(1, 2).double()))[0, 0]
    for i in range(size[0]):
        for j in range(size[1]):
            (row,) = torch.autograd.grad(params[i, j], u, retain_graph=True, materialize_grads=True)
            found = {(int(a), int(b)) for a, b in row[0, 0].nonzero()}
            assert found == reached(layers, i, j, size[1])
            inside = {(i + a, j + b) for a, b in model.window}
            assert found == {(a, b) for a, b in inside if a >= 0 and 0 <= b < size[1]}


def test_the_paper_s_window_has_69_pixels_and_is_seen_in_82_waves() -> None:
    window = model_of((1, 28, 28), 6).decoder.window
    assert len(window) == 69  # type: ignore[arg-type]
    assert len(list(waves(window, 28, 28, torch.device("cpu")))) == 82  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [0, 2])
def test_at_is_forward(code: int) -> None:
    model = shaken(model_of((1, 6, 7), 4, code)).decoder
    u = torch.rand(3, 1, 6, 7, dtype=torch.float64)
    h = model.features(torch.randn(3, code).double())  # type: ignore[operator]
    i, j = torch.tensor([0, 5, 2]), torch.tensor([6, 0, 3])
    everywhere = model(u, h)
    assert everywhere.shape == (3, 1, 6, 7)
    assert torch.equal(model.at(u, h, i, j), everywhere[:, :, i, j])  # type: ignore[operator]


def test_other_pixels_are_seen_in_all_channels_and_the_own_in_none() -> None:
    likelihood = LogisticMixture(channels=3, levels=2, components=2)
    sizes = {"features": 3, "filters": 5, "layers": 2, "widths": [4, 6], "hidden": 10}
    model = shaken(StackedPixelCNN(shape=(3, 2, 2), code=2, num_params=likelihood.num_params, **sizes))
    x = (torch.arange(2**12)[:, None] >> torch.arange(12) & 1).view(-1, 3, 2, 2)
    h = model.features(torch.randn(1, 2).double())
    u = torch.rand(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(u, h)[0, :, 1, 0].square().sum(), u)
    assert torch.equal(gradient[0] != 0, torch.tensor([[True, True], [False, False]]).expand(3, 2, 2))
    with torch.no_grad():
        log_px = likelihood.log_prob(model(2.0 * x.double() - 1, h), x)
    assert log_px.flatten(1).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_probabilities_of_all_images_sum_to_one() -> None:
    model = shaken(model_of((1, 3, 3), 6))
    x, z = images(), torch.randn(1, 2).double().expand(512, -1)
    with torch.no_grad():
        log_px = model.terms(x, z, z.new_zeros(512)).log_px  # type: ignore[operator]
    assert log_px.flatten(1).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_scan_is_raster_order(layers: int) -> None:
    model: VLAE = shaken(model_of((1, 9, 8), layers))  # type: ignore[assignment]
    z, uniform = torch.randn(3, 2).double(), torch.rand(3, 1, 9, 8).double()
    x = torch.zeros(3, 1, 9, 8, dtype=torch.long)
    with torch.no_grad():
        for i in range(9):
            for j in range(8):
                params = model.decoder(model.unit(x), model.decoder.features(z))[:, :, i, j]  # type: ignore[operator]
                x[:, :, i, j] = (uniform[:, :, i, j] >= (-params).sigmoid()).long()  # 0 first
    assert 0 < x.double().mean() < 1
    found = decode(model, z, uniform)
    assert torch.equal(found, x)


def test_every_parameter_gets_a_gradient_and_layers_are_tied() -> None:
    model: VLAE = shaken(model_of((1, 7, 9), 6))  # type: ignore[assignment]
    x = torch.randint(2, (16, 1, 7, 9))
    model(x, torch.randn(16, 2).double()).elbo.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    masked = [name for name, parameter in model.decoder.named_parameters() if parameter.shape[2:] == (3, 3)]
    assert {"first.weight", "later.weight", "mix.weight"} == {name for name in masked if "trunk" not in name}


def test_a_fresh_model_is_uniform() -> None:
    terms = model_of((1, 5, 7), 6)(torch.randint(2, (6, 1, 5, 7)), torch.randn(6, 2))
    torch.testing.assert_close(terms.distortion, torch.full((6,), 35 * math.log(2)))


@pytest.mark.parametrize(
    "changed", [{"layers": 0}, {"layers": 1}, {"filters": 0}, {"features": 0}, {"widths": []}, {"hidden": 0}]
)
def test_refuses_bad_sizes(changed: dict[str, int | list[int]]) -> None:
    sizes = {"features": 3, "filters": 5, "layers": 2, "widths": [4], "hidden": 10} | changed
    with pytest.raises(ValueError) as caught:
        StackedPixelCNN(shape=(1, 5, 5), code=2, num_params=1, **sizes)  # type: ignore[arg-type]
    (key,) = changed
    assert key in str(caught.value)
