"""Waves give the pixels that raster order gives, and samples, paths and completions follow the density."""

import weakref
from typing import Any

import pytest
import torch
from scipy.stats import chi2, norm
from tiny import WINDOWS, images, seen, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlae.model import VLAE
from vlae.sampling import complete, decode, interpolate, reconstruct, sample, scan
from vlae.window import waves, window

CPU = torch.device("cpu")
MAPS = [  # shape, levels, the rest
    ((1, 7, 5), 2, {}),
    ((3, 5, 6), 256, {"likelihood": "LogisticMixture"}),
    ((3, 6, 5), 17, {"likelihood": "LogisticMixture", "grey": True}),
]
over_maps = pytest.mark.parametrize(("shape", "levels", "chosen"), MAPS, ids=["binary", "colour", "grey"])
KINDS = [  # likelihood, channels, levels
    ("Bernoulli", 1, 2),
    ("LogisticMixture", 1, 256),
    ("LogisticMixture", 3, 17),
    ("LogisticMixture", 3, 2),
]
over_windows = pytest.mark.parametrize("receptive_field", WINDOWS)
over_kinds = pytest.mark.parametrize(("likelihood", "channels", "levels"), KINDS)


def noise(model: VLAE, count: int) -> tuple[Tensor, Tensor]:
    eps = torch.randn(count, model.prior.code, dtype=torch.float64)
    return eps, torch.rand(count, *model.decoder.shape, dtype=torch.float64)


@torch.no_grad()
def raster(model: VLAE, z: Tensor, uniform: Tensor) -> Tensor:
    """One pass over the whole image for each pixel, from the top left to the bottom right."""
    x, h = torch.zeros_like(uniform, dtype=torch.long), model.decoder.features(z)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            here = (..., slice(i, i + 1), slice(j, j + 1))
            x[here] = model.likelihood.sample(model.decoder(model.unit(x), h)[here], uniform[here])
    return x


def misfit(observed: Tensor, expected: Tensor) -> float:
    """Chance that counts like `observed` come from a law with the counts `expected` (chi-square)."""
    common = expected >= 5  # chi-square's rule; the rare ones count as one cell
    cells = [torch.cat([v[common], v[~common].sum()[None]]) for v in (observed, expected)]
    statistic = ((cells[0] - cells[1]).square() / cells[1].clamp(min=1e-9)).sum().item()
    return chi2.sf(statistic, int(common.sum()))


def counts(x: Tensor) -> Tensor:
    """How often each binary 3x3 image, in the order of `images`, is there."""
    return torch.bincount(x.flatten(1) @ (1 << torch.arange(9)), minlength=512).double()


@over_windows
@pytest.mark.parametrize("size", [(3, 3), (8, 8), (13, 17), (28, 28), (2, 40), (40, 2), (1, 1)])
def test_windows_lie_in_earlier_waves(receptive_field: str, size: tuple[int, int]) -> None:
    height, width = size
    number = torch.full(size, -1)
    for wave, (i, j) in enumerate(waves(window(receptive_field), height, width, CPU)):
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
    assert sum(1 for _ in waves(window(receptive_field), *size, CPU)) == count


def meets_raster_order(model: VLAE, count: int) -> bool:
    z, uniform = noise(model, count)
    x = decode(model, z, uniform)
    assert len(x.unique()) > 1  # not all alike
    if x[0, 0].numel() < 10:
        return torch.equal(x, raster(model, z, uniform))
    # no other image is what its own parameters draw, as those of a pixel are of earlier pixels alone
    with torch.no_grad():
        params = model.decoder(model.unit(x), model.decoder.features(z))
    return torch.equal(model.likelihood.sample(params, uniform), x)


@over_windows
@over_kinds
@pytest.mark.parametrize("size", [(3, 3), (8, 8)])
def test_scan_is_raster_order(
    receptive_field: str, size: tuple[int, int], likelihood: str, channels: int, levels: int
) -> None:
    assert meets_raster_order(tiny((channels, *size), levels, window=receptive_field, likelihood=likelihood), 3)


@over_windows
@over_maps
def test_scan_is_raster_order_from_maps(
    receptive_field: str, shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]
) -> None:
    assert meets_raster_order(tiny(shape, levels, maps=True, window=receptive_field, dropout=0.3, **chosen).eval(), 3)


