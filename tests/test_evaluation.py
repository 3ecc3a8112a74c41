"""log p(x) by importance sampling is right, and the same however it is computed."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.special import logsumexp
from scipy.stats import norm
from tiny import images, settings, shaken, tiny, widened
from torch import Tensor

from vlae.data import Images
from vlae.datasets import digits
from vlae.evaluation import BLOCK, Estimate, estimates, evaluate, log_likelihood, noise
from vlae.model import VLAE, build, digest

X = images()[[7, 100, 273]]
KEY = (0, "test")


TOYS = [((1, 3, 3), 1), ((1, 3, 3), 2), ((1, 2, 3), [1, 1, 2]), ((1, 2, 2), [2, 1, 1])]
over_toys = pytest.mark.parametrize(("shape", "code"), TOYS, ids=str)


def toy(shape: tuple[int, int, int], code: int | list[int], posterior: str = "normal") -> tuple[VLAE, Tensor]:
    """A model, and images of it."""
    x = images(shape)
    model = widened(tiny(shape, code=code, scale=isinstance(code, int), posterior=posterior))
    return model, x[[7 * len(x) // 512, 100 * len(x) // 512, 273 * len(x) // 512]]


def grid(code: int, step: float = 0.25, reach: float = 8.0) -> tuple[Tensor, np.ndarray]:
    """Noise of a code on a dense grid, and the log of the mass that N(0, 1) has around each point."""
    axis = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
    eps = torch.cartesian_prod(*[axis] * code).view(-1, code)
    return eps, norm.logpdf(eps.numpy()).sum(1) + code * math.log(step)


@torch.no_grad()
def log_px(model: VLAE, x: Tensor, z: Tensor) -> np.ndarray:
    """log p(x | z) of one image for every code."""
    params = model.decoder(model.unit(x).expand(len(z), -1, -1, -1), model.decoder.features(z))
    return model.likelihood.log_prob(params, x.expand(len(z), -1, -1, -1)).flatten(1).sum(1).numpy()


def plain(model: VLAE, key: tuple[int | str, ...], samples: int) -> Estimate:
    """One image, one sample at a time, everything anew."""
    rows = []
    for i, x in enumerate(X.split(1)):
        draws = noise(key, torch.tensor([i]), model.prior.code, samples, 1)
        with torch.no_grad():
            terms = [model(x, eps[0].double()) for eps in draws]
        elbo, rate, distortion = (np.array([getattr(t, name).item() for t in terms]) for name in COLUMNS)
        weight = np.exp(elbo - elbo.max())
        ess = weight.sum() ** 2 / (weight**2).sum()
        rows.append((math.log(weight.mean()) + elbo.max(), ess, rate.mean(), distortion.mean()))
    return Estimate(*torch.tensor(rows, dtype=torch.float64).T)


COLUMNS = ("elbo", "rate", "distortion")


def close(one: Estimate, other: Estimate, size: float) -> None:
    torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=size, atol=size)


@pytest.mark.parametrize(
    ("shape", "code", "posterior"), [*((*each, "normal") for each in TOYS), (*TOYS[1], "iaf")], ids=str
)
def test_estimates_converge_to_the_exact_log_likelihood(
    shape: tuple[int, int, int], code: int | list[int], posterior: str
) -> None:
    model, X = toy(shape, code, posterior)
    eps, weight = grid(model.prior.code)
    z = model.prior.inverse(eps)
    truth = torch.tensor([logsumexp(log_px(model, x, z) + weight) for x in X.split(1)])
    errors = []
    for samples in (16, 256, 4096):
        draws = torch.randn(samples, len(X), model.prior.code, dtype=torch.float64)
        found = log_likelihood(model, X, draws.split(1024))
        error = found.log_px - truth
        standard = (1 / found.ess - 1 / samples).sqrt()  # of a mean of weights, relative to it
        assert (error.abs() < 4 * standard + 2 * standard**2).all()
        errors.append(error.abs().max().item())
    assert errors[2] < 0.05 < errors[0]


@over_toys
def test_of_one_sample_it_is_the_elbo(shape: tuple[int, int, int], code: int | list[int]) -> None:
    model, X = toy(shape, code)
    eps, weight = grid(model.prior.code)
    draws = torch.randn(1024, len(X), model.prior.code, dtype=torch.float64)
    one = [log_likelihood(model, X, [draw[None]]) for draw in draws[:8]]
    with torch.no_grad():
        for found, draw in zip(one, draws, strict=False):
            terms = model(X, draw)
            close(found, Estimate(terms.elbo, torch.ones(len(X)).double(), terms.rate, terms.distortion), 1e-12)
        # the expectations, over a grid of q's noise; the mean of 1,024 one-sample bounds is the same as that of rate
        # and distortion
        for i, x in enumerate(X.split(1)):
            terms = model(x.expand(len(eps), -1, -1, -1), eps)
            mass = torch.from_numpy(np.exp(weight))
            found = log_likelihood(model, x, draws[:, i : i + 1].split(512))
            for value, expected in ((found.rate, terms.rate), (found.distortion, terms.distortion)):
                mean = (mass * expected).sum()
                deviation = ((mass * expected.square()).sum() - mean**2).sqrt() / 32
                assert abs(value.item() - mean) < 4 * deviation


@pytest.mark.parametrize(("maps", "posterior"), [(False, "normal"), (False, "iaf"), (True, "normal")])
def test_it_is_what_a_plain_loop_finds(maps: bool, posterior: str) -> None:
    model, samples = tiny(maps=maps, scale=not maps, posterior=posterior), 20
    model = widened(model) if maps else model
    found, expected = estimates(model, X, KEY, samples, chunk=40), plain(model, KEY, samples)
    close(found, expected, 1e-6)
    assert (found.ess > 1).all()
    assert (found.ess < samples).all()


@pytest.mark.parametrize("likelihood", ["Bernoulli", "LogisticMixture"])
@pytest.mark.parametrize("maps", [False, True])
def test_batch_and_chunk_do_not_matter(maps: bool, likelihood: str) -> None:
    model = tiny(levels=2, maps=maps, likelihood=likelihood, scale=not maps).float()  # scales of 8 numbers multiply
    for samples, chunks in ((3, (1, 2, 3, 6)), (BLOCK + 3, (50, BLOCK, 3 * BLOCK))):
        whole = estimates(model, X, KEY, samples, chunk=10_000)
        for chunk in chunks:
            close(estimates(model, X, KEY, samples, chunk), whole, 1e-5)


@pytest.mark.parametrize(("samples", "chunk"), [(7, 3), (7, 7), (7, 20), (7, 1000), (BLOCK + 1, 50), (300, 2 * BLOCK)])
def test_a_pass_is_no_larger_than_asked_and_each_image_is_encoded_once(samples: int, chunk: int) -> None:
    model, encoded, decoded, short = tiny(), [], [], set()
    model.encoder.register_forward_hook(lambda _, inputs, output: encoded.append(len(inputs[0])))
    model.decoder.register_forward_hook(lambda _, inputs, output: decoded.append(len(output)))
    model.decoder.register_forward_hook(lambda *_: short.add(torch.backends.cudnn.allow_tf32))
    estimates(model, X, KEY, samples, chunk)
    assert short == {False}
    assert torch.backends.cudnn.allow_tf32  # for training, as it was
    assert sum(encoded) == len(X)
    assert sum(decoded) == samples * len(X)
    assert max(decoded) <= chunk


def test_noise_is_that_of_the_image_and_the_sample() -> None:
    def drawn(index: list[int], samples: int, k: int) -> Tensor:
        passes = list(noise(KEY, torch.tensor(index), 3, samples, k))
        assert all(len(eps) <= k for eps in passes)
        return torch.cat(passes)

    whole = drawn([4, 0, 9], 300, 7)
    assert whole.shape == (300, 3, 3)
    assert torch.equal(drawn([4, 0, 9], 300, 1000), whole)
    assert torch.equal(drawn([9, 4], 40, 1), whole[:40, [2, 0]])  # more samples go on with the same
    assert len(whole.unique()) == whole.numel()
    assert not torch.equal(next(noise((1, "test"), torch.tensor([4]), 3, 1, 1))[0], whole[0, :1])


def test_without_a_code_it_is_exact() -> None:
    model = tiny(code=0)
    with torch.no_grad():
        elbo = model(X, torch.zeros(len(X), 0).double()).elbo
    for samples in (1, 5):
        found = estimates(model, X, KEY, samples, chunk=4)
        expected = Estimate(elbo, torch.full_like(elbo, samples), torch.zeros_like(elbo), -elbo)
        close(found, expected, 1e-12)


@pytest.mark.parametrize("code", [2, [2, 2, 2]])
def test_networks_may_run_in_half_precision(code: int | list[int]) -> None:
    model = shaken(build(settings(code), (1, 3, 3), 2), 0.1).float()
    eps = torch.randn(64, len(X), model.prior.code)
    with torch.autocast("cpu", torch.bfloat16):
        half = log_likelihood(model, X, [eps])
    assert all(values.dtype == torch.float64 for values in half)
    full = log_likelihood(model, X, [eps])
    torch.testing.assert_close(half.log_px, full.log_px, rtol=0, atol=0.1)
    assert not torch.equal(half.log_px, full.log_px)


def test_of_an_unlikely_image_nothing_underflows() -> None:
    model = tiny(shape=(1, 28, 28))
    with torch.no_grad():
        model.decoder.head.bias += 30
    found = log_likelihood(model, torch.zeros(2, 1, 28, 28).long(), torch.randn(8, 2, 2).double().split(3))
    assert (found.log_px < -20_000).all()
    assert all(values.isfinite().all() for values in found)


# cut and resumed, alone or by ranks


def cut(model: VLAE, folder: Path, groups: int) -> None:
    """An evaluation that is interrupted after some groups of images."""
    left = iter(range(groups))

    def interrupt(*_: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    hook = model.encoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        estimates(model, X, KEY, 20, 40, folder, every=0.0)
    hook.remove()


def test_resumed_it_is_as_if_never_cut(tmp_path: Path) -> None:
    model, calls = tiny(), []
    whole = estimates(model, X, KEY, 20, 40)  # two images, then one
    cut(model, tmp_path / "run", groups=1)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["evaluate.0.part"]
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    again = estimates(model, X, KEY, 20, 40, tmp_path / "run")
    assert torch.equal(torch.stack(again), torch.stack(whole))
    assert len(calls) == 1


RANK = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import images, tiny
from vlae.evaluation import estimates
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
calls, model = [], tiny()
model.encoder.register_forward_hook(lambda *_: calls.append(1))
for name, place in (("whole", None), ("resumed", folder)):
    found = estimates(model, images()[[7, 100, 273]], (0, "test"), 20, 40, place)
    save_file({"found": torch.stack(found), "calls": torch.tensor(len(calls))}, folder / f"{name}{rank}")
dist.destroy_process_group()
"""


