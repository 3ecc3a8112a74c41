"""Commands on trained models do what the model does, and spoil nothing when they cannot."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import DIGITS, ROOT, command
from tiny import tiny

import vlae
from vlae.__main__ import main
from vlae.codes import encode, linear_probe
from vlae.commands import opened
from vlae.container import unpack
from vlae.datasets import digits
from vlae.figures import captioned, grid
from vlae.folder import alike, store
from vlae.gallery import PICTURES
from vlae.model import save
from vlae.noise import generator

Vlae = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of digits, trained for five steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command(*DIGITS, "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", f"folder={folder}")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Vlae:
    """`python -m vlae ...` in an empty folder; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vlae", *arguments])
        main()
        return capsys.readouterr().out

    return call


def test_a_finished_run_has_every_picture(run: Path) -> None:
    found = {path.stem for path in run.glob("*.png")}
    assert found >= {*PICTURES, "bits", "window", "noise", "learning_curves"}


@pytest.mark.parametrize("place", ["", "checkpoints/best.ckpt"])
def test_evaluate(run: Path, call: Vlae, place: str) -> None:
    out = call("evaluate", str(run / place), "--samples", "3", "--batch", "300", "--split", "validation")
    record = json.loads((run / "evaluate.json").read_text())
    (run / "evaluate.json").unlink()
    metrics, trained = record["metrics"], json.loads((run / "metrics.json").read_text())
    named = {key: record[key] for key in ("data", "split", "binarisation", "seed", "samples", "images")}
    assert named == {
        "data": "digits",
        "split": "validation",
        "binarisation": "none",
        "seed": 0,
        "samples": 3,
        "images": 250,
    }
    assert record["command"].startswith("python -m vlae evaluate ")
    assert metrics["val/nll"] < metrics["val/nelbo"]
    # other noise than in training: within a few standard errors of the bound found there
    assert metrics["val/nelbo"] == pytest.approx(trained["val/nelbo"], rel=0.01)
    assert f"{metrics['val/nll']:.3f}" in out
    assert str(run / "evaluate.json") in out


