"""The VLAE's terms are bounds of an exact log p(x); models are built, stored and opened with clear refusals."""

import copy
import json
import math
import pickle
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm
from tiny import SHAPE, images, maps_for, settings, shaken, tiny, widened
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from vlae.encoder import IAF, Encoder, MapEncoder, Normal
from vlae.flow import Flow, Made
from vlae.layers import MaskedLinear
from vlae.model import VLAE, Terms, build, load
from vlae.objective import Objective

KINDS = [("Bernoulli", 2), ("LogisticMixture", 17), ("LogisticMixture", 256)]
over_kinds = pytest.mark.parametrize(("likelihood", "levels"), KINDS)
MIXTURE = {"likelihood": "LogisticMixture"}
MODELS: list[tuple[tuple[int, int, int], int, dict[str, Any]]] = [  # shape, levels, the rest
    ((1, 5, 7), 2, {}),
    ((1, 5, 7), 2, {"maps": True}),
    ((3, 5, 7), 256, {"maps": True, "grey": True, **MIXTURE}),
    ((1, 5, 7), 2, {"posterior": "iaf"}),
]
over_models = pytest.mark.parametrize(("shape", "levels", "chosen"), MODELS, ids=["flat", "maps", "grey", "iaf"])


# encoder


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_scales_of_an_iaf_posterior_are_those_of_its_codes(depth: int) -> None:
    flow = Flow(5, False, [Made(5, 8, False, context=True) for _ in range(depth)])  # fresh: shifts of zero
    q = IAF(Normal(torch.zeros(1, 5), torch.randn(1, 5)), torch.randn(1, 8), flow).repeat(50_000)
    z, _ = q.rsample_with_log_prob(torch.randn(50_000, 5))
    torch.testing.assert_close(z.std(0).log(), q.log_scale[0], atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [(3, 3), (3, 64), (64, 3), (5, 7), (13, 17), (28, 28), (31, 30), (33, 64), (64, 64)])
@pytest.mark.parametrize("widths", [[], [4], [4, 5, 6, 7]])
def test_encoder_takes_any_size(size: tuple[int, int], widths: list[int]) -> None:
    shape = 2, *size
    encoders = [(5, Encoder(shape=shape, code=5, widths=widths, hidden=6))]
    if widths:
        maps = maps_for(shape, 3, len(widths) - 1)
        encoders += [(math.prod(maps), MapEncoder(shape=shape, code=maps, widths=widths, blocks=[1] * len(widths)))]
    for numbers, encoder in encoders:
        q = shaken(encoder)(torch.randn(3, *shape).double())
        assert q.mean.shape == q.log_scale.shape == (3, numbers)
        assert torch.isfinite(q.mean).all()


@pytest.mark.parametrize("size", [(3, 3), (3, 64), (5, 7), (13, 17), (31, 30)])
@pytest.mark.parametrize("maps", [False, True])
@over_kinds
def test_model_takes_any_size(maps: bool, size: tuple[int, int], likelihood: str, levels: int) -> None:
    model = tiny((1, *size), levels, maps=maps, likelihood=likelihood)
    terms = model(torch.randint(levels, (2, 1, *size)), torch.randn(2, model.prior.code).double())
    assert terms.log_px.shape == (2, *size)
    assert terms.rate.shape == terms.distortion.shape == terms.elbo.shape == (2,)
    assert torch.isfinite(terms.elbo).all()


@pytest.mark.parametrize("blocks", [None, [1, 1], [0, 1]])
def test_every_pixel_reaches_the_posterior(blocks: list[int] | None) -> None:
    shape = 1, 7, 9
    if blocks:
        encoder: nn.Module = MapEncoder(shape=shape, code=maps_for(shape), widths=[4, 6], blocks=blocks)
    else:
        encoder = Encoder(shape=shape, code=3, widths=[4, 6], hidden=10)
    shaken(encoder, 0.1)  # no log-scale at its clamp
    rows = jacobian(lambda u: torch.cat([*encoder(u)], 1)[0], torch.randn(1, *shape).double())
    assert (rows != 0).all()