@over_windows
def test_scan_is_raster_order_without_a_code(receptive_field: str) -> None:
    assert meets_raster_order(tiny((1, 5, 8), code=0, window=receptive_field), 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("receptive_field", "size", "likelihood", "channels", "levels"),
    [
        *[(field, (13, 17), *kind) for field, kind in zip(WINDOWS, 2 * KINDS, strict=True)],
        ("7x4", (28, 28), "Bernoulli", 1, 2),
        ("1x1", (28, 28), "LogisticMixture", 1, 256),
        ("4x2", (28, 28), "LogisticMixture", 3, 2),
        ("5x3", (32, 32), "LogisticMixture", 1, 256),
        ("15x8", (32, 32), "Bernoulli", 1, 2),
    ],
)
def test_scan_is_raster_order_on_larger_images(
    receptive_field: str, size: tuple[int, int], likelihood: str, channels: int, levels: int
) -> None:
    assert meets_raster_order(tiny((channels, *size), levels, window=receptive_field, likelihood=likelihood), 1)


@pytest.mark.usefixtures("unchecked")
@over_windows
@pytest.mark.parametrize("code", [0, 2, [2, 3, 4]])
@pytest.mark.parametrize("channels", [1, 3])
def test_scan_meets_the_parameters_of_forward(receptive_field: str, code: int | list[int], channels: int) -> None:
    grey, likelihood = channels == 3, "LogisticMixture"
    model = tiny((channels, 5, 7), 17, code=code, window=receptive_field, likelihood=likelihood, grey=grey)
    x = torch.randint(17, (3, channels, 5, 7))
    h = model.decoder.features(torch.randn(3, model.prior.code, dtype=torch.float64))
    met = torch.full((3, model.likelihood.num_params, 5, 7), torch.nan, dtype=torch.float64)

    def look_up(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
        met[:, :, i, j] = params
        return x[:, :, i, j]

    assert torch.equal(scan(model, h, look_up, 3), x)
    torch.testing.assert_close(met, model.decoder(model.unit(x), h).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("code", [0, 2, [2, 3, 4]])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cut", [0, 2])
def test_images_do_not_depend_on_their_batch(code: int | list[int], channels: int, cut: int) -> None:
    model = tiny((channels, 5, 7), 17, code=code, likelihood="LogisticMixture")
    eps, uniform = noise(model, 5)
    x, pick = torch.randint(17, (5, channels, 5, 7)), torch.rand(5)
    more = torch.randn(6, 5, model.prior.code, dtype=torch.float64)
    along = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def drawn(part: slice) -> list[Tensor]:
        return [
            sample(model, eps[part], uniform[part]),
            reconstruct(model, x[part], eps[part], uniform[part]),
            interpolate(model, eps[part], more[0, part], along, uniform[part]),
            complete(model, x[part], 2, more[:, part], pick[None, part], uniform[None, part])[0],
        ]

    for whole, first, second in zip(drawn(slice(None)), drawn(slice(cut)), drawn(slice(cut, None)), strict=True):
        assert torch.equal(torch.cat([first, second]), whole)


class Memory(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still held by anything."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.held[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, storage._cdata)
        return out


@pytest.mark.parametrize("receptive_field", ["1x1", "3x2", "7x4"])
def test_a_wave_leaves_nothing_behind(receptive_field: str) -> None:
    model = tiny((1, 16, 12), window=receptive_field)
    z, uniform = noise(model, 2)
    sizes, held = [0], []  # pixels of each wave, bytes held as they are drawn

    def choose(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
        sizes.append(len(i))
        held.append(sum(memory.held.values()))
        return model.likelihood.sample(params, uniform[:, :, i, j])

    with Memory() as memory:
        h = model.decoder.features(z)  # with gradients: the scan must not keep them
        scan(model, h, choose, 2)
    alike: dict[tuple[int, int], set[int]] = {}  # a wave may still hold the tensors of the one before, no others
    for *two, held_bytes in zip(sizes, sizes[1:], held, strict=False):
        alike.setdefault(tuple(two), set()).add(held_bytes)
    assert len(held) > 2 * len(alike)
    assert all(len(values) == 1 for values in alike.values()), alike


@pytest.mark.parametrize("code", [3, 20, [5, 4, 4]])
def test_codes_from_noise_cost_no_more_than_noise_from_codes(code: int | list[int]) -> None:
    model = tiny((1, 8, 8), code=code, width=30)
    eps, _ = noise(model, 4)
    with FlopCounterMode(display=False) as forward:
        model.prior(eps)
    with FlopCounterMode(display=False) as inverse:
        model.prior.inverse(eps)
    assert 0 < inverse.get_total_flops() <= forward.get_total_flops()  # each hidden unit once


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("shape", "levels", "chosen"), [((1, 5, 7), 2, {}), *((*kind[:2], {"maps": True, **kind[2]}) for kind in MAPS)]
)
def test_sample_and_reconstruct_decode_the_codes_of_prior_and_posterior(
    shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]
) -> None:
    model = tiny(shape, levels, **chosen)
    eps, uniform = noise(model, 4)
    x = torch.randint(levels, (4, *shape))
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
    for x in (
        sample(model, eps, uniform),
        reconstruct(model, images()[:2], eps, uniform),
        interpolate(model, eps, -eps, torch.ones(1, dtype=torch.float64), uniform),
        complete(model, images()[:2], 1, eps[None], uniform[None, :, 0, 0, 0], uniform[None]),
    ):
        assert x.dtype == torch.long
        assert not x.requires_grad


def test_frequencies_of_samples_are_their_probabilities() -> None:
    model, count = tiny(code=0), 40_000
    observed = counts(sample(model, *noise(model, count)))
    with torch.no_grad():
        expected = count * model(images(), torch.zeros(512, 0, dtype=torch.float64)).elbo.exp()
    assert misfit(observed, expected) > 1e-4


def test_a_path_turns_from_one_noise_to_the_other() -> None:
    model = tiny((1, 5, 7), code=3)
    (a, uniform), (b, _) = noise(model, 6), noise(model, 6)
    a, b = 4 * a, 2 * b
    along = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    x = interpolate(model, model.prior.inverse(a), model.prior.inverse(b), along, uniform)
    assert x.shape == (6, 4, 1, 5, 7)
    for k, t in enumerate(along.tolist()):
        for n in range(6):
            straight = (1 - t) * a[n] + t * b[n]
            length = (1 - t) * a[n].square().sum().sqrt() + t * b[n].square().sum().sqrt()
            eps = straight * (length / straight.square().sum().sqrt())
            assert torch.equal(x[n, k], sample(model, eps[None], uniform[n : n + 1])[0])
    assert not torch.equal(x[:, 0], x[:, -1])


def test_a_path_between_equal_codes_stays() -> None:
    model = tiny((1, 5, 7), code=3)
    z, uniform = noise(model, 4)
    x = interpolate(model, z, z, torch.linspace(0, 1, 5, dtype=torch.float64), uniform)
    assert torch.equal(x, decode(model, z, uniform)[:, None].expand_as(x))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_a_completion_keeps_the_upper_rows_and_never_reads_the_lower(channels: int, rows: int) -> None:
    model = tiny((channels, 5, 4), 17, likelihood="LogisticMixture")
    _, uniform = noise(model, 6)
    uniform = torch.stack([uniform, 1 - uniform])
    x, pick = torch.randint(17, (6, channels, 5, 4)), torch.rand(2, 6)
    eps = torch.randn(7, 6, 2, dtype=torch.float64)
    done = complete(model, x.byte(), rows, eps, pick, uniform)
    for each, one, pixels in zip(done, pick, uniform, strict=True):
        assert torch.equal(each[:, :, :rows], x[:, :, :rows])
        assert rows == 5 or (each[:, :, rows:] != x[:, :, rows:]).any()
        assert torch.equal(complete(model, x, rows, eps, one[None], pixels[None])[0], each)
    x[:, :, rows:] = 16 - x[:, :, rows:]
    assert torch.equal(complete(model, x, rows, eps, pick, uniform), done)


def test_a_completion_of_nothing_is_a_sample() -> None:
    model = tiny((1, 5, 4))
    eps, uniform = noise(model, 6)
    x, pick = torch.zeros(6, 1, 5, 4, dtype=torch.long), torch.linspace(0, 0.999, 6)
    done = complete(model, x, 0, eps[None], pick[None], uniform[None])[0]
    assert torch.equal(done, sample(model, eps, uniform))
    apart = torch.stack([eps, eps + 3])  # without a row given both codes weigh the same
    codes = torch.where((pick < 0.5)[:, None], apart[0], apart[1])
    done = complete(model, x, 0, apart, pick[None], uniform[None])[0]
    assert torch.equal(done, sample(model, codes, uniform))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("receptive_field", "rows"), [("none", 2), ("3x2", 1)])
def test_completions_follow_the_density_given_the_upper_rows(receptive_field: str, rows: int) -> None:
    model, count = tiny(window=receptive_field, scale=False), 4000
    x = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]]).expand(count, 1, 3, 3)
    fitting = (images()[:, :, :rows] == x[:1, :, :rows]).flatten(1).all(1)

    @torch.no_grad()
    def law(eps: Tensor) -> Tensor:
        """p(image | upper rows) where the codes of `eps`, equally likely, are all there are."""
        h = model.decoder.features(model.prior.inverse(eps))
        px = torch.zeros(512, dtype=torch.float64)
        for number in fitting.nonzero():
            image = images()[number].expand(len(eps), -1, -1, -1)
            log_px = model.likelihood.log_prob(model.decoder(model.unit(image), h), image)
            px[number] = log_px.flatten(1).sum(1).exp().mean()
        return px / px.sum()

    def completions(eps: Tensor) -> Tensor:
        return counts(complete(model, x, rows, eps, torch.rand(1, count), noise(model, count)[1][None])[0])

    few = torch.randn(3, 2, dtype=torch.float64)
    assert misfit(completions(few[:, None].expand(-1, count, -1)), count * law(few)) > 1e-4

    quantiles = torch.from_numpy(norm.ppf((torch.arange(40).double() + 0.5) / 40))  # of N(0, 1): all codes
    exact = count * law(torch.cartesian_prod(quantiles, quantiles))
    assert misfit(completions(torch.randn(1, count, 2, dtype=torch.float64)), exact) < 1e-4  # blind to the upper rows
    assert misfit(completions(torch.randn(60, count, 2, dtype=torch.float64)), exact) > 1e-4


