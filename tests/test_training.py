"""A run is a function of its settings: averaged, interrupted, spread over devices, it ends at the same weights."""

import json
import math
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small import DIGITS, config
from tiny import settings
from torch import Tensor

import vlae
import vlae.datasets
from vlae.data import Images
from vlae.datasets import Part, Splits
from vlae.encoder import Encoder
from vlae.experiment import run
from vlae.noise import generator
from vlae.training import Averaging, LitVLAE

pytestmark = pytest.mark.usefixtures("unchecked")
SHAPE = (1, 3, 5)
OPTIMIZER = {"name": "adamax", "lr": 0.02, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0}
OBJECTIVE = {"beta": 1.0, "warmup_steps": 0, "free_bits": 0.0, "kind": "hard"}


def toy(root: Path) -> Splits:
    """24 / 7 / 8 binary images, most of them dark."""
    noise = generator("toy")
    parts = (Part((torch.rand(n, *SHAPE, generator=noise) < 0.3).to(torch.uint8)) for n in (24, 7, 8))
    return Splits(*parts, levels=2)


def make(batch_size: int = 4) -> Images:
    return Images(toy, root=None, batch_size=batch_size, eval_batch_size=3, seed=1)


def lit(
    code: int = 2,
    compile: bool = False,
    dropout: float = 0.0,
    objective: dict[str, Any] | None = None,
    **optimizer: Any,
) -> LitVLAE:
    torch.manual_seed(0)
    return LitVLAE(
        model=settings(code=code, window="3x2", dropout=dropout),
        shape=SHAPE,
        levels=2,
        seed=1,
        optimizer=OPTIMIZER | optimizer,
        objective=OBJECTIVE | (objective or {}),
        compile=compile,
    )


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    off = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    off["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    rest = {"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0, "max_epochs": 2}
    rest |= {"log_every_n_steps": 1}
    return Trainer(**off | rest | {"default_root_dir": folder} | settings, callbacks=list(callbacks))


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, in nested dictionaries and lists of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


class Watch(Callback):
    """Losses and weights after each optimiser step, weights in each validation, learning rates, clipped gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.validated: list[dict[str, Tensor]] = []
        self.scores: list[dict[str, float]] = []
        self.rates: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        if len(self.steps) < trainer.global_step:
            self.steps.append(copied(module))

    def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        if gradients:  # of the step before
            self.norms.append(torch.cat(gradients).norm().item())

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.validated.append(copied(module))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.scores.append({name: value.item() for name, value in trainer.callback_metrics.items() if "val" in name})


class SaveAt(Callback):
    """Saves in the hook after the given step; stands after the averaging."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():  # not again where steps take several batches
            trainer.save_checkpoint(self.path)


def test_averaged_weights_are_a_plain_loop(tmp_path: Path) -> None:
    watch, decay, path = Watch(), 0.4, tmp_path / "some.ckpt"
    module = lit()
    fit = trainer(tmp_path, watch, Averaging(decay), SaveAt("on_validation_end", 12, path), val_check_interval=2)
    fit.fit(module, make())

    averages: list[dict[str, Tensor]] = []
    for n, weights in enumerate(watch.steps):
        d = min(decay, (1 + n) / (10 + n)) if n else 0.0  # the average starts where the first step ends
        averages.append({k: d * averages[-1][k] + (1 - d) * w if n else w for k, w in weights.items()})

    def near(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=1e-6) for k in a)

    assert len(averages) == 12
    assert len(watch.validated) == 6 * 3
    for k, weights in enumerate(watch.validated):  # three batches a validation, one after every second step
        assert near(weights, averages[2 * (k // 3) + 1])
    assert not near(watch.validated[-1], watch.steps[-1])
    checkpoint = torch.load(path, weights_only=True)
    assert near(checkpoint["state_dict"], averages[-1])
    assert same(checkpoint["current_model_state"], watch.steps[-1])
    assert near(copied(module), averages[-1])
    assert near(copied(vlae.load(path)), copied(module.model))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 3), ("on_train_batch_end", 8), ("on_validation_end", 6)]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, hook: str, step: int, dropout: float) -> None:
    """Weights, averaged weights, optimiser, learning rate and gamma of the soft free bits, to the bit."""

    def fit(path: Path | None, end: Path, *more: Callback) -> tuple[Watch, dict[str, Any]]:
        soft = {"kind": "soft", "free_bits": 2.0}
        watch, module = Watch(), lit(schedule="cosine", warmup_steps=4, dropout=dropout, objective=soft)
        run = trainer(tmp_path, watch, Averaging(0.9), *more, SaveAt("on_train_batch_end", 12, end))
        run.fit(module, make(), ckpt_path=path)
        return watch, torch.load(end, weights_only=True)

    path = tmp_path / "some.ckpt"
    whole, end = fit(None, tmp_path / "whole.ckpt", SaveAt(hook, step, path))
    rest, resumed_end = fit(path, tmp_path / "rest.ckpt")
    assert same(rest.steps, whole.steps[step:])
    assert rest.rates == whole.rates[step:]
    assert rest.losses == whole.losses[step:]
    assert rest.scores[-1] == whole.scores[-1]
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert same(end[key], resumed_end[key])
    assert torch.load(path, weights_only=True)["state_dict"]["objective.gamma"] != 1