def test_without_blocks_a_place_of_the_code_sees_the_pixels_around_it() -> None:
    encoder = shaken(MapEncoder(shape=(3, 7, 9), code=[2, 4, 5], widths=[4, 6], blocks=[0, 0]))
    rows = jacobian(lambda u: torch.cat([*encoder(u)], 1)[0], torch.randn(1, 3, 7, 9).double())
    row, column = torch.arange(7), torch.arange(9)
    for (i, j), seen in zip(product(range(4), range(5)), (rows != 0).view(4, 20, 3, 7, 9).unbind(1), strict=True):
        around = ((row - 2 * i).abs() <= 2)[:, None] & ((column - 2 * j).abs() <= 2)  # 3x3, then 3x3 of stride 2
        assert torch.equal(seen, around.expand_as(seen))


@pytest.mark.parametrize(("shape", "levels", "chosen"), MODELS[:3], ids=["flat", "maps", "grey"])
def test_posterior_density_is_a_normal(shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]) -> None:
    q = tiny(shape, levels, **chosen).encode(torch.randint(levels, (7, *shape)))
    eps = torch.randn_like(q.mean)
    z, log_qz = q.rsample_with_log_prob(eps)
    scipy = norm(q.mean.detach().numpy(), q.log_scale.exp().detach().numpy()).logpdf(z.detach().numpy()).sum(1)
    torch.testing.assert_close(log_qz.detach(), torch.from_numpy(scipy))


def test_density_of_an_inverse_autoregressive_posterior_is_that_of_its_jacobian() -> None:
    model = tiny(code=4, posterior="iaf")
    x, eps = images()[::101], torch.randn(6, 4).double()
    codes, log_qz = model.encode(x).rsample_with_log_prob(eps)
    off = torch.zeros(4, 4, dtype=torch.bool)
    for k in range(6):
        encoded = model.encode(x[k : k + 1])
        matrix = jacobian(lambda v, q=encoded: q.rsample_with_log_prob(v[None])[0][0], eps[k])
        expected = norm.logpdf(eps[k].numpy()).sum() - torch.linalg.slogdet(matrix)[1]
        torch.testing.assert_close(log_qz[k], expected)
        off |= (matrix != 0) & ~torch.eye(4, dtype=torch.bool).flip(0)  # each step reverses the order
        torch.testing.assert_close(codes[k], encoded.rsample_with_log_prob(eps[k : k + 1])[0][0])
        torch.testing.assert_close(encoded.mean[0], encoded.rsample_with_log_prob(torch.zeros(1, 4).double())[0][0])
    assert off.sum() > 6  # not independent, and more than one step could do


def test_the_flow_of_a_posterior_is_told_what_the_image_is() -> None:
    model = tiny(code=4, posterior="iaf")
    start = torch.randn(1, 4).double().expand(6, -1)
    moved = model.encoder.flow(start, model.encode(images()[::101]).context)[0]  # type: ignore[union-attr, operator]
    assert (moved.diff(dim=0).abs() > 1e-6).all()


def test_a_fresh_flow_leaves_the_posterior_as_it_is() -> None:
    model = build(settings(code=4, posterior="iaf"), SHAPE, 2)
    q, eps = model.encode(images()[::101]), torch.randn(6, 4)
    z = q.rsample_with_log_prob(eps)[0].flip(1)  # an odd number of reversals
    assert torch.equal(z, q.start.rsample_with_log_prob(eps)[0])  # type: ignore[union-attr]


@over_kinds
def test_without_a_code_there_is_no_rate_and_no_encoder(likelihood: str, levels: int) -> None:
    model = tiny(levels=levels, code=0, likelihood=likelihood)
    assert not [*model.encoder.parameters(), *model.prior.parameters()]
    x = torch.randint(levels, (4, *SHAPE))
    terms = model(x, torch.zeros(4, 0).double())
    assert torch.equal(terms.rate, torch.zeros(4).double())
    assert torch.equal(terms.elbo, -terms.distortion)


# bounds


