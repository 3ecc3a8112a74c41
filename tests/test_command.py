"""`python train.py`: every recipe trains, a folder is named by what was asked for, a mistake is one line."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from math import ceil
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from small import CPU, DIGITS, ROOT, TINY, command, config, overrides, write_files

from vlae import build
from vlae.datasets import Splits, digits
from vlae.experiment import prepare, run, trainer_for
from vlae.launch import UNNAMED, lasting, named
from vlae.records import RESUMABLE, commit

YAML = {group: sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")) for group in ("data", "experiment")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


BINARY = ("mnist", "mnist_static", "omniglot", "omniglot_original", "caltech101")
SIZES = {"digits": ((1, 8, 8), 17), "mnist_grey": ((1, 28, 28), 256), "cifar10": ((3, 32, 32), 256)}
SIZES |= {"images": ((3, 8, 32), 256)} | dict.fromkeys(BINARY, ((1, 28, 28), 2))


@pytest.mark.parametrize("data", sorted({*YAML["data"]} - {*BINARY[1:]}))  # of which one stands for all
@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")))
def test_every_data_set_and_model_compose_and_build(data: str, model: str) -> None:
    shape, levels = SIZES[data]
    composed = config(f"data={data}", f"model={model}")
    if isinstance(composed["model"]["code"], list):
        maps = [16, ceil(shape[1] / 4), ceil(shape[2] / 4)]
        if maps != composed["model"]["code"]:
            with pytest.raises(ValueError, match=re.escape(f"need maps such as {maps}")):
                build(composed["model"], shape, levels)
        composed["model"]["code"] = maps
    if model in {"binary", "binary_large", "paper"} and levels != 2:
        with pytest.raises(ValueError, match=r"Bernoulli needs 1 channel of 2 levels.*LogisticMixture"):
            build(composed["model"], shape, levels)
    else:
        assert build(composed["model"], shape, levels).likelihood.levels == levels


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("data", YAML["data"])
def test_every_data_set_trains(data: str, files: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its own reader, from small files in its own format; with a window of few waves, and with figures where
    no other test has such images."""
    model = "binary" if SIZES[data][1] == 2 else "grey"
    if data not in ("mnist_grey", "cifar10", "images"):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    small = [] if model == "binary" else ["model.likelihood.components=2"]
    few = ["trainer.max_steps=2", "data.batch_size=32", "model.decoder.receptive_field=1x1", *overrides(data, files)]
    command(f"data={data}", f"model={model}", *few, *small, *CPU, *TINY, "folder=run")
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 2
    record = json.loads(Path("run/config.json").read_text())
    assert record["data"]["_target_"].endswith(f".{data}")


WINDOWS = {"cifar10_4x2": "4x2", "cifar10_5x3": "5x3", "cifar10_7x4_grey": "7x4"}


@pytest.mark.parametrize("experiment", WINDOWS)
def test_windows_of_cifar10_differ_alone(experiment: str) -> None:
    composed, largest = config(f"experiment={experiment}"), config("experiment=cifar10_7x4")
    decoder, other = composed["model"].pop("decoder"), largest["model"].pop("decoder")
    assert composed == largest
    assert decoder == other | {"receptive_field": WINDOWS[experiment], "grey": experiment.endswith("grey")}