def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    """Three images, so that one rank has more; also where one process was cut after two."""
    model = tiny()
    cut(model, tmp_path, groups=1)
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=Path(__file__).parent, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        _, error = rank.communicate(timeout=120)
        assert rank.returncode == 0, error.decode()
    one = torch.stack(estimates(model, X, KEY, 20, 40))
    for rank in range(2):
        for name, calls in (("whole", (1, 1)), ("resumed", (2, 1))):
            left = load_file(tmp_path / f"{name}{rank}")
            torch.testing.assert_close(left["found"], one, rtol=0, atol=1e-10)
            assert left["calls"] == calls[rank], name


# bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"samples": -3}, "samples=-3: must be at least 1"),
        ({"chunk": 0}, "chunk=0: must be at least 1"),
        ({"x": torch.zeros(2, 1, 3, 4).long()}, "images of int64 (1, 3, 4); the model is for integers (1, 3, 3)"),
        ({"x": 2 * X}, "images of values 0 to 2; the model is for 0 to 1"),
        ({"x": -X}, "images of values -1 to 0; the model is for 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        estimates(tiny(), **{"x": X, "key": KEY, "samples": 4, "chunk": 8} | changed)
    assert str(caught.value) == message


def test_no_noise_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        log_likelihood(tiny(), X, [])
    assert str(caught.value) == "noise: no samples; at least 1"
    with pytest.raises(ValueError, match=rf"noise of shape \(3, 1, 2\) for {len(X)} images"):
        log_likelihood(tiny(), X, [torch.zeros(3, 1, 2).double()])


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.head.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"image among \[0, 1\] is not finite"):
        estimates(model, X, KEY, 4, 8, tmp_path, every=0.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 21}, "samples=20, now 21"),
        ({"key": (1, "test")}, "key=[0, 'test'], now [1, 'test']"),
        ({"x": 1 - X}, "images="),
        ({"model": tiny(window="none")}, "weights="),
    ],
)
def test_what_is_kept_of_another_evaluation_is_refused(
    changed: dict[str, object], message: str, tmp_path: Path
) -> None:
    cut(tiny(), tmp_path, groups=1)
    before = (tmp_path / "evaluate.0.part").read_bytes()
    with pytest.raises(ValueError, match=r"evaluate.0.part.*remove it") as caught:
        estimates(**{"model": tiny(), "x": X, "key": KEY, "samples": 20, "chunk": 40} | changed, folder=tmp_path)
    assert message in str(caught.value)
    assert (tmp_path / "evaluate.0.part").read_bytes() == before


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    cut(tiny(), tmp_path, groups=1)
    file = tmp_path / "evaluate.0.part"
    whole = file.read_bytes()

    def other(values: Tensor, done: Tensor) -> None:
        """The right words about other arrays."""
        file.write_bytes(whole)
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        save_file({"values": values, "done": done}, file, about)

    size = len(X)
    for damage in (
        lambda: file.write_bytes(whole[:-9]),
        lambda: file.write_bytes(pickle.dumps({"values": 1})),
        lambda: save_file({"a": X}, file),
        lambda: save_file({"a": X}, file, {"vlae": "[1]"}),
        lambda: other(torch.zeros(size, 4), torch.zeros(size, dtype=torch.bool)),
        lambda: other(torch.zeros(size, 3).double(), torch.zeros(size, dtype=torch.bool)),
        lambda: other(torch.zeros(size, 4).double(), torch.zeros(size)),
    ):
        damage()
        with pytest.raises(ValueError, match=r"evaluate.0.part: not the results of an evaluation .*remove it"):
            estimates(tiny(), X, KEY, 20, 40, tmp_path)