@pytest.mark.parametrize(
    ("rows", "codes", "message"),
    [
        (-1, 2, "rows=-1: must be 0 to 5, the height of the images"),
        (6, 2, "rows=6: must be 0 to 5, the height of the images"),
        (2, 0, "noise of shape (0, 1, 2); K >= 1 draws for each of 1 images are needed"),
    ],
)
def test_refuses_completions_that_cannot_be(rows: int, codes: int, message: str) -> None:
    model = tiny((1, 5, 4))
    _, uniform = noise(model, 1)
    with pytest.raises(ValueError) as caught:
        complete(
            model,
            torch.zeros(1, 1, 5, 4).long(),
            rows,
            torch.zeros(codes, 1, 2).double(),
            torch.rand(1, 1),
            uniform[None],
        )
    assert str(caught.value) == message


@pytest.mark.parametrize("batch", [3, 4000])
def test_the_number_of_threads_comes_back(batch: int) -> None:
    """Also after an error; with more images than it takes few threads for, it never changes."""
    model, found = tiny(), []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        h = model.decoder.features(torch.randn(batch, 2, dtype=torch.float64))

        def stop(params: Tensor, i: Tensor, j: Tensor) -> Tensor:
            found.append(torch.get_num_threads())
            raise InterruptedError

        with pytest.raises(InterruptedError):
            scan(model, h, stop, batch)
        assert torch.get_num_threads() == 2
        assert found == [1 if batch == 3 else 2]
    finally:
        torch.set_num_threads(before)


def test_other_shapes_are_refused() -> None:
    """Sizes that the layers would take all the same."""
    model = tiny((1, 8, 8))
    eps, uniform = noise(model, 2)
    x, pick = torch.zeros(2, 1, 8, 8, dtype=torch.long), torch.rand(1, 2)
    for size in ((8, 9), (7, 7), (9, 8)):
        other, pixels = x.new_zeros(2, 1, *size), uniform.new_zeros(2, 1, *size)
        with pytest.raises(ValueError, match=rf"images of int64 \(1, {size[0]}, {size[1]}\); .* \(1, 8, 8\)"):
            reconstruct(model, other, eps, pixels)
        with pytest.raises(ValueError, match=rf"images of \(1, {size[0]}, {size[1]}\); the model is for \(1, 8, 8\)"):
            complete(model, other, 2, eps[None], pick, pixels[None])
        with pytest.raises(ValueError, match=r"uniform of shape .*; \(2, 1, 8, 8\) is needed"):
            sample(model, eps, pixels)
    with pytest.raises(ValueError, match="images of values 0 to 2; the model is for 0 to 1"):
        complete(model, x + 2 * torch.eye(8).long(), 2, eps[None], pick, uniform[None])