def log_joint(model: VLAE, x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z) of every image with every code, [images, codes]."""
    rows = [model.terms(one.expand(len(z), -1, -1, -1), z, z.new_zeros(len(z))) for one in x]
    return torch.stack([-row.distortion + row.log_pz for row in rows])


@torch.no_grad()
def exact(model: VLAE, x: Tensor, step: float = 0.2, reach: float = 9.0) -> Tensor:
    """log p(x) by the trapezoid rule over the noise of the code, whose density is known without the flow."""
    axis = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
    eps = torch.cartesian_prod(*[axis] * model.prior.code).view(-1, model.prior.code)
    z = model.prior.inverse(eps)
    weight = torch.from_numpy(norm.logpdf(eps.numpy()).sum(1)) + model.prior.code * math.log(step)
    likely = log_joint(model, x, z) - log_joint_of_code(model, z)
    return (likely + weight).logsumexp(1)


def log_joint_of_code(model: VLAE, z: Tensor) -> Tensor:
    eps, log_det = model.prior(z)
    return torch.from_numpy(norm.logpdf(eps.numpy()).sum(1)) + log_det


TOYS: list[tuple[tuple[int, int, int], int | list[int]]] = [  # enumerated: the images, and codes by a grid
    (SHAPE, 1),
    (SHAPE, 2),
    ((1, 2, 3), [1, 1, 2]),
    ((1, 2, 2), [2, 1, 1]),
]
over_toys = pytest.mark.parametrize(("shape", "code"), TOYS, ids=str)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("shape", "code"), [TOYS[0], *TOYS[2:]], ids=str)
def test_probabilities_of_all_images_sum_to_one(shape: tuple[int, int, int], code: int | list[int]) -> None:
    total = exact(tiny(shape, code=code), images(shape), step=0.5).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-6)


def test_without_a_code_the_elbo_is_exact() -> None:
    for likelihood in ("Bernoulli", "LogisticMixture"):
        elbo = tiny(code=0, likelihood=likelihood)(images(), torch.zeros(512, 0).double()).elbo
        assert elbo.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.usefixtures("unchecked")
@over_toys
def test_bounds_rise_with_samples_and_stay_below_the_truth(shape: tuple[int, int, int], code: int | list[int]) -> None:
    model, count = widened(tiny(shape, code=code, scale=isinstance(code, int))), 64 * 128
    x = images(shape)
    x = x[[7 * len(x) // 512, 100 * len(x) // 512, 273 * len(x) // 512, -8]]
    truth = exact(model, x)
    with torch.no_grad():
        noise = (torch.randn(count, model.prior.code).double() for _ in x)
        elbos = torch.stack([model(one.expand(count, -1, -1, -1), eps).elbo for one, eps in zip(x, noise, strict=True)])

    def bound(samples: int) -> Tensor:
        return (elbos.unflatten(1, (-1, samples)).logsumexp(2) - math.log(samples)).mean(1)

    assert (bound(1) < bound(8)).all()
    assert (bound(8) < bound(64)).all()
    assert (bound(64) < truth + 0.01).all()  # its own noise: 128 means of 64
    assert (bound(1) < truth - 0.01).all()
    torch.testing.assert_close(bound(count), truth, rtol=0, atol=0.08)


def test_rate_is_the_divergence_from_the_prior() -> None:
    model, x = tiny(code=1), images()[[7]]
    axis = torch.arange(-12, 12, 0.01, dtype=torch.float64)[:, None]
    with torch.no_grad():
        q = model.encode(x)
        log_qz = torch.from_numpy(norm(q.mean.item(), q.log_scale.exp().item()).logpdf(axis.numpy()))[:, 0]
        terms = model.terms(x.expand(len(axis), -1, -1, -1), axis, log_qz)
        divergence = (log_qz.exp() * terms.rate).sum() * 0.01
        eps = norm.ppf((torch.arange(4000).numpy() + 0.5) / 4000)
        sampled = model(x.expand(4000, -1, -1, -1), torch.from_numpy(eps)[:, None]).rate.mean()
    assert divergence > 0
    torch.testing.assert_close(sampled, divergence, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("shape", "code"), [(SHAPE, 3), (SHAPE, [2, 2, 2]), ((1, 2, 5), [1, 1, 3])])
def test_autoregressive_prior_is_an_inverse_autoregressive_posterior(
    shape: tuple[int, int, int], code: int | list[int]
) -> None:
    """VLAE section 3.2: the flow moved from the prior into the posterior, without context, gives the same objective."""
    model, x = tiny(shape, code=code), images(shape)[::37]
    eps = torch.randn(len(x), model.prior.code).double()
    q = model.encode(x)
    base = q.mean + q.log_scale.exp() * eps
    log_base = torch.from_numpy(norm.logpdf(eps.numpy()).sum(1)) - q.log_scale.sum(1)
    for k, start in enumerate(base):
        moved = model.prior(start[None])[0]  # the posterior's code: its own flow applied to its base
        log_qz = log_base[k] - torch.linalg.slogdet(jacobian(lambda v: model.prior(v[None])[0][0], start))[1]
        log_pz = norm.logpdf(moved.detach().numpy()).sum()
        h = model.decoder.features(model.prior.inverse(moved))
        log_px = model.likelihood.log_prob(model.decoder(model.unit(x[k : k + 1]), h), x[k : k + 1]).sum()
        torch.testing.assert_close(model(x[k : k + 1], eps[k : k + 1]).elbo[0], log_px + log_pz - log_qz)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_objective_of_an_inverse_autoregressive_posterior_is_that_of_a_prior_with_its_weights(depth: int) -> None:
    """The same by two models: one flow in the prior, or in the posterior and before the decoder, told nothing."""
    prior, posterior = tiny(code=4), tiny(code=4, depth=0, posterior="iaf")
    flow: Flow = shaken(Flow(4, False, [Made(4, 12, False, context=True) for _ in range(depth)]))  # type: ignore[assignment]
    prior.prior = posterior.encoder.flow = flow
    mine, theirs = prior.encoder.net, posterior.encoder.net  # type: ignore[union-attr]
    with torch.no_grad():
        for ours, other in zip(mine.parameters(), theirs.parameters(), strict=True):  # type: ignore[union-attr, operator]
            other.zero_()[: len(ours)] = ours  # the last rows are what the flow is told

    x, eps = images()[::37], torch.randn(14, 4).double()
    posterior.decoder.load_state_dict(prior.decoder.state_dict())
    shallow = posterior.decoder.features
    posterior.decoder.features = lambda z: shallow(flow.inverse(z))  # type: ignore[assignment, operator]
    found, expected = posterior(x, eps), prior(x, eps)
    torch.testing.assert_close(found.log_px, expected.log_px)
    torch.testing.assert_close(found.rate, expected.rate)


# model


def test_terms_add_up() -> None:
    log_px, log_pz, log_qz = torch.randn(4, 2, 3), torch.randn(4), torch.randn(4)
    terms = Terms(log_px, log_pz, log_qz)
    for b in range(4):
        distortion = -sum(log_px[b].flatten().tolist())
        assert terms.distortion[b].item() == pytest.approx(distortion, rel=1e-5)
        assert terms.rate[b].item() == pytest.approx(log_qz[b].item() - log_pz[b].item(), rel=1e-5)
        assert terms.elbo[b].item() == pytest.approx(-distortion - (log_qz[b] - log_pz[b]).item(), rel=1e-5)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_unit_reaches_from_minus_one_to_one(levels: int) -> None:
    model = tiny(levels=levels, likelihood="LogisticMixture")
    x = torch.arange(levels).view(levels, 1, 1, 1)
    expected = torch.linspace(-1, 1, levels, dtype=torch.float64).view_as(x)
    torch.testing.assert_close(model.unit(x), expected)
    assert torch.equal(model.unit(x.byte()), model.unit(x))


@over_models
def test_bytes_are_integers_too(shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]) -> None:
    model, x = tiny(shape, levels, **chosen), torch.randint(levels, (4, *shape))
    eps = torch.randn(4, model.prior.code).double()
    assert torch.equal(model(x.byte(), eps).elbo, model(x, eps).elbo)


@over_models
def test_noise_of_another_shape_is_refused(shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]) -> None:
    model, x = tiny(shape, levels, **chosen), torch.zeros(4, *shape, dtype=torch.long)
    for wrong in (torch.zeros(4, 1), torch.zeros(4, model.prior.code + 1)):
        with pytest.raises(ValueError) as caught:
            model(x, wrong.double())
        assert f"noise of shape {tuple(wrong.shape)} for codes of shape (4, {model.prior.code})" in str(caught.value)


@pytest.mark.parametrize("window", ["none", "3x2", "7x4"])
@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("code", [0, 2, [2, 3, 4]])
def test_a_fresh_bernoulli_model_is_uniform(window: str, depth: int, code: int | list[int]) -> None:
    model = build(settings(code=code, window=window, depth=depth), (1, 5, 7), 2).double()
    x = torch.randint(2, (6, 1, 5, 7))
    expected = torch.full((6,), 35 * math.log(2), dtype=torch.float64)
    torch.testing.assert_close(
        model(x, torch.randn(6, model.prior.code).double()).distortion, expected, rtol=1e-14, atol=0
    )


@over_kinds
@pytest.mark.parametrize("code", [0, 4, [2, 4, 5]])
@pytest.mark.parametrize("window", ["none", "3x2"])
@pytest.mark.parametrize("scale", [False, True])
def test_every_parameter_gets_a_gradient(
    likelihood: str, levels: int, code: int | list[int], window: str, scale: bool
) -> None:
    colour = isinstance(code, list) and likelihood != "Bernoulli"
    shape = 1 + 2 * colour, 7, 9
    own = {"grey": colour, "dropout": 0.2} if isinstance(code, list) else {"posterior": "iaf" if scale else "normal"}
    model = tiny(shape, levels, code=code, window=window, likelihood=likelihood, scale=scale, **own)
    x = torch.randint(levels, (16, *shape))
    model(x, torch.randn(16, model.prior.code).double()).elbo.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            assert (module.weight.grad[module.mask == 0] == 0).all()


@over_models
def test_images_of_a_batch_do_not_mix(shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]) -> None:
    model, x = tiny(shape, levels, **chosen), torch.randint(levels, (5, *shape))
    eps = torch.randn(5, model.prior.code).double()
    alone = torch.cat([model(x[k : k + 1], eps[k : k + 1]).elbo for k in range(5)])
    torch.testing.assert_close(model(x, eps).elbo, alone, rtol=1e-12, atol=1e-12)


def changed(path: str, value: Any, code: int | list[int] = 2) -> dict[str, Any]:
    model: dict[str, Any] = settings(code)
    *sections, key = path.split(".")
    place = model
    for section in sections:
        place = place[section]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return model


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("code", -1, "model.code=-1"),
        ("code", True, "model.code=True"),
        ("code", 2.0, "model.code=2.0"),
        ("code", "2", "model.code='2'"),
        ("prior", ..., "prior"),
        ("priors", {}, "priors"),
        ("encoder", "conv", "model.encoder"),
        ("prior", None, "model.prior"),
        ("encoder._target_", ..., "model.encoder._target_"),
        ("encoder._target_", "os.system", "model.encoder._target_='os.system'"),
        ("encoder._target_", "vlae.encoder.Encode", "model.encoder._target_='vlae.encoder.Encode'"),
        ("encoder.widths", 4, "model.encoder.widths=4"),
        ("encoder.widths", [4, "6"], "model.encoder.widths=[4, '6']"),
        ("encoder.widths", [4, 0], "widths=[4, 0]"),
        ("encoder.hidden", 0, "hidden=0"),
        ("encoder.hiden", 3, "model.encoder.hiden=3"),
        ("encoder.shape", [1, 3, 3], "model.encoder.shape"),
        ("prior.depth", -1, "depth"),
        ("prior.depth", 1.5, "model.prior.depth=1.5"),
        ("prior.width", 0, "width=0"),
        ("prior.scale", "no", "model.prior.scale='no'"),
        ("prior.scale", ..., "model.prior.scale"),
        ("decoder.receptive_field", "7", "receptive_field=7"),
        ("decoder.receptive_field", 7, "model.decoder.receptive_field=7"),
        ("decoder.features", 0, "features=0"),
        ("decoder.widths", [], "widths"),
        ("decoder.num_params", 3, "model.decoder.num_params"),
        ("likelihood.components", 3, "model.likelihood.components=3"),
        ("likelihood", {"_target_": "vlae.likelihoods.LogisticMixture", "components": 0}, "components=0"),
        ("likelihood", {"_target_": "vlae.likelihoods.LogisticMixture"}, "model.likelihood.components"),
    ],
)
def test_build_refuses_and_names_the_key(path: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(changed(path, value), SHAPE, 2)
    assert named in str(caught.value)
    assert "model" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("code", [2, 3, 3], "model.code=[2, 3, 3]: 2 widths on images [1, 3, 3] need maps such as [2, 2, 2]"),
        ("code", [2, 2], "model.code=[2, 2]: must be an integer"),
        ("code", [2, 0, 2], "model.code=[2, 0, 2]: must be an integer"),
        ("code", 8, "code=8"),
        ("code", 0, "code=0"),
        ("encoder", settings()["encoder"], "code=[2, 2, 2]"),
        ("prior", settings()["prior"], "code=[2, 2, 2]"),
        ("prior", settings(depth=0)["prior"], "code=[2, 2, 2]"),
        ("decoder", settings()["decoder"], "code=[2, 2, 2]"),
        ("encoder.blocks", [1], "model.encoder: blocks=[1]: one number for each of widths=[4, 6]"),
        ("decoder.widths", [4, 6, 8], "model.decoder: blocks=[1, 1]: one number for each of widths=[4, 6, 8]"),
        ("decoder.grey", True, "model.decoder: grey=true"),
        ("decoder.dropout", 1.0, "model.decoder: dropout=1.0"),
        ("prior.receptive_field", "none", "model.prior: receptive_field=none"),
    ],
)
def test_build_refuses_maps_that_do_not_fit(path: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(changed(path, value, [2, 2, 2]), SHAPE, 2)
    assert named in str(caught.value)
    assert "model." in str(caught.value)


def test_build_refuses_images_that_the_likelihood_cannot_model() -> None:
    with pytest.raises(ValueError) as caught:
        build(settings(), SHAPE, 17)
    assert "model.likelihood" in str(caught.value)
    assert "LogisticMixture" in str(caught.value)  # the cure


def test_build_leaves_its_settings_alone() -> None:
    given = settings()
    before = copy.deepcopy(given)
    build(given, SHAPE, 2)
    assert given == before


# load


def store(model: VLAE, model_settings: dict[str, Any], levels: int, file: Path) -> Path:
    """A model's float32 weights as a run or an export leaves them, by the ending of the file's name."""
    description = {"model": model_settings, "shape": list(model.decoder.shape), "levels": levels}
    state = {name: value.float().contiguous() for name, value in model.state_dict().items()}
    if file.suffix == ".safetensors":
        save_file(state, file, {"vlae": json.dumps(description)})
    else:
        weights = {f"model.{name}": value for name, value in state.items()} | {"objective.gamma": torch.ones(())}
        torch.save({"hyper_parameters": description | {"seed": 0}, "state_dict": weights, "epoch": 3}, file)
    return file


ENDINGS = ["ckpt", "safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("shape", "levels", "chosen"),
    [*(((1, 5, 7), levels, {"likelihood": likelihood}) for likelihood, levels in KINDS), *MODELS[1:]],
)
def test_a_stored_model_opens_alone(
    tmp_path: Path, ending: str, shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]
) -> None:
    model = tiny(shape, levels, **chosen).float().eval()
    opened = load(store(model, model.description["model"], levels, tmp_path / f"one.{ending}"))
    assert not opened.training
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    assert opened.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    x, eps = torch.randint(levels, (3, *shape)), torch.randn(3, model.prior.code)
    assert torch.equal(opened(x, eps).elbo, model(x, eps).elbo)


@pytest.mark.parametrize("ending", ENDINGS)
def test_load_refuses_foreign_classes_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "yours_only.py").write_text(
        f"open({str(touched)!r}, 'w').close()\nfrom vlae.prior import AFPrior\nclass Own(AFPrior):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    chosen = settings()
    chosen["prior"]["_target_"] = "yours_only.Own"
    file = store(tiny(), chosen, 2, tmp_path / f"own.{ending}")
    with pytest.raises(ValueError) as caught:
        load(file)
    assert "model.prior._target_='yours_only.Own'" in str(caught.value)
    assert not touched.exists()  # not even imported
    assert type(load(file, allow=("vlae.", "yours_only.")).prior).__name__ == "Own"


class Trap:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def test_load_unpickles_no_foreign_object(tmp_path: Path) -> None:
    description = {"model": settings(), "shape": [1, 3, 3], "levels": 2}
    touched, file = tmp_path / "touched", tmp_path / "bad.ckpt"
    torch.save({"hyper_parameters": description, "state_dict": {}, "trap": Trap(touched)}, file)
    with pytest.raises(ValueError) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert not touched.exists()


def foreign_files(folder: Path) -> list[Path]:
    named = {name: folder / name for name in ("text.ckpt", "text.safetensors", "list.ckpt", "pickle.ckpt", "bare.ckpt")}
    (folder / "empty.ckpt").touch()
    named["text.ckpt"].write_text("no checkpoint")
    named["text.safetensors"].write_text("no weights")
    torch.save([1, 2], named["list.ckpt"])
    named["pickle.ckpt"].write_bytes(pickle.dumps({"a": 1}, protocol=2))
    torch.save({"state_dict": {}}, named["bare.ckpt"])
    save_file({"a": torch.zeros(1)}, folder / "bare.safetensors")
    description = {"model": settings(), "shape": [1, 3, 3], "levels": 2}
    torch.save({"hyper_parameters": description}, folder / "weightless.ckpt")
    torch.save({"hyper_parameters": description, "state_dict": {"model.a": torch.zeros(1)}}, folder / "other.ckpt")
    return sorted(folder.iterdir())


def test_load_refuses_files_that_are_not_ours(tmp_path: Path) -> None:
    files = foreign_files(tmp_path)
    assert len(files) == 9
    wrong = {}
    for file in files:
        try:
            load(file)
        except ValueError as error:
            if str(file) not in str(error):
                wrong[file.name] = f"a message without the file's name: {error}"
        except Exception as error:
            wrong[file.name] = f"{type(error).__name__}: {error}"
        else:
            wrong[file.name] = "nothing"
    assert not wrong


def test_a_missing_file_names_the_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tiny(), settings(), 2, tmp_path / "small.safetensors")
    monkeypatch.setattr("vlae.model.WEIGHTS", [tmp_path, tmp_path / "none"])
    for missing in ("absent", tmp_path / "absent.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            load(missing)
        assert str(missing) in str(caught.value)
        assert str(caught.value).endswith("small")
    assert isinstance(load("small"), VLAE)


# objective


def costs(rate: list[float], distortion: list[float]) -> tuple[Tensor, Tensor, Terms]:
    r = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    d = torch.tensor(distortion, dtype=torch.float64, requires_grad=True)
    return r, d, Terms(-d[:, None, None], -r, torch.zeros_like(r))


def objective(**chosen: Any) -> Objective:
    return Objective(**{"beta": 1.0, "warmup_steps": 0, "free_bits": 0.0, "kind": "hard"} | chosen).double()


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("rate", [[3.0, 5.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 0.5, -2.0]])
def test_without_free_bits_the_loss_is_the_bound(kind: str, rate: list[float]) -> None:
    """A mean rate estimated by one sample may be negative; no floor was asked for."""
    make = objective(kind=kind)
    for _ in range(3):
        r, d, terms = costs(rate, [10.0, 20.0, 33.0])
        loss = make(terms, 0)
        assert loss.item() == pytest.approx(-terms.elbo.mean().item(), abs=1e-12)
        loss.backward()
        torch.testing.assert_close(r.grad, torch.full((3,), 1 / 3).double())
        torch.testing.assert_close(d.grad, torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("step", [0, 1, 4, 9, 10, 11, 1000])
def test_warm_up_is_linear_and_ends_at_beta(beta: float, step: int) -> None:
    r, d, terms = costs([3.0, 5.0], [10.0, 20.0])
    loss = objective(beta=beta, warmup_steps=10)(terms, step)
    weight = beta * (step + 1) / 11 if step < 10 else beta
    assert loss.item() == pytest.approx(15 + weight * 4)
    loss.backward()
    torch.testing.assert_close(r.grad, torch.full((2,), weight / 2).double())
    torch.testing.assert_close(d.grad, torch.full((2,), 0.5).double())


@pytest.mark.parametrize(
    ("rate", "free"), [([3.0, 5.0], True), ([0.0, 9.9], True), ([-1.0, 0.0], True), ([1.0, 9.5], False)]
)
def test_hard_free_bits_are_a_floor_on_the_mean(rate: list[float], free: bool) -> None:
    r, d, terms = costs(rate, [10.0, 20.0])
    loss = objective(free_bits=5.0, beta=2.0)(terms, 0)
    assert loss.item() == pytest.approx(15 + 2 * max(5.0, sum(rate) / 2))
    loss.backward()
    torch.testing.assert_close(r.grad, torch.full((2,), 0.0 if free else 1.0).double())
    torch.testing.assert_close(d.grad, torch.full((2,), 0.5).double())


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_soft_free_bits_follow_the_rule(beta: float) -> None:
    make, gamma = objective(kind="soft", free_bits=4.0, beta=beta), 1.0
    #        below           inside 5 %    above
    rates = [3.0, 3.9, 1.0, 4.0, 4.1, 4.2, 4.3, 8.0, 8.0, 8.0, 8.0, 2.0]
    for mean in rates:
        r, d, terms = costs([mean - 1, mean + 1], [10.0, 20.0])
        gamma = gamma / 1.1 if mean < 4 else min(1.0, gamma * 1.1) if mean > 4.2 else gamma
        loss = make(terms, 0)
        assert make.gamma.item() == pytest.approx(gamma)
        assert loss.item() == pytest.approx(15 + beta * gamma * mean)
        loss.backward()
        torch.testing.assert_close(r.grad, torch.full((2,), beta * gamma / 2).double())
        torch.testing.assert_close(d.grad, torch.full((2,), 0.5).double())
    assert "gamma" in make.state_dict()  # a resumed run goes on with it


def test_soft_free_bits_never_lose_the_rate() -> None:
    make = objective(kind="soft", free_bits=4.0)
    for _ in range(500):
        make(costs([0.0, 0.0], [1.0, 1.0])[2], 0)
    assert 0 < make.gamma.item() < 1e-3
    for _ in range(500):
        make(costs([9.0, 9.0], [1.0, 1.0])[2], 0)
    assert make.gamma.item() == 1


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_floor_is_one_for_all_devices(kind: str) -> None:
    for elsewhere, free in ((1.0, True), (100.0, False)):
        r, _, terms = costs([3.0, 5.0], [10.0, 20.0])
        make = objective(kind=kind, free_bits=6.0)
        make(terms, 0, lambda rate, other=elsewhere: (rate + other) / 2).backward()
        expected = (0.0 if kind == "hard" else 0.5 / 1.1) if free else 0.5
        torch.testing.assert_close(r.grad, torch.full((2,), expected).double())


@pytest.mark.parametrize(
    ("key", "value"),
    [("warmup_steps", -1), *((key, value) for key in ("beta", "free_bits") for value in (-1.0, math.inf, math.nan))],
)
def test_objective_refuses(key: str, value: float) -> None:
    with pytest.raises(ValueError) as caught:
        objective(**{key: value})
    assert f"{key}={value}" in str(caught.value)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_free_bits_do_not_hide_a_rate_that_is_no_number(kind: Literal["hard", "soft"]) -> None:
    terms = Terms(torch.zeros(2, 3, 3), torch.tensor([0.0, math.nan]), torch.zeros(2))
    assert Objective(beta=1.0, warmup_steps=0, free_bits=5.0, kind=kind)(terms, 0).isnan()