# the record


def small(levels: int = 17) -> VLAE:
    return build(settings(likelihood="LogisticMixture"), (1, 8, 8), levels)


def test_a_record_says_what_was_found_of_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, model = Images(digits, None, 1, 1, seed=3), small().double()
    metrics = evaluate(model, images, "validation", 4, 500, tmp_path, {"command": "the command", "data": "digits"})
    assert [file.name for file in tmp_path.iterdir()] == ["evaluate.json"]
    record = json.loads((tmp_path / "evaluate.json").read_text())
    assert record.pop("metrics") == metrics
    about = {"command": "the command", "data": "digits", "split": "validation", "binarisation": "none"}
    about |= {"seed": 3, "samples": 4, "images": 250, "weights": digest(*model.state_dict().values())}
    assert {name: record[name] for name in about} == about
    assert set(record) == {*about, "commit", "date", "hardware", "wall_s"}

    found = estimates(model, images.part("validation").images, (3, "validation"), 4, 1000)
    nll = -found.log_px.numpy()
    bound = (found.rate + found.distortion).mean().item()
    expected = {
        "nelbo": bound,
        "rate": found.rate.mean().item(),
        "distortion": found.distortion.mean().item(),
        "bits_per_dim": bound / 64 / math.log(2),
        "nll": nll.mean(),
        "nll_standard_error": nll.std(ddof=1) / math.sqrt(250),
        "gap": bound - nll.mean(),
        "gap_standard_error": ((found.rate + found.distortion).numpy() - nll).std(ddof=1) / math.sqrt(250),
        "nll_bits_per_dim": nll.mean() / 64 / math.log(2),
        "ess": found.ess.mean().item(),
    }
    assert metrics == pytest.approx({f"val/{name}": value for name, value in expected.items()}, rel=1e-6)
    printed = capsys.readouterr().out
    for name in expected:
        assert name in printed
    assert str(tmp_path / "evaluate.json") in printed.replace("\n", "")