def test_a_run_opens_as_the_weights_that_count(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mnist_static"
    shutil.copytree(run, folder)
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    last["state_dict"]["model.decoder.mix.bias"] += 1
    torch.save(last, folder / "checkpoints" / "last.ckpt")
    for name in ("best", "last"):  # without the best on validation, the last
        path = folder / "checkpoints" / f"{name}.ckpt"
        weights, found = torch.load(path, weights_only=True)["state_dict"], vlae.load(folder).state_dict()
        assert all(torch.equal(value, weights[f"model.{key}"]) for key, value in found.items())
        # a command's run is a folder first: shipped weights have that name, too
        assert opened("mnist_static")[0].decoder.shape == (1, 8, 8)
        path.unlink()
    with pytest.raises(FileNotFoundError, match="mnist_static: a folder without a run's checkpoint"):
        vlae.load(folder)


def test_pictures_need_no_lightning(run: Path, tmp_path: Path) -> None:
    """It takes longer to import than all else together."""
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8), np.uint8))
    calls = [["sample", run], ["encode", run, "x.npy"], ["compress", run, "x.npy", "-o", "x.vlae"]]
    calls += [["decompress", run, "x.vlae", "-o", "again.npz"]]
    code = """
import sys, torch, vlae
from runpy import run_module
model = vlae.load(sys.argv[1])
torch.load(sys.argv[1], weights_only=True)
assert not model.training
assert vlae.sample(model, torch.randn(2, 3), torch.rand(2, 1, 8, 8)).shape == (2, 1, 8, 8)
assert not {"hydra", "omegaconf", "lightning", "wandb"} & set(sys.modules)
"""
    for words in calls:
        code += f"sys.argv[1:] = {[*map(str, words)]}; run_module('vlae', run_name='__main__')\n"
    code += "assert 'torch' in sys.modules and not {'lightning', 'hydra'} & set(sys.modules)"
    line = [sys.executable, "-c", code, str(run / "checkpoints" / "best.ckpt")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not np.load(tmp_path / "again.npz")["images"].any()


@pytest.mark.parametrize("parts", ["training part", "training and validation parts"])
def test_export(run: Path, call: Vlae, parts: str) -> None:
    shutil.copytree(run, "run")
    config = json.loads(Path("run/config.json").read_text())
    config["data"]["train_on_validation"] = "validation" in parts
    Path("run/config.json").write_text(json.dumps(config))
    call("export", "run", "mine")
    stored, own = load_file("weights/mine.safetensors"), vlae.load("run/checkpoints/best.ckpt")
    assert stored.keys() == own.state_dict().keys()
    assert all(torch.equal(value, own.state_dict()[name].half()) for name, value in stored.items())
    metrics = json.loads(Path("results/mine_weights.json").read_text())["metrics"]
    x = digits(Path()).test.images
    with torch.no_grad():
        bound = -torch.stack([own(x, torch.randn(len(x), own.prior.code)).elbo.mean() for _ in range(20)]).mean()
    assert metrics["test/nelbo"] == pytest.approx(bound.item(), rel=0.01)
    asked = ["evaluate", "weights/mine.safetensors", "--data", "digits", "--split", "validation", "--samples", "1"]
    if "validation" in parts:
        with pytest.raises(SystemExit, match="split=validation: the run was trained on it"):
            call(*asked)
    else:
        call(*asked)
        assert json.loads(Path("runs/mine/evaluate.json").read_text())["split"] == "validation"
    card = Path("weights/mine.md").read_text()
    assert f"Trained on the {parts} of digits" in card
    assert f"| test/nelbo | {metrics['test/nelbo']:.4f} |" in card


def test_sample(run: Path, call: Vlae) -> None:
    drawn = []
    for seed in ("0", "0", "1"):
        call("sample", str(run), "--seed", seed, "-o", "out")
        drawn.append(np.asarray(Image.open("out/samples.png")))
    assert np.array_equal(drawn[0], drawn[1])
    assert drawn[0].shape == drawn[2].shape
    assert not np.array_equal(drawn[0], drawn[2])


def test_reconstruct(run: Path, call: Vlae) -> None:
    out = call("reconstruct", str(run), "train", "-o", "out")
    for name in (*PICTURES, "bits", "window", "noise"):
        if name != "samples":
            assert str(Path("out") / f"{name}.png") in out
        assert Image.open(Path("out") / f"{name}.png").width > 300


def test_reconstruct_a_single_picture(run: Path, call: Vlae) -> None:
    Image.new("L", (8, 8)).save("one.png")
    call("reconstruct", str(run), "one.png", "-o", "out")
    assert Image.open("out/interpolations.png").height < Image.open(run / "interpolations.png").height


def test_encode(run: Path, call: Vlae) -> None:
    out = call("encode", str(run), "-o", "new/codes.npz")
    splits, model = digits(Path()), vlae.load(run / "checkpoints" / "best.ckpt")
    codes = np.load("new/codes.npz", allow_pickle=False)
    with torch.no_grad():
        q = model.encode(splits.test.images)
    np.testing.assert_allclose(codes["mean"], q.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(codes["scale"], q.log_scale.exp(), rtol=1e-4)
    assert codes["labels"].tolist() == splits.test.labels.tolist()
    # the draw of testing: its mean rate
    rate = json.loads((run / "metrics.json").read_text())["test/rate"]
    assert codes["rate"].mean() == pytest.approx(rate, rel=1e-4)
    assert f"{codes['rate'].mean():.3f} nats" in out
    assert sorted(path.name for path in Path("new").iterdir()) == ["codes.npz"]


@pytest.mark.parametrize("many", [True, False])
def test_encode_one_s_own_pictures(run: Path, call: Vlae, many: bool) -> None:
    images = digits(Path()).test.images[:3]
    Path("mine").mkdir()
    for number, image in enumerate(images):
        # any grey of a level's width stands for it
        Image.fromarray((image[0].int() * 256 // 17 + 3).to(torch.uint8).numpy()).save(f"mine/{number}.png")
    call("encode", str(run), "mine" if many else "mine/0.png", "-o", "codes.npz")
    codes = np.load("codes.npz", allow_pickle=False)
    with torch.no_grad():
        q = vlae.load(run / "checkpoints" / "best.ckpt").encode(images if many else images[:1])
    np.testing.assert_allclose(codes["mean"], q.mean, rtol=1e-4, atol=1e-5)
    assert "labels" not in codes


@pytest.mark.usefixtures("unchecked")
def test_compress_and_decompress(run: Path, call: Vlae) -> None:
    x = digits(Path()).test.images
    out = call("compress", str(run), "-o", "new/test.vlae", "--samples", "2")
    data = Path("new/test.vlae").read_bytes()
    assert f"{len(data):,} bytes for {len(x):,} images" in out
    for line in ("test.vlae", "-ELBO", "-log p(x)", "PNG", "WebP", "xz"):
        assert line in out
    shown = float(re.search(r"test\.vlae +│ ([\d.]+)", out)[1])  # type: ignore[index]
    assert shown == pytest.approx(8 * len(data) / x.numel(), abs=1e-4)
    call("decompress", str(run), "new/test.vlae")
    assert np.array_equal(np.load("new/test.npz")["images"], x)
    call("decompress", str(run / "checkpoints" / "best.ckpt"), "new/test.vlae", "-o", "pictures")
    call("compress", str(run), "pictures", "-o", "again.vlae", "--samples", "1")
    assert Path("again.vlae").read_bytes() == data
    two = ["pictures/00001.png", "pictures/00000.png"]
    call("compress", str(run), *two, "-o", "two.vlae", "--samples", "1", "--portable")
    assert unpack(Path("two.vlae").read_bytes())[0].floats == "float64"
    call("decompress", str(run), "two.vlae")
    assert np.array_equal(np.load("two.npz")["images"], x[[1, 0]])
    call("compress", str(run), "two.npz", "-o", "third.vlae", "--samples", "1", "--portable")
    assert Path("third.vlae").read_bytes() == Path("two.vlae").read_bytes()
    assert {path.name for path in Path("new").iterdir()} == {"test.vlae", "test.npz"}


@pytest.mark.usefixtures("unchecked")
def test_compress_codes_alone(run: Path, call: Vlae) -> None:
    out = call("compress", str(run), "test", "--lossy", "2", "-o", "codes.vlae")
    x, found = digits(Path()).test.images, []
    assert Path("codes.vlae").stat().st_size == 35 + 2 * len(x)
    for more in (["--likely"], [], ["--seed", "0"], ["--seed", "4"]):
        call("decompress", str(run), "codes.vlae", "-o", f"{len(found)}.npz", *more)
        found.append(np.load(f"{len(found)}.npz")["images"])
    assert f"{float((found[0] != x.numpy()).mean()):.2%} of the most likely values" in out
    assert np.array_equal(found[1], found[2])
    assert not np.array_equal(found[2], found[3])
    assert found[0].shape == found[3].shape == x.shape


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_read_back(tmp_path: Path, channels: int) -> None:
    for levels in range(2, 257):
        values = torch.arange(levels, dtype=torch.uint8).expand(2, channels, 1, -1).contiguous()
        values[1] = values[1].flip(2)
        store(values, levels, tmp_path / f"{levels}")
        assert torch.equal(alike([tmp_path / f"{levels}"], (channels, 1, levels), levels), values)


class Evil:
    """Would leave a file, were it unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


@pytest.fixture(scope="module")
def mistakes(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what commands cannot use, for all of them, as none may change it."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Image.new("L", (7, 8)).save("small.png")
        Image.new("L", (8, 8)).save("fits.png")
        Image.new("L", (400, 300)).save("large.jpg")
        Image.new("RGB", (8, 8), (0, 16, 0)).save("colour.png")
        Image.new("L", (8, 8), 100).save("finer.png")
        np.save("floats.npy", np.zeros((2, 8, 8)))
        np.save("none.npy", np.zeros((0, 8, 8), dtype=np.uint8))
        np.save("seventeen.npy", np.arange(128).reshape(2, 1, 8, 8) % 18)
        np.savez("two.npz", a=np.zeros(1), b=np.zeros(1))
        np.save("pickled.npy", np.array([Evil()], dtype=object), allow_pickle=True)
        model = vlae.load(run / "checkpoints" / "best.ckpt")
        Path("digit.vlae").write_bytes(vlae.compress(model, digits(Path()).test.images[:1]))
        Path("text.png").write_text("no picture")
        for name in ("broken", "cut"):
            Path(name, "checkpoints").mkdir(parents=True)
        Path("broken/config.json").write_text('{"seed": 0')
        Path("cut/config.json").write_bytes((run / "config.json").read_bytes())
        for name in ("evil", "bad"):
            Path(name, "checkpoints").mkdir(parents=True)
            config = json.loads((run / "config.json").read_text())
            if name == "evil":
                config |= {"allow": ["posix"], "data": {"_target_": "posix.system", "root": "touch ran"}}
            Path(name, "config.json").write_text(json.dumps(config))
        for path in ("evil.ckpt", "evil.safetensors", "evil/checkpoints/evil.ckpt", "bad/checkpoints/evil.ckpt"):
            Path(path).write_bytes(pickle.dumps(Evil(), protocol=2))
        Path("own.safetensors").write_bytes((ROOT / "weights" / "mnist_static.safetensors").read_bytes())
        Path("cut/checkpoints/best.ckpt").write_bytes((run / "checkpoints/best.ckpt").read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["encode", "{run}", "small.png"], r"small\.png: 7 x 8 pixels; 8 x 8 are wanted"),
        (["encode", "{run}", "valid"], "valid: neither train, validation, test alone nor a file or folder"),
        (["encode", "{run}", "text.png"], r"text\.png: cannot identify"),
        (["encode", "{run}", "--data", "digits"], "--data=digits: .* trained on its own data"),
        (["encode", "nowhere"], "nowhere: no such file; shipped weights: mnist_static"),
        (["encode", "."], "no run, as there is no config.json"),
        (["encode", "broken"], r"broken/config\.json: not the settings of a run"),
        (["encode", "cut"], "cut/checkpoints/best.ckpt: not a VLAE that can be opened"),
        (["encode", "mnist_static", "--data", "digits"], r"images of \(1, 8, 8\), 17 levels; the model is for"),
        (["encode", "mnist_static", "--data", "nothing"], "--data=nothing: must be one of digits, mnist"),
        (["encode", "own.safetensors"], "own.safetensors: say by --data what it was trained on: digits, mnist"),
        (["encode", "evil"], "evil/config.json: the run calls code of posix; if you trust it, --allow posix"),
        (["evaluate", "evil.ckpt"], "no run, as there is no"),
        (["sample", "evil.safetensors"], "not a VLAE that can be opened"),
        (["evaluate", "evil/checkpoints/evil.ckpt", "--allow", "nothing"], "calls code of posix"),
        (["sample", "bad/checkpoints/evil.ckpt"], "refused, as it holds more than tensors and plain types"),
        (["sample", "{run}", "-o", "fits.png"], "--output=fits.png: a file; pictures go into a folder"),
        (["reconstruct", "{run}", "large.jpg"], r"large\.jpg: 400 x 300 pixels; 8 x 8 are wanted"),
        (["evaluate", "{run}", "--samples", "0"], "samples=0: must be at least 1"),
        (["compress", "{run}", "--samples", "0"], "samples=0: must be at least 1"),
        (["compress", "{run}", "-o", "broken"], "--output=broken: a folder; a file"),
        (["compress", "{run}", "test", "fits.png"], "test: neither train, validation, test alone"),
        (["compress", "{run}", "floats.npy"], r"floats.npy: float64 \[2, 8, 8\]; integers 0 to 255 of \[N, 1, 8, 8\]"),
        (["compress", "{run}", "seventeen.npy"], "images of values 0 to 17; the model is for 0 to 16"),
        (["compress", "{run}", "two.npz"], "two.npz: .*images"),
        (["compress", "{run}", "colour.png"], r"colour\.png: other values than the model's 17 levels of grey; an .npy"),
        (
            ["compress", "{run}", "fits.png", "finer.png"],
            r"finer\.png: other values than the model's 17 levels of grey",
        ),
        (["decompress", "{run}", "digit.vlae", "-o", "two.npz"], "--output=two.npz: is there already"),
        (["encode", "{run}", "--data", "digits", "nowhere"], "--data=digits: .* trained on its own data"),
        (["encode", "{run}", "-o", "codes.npz", "nowhere"], "nowhere: neither train, validation, test alone"),
        (["compress", "{run}", "pickled.npy"], "pickled.npy: Object arrays cannot be loaded"),
        (["compress", "{run}", "none.npy"], "no images to compress"),
        (["decompress", "{run}", "text.png"], "text.png: no compressed images"),
        (["decompress", "mnist_static", "digit.vlae"], "digit.vlae: made with model"),
        (["decompress", "{run}", "digit.vlae", "--likely"], "--likely: digit.vlae holds every pixel"),
        (["compress", "{run}", "--lossy", "-2"], "lossy=-2 with model.code=3: 1 to 255 bytes"),
        (["decompress", "{run}", "digit.vlae", "-o", "broken"], "--output=broken: is there already"),
        (["decompress", "{run}", "digit.vlae", "-o", "fits.png"], "--output=fits.png: is there already"),
        (["evaluate", "{run}", "--batch", "-1"], "batch=-1: must be at least 1"),
        (["evaluate", "{run}", "--split", "tset"], "split=tset: must be one of train, validation, test"),
    ],
)
def test_one_line_says_what_is_wrong(
    run: Path, mistakes: Path, call: Vlae, arguments: list[str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mistakes)
    (run / "codes.npz").write_text("kept")
    (run / "evaluate.json").write_text("kept")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        call(*(text.replace("{run}", str(run)) for text in arguments))
    assert "\n" not in str(stopped.value)
    assert re.search(found, str(stopped.value)), str(stopped.value)
    assert sorted(Path().rglob("*")) == before
    assert {(run / name).read_text() for name in ("codes.npz", "evaluate.json")} == {"kept"}
    for name in ("codes.npz", "evaluate.json"):  # the run is of all tests here
        (run / name).unlink()


def test_codes_do_not_depend_on_the_batch() -> None:
    model, x = vlae.load("mnist_static"), torch.randint(2, (7, 1, 28, 28))
    eps = torch.randn(3, 7, 64)
    whole, parts = encode(model, x, eps), encode(model, x, eps, batch=3)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        rates = torch.stack([model(x, noise).rate for noise in eps])
    torch.testing.assert_close(whole.rate, rates.mean(0), rtol=1e-4, atol=1e-3)


def test_linear_probe() -> None:
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(600, 5)), draw.normal(size=(5, 3))
    y = (x @ w).argmax(1)
    assert linear_probe(x[:400], y[:400], x[400:], y[400:]) > 0.9
    shuffled = draw.permutation(y)
    assert linear_probe(x[:400], shuffled[:400], x[400:], shuffled[400:]) < 0.5
    # features of any scale are standardised alike
    scaled = x * [1e-3, 1, 1e3, 1, 10]
    assert linear_probe(scaled[:400], y[:400], scaled[400:], y[400:]) > 0.9


def tiles(picture: np.ndarray, rows: int, size: int) -> np.ndarray:
    """The images in a captioned grid of eight columns, as they were before they were enlarged."""
    zoom = max(1, 84 // size)
    edge = zoom * size + 4
    cut = picture[-rows * edge :, : 8 * edge, 0].reshape(rows, edge, 8, edge).swapaxes(1, 2)
    return cut[..., 2:-2, 2:-2][..., ::zoom, ::zoom]


@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_pictures_show_what_they_say() -> None:
    model = vlae.load("mnist_static")
    x = vlae.sample(model, torch.randn(8, 64), torch.rand(8, 1, 28, 28))
    given = 255 * x[:, 0].numpy()
    drawn = tiles(PICTURES["reconstructions"](model, x, generator("a")), 8, 28)
    assert np.array_equal(drawn[:, 0], given)
    assert set(np.unique(drawn)) == {0, 255}
    near = np.abs(drawn[:, 1:].astype(int) - given[:, None]).mean((1, 2, 3))
    far = np.abs(drawn[:, 1:].astype(int) - np.roll(given, 1, 0)[:, None]).mean((1, 2, 3))
    assert near.mean() < far.mean()  # a code is of its own image
    assert (drawn[:, 1] != drawn[:, 2]).any()  # with fresh pixels
    paths = tiles(PICTURES["interpolations"](model, x, generator("a")), 4, 28).astype(int)
    step, whole = np.abs(paths[:, 1:] - paths[:, :-1]).mean(), np.abs(paths[:, 0] - paths[:, -1]).mean()
    assert step < whole


def test_completions_keep_the_upper_half() -> None:
    model, x = tiny((1, 8, 8)).float(), torch.randint(2, (8, 1, 8, 8))
    given = 255 * x[:, 0].numpy()
    completed = tiles(PICTURES["completions"](model, x, generator("a")), 8, 8)
    assert np.array_equal(completed[:, 0], given)
    assert (completed[:, :, :4] == given[:, None, :4]).all()
    assert (completed[:, 1, 4:] == 128).all()  # grey: not shown
    assert (completed[:, 2] != completed[:, 3]).any()


def test_captions_leave_the_picture_as_it_is() -> None:
    picture = grid(torch.randint(256, (8, 3, 32, 32)), 256, 8)
    found = captioned(picture, "words " * 40)
    assert np.array_equal(found[-picture.shape[0] :, : picture.shape[1]], picture)
    strip = found[: -picture.shape[0]]
    assert (strip < 128).any()
    assert (strip[:, -1] == 255).all()  # no word is cut off


def test_names_from_inside_a_run(run: Path, call: Vlae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    out = call("sample", "best.ckpt")
    assert str(run / "samples.png") in out


def test_weights_of_one_s_own_need_no_data_for_pictures(call: Vlae) -> None:
    Path("own.safetensors").write_bytes((ROOT / "weights" / "mnist_static.safetensors").read_bytes())
    Image.new("L", (28, 28)).save("black.png")
    call("sample", "own.safetensors", "-o", "out")
    call("encode", "own.safetensors", "black.png", "-o", "out")
    assert np.load("out/codes.npz")["mean"].shape == (1, 64)


def test_codes_that_are_not_finite_are_not_written(run: Path, call: Vlae, tmp_path: Path) -> None:
    model = vlae.load(run / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(math.nan)
    save(model, Path("digits.safetensors"))
    with pytest.raises(SystemExit, match=r"FloatingPointError: .*nothing is written"):
        call("encode", "digits.safetensors", "-o", "codes.npz")
    assert not Path("codes.npz").exists()


def test_noise_of_other_images_is_refused() -> None:
    model, x = vlae.load("mnist_static"), torch.zeros(4, 1, 28, 28, dtype=torch.long)
    with pytest.raises(ValueError, match="K >= 1 draws for each of 4 images"):
        encode(model, x, torch.zeros(0, 4, 64))
    with pytest.raises(ValueError, match="no images"):
        encode(model, x[:0], torch.zeros(1, 0, 64))