@pytest.mark.parametrize("experiment", sorted({*YAML["experiment"]} - {*WINDOWS}))
def test_every_experiment_takes_two_steps(experiment: str, files: Path, tmp_path: Path) -> None:
    """At full size, but for the batch, and without test and pictures, which take a while."""
    composed = config(f"experiment={experiment}")
    mine = overrides(composed["data"]["_target_"].rsplit(".", 1)[1], files)
    few = ["data.batch_size=2", "trainer.max_steps=2", "+trainer.limit_val_batches=0", "trainer.log_every_n_steps=2"]
    asked, images, model = prepare(config(f"experiment={experiment}", *mine, *CPU, *few))
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = trainer_for(asked, images, tmp_path, [])
    trainer.fit(model, images)
    assert trainer.global_step == 2
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_torchrun_inside_a_job_of_slurm_tells_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which a Trainer sets
    torchrun = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "one"}
    slurm = {"SLURM_NTASKS": 2, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_JOB_ID": 7}
    for name, value in {**slurm, **torchrun}.items():
        monkeypatch.setenv(name, str(value))
    asked, images, _ = prepare(config(*DIGITS, "trainer.devices=2", "trainer.strategy=ddp"))
    trainer = trainer_for(asked, images, tmp_path, [])
    assert (trainer.global_rank, trainer.world_size, trainer.is_global_zero) == (1, 2, False)


@pytest.mark.parametrize(
    ("epochs", "text"), [(7, "the last 2 epochs are not validated"), (3, "nothing is validated"), (10, "")]
)
def test_epochs_after_the_last_validation_are_told(tmp_path: Path, epochs: int, text: str) -> None:
    asked, images, _ = prepare(config(*DIGITS, f"trainer.max_epochs={epochs}"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_for(asked, images, tmp_path, [])
    told = [str(each.message) for each in caught if "check_val_every_n_epoch=5" in str(each.message)]
    assert len(told) == bool(text)
    assert all(f"trainer.max_epochs={epochs} " in line and text in line for line in told)


@pytest.mark.usefixtures("unchecked")
def test_an_experiment_of_full_size_is_tested_and_drawn(files: Path, here: Path) -> None:
    few = ["trainer.max_steps=2", "+trainer.limit_test_batches=1", *CPU, *overrides("mnist_static", files)]
    metrics = run(config("experiment=mnist_static", *few), here / "run", "python train.py")
    assert (metrics["steps"], metrics["images_seen"]) == (2, 2 * 64)
    assert 0 < metrics["test/nelbo"] < float("inf")


def test_colours_of_two_levels_train_and_a_test_split_of_one_is_drawn(here: Path) -> None:
    (here / "pictures").mkdir()
    noise = np.random.default_rng(0)
    for number in range(10):
        pixels = noise.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / "pictures" / f"{number}.png")
    data = ["data=images", "data.folder=pictures", "data.height=8", "data.width=8", "data.levels=2"]
    command(*DIGITS, *data, "data.batch_size=4", "trainer.max_steps=1", "folder=run")
    assert json.loads(Path("run/config.json").read_text())["data"]["levels"] == 2
    assert Image.open("run/interpolations.png").mode == "RGB"


@pytest.mark.parametrize("benchmark", ["tables", "ablations"])
def test_what_benchmarks_train_differs_and_builds(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "benchmarks")
    names = run_path(f"{benchmark}.py")
    rows = [row.overrides for row in names["ROWS"].values()] if benchmark == "tables" else names["CHANGES"]
    base = "" if benchmark == "tables" else "experiment=mnist_static "
    composed = [config(*(base + row).split()) for row in rows]
    assert len({json.dumps(each, sort_keys=True) for each in composed}) == len(rows) > 1
    for each in composed:
        build(each["model"], (1, 28, 28), 2)


def test_ablations_refuse_a_file_of_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT / "benchmarks")
    file, main = tmp_path / "kept.jsonl", run_path("ablations.py")["main"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--out", str(file), "--changes", "a=1"])
    kept = {"experiment": "mnist_static", "change": "a=1", "seed": 0, "epochs": 2}
    kept |= {"precision": "bf16-mixed", "commit": commit()}
    file.write_text(json.dumps(kept) + "\n")
    main()  # has that change, so trains nothing
    others = {"experiment": "mnist", "seed": 1, "epochs": 8, "precision": "32-true", "commit": "0" * 40}
    for name, other in others.items():
        file.write_text(json.dumps(kept | {name: other}) + "\n")
        with pytest.raises(SystemExit, match=f"kept.jsonl: lines of {name} {other}, not "):
            main()
    assert len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["data=digits"], "default"),
        (["optimizer.lr=0.1", "model.code=4"], "model.code=4,optimizer.lr=0.1"),
        (["model.code=4", "optimizer.lr=0.1"], "model.code=4,optimizer.lr=0.1"),
        (["+trainer.limit_val_batches=3"], "trainer.limit_val_batches=3"),
        (["init_from=a/b.ckpt"], "init_from=a%b.ckpt"),
        (["experiment=digits", "trainer.max_epochs=3", "trainer.max_steps=9"], "experiment=digits"),
        (["trainer.devices=2", "wandb.mode=disabled", "record=a", "trainer.enable_progress_bar=false"], "default"),
    ],
)
def test_a_folder_is_named_by_what_was_asked_for(overrides: list[str], name: str) -> None:
    assert named(lasting(overrides, "digits")) == name