def test_without_a_code_one_sample_is_enough(tmp_path: Path) -> None:
    model = build(settings(code=0, likelihood="LogisticMixture"), (1, 8, 8), 17)
    metrics = evaluate(model, Images(digits, None, 1, 1, seed=0), "test", 4096, 250, tmp_path, {})
    assert metrics["test/nll"] == pytest.approx(metrics["test/nelbo"], rel=1e-12)
    assert json.loads((tmp_path / "evaluate.json").read_text())["samples"] == 1


def test_a_part_is_drawn_from_the_whole_split(tmp_path: Path) -> None:
    model, images = small().double(), Images(digits, None, 1, 1, seed=0)
    test, parts = images.part("test").images, []
    for part in (40, 250, 1000):
        (tmp_path / "evaluate.json").unlink(missing_ok=True)
        metrics = evaluate(model, images, "test", 1, 250, tmp_path, {}, part)
        record = json.loads((tmp_path / "evaluate.json").read_text())
        assert (record["images"], record["metrics"]) == (min(part, 250), metrics)
        parts.append(metrics["test/nll"])
    drawn = torch.tensor([7, 0, 249, 30])
    of_four = estimates(model, test[drawn], (0, "test"), 2, 250, numbers=drawn)
    for part_of, whole in zip(of_four, estimates(model, test, (0, "test"), 2, 250), strict=True):
        assert torch.allclose(part_of, whole[drawn], rtol=1e-12, atol=0)  # an image's noise is its own
    # a fresh mixture is the harder the farther values are from the middle, so that images differ
    first = estimates(model, test[:40], (0, "test"), 1, 250).log_px.mean().item()
    assert abs(parts[0] + first) > 1e-3
    assert parts[0] != pytest.approx(parts[1], rel=1e-6)
    assert parts[1] == pytest.approx(parts[2], rel=1e-12)


