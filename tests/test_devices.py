"""Ranks are one process: with their shares of the batch and however they were started, they leave what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from small import DIGITS, ROOT, command
from test_training import SHAPE, SaveAt, lit, trainer
from torch import Tensor

from vlae.data import Images
from vlae.datasets import Part, Splits
from vlae.launch import lasting, named
from vlae.noise import generator
from vlae.training import Averaging


def toy(root: Path) -> Splits:
    """27 / 7 / 9 binary images: batches of 8 leave a rest, and last evaluation batches differ in size."""
    noise = generator("toy")
    parts = (Part((torch.rand(n, *SHAPE, generator=noise) < 0.3).to(torch.uint8)) for n in (27, 7, 9))
    return Splits(*parts, levels=2)


class Diary(Callback):
    """What each rank logged after each batch and each validation, and its weights after each step, as a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train: list[list[Tensor]] = []
        self.scores: list[list[Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        values = trainer.callback_metrics
        self.train.append([values[f"train/{name}"] for name in ("loss", "rate", "distortion")])
        self.weights.append({name: value.clone() for name, value in module.state_dict().items()})

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.scores.append([value for name, value in sorted(trainer.callback_metrics.items()) if "val" in name])

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        diary = {"train": torch.tensor(self.train), "scores": torch.tensor(self.scores), "weights": self.weights}
        torch.save(diary, self.folder / f"{trainer.world_size}_{trainer.global_rank}.pt")


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("accumulate", [1, 2])  # of three batches: the second step of an epoch takes one
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_losses_and_weights_of_two_ranks_are_those_of_one_process(
    tmp_path: Path, kind: str, accumulate: int
) -> None:
    rates: list[Tensor] = []  # of every training image in its place in the global batch
    tested = []
    for devices in (1, 2):
        module = lit(objective={"kind": kind, "free_bits": 0.1})
        if devices == 1:
            module.model.register_forward_hook(
                lambda model, _, terms: rates.append(terms.rate.detach()) if model.training else None
            )
        ranks = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
        more = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 5.0, "max_epochs": 3}
        save = SaveAt("on_validation_end", {1: 9, 2: 6}[accumulate], tmp_path / f"{devices}.ckpt")
        fit = trainer(tmp_path, Diary(tmp_path), Averaging(0.5), save, **ranks, **more)
        images = Images(toy, root=None, batch_size=8 // devices, eval_batch_size=3, seed=1)
        fit.fit(module, images)
        tested.append(fit.test(module, images, verbose=False)[0])
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    assert one["train"].shape == (9, 3)
    assert one["scores"].shape == (3, 4)
    near = {"rtol": 1e-4, "atol": 1e-5}
    for rank in (first, second):
        torch.testing.assert_close(rank["train"], one["train"], **near)
        torch.testing.assert_close(rank["scores"], one["scores"], **near)
        # a hundredth of the 0.02 by which Adamax moves a weight whose gradient may be all rounding
        torch.testing.assert_close(rank["weights"], one["weights"], rtol=1e-4, atol=2e-4)
    checkpoints = [torch.load(tmp_path / f"{devices}.ckpt", weights_only=True) for devices in (1, 2)]
    for key in ("state_dict", "current_model_state"):
        torch.testing.assert_close(checkpoints[1][key], checkpoints[0][key], rtol=1e-4, atol=2e-4)
    assert checkpoints[0]["metrics"] == pytest.approx(checkpoints[1]["metrics"], rel=1e-4)
    assert len(checkpoints[0]["metrics"]) == 4
    assert tested[0] == pytest.approx(tested[1], rel=1e-4)
    assert len(tested[0]) == 4
    # the floor of a rank's own mean would have stopped one rank's gradient and not the other's
    halves = torch.stack(rates).unflatten(1, (2, 4)).mean(2) > 0.1
    assert (halves[:, 0] != halves[:, 1]).any()


RUN = [*DIGITS, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "objective.free_bits=1.0"]
RUN += ["data.eval_batch_size=90", "wandb.mode=offline"]
STARTS = {  # a sweep's job is `python train.py`, whose ranks Lightning starts
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py")],
    "sweep": [str(ROOT / "train.py"), "-m", "folder=all"],
}


def left(folder: Path) -> tuple[set[Path], int, dict[str, float]]:
    """The files of a run but for W&B's, the number of its W&B runs, and its metrics but for the clock's."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    metrics = json.loads((folder / "metrics.json").read_text())
    ours = {path for path in files if path.parts[0] != "wandb"}
    return ours, len(list(folder.glob("wandb/offline-run-*/*.wandb"))), {**metrics, "wall_s": 0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    command(*RUN, f"folder={folder}")
    return folder


@pytest.mark.parametrize("start", STARTS)
def test_every_start_of_two_ranks_leaves_one_run(
    start: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ranks = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=125", "record=both"]
    line = [sys.executable, *STARTS[start], *RUN, *ranks]
    # W&B's service of this process would write where this process stood as it started
    fresh = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=fresh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr
    (settings,) = tmp_path.rglob("config.json")
    files, dashboards, metrics = left(settings.parent)
    expected, _, whole = left(alone)
    assert files - {Path("output.log")} == expected
    assert dashboards == 1
    if start == "sweep":
        asked = {text.split("=")[0]: text for text in [*RUN, *ranks]}.values()  # the last, where one is said twice
        assert settings.parent == tmp_path / "all" / named(lasting(asked, "digits"))
    shown = settings.with_name("output.log").read_text() if start == "sweep" else done.stdout
    assert shown.count("independent pixels") == 1
    (record,) = (tmp_path / "results").rglob("*.json")
    assert json.loads(record.read_text())["images_seen"] == whole["images_seen"]
    assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-4)