def test_long_names_are_cut_but_differ() -> None:
    widths = [f"model.encoder.widths=[{','.join(['8'] * n)}]" for n in (80, 81)]
    one, two = (named([text]) for text in widths)
    assert one != two
    assert one == named(widths[:1])
    assert max(len(one), len(two)) <= 120


def test_what_is_not_in_the_name_may_change_on_resume() -> None:
    """A setting that neither the name nor the comparison knows would let one run go on as another."""
    assert {key.split(".")[0] for key in UNNAMED} <= {*RESUMABLE, "folder", "hydra"}


def test_the_command_makes_the_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(*DIGITS, "trainer.max_steps=2")
    name = next(Path("runs/digits").iterdir()).name
    assert name == named(lasting(DIGITS, "digits"))
    assert {path.name for path in here.iterdir()} == {"runs"}  # no hydra folder, no log, no lightning_logs
    assert str(Path("runs/digits") / name) in capsys.readouterr().out.replace("\n", "")
    again = json.loads(next(Path("runs/digits").glob("*/config.json")).read_text())
    assert again == config(*DIGITS, "trainer.max_steps=2")


def own(root: Path, verify: bool = True) -> Splits:
    raise AssertionError("foreign code was called")


REFUSED = {  # what the line must say besides
    "+model.decoder.widht=3": "model.decoder.widht=3: unknown key.*did you mean width.*allowed: .*features",
    "+model.colour=3": "model.*colour",
    "model.decoder.width=abc": "model.decoder.width='abc': expected int",
    "model.decoder.width=2.5": "model.decoder.width=2.5: expected int",
    "model.decoder.receptive_field=7y4": "model.decoder.*7y4.*AxB",
    "model.decoder.receptive_field=0x3": "model.decoder.*0x3.*AxB",
    "model.decoder.receptive_field=-1x2": "model.decoder.*-1x2.*AxB",
    "model.decoder.receptive_field=": "model.decoder.*receptive_field=.*AxB",
    "model.decoder.width=0": "model.decoder.*width.*0.*at least 1",
    "model.prior.depth=-1": "model.prior.*depth.*at least",
    "model.code=-1": "model.code=-1",
    "model.code=x": "model.code='x'",
    "model.encoder.widths=[8,0]": r"model.encoder.*widths.*0.*at least 1",
    "model.encoder._target_=os.system": "model.encoder._target_='os.system': not allowed.*vlae",
    "data._target_=test_command.own": "data._target_='test_command.own': not allowed.*vlae",
    "data._target_=vlae.datasets.mnits": "data._target_.*mnits",
    "data._target_=vlae.datasets.Path": "data._target_.*Path",
    "data.batch_size=5000": "data.batch_size: 5000 .*at most 1297",
    "data.batch_size=0": "data.batch_size: 0",
    "data.batch_size=x": "data.batch_size='x': expected int",
    "+data.colour=3": "data.colour=3: unknown key.*batch_size",
    "data=mnist": "no train-images-idx3-ubyte.*data.root",
    "data=images": "data.folder=None: expected str",
    "data=images data.folder=nowhere": "data.folder=nowhere: no such folder",
    "data=images data.folder=. data.height=3.5": "data.height=3.5: expected int",
    "+data.split_sed=3": "data.split_sed=3: unknown key",
    "data=omniglot +data.split_sed=3": "data.split_sed=3: unknown key, did you mean split_seed.*batch_size.*verify",
    "wandb.mode=loud": "wandb.mode='loud': expected 'offline' or 'online' or 'disabled'",
    "wandb.project=3": "wandb.project=3: expected str",
    "+wandb.colour=3": "wandb.colour=3: unknown key",
    "trainer.precision=7": "trainer.precision=7: expected .*bf16-mixed",
    "trainer.precision=64": "trainer.precision=64-true: weights are float32; allowed: 32-true, bf16-mixed, 16-mixed",
    "trainer.precision=bf16-true": "trainer.precision=bf16-true: .*allowed",
    "+trainer.max_epoch=3": "trainer.max_epoch=3: unknown key, did you mean max_epochs",
    "trainer.max_epochs=many": "trainer.max_epochs='many': expected int or None",
    "trainer.max_steps=0": "trainer.max_steps=0: nothing would be trained",
    "+trainer.fast_dev_run=true": "trainer.fast_dev_run",
    "+trainer.overfit_batches=2": "trainer.overfit_batches: each epoch takes the next batches",
    "+trainer.limit_train_batches=0": "trainer.limit_train_batches=0: leaves nothing",
    "+trainer.limit_test_batches=0": "trainer.limit_test_batches=0: leaves nothing",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches=0: must be at least 1",
    "trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch=0: must be at least 1",
    "trainer.precision=transformer-engine": "trainer: .*transformer",
    "trainer.strategy=ddp_fork": "trainer.strategy=ddp_fork: .*use ddp",
    "trainer.strategy=ddp_spawn_find_unused_parameters_true": "trainer.strategy=ddp_spawn_find.*: .*use ddp",
    "trainer.max_epochs=-3": "trainer: .*max_epochs",
    "+trainer.logger=false": "trainer.logger=False: unknown key",
    "trainer.accelerator=abacus": "trainer: .*abacus",
    "trainer.strategy=abacus": "trainer: .*abacus",
    "optimizer.name=sgd": "optimizer.name='sgd': expected 'adamax' or 'muon'",
    "optimizer.lr=-1.0": "lr=-1.0",
    "objective.kind=firm": "objective.kind='firm': expected 'hard' or 'soft'",
    "objective.free_bits=-1.0": "free_bits=-1.0",
    "seed=abc": "seed='abc': expected int",
    "averaging=2.0": "averaging=2.0: must be at least 0",
    "averaging=x": "averaging='x': expected float",
    "patience=-1": "patience=-1: must be null .* or at least 1",
    "patience=x": "patience='x': expected int or None",
    "compile=3": "compile=3: expected bool",
    "allow=vlae": "allow='vlae': expected list",
    "record=3": "record=3: expected str or None",
    "init_from=nowhere.ckpt": "nowhere.ckpt: no such file",
    "+colour=3": "colour=3: unknown key",
}
TOGETHER = {
    "trainer.max_epochs=-1 optimizer.schedule=cosine": "optimizer.schedule=cosine: needs trainer.max_steps or",
    "data.batch_size=700 trainer.devices=2 trainer.strategy=ddp": "data.batch_size: 700.*2 dev.*at most 648",
}


