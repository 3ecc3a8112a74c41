"""Files of images: what is decoded is what was encoded, as short as the bound says, or it is refused."""

import math
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.dummy import DummyClassifier
from tiny import last_of, settings, shaken, tiny

from vlae.codec import Codec
from vlae.compression import BATCH, alike, compress, decompress, encoded, fingerprint, header, layout, seed
from vlae.container import KINDS as KIND_NAMES
from vlae.container import MAGIC, CodecError, Header, pack, unpack
from vlae.layers import normal_log_prob
from vlae.lossy import codes
from vlae.model import VLAE, build, load
from vlae.sampling import sample
from vlae.sizes import sheet, sizes

MIXTURE = {"likelihood": "LogisticMixture"}
KINDS: list[tuple[tuple[int, int, int], int, dict[str, Any]]] = [
    ((1, 3, 3), 2, {}),
    ((1, 13, 17), 2, {"window": "7x4", "depth": 4, "code": 5}),
    ((1, 5, 4), 2, {"window": "none", "depth": 0}),
    ((1, 5, 4), 2, {"window": "15x8", "code": 0}),
    ((1, 5, 4), 2, {"window": "none", "code": 0}),
    ((1, 6, 5), 256, {"window": "7x4", "depth": 1, **MIXTURE}),
    ((1, 4, 4), 17, {"window": "1x1", "code": 1, **MIXTURE}),
    ((3, 4, 5), 256, {"window": "4x2", **MIXTURE}),
    ((3, 6, 6), 256, {"maps": True, "window": "5x3", **MIXTURE}),
    ((3, 6, 6), 256, {"maps": True, "window": "7x4", "grey": True, "dropout": 0.3, **MIXTURE}),
    ((1, 7, 5), 2, {"maps": True, "window": "none", "depth": 3}),
]


def model_of(shape: tuple[int, int, int], levels: int, chosen: dict[str, Any]) -> VLAE:
    return tiny(shape, levels, **{"scale": False, **chosen}).eval()


def draw(model: VLAE, count: int) -> torch.Tensor:
    return torch.randint(0, model.likelihood.levels, (count, *model.decoder.shape))


@pytest.fixture(scope="module")
def small() -> VLAE:
    return model_of((1, 5, 5), 2, {"code": 3})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_exact(kind: tuple[tuple[int, int, int], int, dict[str, Any]]) -> None:
    model = model_of(*kind).float()
    for count in (1, BATCH + 1):
        x = draw(model, count)
        found = decompress(model, compress(model, x))
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), x)


@pytest.mark.usefixtures("unchecked")
def test_any_number_of_images(small: VLAE) -> None:
    for count in (2, 3, BATCH - 1, 2 * BATCH + 341):
        x = draw(small, count)
        assert torch.equal(decompress(small, compress(small, x)).long(), x)


def test_codes_are_drawn_near_the_mean() -> None:
    """Where a table of 2^24 parts gives each of its values one, a wide one would draw thousands of scales away."""
    model = model_of((1, 5, 5), 2, {"code": 16})
    with torch.no_grad():
        model.encoder.net[-1].weight.zero_()
        model.encoder.net[-1].bias.copy_(torch.tensor([5.0, -0.3] * 8 + [-1.0] * 16))
    codec, x = Codec(model, 1 / 64), draw(model, 4000)
    with torch.no_grad():
        z = codec.draw(codec.stack(seed(BATCH * 4000)), x) / 64
    score = (z - torch.tensor([5.0, -0.3] * 8)) * torch.tensor(1.0).exp()
    assert 4 < score.abs().max() < 6.1
    assert abs(score.mean()) < 0.02
    assert abs(score.std() - 1) < 0.02


@pytest.mark.usefixtures("unchecked")
def test_another_processor_is_refused_or_right(tmp_path: Path) -> None:
    """Other instructions for every kernel; in float64 they do not decide a symbol."""
    code = """
import torch, vlae
x, model = torch.load("x.pt", weights_only=True), vlae.load("mnist_static")
print(torch.backends.cpu.get_cpu_capability())
for floats in ("float32", "float64"):
    try:
        found = vlae.decompress(model.to(getattr(torch, floats)), open(floats, "rb").read())
        print("right" if torch.equal(found, x) else "wrong")
    except vlae.CodecError:
        print("refused")
"""
    model = load("mnist_static")
    x = sample(model, torch.randn(3, 64), torch.rand(3, 1, 28, 28)).to(torch.uint8)
    torch.save(x, tmp_path / "x.pt")
    for floats in ("float32", "float64"):
        with alike():
            (tmp_path / floats).write_bytes(encoded(model.to(getattr(torch, floats)), x, "bits-back"))
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    capability, single, double = done.stdout.split()
    assert capability == "DEFAULT"
    assert single in ("refused", "right")
    assert double == "right"