@pytest.mark.parametrize("more", [{}, {"max_steps": 9, "max_epochs": -1}])
def test_a_run_that_goes_on_with_other_steps_an_epoch_stays_in_its_schedule(
    tmp_path: Path, more: dict[str, int]
) -> None:
    """As with more devices: six steps an epoch, then two, and after half of the second epoch six again."""

    def fit(start: Path | None, end: Path, step: int, accumulate: int) -> list[float]:
        watch, save = Watch(), SaveAt("on_validation_end" if step == 6 else "on_train_batch_end", step, end)
        run = trainer(tmp_path, watch, save, accumulate_grad_batches=accumulate, **more)
        run.fit(lit(schedule="cosine"), make(), ckpt_path=start)
        return watch.rates

    paths = [tmp_path / f"{k}.ckpt" for k in range(3)]
    found = [*fit(None, paths[0], 6, 1)[:6], *fit(paths[0], paths[1], 7, 3)[:1], *fit(paths[1], paths[2], 9, 1)]
    places = [k / 12 for k in (0, 1, 2, 3, 4, 5, 6, 9, 10, 11)]  # in epochs; where steps end the run, it is in steps
    places = [k / 9 for k in range(9)] if more else places
    assert found == pytest.approx([0.02 * (0.5 + 0.5 * math.cos(math.pi * place)) for place in places])


def test_accumulating_two_batches_is_one_of_twice_the_size(tmp_path: Path) -> None:
    """Without a code, as its noise is drawn for each batch."""
    halves, whole = Watch(), Watch()
    trainer(tmp_path, halves, accumulate_grad_batches=2).fit(lit(code=0), make(batch_size=4))
    trainer(tmp_path, whole).fit(lit(code=0), make(batch_size=8))
    assert len(halves.steps) == len(whole.steps) == 6
    for a, b in zip(halves.steps, whole.steps, strict=True):
        assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_every_precision_trains_with_full_densities_and_is_scored_in_full(tmp_path: Path, precision: str) -> None:
    module, watch, seen = lit(), Watch(), []
    module.model.register_forward_hook(lambda model, _, terms: seen.append(terms))
    inner = set()
    module.model.decoder.mix.register_forward_hook(lambda layer, _, out: inner.add((layer.training, out.dtype)))
    trained = trainer(tmp_path, watch, precision=precision, max_steps=2)
    trained.fit(module, make())
    trained.test(module, make(), verbose=False)
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert len(watch.losses) == 2
    assert not same(watch.steps[0], watch.steps[1])
    assert {term.dtype for terms in seen for term in terms} == {torch.float32}
    half = torch.float32 if precision == "32-true" else torch.bfloat16  # 16-mixed is bf16 on a CPU
    assert inner == {(True, half), (False, torch.float32)}