@pytest.mark.parametrize(("overrides", "message"), (REFUSED | TOGETHER).items())
def test_what_cannot_be_is_refused_in_one_line(
    overrides: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    monkeypatch.setenv("VLAE_DATA_DIR", str(here / "no"))
    with pytest.raises(SystemExit) as stopped:
        command("trainer.enable_progress_bar=false", *overrides.split())
    text = str(stopped.value.code)  # python prints it and exits with 1
    assert re.search(message, text), text
    assert "\n" not in text
    assert text.startswith(("ValueError: ", "FileNotFoundError: "))
    assert {path.name for path in here.iterdir()} <= {"no"}  # where data would be downloaded to


def process(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


BARE = """
import sys
from importlib.metadata import Distribution, PackageNotFoundError

GONE = {"wandb", "matplotlib", "pooch", "constriction"}
from_name = Distribution.from_name

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"no {name} here", name=name)

def look(name):
    if name in GONE:
        raise PackageNotFoundError(name)
    return from_name(name)

sys.meta_path.insert(0, Gone())
Distribution.from_name = look
"""


def test_bare_machines_and_signals(here: Path) -> None:
    """Without the optional packages or fast bfloat16 a run trains; terminated, it says so, and goes on where it was."""
    (here / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    bare = {"PYTHONPATH": path, "ATEN_CPU_CAPABILITY": "avx2"}
    ours = [*DIGITS, "folder=run", "trainer.precision=bf16-mixed", "trainer.max_epochs=100000"]
    ours += ["optimizer.schedule=constant"]
    line = [sys.executable, str(ROOT / "train.py"), *ours]
    going = subprocess.Popen(line, env=os.environ | bare, stderr=subprocess.PIPE, text=True)
    last = here / "run" / "checkpoints" / "last.ckpt"
    while not last.exists() and going.poll() is None:
        time.sleep(0.1)
    going.send_signal(signal.SIGTERM)
    _, errors = going.communicate()
    assert going.returncode == 143, errors
    assert not (here / "run" / "metrics.json").exists()
    steps = torch.load(last, weights_only=True)["global_step"]
    assert steps > 0

    done = process(*ours, f"trainer.max_steps={steps + 3}", **bare)
    assert done.returncode == 0, done.stderr
    slow = "trainer.precision=bf16-mixed: bfloat16 can be several times slower than 32-true on this processor"
    assert done.stderr.count(slow) == (platform.machine() in {"x86_64", "AMD64"})  # of which the variable tells
    assert json.loads((here / "run" / "metrics.json").read_text())["steps"] == steps + 3
    assert "no matplotlib here" in done.stdout
    assert not (here / "run" / "learning_curves.png").exists()


def test_a_missing_dashboard_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"wandb is not installed; install it or set wandb.mode=disabled"):
        command(*DIGITS, "wandb.mode=offline")
    assert not list(here.iterdir())


def test_max_time_ends_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    limits = ["trainer.max_epochs=-1", "optimizer.schedule=constant", "trainer.max_time={milliseconds:200}"]
    command(*DIGITS, *limits, "trainer.check_val_every_n_epoch=1000", "folder=run")
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] > 0


def test_images_are_counted_where_accumulation_leaves_a_rest(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,297 images are 12 batches of 100 an epoch, which are 3 steps of 5 batches, the last of 2."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = ["data.batch_size=100", "trainer.accumulate_grad_batches=5", "trainer.max_epochs=2", "folder=run"]
    command(*DIGITS, *settings)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (metrics["steps"], metrics["images_seen"]) == (6, 2400)


@pytest.mark.parametrize("batch", [4, 64, 300])
def test_images_of_a_benchmark_are_those_of_the_set_repeated(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = run_path(str(ROOT / "benchmarks" / "training.py"))
    plain, (x, y) = digits(Path()).train, made["images_for"](digits, batch, 0).splits.train
    assert len(x) >= 10 * batch
    assert len(x) % len(plain.images) == 0
    copies = len(x) // len(plain.images)
    assert torch.equal(x, torch.cat([plain.images] * copies))
    assert torch.equal(y, torch.cat([plain.labels] * copies))