@pytest.mark.parametrize("count", [1, 2, 40, 300])
def test_images_that_cost_nothing(count: int) -> None:
    """Certain pixels and codes that say nothing: a byte an image, or a small file might claim any number of them."""
    model = model_of((1, 5, 5), 2, {"code": 3, "depth": 0})
    with torch.no_grad():
        for layer in (model.encoder.net[-1], model.decoder.head):
            layer.weight.zero_()
            layer.bias.zero_()
        model.decoder.head.bias.fill_(-100)
    x = torch.zeros(count, 1, 5, 5, dtype=torch.long)
    data = compress(model, x)
    about, payload = unpack(data)
    assert count <= len(payload) < count + 4 + 4 * about.initial
    assert torch.equal(decompress(model, data).long(), x)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("where", [-1e30, -40.0, 31.9999, 1e5])
@pytest.mark.parametrize("log_scale", [-100.0, 100.0])
def test_codes_beyond_the_ring(where: float, log_scale: float) -> None:
    model = model_of((1, 5, 5), 2, {"code": 3})
    with torch.no_grad():
        model.encoder.net[-1].bias.copy_(torch.tensor([where] * 3 + [log_scale] * 3))
    for count in (1, BATCH + 1):
        x = draw(model, count)
        assert torch.equal(decompress(model, compress(model, x)).long(), x)
        decompress(model, compress(model, x, lossy=1))


@pytest.mark.parametrize("count", [1, 2, 3, 62, 64, 65, 341, 1000, 10_000, 2**32 - 1])
def test_layout_holds_all_images(count: int) -> None:
    small, full = layout(count)
    assert sum(small) + BATCH * full == count
    assert small == sorted(small)
    assert all(1 <= size < BATCH for size in small)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("shape", "levels", "code", "more"),
    [((1, 13, 17), 2, 6, {}), ((3, 6, 6), 256, [2, 3, 3], {"grey": True, **MIXTURE})],
)
def test_length_is_the_bound(
    shape: tuple[int, int, int], levels: int, code: int | list[int], more: dict[str, Any]
) -> None:
    """Against -ELBO by the mean of fresh codes, which knows nothing of grids, waves or stacks."""
    torch.manual_seed(0)
    model = shaken(build(settings(window="4x2", code=code, scale=False, **more), shape, levels), 0.1).eval()
    x = draw(model, 700)
    with torch.no_grad():
        scales = last_of(model).bias
        scales[len(scales) // 2 :] -= 2  # where the grid must be fine
        noise = torch.randn(10, len(x), model.prior.code, dtype=torch.float64)
        bound = -torch.stack([model(x, eps).elbo for eps in noise]).mean(0).sum().item() / math.log(2)
    data = compress(model, x)
    bits = 8 * len(data) - 32 * unpack(data)[0].initial
    assert abs(bits / bound - 1) < 0.01


@pytest.mark.usefixtures("unchecked")
def test_many_images_borrow_bits() -> None:
    model = load("mnist_static")
    x = sample(model, torch.randn(12, 64), torch.rand(12, 1, 28, 28))
    assert unpack(compress(model, x))[0].kind == "bits-back"


def test_single_image_is_paid_for(small: VLAE) -> None:
    """Without bits back an image takes -log2 p(x | z) - log2 P(z on its grid)."""
    x = draw(small, 1)
    data = compress(small, x)
    about, payload = unpack(data)
    spacing = 2.0**about.spacing
    z = (small.encode(x).mean / spacing).round() * spacing
    params = small.decoder(small.unit(x), small.decoder.features(z))
    eps = z
    for n, step in enumerate(small.prior.steps):
        eps = eps.flip(1) if n else eps
        eps = eps - (step(eps)[0] / spacing).round() * spacing
    unit = torch.distributions.Normal(0.0, 1.0)
    mass = unit.cdf(eps + spacing / 2) - unit.cdf(eps - spacing / 2)
    bits = -(small.likelihood.log_prob(params, x).sum() + mass.log().sum()).item() / math.log(2)
    assert about.initial == 0
    assert bits - 1 <= 8 * len(payload) <= bits + 33


@pytest.mark.usefixtures("unchecked")
def test_initial_bits_are_those_of_a_few_images() -> None:
    model = model_of((1, 13, 17), 2, {"code": 8})
    x = draw(model, 1000)
    about, _ = unpack(compress(model, x))
    codec = Codec(model, 2.0**about.spacing)
    stack = codec.stack(seed(2000))
    before = stack.num_bits()
    with alike():
        codec.draw(stack, x[:BATCH])
    assert 0 < 32 * about.initial < (before - stack.num_bits()) / 4


@pytest.mark.parametrize("large", [1.0, 1e4])
@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("code", [5, [2, 2, 3]], ids=str)
def test_the_grid_is_kept(code: int | list[int], depth: int, large: float) -> None:
    """Against a plain loop over numbers, and one to one even where the ring wraps."""
    model = tiny((1, 4, 5), code=code, scale=False, depth=depth)
    shaken(model.prior, 1.0)
    with torch.no_grad():
        for step in model.prior.steps:
            (step if isinstance(code, int) else step.channels).shift.bias.mul_(large)
    codec, prior = Codec(model, 0.25), model.prior
    z = torch.randint(-codec.reach, codec.reach, (40, prior.code)).double()
    with torch.no_grad():
        found = codec.noise(z)
        for row, result in zip(z.tolist(), found.tolist(), strict=True):
            for n, step in enumerate(prior.steps):
                row = row[::-1] if n else row
                shift = step(0.25 * torch.tensor([row], dtype=torch.float64))[0][0]
                row = [
                    (value - round(float(mean) / 0.25) + codec.reach) % (2 * codec.reach) - codec.reach
                    for value, mean in zip(row, shift, strict=True)
                ]
            assert row == result
        assert torch.equal(codec.code(found), z)
        again = torch.randint(-codec.reach, codec.reach, (40, prior.code)).double()
        assert torch.equal(codec.noise(codec.code(again)), again)


@pytest.mark.usefixtures("unchecked")
def test_nothing_but_model_and_images_matters(small: VLAE) -> None:
    """Neither the state of random numbers, nor threads, strides, integer types or autocast."""
    x = draw(small, 20)
    data = compress(small, x)
    torch.manual_seed(7)
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert compress(small, x) == data
            assert torch.equal(decompress(small, data).long(), x)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert compress(small, x.to(torch.uint8)) == data
    assert compress(small, x.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1)) == data