def test_a_record_of_hours_is_not_lost(tmp_path: Path) -> None:
    model = small()

    def run(split: str, samples: int, part: int | None = None) -> None:
        evaluate(model, Images(digits, None, 1, 1, seed=0), split, samples, None, tmp_path, {}, part)

    run("test", 2)
    before = (tmp_path / "evaluate.json").read_bytes()
    for split, samples, part in (("test", 1, None), ("validation", 2, None), ("test", 2, 249)):
        here = rf"holds test at 2 samples of 250 images; move it to have {split} at {samples} of {part or 250}"
        with pytest.raises(ValueError, match=here):
            run(split, samples, part)
    assert (tmp_path / "evaluate.json").read_bytes() == before
    run("test", 3)
    assert json.loads((tmp_path / "evaluate.json").read_text())["samples"] == 3
    own = digest(*model.state_dict().values())
    torch.nn.init.ones_(model.decoder.head.bias)
    now = digest(*model.state_dict().values())
    here = f"holds test at 3 samples of 250 images, weights {own}; move it to have test at 3 of 250, weights {now}"
    with pytest.raises(ValueError, match=here):
        run("test", 3)


def test_a_record_that_came_meanwhile_is_not_lost(tmp_path: Path) -> None:
    model, images = small(), Images(digits, None, 1, 1, seed=0)
    evaluate(model, images, "validation", 2, None, tmp_path, {})
    file, other = tmp_path / "evaluate.json", (tmp_path / "evaluate.json").read_bytes()
    file.unlink()
    (tmp_path / "evaluate.json.part").write_text("what a kill left of a record")

    def ended(*_: object) -> None:
        file.write_bytes(other)

    model.encoder.register_forward_hook(ended)
    with pytest.raises(ValueError, match="holds validation at 2 samples of 250 images; move it to have test"):
        evaluate(model, images, "test", 1, None, tmp_path, {})
    assert file.read_bytes() == other


def test_a_model_that_is_training_is_scored_without_dropout() -> None:
    model, eps = tiny(dropout=0.5), torch.randn(4, len(X), 2, dtype=torch.float64)
    expected = log_likelihood(model.eval(), X, [eps])
    model.train()
    model.prior.eval()
    assert all(map(torch.equal, log_likelihood(model, X, [eps]), expected))
    assert [part.training for part in (model, model.decoder.blocks[0], model.prior)] == [True, True, False]
    assert (model(X, eps[0]).elbo != model(X, eps[0]).elbo).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "tests"}, "split=tests: must be one of train, validation, test"),
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"chunk": 0}, "batch=0: must be at least 1"),
        ({"part": 0}, "images=0: must be at least 1"),
        ({"model": small(256)}, "images of (1, 8, 8), 17 levels; the model is for (1, 8, 8), 256 levels"),
        ({"model": tiny()}, "images of (1, 8, 8), 17 levels; the model is for (1, 3, 3), 2 levels"),
    ],
)
def test_a_refused_evaluation_leaves_the_record(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "evaluate.json").write_text("older")
    usual = {"model": small(), "images": Images(digits, None, 1, 1, seed=0), "split": "test", "samples": 4}
    with pytest.raises(ValueError) as caught:
        evaluate(**usual | {"chunk": None, "folder": tmp_path, "about": {}} | changed)
    assert str(caught.value) == message
    assert (tmp_path / "evaluate.json").read_text() == "older"