@pytest.mark.parametrize("name", ["adamax", "muon"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_schedules(tmp_path: Path, schedule: str, name: str) -> None:
    watch = Watch()
    module = lit(name=name, schedule=schedule, warmup_steps=3, lr=0.01)
    trainer(tmp_path, watch, max_steps=10, accumulate_grad_batches=2, max_epochs=-1).fit(module, make())
    assert len(watch.rates) == 10
    for t, rate in enumerate(watch.rates):
        fall = {"constant": 1, "linear": (10 - t) / 10, "cosine": math.cos(math.pi * t / 20) ** 2}[schedule]
        assert rate == pytest.approx(0.01 * min(1, (t + 1) / 4) * fall, rel=1e-6)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    free, clipped = Watch(), Watch()
    trainer(tmp_path, free).fit(lit(), make())
    trainer(tmp_path, clipped, gradient_clip_val=0.01).fit(lit(), make())
    assert min(free.norms) > 0.1
    assert clipped.norms == pytest.approx([0.01] * len(clipped.norms), rel=1e-3)


def compiled(folder: Path) -> None:
    """Traces forward and backward, but leaves out the code generator, which takes a minute."""
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # type: ignore
    plain, compiled = Watch(), Watch()
    # the generator lays out memory itself; without it, backward views trip over channels_last
    modules = [module.to(memory_format=torch.contiguous_format) for module in (lit(), lit(compile=True))]
    for watch, module in zip((plain, compiled), modules, strict=True):
        trainer(folder, watch, Averaging(0.9), max_steps=3, limit_val_batches=0).fit(module, make())
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()
    assert plain.losses == pytest.approx(compiled.losses, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_a_compiled_model_is_the_same_model(tmp_path: Path) -> None:
    """In a process of its own, as the compiler cannot trace the shape checks of tests."""
    script = "import sys, pathlib, test_training; test_training.compiled(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Poison(Callback):
    """One weight becomes NaN after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            module.model.decoder.head.bias.data.fill_(math.nan)


@pytest.mark.parametrize(("step", "found"), [(8, 8), (12, 12)])  # in the middle of an epoch, just before a validation
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, step: int, found: int) -> None:
    best = ModelCheckpoint(tmp_path, "best", monitor="val/nelbo", enable_version_counter=False)
    last = ModelCheckpoint(tmp_path, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    fit = trainer(tmp_path, Poison(step), Averaging(0.9), best, last, max_epochs=4)
    message = rf"not finite at step {found}; last good checkpoint: .*last.ckpt; try a lower optimizer.lr"
    with pytest.raises(FloatingPointError, match=message):
        fit.fit(lit(), make())
    for file in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(tmp_path / file, weights_only=True)
        assert checkpoint["global_step"] == 6
        assert all(value.isfinite().all() for value in checkpoint["current_model_state"].values())
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_fresh_model_must_be_uniform(tmp_path: Path) -> None:
    module = lit()
    module.model.decoder.head.bias.data.fill_(1.0)
    with pytest.raises(ValueError, match=r"must start near 10.4 nats \(D ln 2\)"):
        trainer(tmp_path).fit(module, make())


def finished(folder: Path, *overrides: str) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # the slowest part of a short run
        return run(config(*DIGITS, *overrides), folder, "python train.py")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of five steps, a validation after each."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        finished(folder, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "record=some")
    return folder


NAMES = [f"{split}/{name}" for split in ("val", "test") for name in ("rate", "distortion", "nelbo", "bits_per_dim")]
BASELINE = "independent_pixels/bits_per_dim"


def by_hand(file: Path, split: str) -> dict[str, float]:
    """The figures of a checkpoint on digits, from its weights."""
    model = vlae.load(file)
    images = Images(vlae.datasets.digits, root=None, batch_size=1, eval_batch_size=1, seed=0)
    x = images.part(split).images
    eps = torch.randn(len(x), 3, generator=generator("eps", 0, split))
    with torch.no_grad():
        terms = model(x, eps)
    rate, distortion = terms.rate.double().mean().item(), terms.distortion.double().mean().item()
    bits = (rate + distortion) / (64 * math.log(2))
    return {"rate": rate, "distortion": distortion, "nelbo": rate + distortion, "bits_per_dim": bits}


def test_the_figures_are_those_of_the_best_averaged_weights(done: Path) -> None:
    metrics = json.loads((done / "metrics.json").read_text())
    assert set(metrics) == {*NAMES, BASELINE, "parameters", "steps", "images_seen", "wall_s"}
    for short, split in (("val", "validation"), ("test", "test")):
        for name, value in by_hand(done / "checkpoints" / "best.ckpt", split).items():
            assert metrics[f"{short}/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert (metrics["steps"], metrics["images_seen"]) == (10, 2500)
    parameters = vlae.load(done / "checkpoints" / "best.ckpt").parameters()
    assert metrics["parameters"] == sum(p.numel() for p in parameters)
    assert metrics["wall_s"] > 0
    assert metrics[BASELINE] == pytest.approx(2.433, abs=1e-3)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_logged_names(done: Path) -> None:
    names = {name for row in rows(done) for name in row}
    training = {"train/loss", *(name.replace("val", "train") for name in NAMES[:4])}
    assert names == {*NAMES, *training, "step"}


def test_a_record_says_what_was_measured(done: Path) -> None:
    record = json.loads((done.parent / "results" / "some.json").read_text())
    metrics = json.loads((done / "metrics.json").read_text())
    assert record.pop("metrics") == {name: metrics[name] for name in (*NAMES, BASELINE)}
    assert {key: record[key] for key in ("parameters", "steps", "images_seen", "wall_s")} == {
        key: metrics[key] for key in ("parameters", "steps", "images_seen", "wall_s")
    }
    expected = {"name": "some", "data": "digits", "split": "test", "binarisation": "none", "seed": 0}
    assert {key: record[key] for key in expected} == expected
    free = {"command", "commit", "date", "hardware", "parameters", "steps", "images_seen", "wall_s"}
    assert set(record) == {*expected, *free}
    assert record["command"] == "python train.py"
    assert all(record[key] for key in free)


def test_a_finished_run_is_left_as_it_is(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in done.rglob("*")}

    before = state()
    again = finished(done, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "record=some")
    assert again == json.loads((done / "metrics.json").read_text())
    assert "finished already" in capsys.readouterr().out
    shown = ["wandb.project=other", "trainer.enable_model_summary=true", "trainer.log_every_n_steps=1"]
    assert again == finished(done, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "record=some", *shown)
    for override in ("model.code=4", "optimizer.lr=0.1", "seed=1", "data.batch_size=100"):
        key = override.split("=")[0]
        with pytest.raises(ValueError, match=rf"holds a run with {key}=.*, now .*another `folder`"):
            finished(done, "trainer.max_epochs=2", override)
    assert state() == before


class Mortal(Encoder):
    """An encoder that ends the process it runs in, or at least the run, at a given training batch."""

    left = math.inf

    def forward(self, u: Tensor) -> Any:
        Mortal.left -= self.training
        if Mortal.left < 0:
            raise RuntimeError("killed")
        return super().forward(u)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """In the middle of its third epoch; nothing but the folder is left of it."""
    ours = ["model.encoder._target_=test_training.Mortal", "allow=[test_training]", "trainer.max_epochs=4"]
    ours += ["objective.kind=soft", "trainer.check_val_every_n_epoch=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    metrics = finished(whole, *ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mortal, "left", 12)  # batches: two of the third epoch
        with pytest.raises(RuntimeError, match="killed"):
            finished(parts, *ours)
    assert not (parts / "metrics.json").exists()
    resumed = finished(parts, *ours)
    assert {**resumed, "wall_s": 0} == {**metrics, "wall_s": 0}
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, parts)]
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "metrics"):
        assert same(ends[0][key], ends[1][key])
    assert rows(parts) == rows(whole)


def test_start_from_a_checkpoint(done: Path, tmp_path: Path) -> None:
    best = done / "checkpoints" / "best.ckpt"
    still = ["averaging=0.0", "optimizer.lr=0.0", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
    metrics = finished(tmp_path / "run", f"init_from={best}", *still)
    before = json.loads((done / "metrics.json").read_text())
    assert {name: metrics[name] for name in NAMES} == pytest.approx({name: before[name] for name in NAMES}, rel=1e-6)
    with pytest.raises(ValueError, match=r"^init_from: .* is \(.*\) there and \(.*\) in this model$"):
        finished(tmp_path / "other", f"init_from={best}", "model.decoder.width=5")
    with pytest.raises(FileNotFoundError, match="no such file"):
        finished(tmp_path / "other", "init_from=nowhere.ckpt")
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:Total length of `list`")  # the empty validation is meant
def test_the_last_weights_of_a_final_run(tmp_path: Path) -> None:
    metrics = finished(tmp_path / "run", "data.train_on_validation=true", "trainer.max_epochs=2", "patience=1")
    assert {name for name in metrics if "/" in name} == {*NAMES[4:], BASELINE}
    files = {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()}
    assert files == {"last.ckpt", "previous.ckpt"}
    for name, value in by_hand(tmp_path / "run" / "checkpoints" / "last.ckpt", "test").items():
        assert metrics[f"test/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert metrics["steps"] == 2 * 6  # of 1,547 images


def test_a_run_that_diverges_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"not finite at step .*last good checkpoint: .*try a lower"):
        finished(tmp_path / "run", "optimizer.lr=1e20", "optimizer.warmup_steps=0", "trainer.gradient_clip_val=null")
    assert not (tmp_path / "run" / "metrics.json").exists()