def chosen(model: VLAE, x: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
    """Bytes of one image and its code, draw by draw."""
    q = model.encode(x)
    posterior = torch.distributions.Normal(q.mean[0], q.log_scale[0].exp())
    unit, numbers = torch.distributions.Normal(0.0, 1.0), []
    eps = torch.zeros(model.prior.code, dtype=torch.float64)
    for stage in range(count):
        raw = np.random.PCG64(stage).random_raw(256 * model.prior.code).reshape(256, -1)
        fresh = torch.from_numpy(norm.ppf((raw // np.uint64(2**11) + 0.5) / 2**53))
        keeps = [
            0.0 if stage == 0 else 1.0 if number == 0 else [0.6, 0.8, 0.9, 0.97][number % 4] for number in range(256)
        ]
        keep = torch.tensor(keeps, dtype=torch.float64)[:, None]
        each = keep * eps + (1 - keep**2) ** 0.5 * fresh
        z = model.prior.inverse(each)
        log_det = model.prior(z)[1]
        weight = posterior.log_prob(z).sum(1) - unit.log_prob(each).sum(1) - log_det
        numbers.append(int(weight.argmax()))
        eps = each[numbers[-1]]
    return numbers, model.prior.inverse(eps[None])


@pytest.mark.parametrize(("code", "scale"), [(3, False), (3, True), ([1, 3, 3], True)])
def test_lossy_files_hold_codes(code: int | list[int], scale: bool) -> None:
    model = model_of((1, 5, 5), 2, {"code": code, "scale": scale})
    x, uniform = draw(model, 70), torch.rand(70, 1, 5, 5)
    data = compress(model, x, lossy=2)
    about, payload = unpack(data)
    assert (about.kind, len(payload)) == ("lossy", 140)
    drawn, likely = decompress(model, data, uniform), decompress(model, data)
    for n in (0, 69):
        numbers, z = chosen(model, x[n : n + 1], 2)
        assert list(payload[2 * n : 2 * n + 2]) == numbers
        h = model.decoder.features(z)
        for images in (drawn, likely):
            image = images[n : n + 1]
            for i in range(5):
                for j in range(5):  # raster order, a pass for each pixel
                    below = model.likelihood.pmf(model.decoder(model.unit(image), h), image[:, :0])[0, 0, i, j]
                    least = uniform[n, 0, i, j] if images is drawn else 0.5
                    assert image[0, 0, i, j] == (least >= below)


def test_more_bytes_are_nearer(small: VLAE) -> None:
    """On the way to a draw of q(z | x), of which log q is that of its mean less half a nat a dimension."""
    x, found = draw(small, 40), []
    q = small.encode(x)
    for count in (1, 2, 4):
        payload = unpack(compress(small, x, count))[1]
        z = codes(small, np.frombuffer(payload, np.uint8).reshape(40, count))
        log_pz = normal_log_prob(small.prior(z)[0])
        log_qz = torch.distributions.Normal(q.mean, q.log_scale.exp()).log_prob(z).sum(1)
        found.append((log_qz - log_pz).mean().item())
    assert found[0] < found[1] < found[2]


@pytest.mark.usefixtures("unchecked")
def test_benchmark_of_lossy_files_measures_what_compress_writes(small: VLAE) -> None:
    measured = run_path(str(Path(__file__).parents[1] / "benchmarks" / "lossy.py"))
    x, y = draw(small, 20), torch.arange(20) % 2
    judge = measured["Judge"](x, y, DummyClassifier(strategy="constant", constant=1).fit(x.flatten(1), y))
    found, _ = measured["measure"](small, judge, 0)
    for count in 1, 3, 8:
        file = compress(small, x, lossy=count)
        assert found["files"][f"{count}"]["bytes"] == pytest.approx(len(file) / 20, abs=5e-4)
        wrong = (decompress(small, file) != x).double().mean().item()
        assert found["files"][f"{count}"]["likely"]["wrong_pixels"] == pytest.approx(wrong, abs=5e-5)
        assert found["files"][f"{count}"]["likely"]["digits"] == 0.5


def test_lossy_refusals(small: VLAE) -> None:
    x = torch.zeros(2, 1, 3, 3, dtype=torch.long)
    for code, lossy in ((0, 1), (2, -1), (2, 256)):
        with pytest.raises(ValueError) as caught:
            compress(model_of((1, 3, 3), 2, {"code": code}), x, lossy)
        assert f"lossy={lossy} with model.code={code}" in str(caught.value)
    data = compress(small, draw(small, 3), lossy=1)
    for wrong in (torch.rand(2, 1, 5, 5), torch.rand(3, 1, 5, 4)):
        with pytest.raises(ValueError) as caught:
            decompress(small, data, wrong)
        assert f"{tuple(wrong.shape)} for 3 of (1, 5, 5), lossy" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        decompress(small, compress(small, draw(small, 3)), torch.rand(3, 1, 5, 5))
    assert "two-part" in str(caught.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 1, 5, 5, dtype=torch.long), "no images"),
        (torch.zeros(2, 1, 5, 4, dtype=torch.long), "(1, 5, 4)"),
        (torch.full((2, 1, 5, 5), 2), "values 2 to 2"),
    ],
)
def test_other_images_are_refused(small: VLAE, x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        compress(small, x)
    assert message in str(caught.value)


@pytest.mark.parametrize("maps", [False, True])
def test_scales_are_refused(maps: bool) -> None:
    x = torch.zeros(2, 1, 3, 3, dtype=torch.long)
    free = model_of((1, 3, 3), 2, {"maps": maps, "scale": True, "depth": 0})  # no step, no scale
    assert torch.equal(decompress(free, compress(free, x)).long(), x)
    with pytest.raises(ValueError) as caught:
        compress(tiny(scale=True, maps=maps), x)
    assert "model.prior.scale=false" in str(caught.value)


@pytest.mark.parametrize("lossy", [0, 2])
def test_posteriors_with_a_flow_are_refused(lossy: int) -> None:
    with pytest.raises(ValueError) as caught:
        compress(tiny(scale=False, posterior="iaf"), torch.zeros(2, 1, 3, 3, dtype=torch.long), lossy=lossy)
    assert "model.encoder.posterior=iaf" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "maps"),
    [
        ("encoder.net.8", False),
        ("encoder.out", True),
        ("prior.steps.0.shift", False),
        ("prior.steps.0.channels.shift", True),
        ("decoder.head", False),
        ("decoder.head", True),
    ],
)
def test_models_that_are_not_finite_are_refused(part: str, maps: bool) -> None:
    model = model_of((1, 3, 3), 2, {"maps": maps})
    with torch.no_grad():
        model.get_submodule(part).bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        compress(model, torch.zeros(2, 1, 3, 3, dtype=torch.long))


def test_half_precision_is_refused(small: VLAE) -> None:
    with pytest.raises(ValueError) as caught:
        compress(deepcopy(small).bfloat16(), draw(small, 2))
    assert "torch.bfloat16: compression needs a model in float32" in str(caught.value)


def forged(data: bytes, payload: bytes | None = None, **fields: Any) -> bytes:
    """A file with other fields and right checksums."""
    about, own = unpack(data)
    return pack(about._replace(**fields), own if payload is None else payload)


def refused(model: VLAE, data: bytes) -> str:
    with pytest.raises(CodecError) as caught:
        decompress(model, data)
    return str(caught.value)


def test_another_model_or_machine_is_refused(small: VLAE) -> None:
    data = compress(small, draw(small, 9))
    other = model_of((1, 5, 5), 2, {"code": 3})
    with torch.no_grad():
        other.decoder.head.bias += 1e-6
    assert "model" in refused(other, data)
    assert "floats" in refused(deepcopy(small).float(), data)
    assert "threads 2, which is 1 here" in refused(small, forged(data, threads=2))
    assert "batch" in refused(small, forged(data, batch=255))
    assert "fingerprint" in refused(small, forged(data, fingerprint=1))
    assert "torch 2.1 " in refused(small, forged(data, fingerprint=1, torch="2.1"))


def test_a_machine_that_computes_otherwise_is_refused(small: VLAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a millionth in the odds of pixels: the fingerprint, and were that equal, the end."""
    data = compress(small, draw(small, BATCH + 6))
    about, _ = unpack(data)
    pmf = small.likelihood.pmf
    monkeypatch.setattr(
        small.likelihood, "pmf", lambda params, x: pmf(params, x) * (1 + 1e-6 * torch.arange(2)[:, None])
    )
    assert "fingerprint" in refused(small, data)
    with alike():
        here = fingerprint(small, about.spacing)
    assert "damaged" in refused(small, forged(data, fingerprint=here))


@pytest.mark.parametrize(("part", "much"), [("encoder", 1e-4), ("prior", 0.1), ("decoder", 1e-6)])
def test_every_part_is_in_the_fingerprint(part: str, much: float) -> None:
    model = model_of((1, 5, 5), 2, {"code": 3}).float()
    data = compress(model, draw(model, BATCH + 6))
    other = deepcopy(model)
    with torch.no_grad():
        for weight in other.get_submodule(part).parameters():
            weight.mul_(1 + much)
    about, _ = unpack(data)
    theirs = header(other, about.kind, about.images).model
    assert "fingerprint" in refused(other, forged(data, model=theirs))


def files(model: VLAE) -> dict[str, bytes]:
    """One of each kind."""
    found = [compress(model, draw(model, n), lossy) for n, lossy in ((BATCH + 6, 0), (2, 0), (9, 2))]
    named = {unpack(data)[0].kind: data for data in found}
    assert set(named) == set(KIND_NAMES)
    return named


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_headers_that_lie_are_refused(small: VLAE, kind: str) -> None:
    data = files(small)[kind]
    about, payload = unpack(data)
    lies = [
        {"initial": about.initial + 1},
        {"initial": 2**16 - 1},
        {"spacing": -128},
        {"spacing": 127},
        {"spacing": 1 if about.spacing != 1 else 2},
    ]
    for fields in (
        {"images": 0},
        {"images": about.images - 1},
        {"images": about.images + 1},
        {"images": 2**32 - 1},
        *lies,
        {"content": about.content ^ 1},
        {"torch": "2.12"},
        {"constriction": "0.6"},
        *({"kind": other} for other in KIND_NAMES if other != kind),
    ):
        refused(small, forged(data, **fields))
    longer = payload + bytes(4), payload + b"\1\0\0\0"
    for wrong in (b"", payload[:-4], payload[4:], *longer, payload[:-1], bytes(400)):
        refused(small, forged(data, wrong))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_absurd_sizes_take_no_memory(kind: str) -> None:
    """Of images of many bytes, where a count could do most harm."""
    model = model_of((1, 14, 14), 2, {"code": 3})
    counts = {"bits-back": 420, "two-part": 40, "lossy": 420}
    data = compress(model, draw(model, counts[kind]), 2 * (kind == "lossy"))
    about, payload = unpack(data)
    assert about.kind == kind
    tracemalloc.start()
    try:
        decompress(model, data)
        honest = tracemalloc.get_traced_memory()[1]
        for images in (about.images + 64, len(payload), 2**32 - 1):
            tracemalloc.reset_peak()
            assert "damaged" in refused(model, forged(data, images=images))
            assert tracemalloc.get_traced_memory()[1] < 2 * honest + 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("unchecked")
def test_mutations_are_refused(small: VLAE) -> None:
    rng = random.Random(0)
    good = list(files(small).values())
    for _ in range(300):
        wrong = mutated(*rng.sample(good, 2), rng)
        if wrong not in good:
            refused(small, wrong)


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Truncated, flipped, spliced or random; a fifth of them with a right checksum in front."""
    at, to = sorted(rng.randrange(len(data)) for _ in range(2))
    kind = rng.randrange(5)
    if kind == 0:
        wrong = data[:at]
    elif kind == 1:
        wrong = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    elif kind == 2:
        wrong = data[:at] + other[rng.randrange(len(other)) :]
    elif kind == 3:
        wrong = data[:at] + rng.randbytes(to - at) + data[to:]
    else:
        wrong = MAGIC + rng.randbytes(rng.randrange(200))
    if rng.random() < 0.2:
        wrong = MAGIC + zlib.crc32(wrong[8:]).to_bytes(4, "little") + wrong[8:]
    return wrong


def test_headers_survive() -> None:
    about = Header("lossy", "float64", -3, 64, 1, 7, 2**16 - 1, 2**32 - 1, 5, "0123abcd", "2.13", "0.5")
    assert unpack(pack(about, b"payload")) == (about, b"payload")
    for fields in ({"images": 2**32}, {"initial": 2**16}):
        with pytest.raises(ValueError) as caught:
            pack(about._replace(**fields), b"")
        assert "do not fit" in str(caught.value)


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (1, 256), (3, 2), (3, 256)])
def test_other_formats_get_the_same_pixels(channels: int, levels: int) -> None:
    x = torch.randint(0, levels, (7, channels, 4, 5), dtype=torch.uint8)
    picture = sheet(x, levels)
    assert picture.size == (15, 12)
    for n, image in enumerate(x):
        for i in range(4):
            for j in range(5):
                found = picture.getpixel((n % 3 * 5 + j, n // 3 * 4 + i))
                expected = tuple(image[:, i, j].tolist()) if channels == 3 else int(image[0, i, j])
                assert found == (255 * expected if (channels, levels) == (1, 2) else expected)
    if shutil.which("cjxl") is None:
        warnings.warn("no cjxl on this machine: JPEG XL is not tried", stacklevel=1)
    noise = torch.randint(0, levels, (50, channels, 9, 9), dtype=torch.uint8)
    entropy = noise.numel() * math.log2(levels) / 8  # which no lossless format beats by more than luck
    for name, size in sizes(noise, levels).items():
        assert 0.98 * entropy < size, name
    assert sizes(noise, levels)["xz"] < (1.02 * entropy if levels in (2, 256) else 1.5 * entropy) + 100


@pytest.mark.parametrize("width", [16_383, 16_384])
def test_a_picture_too_large_for_webp_goes_without(width: int) -> None:
    found = sizes(torch.zeros(1, 1, 1, width, dtype=torch.uint8), 256)
    assert any(name.startswith("WebP") for name in found) == (width == 16_383)


def test_normal_masses_are_those_of_the_prior() -> None:
    """constriction's table of N(0, 1) on the grid against the density."""
    model = tiny(scale=False)
    codec = Codec(model, 1 / 8)
    eps = torch.arange(-24, 25).double()[:, None] / 8
    for value in eps:
        stack = codec.stack(seed(40))
        before = stack.num_valid_bits()
        for _ in range(20):
            stack.encode_reverse((8 * value).int().numpy(), codec.standard)
        bits = (stack.num_valid_bits() - before) / 20
        assert abs(bits - (3 - normal_log_prob(value[None]).item() / math.log(2))) < 0.12
