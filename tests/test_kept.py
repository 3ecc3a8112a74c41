"""Nothing is lost: killed, told to end, out of time or of disk, a run goes on and ends as if nothing had been.

Every run is a child of this process, which has read the libraries already; the kills and the files are real.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer
from small import DIGITS, config
from test_training import SaveAt, Watch, lit, make, rows, same, trainer
from torch.multiprocessing import ProcessExitedException

from vlae import keeping
from vlae.experiment import run
from vlae.figures import read_metrics
from vlae.keeping import Keeping, Log
from vlae.training import Averaging, LitVLAE

pytestmark = pytest.mark.usefixtures("forks")

# steps in epochs of three, a validation after the third and the sixth
OURS = ["trainer.max_steps=8", "trainer.max_epochs=-1", "+trainer.limit_train_batches=3", "objective.kind=soft"]
OURS += ["trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1", "model.decoder.receptive_field=none"]


def start(work: Callable[[], object]) -> int:
    """A child process that does the work; its id."""
    if child := os.fork():
        return child
    code: Any = 1
    try:
        sys.modules["matplotlib"] = None  # type: ignore[assignment]  # the slowest part of a short run
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder: Path, *overrides: str, before: Callable[[], object] = lambda: None) -> int:
    """A run in a child, which first does what comes `before`; how it ended."""

    return end(start(lambda: (before(), run(settings(*overrides), folder, "python train.py"))))


@cache
def settings(*overrides: str) -> dict[str, Any]:
    return config(*DIGITS, *OURS, *overrides)


class Moments:
    """Counts what a training does, and signals its process at a given moment of a given kind."""

    def __init__(self, kind: str = "", number: int = 0, signum: int = signal.SIGKILL, size: int = 0) -> None:
        self.at, self.signum, self.size = (kind, number), signum, size
        self.counts: Counter[str] = Counter()

    def now(self, kind: str) -> bool:
        self.counts[kind] += 1
        return (kind, self.counts[kind]) == self.at

    def strike(self, kind: str) -> None:
        if self.now(kind):
            os.kill(os.getpid(), self.signum)

    def watch(self, patch: pytest.MonkeyPatch | None = None) -> None:
        """In this process: between forward and backward, backward and step; batches of validation; file operations."""

        def struck(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                result = function(*arguments)
                self.strike(kind)
                return result

            return call

        patch = patch or pytest.MonkeyPatch()  # in a child, for good
        for kind in ("training", "validation", "test"):
            name = f"{kind}_step"
            patch.setattr(LitVLAE, name, struck(getattr(LitVLAE, name), kind))
        patch.setattr(LitVLAE, "on_before_optimizer_step", struck(LitVLAE.on_before_optimizer_step, "training"))
        fsync, replace = os.fsync, os.replace

        def written(file: int) -> None:
            if os.readlink(f"/proc/self/fd/{file}").endswith(".ckpt.part") and self.now("write"):
                os.ftruncate(file, self.size)  # the file as it was when only so much of it had been written
                os.kill(os.getpid(), self.signum)
            fsync(file)

        def moved(source: Path, target: Path) -> None:
            checkpoint = ".ckpt" in source.name
            if checkpoint:
                self.strike("move")
            replace(source, target)
            if checkpoint:
                self.strike("move")

        patch.setattr(os, "fsync", written)
        patch.setattr(os, "replace", moved)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, which leaves how often each kind of moment came; in this process, to have all at hand."""
    folder, moments = tmp_path_factory.mktemp("runs") / "whole", Moments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        moments.watch(patch)
        run(settings(), folder, "python train.py")
    (folder / "counts").write_text(json.dumps(moments.counts))
    return folder


def assert_same(one: Path, other: Path) -> None:
    """Weights, averaged weights, optimiser, learning rate: to the bit; metrics, and every row of the log."""
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (one, other))
        for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "metrics"):
            assert same(a.get(key), b.get(key)), f"{name}: {key}"
        assert a["optimizer_states"][0]["state"]
    metrics = [json.loads((folder / "metrics.json").read_text()) | {"wall_s": 0} for folder in (one, other)]
    assert metrics[0] == metrics[1]
    assert rows(one) == rows(other)
    assert not list(other.rglob("*.part"))


@pytest.mark.parametrize("place", range(10))
def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(whole: Path, tmp_path: Path, place: int) -> None:
    """Three moments in steps, three in validations, two in writes of a checkpoint, two around its moves."""
    chance = random.Random(place)
    kind = ["training", "validation", "write", "move"][place % 4]
    count = json.loads((whole / "counts").read_text())[kind]
    assert count >= {"training": 16, "validation": 2, "write": 5, "move": 14}[kind]
    size = chance.randrange((whole / "checkpoints" / "last.ckpt").stat().st_size)
    parts, moments = tmp_path / "parts", Moments(kind, chance.randint(1, count), size=size)
    assert train(parts, before=moments.watch) == -signal.SIGKILL
    assert not (parts / "metrics.json").exists()
    assert train(parts) == 0
    assert_same(whole, parts)


@pytest.mark.parametrize(
    ("signum", "kind", "number", "step"),
    [
        (signal.SIGTERM, "training", 10, 5),
        (signal.SIGUSR1, "training", 5, 3),  # an epoch's last: after the validation
        (signal.SIGUSR2, "validation", 2, 6),
        (signal.SIGINT, "training", 3, 2),
        (signal.SIGHUP, "training", 7, 4),
    ],
)
def test_a_run_told_to_end_saves_its_step(
    whole: Path, tmp_path: Path, signum: int, kind: str, number: int, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "parts"
    assert train(parts, before=Moments(kind, number, signum).watch) == 128 + signum
    assert f"{signal.Signals(signum).name}: step {step} saved" in capfd.readouterr().out
    assert torch.load(parts / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    assert train(parts) == 0
    assert_same(whole, parts)


def test_an_earlier_handler_decides(whole: Path, tmp_path: Path) -> None:
    """As that of a scheduler, which requeues: it finds the step saved; if it returns, training goes on."""
    parts = tmp_path / "parts"

    def handle(signum: int, frame: object) -> None:
        step = torch.load(parts / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        (parts / "handled").write_text(f"{signum} {step}")

    def before() -> None:
        signal.signal(signal.SIGUSR2, handle)
        Moments("training", 10, signal.SIGUSR2).watch()

    assert train(parts, before=before) == 0
    assert (parts / "handled").read_text() == f"{int(signal.SIGUSR2)} 5"
    assert_same(whole, parts)


def test_a_long_epoch_is_saved_in_its_middle(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"

    def before() -> None:
        keeping.MINUTES = 0  # after every step
        Moments("training", 11).watch()

    assert train(parts, before=before) == -signal.SIGKILL
    assert torch.load(parts / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert train(parts) == 0
    assert_same(whole, parts)


def test_a_run_out_of_time_goes_on_with_more(whole: Path, tmp_path: Path) -> None:
    """It ends regularly where its time is over, in the middle of an epoch."""
    parts = tmp_path / "parts"
    assert train(parts, "trainer.max_time={milliseconds:30}") == 0
    steps = json.loads((parts / "metrics.json").read_text())["steps"]
    assert 0 < steps < 8
    assert torch.load(parts / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps
    assert train(parts, "trainer.max_time=00:01:00:00") == 0
    assert_same(whole, parts)


@pytest.mark.parametrize("steps", [5, 6])  # in the middle of an epoch, at its end
def test_a_run_that_has_made_its_steps_goes_on_to_more(whole: Path, tmp_path: Path, steps: int) -> None:
    """It validates, tests and logs where an uninterrupted one does, also if it is killed before the test."""
    parts = tmp_path / "parts"
    few = f"trainer.max_steps={steps}"
    assert train(parts, few, before=Moments("test", 1).watch) == -signal.SIGKILL
    assert train(parts, few) == 0
    assert rows(parts)[-1]["step"] == steps
    assert train(parts) == 0
    assert [(row["step"], *row) for row in rows(parts)] == [(row["step"], *row) for row in rows(whole)]


def test_a_run_that_was_stopped_early_is_over(tmp_path: Path) -> None:
    """Also if it is killed before its last line: with no learning rate no validation is better than the first."""
    one, other = tmp_path / "one", tmp_path / "other"
    ours = ["patience=2", "optimizer.lr=0.0", "trainer.max_steps=12"]
    assert train(one, *ours) == 0
    assert json.loads((one / "metrics.json").read_text())["steps"] == 9
    assert torch.load(one / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 3
    assert train(other, *ours, before=Moments("test", 1).watch) == -signal.SIGKILL
    (other / "failed.json").write_text('{"reason": "killed"}')
    (tmp_path / "[").mkdir()
    other = other.rename(tmp_path / "[" / "moved] :cat:")  # terminals may read that as markup
    assert train(other, *ours) == 0
    assert_same(one, other)
    assert not (other / "failed.json").exists()


def test_the_best_of_a_run_that_was_moved_is_kept(tmp_path: Path) -> None:
    """As if it had been so good that no other can be better."""
    parts = tmp_path / "parts"
    assert train(parts, "trainer.max_steps=4") == 0
    parts = parts.rename(tmp_path / "moved")
    best, last = (parts / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    content, checkpoint = best.read_bytes(), torch.load(last, weights_only=True)
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("Best"))
    for score in (state["best_model_score"], state["kth_value"], *state["best_k_models"].values()):
        score.zero_()
    torch.save(checkpoint, last)
    assert train(parts) == 0
    assert best.read_bytes() == content


def test_a_second_training_in_a_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    moments = Moments("training", 10, signal.SIGSTOP)  # it sleeps in its fifth step
    first = start(lambda: (moments.watch(), run(settings(), parts, "python train.py")))
    assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in parts.rglob("*")}
    for more in ([], ["trainer.max_epochs=1"]):
        with pytest.raises(ValueError, match=r"parts: another training is running there"):
            run(settings(*more), parts, "python train.py")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in parts.rglob("*")} == before
    os.kill(first, signal.SIGKILL)
    assert end(first) == -signal.SIGKILL
    assert train(parts) == 0
    assert_same(whole, parts)


def test_another_training_may_finish_before_the_lock_is_held(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tmp_path / "parts"
    lock = keeping.locked

    def late(folder: Path) -> Any:
        shutil.copytree(whole, folder)
        return lock(folder)

    monkeypatch.setattr("vlae.experiment.locked", late)
    assert run(settings(), parts, "python train.py") == json.loads((whole / "metrics.json").read_text())
    assert (parts / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_a_full_disk_leaves_the_checkpoint_before(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "parts"
    last = parts / "checkpoints" / "last.ckpt"
    assert train(parts, before=Moments("training", 10).watch) == -signal.SIGKILL
    content = last.read_bytes()
    size = len(content) - 100
    assert train(parts, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))) == 1
    message = (
        r"OSError: \S*/checkpoints/best.ckpt could not be written: File too large; the checkpoints there are whole"
    )
    assert re.search(message, capfd.readouterr().err)
    assert last.read_bytes() == content
    assert train(parts) == 0
    assert_same(whole, parts)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(OSError, match=rf"^{folder} cannot be written, so no run can be kept there: "):
            run(settings(), folder, "python train.py")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts = tmp_path / "parts"
    last, previous = (parts / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    assert train(parts, before=Moments("training", 15).watch) == -signal.SIGKILL
    content = previous.read_bytes()
    for path in (last, previous):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"no checkpoint can be opened \({last}: .*; {previous}: .*\); remove"):
        run(settings(), parts, "python train.py")
    previous.write_bytes(content)
    best = parts / "checkpoints" / "best.ckpt"
    content = best.read_bytes()
    os.truncate(best, len(content) // 2)
    (parts / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"^{best} cannot be opened \(.*; remove it to go on"):
        run(settings("trainer.max_steps=9"), parts, "python train.py")
    assert (parts / "metrics.json").read_text() == "{}"
    (parts / "metrics.json").unlink()
    best.write_bytes(content)
    assert train(parts) == 0
    assert f"{last} cannot be opened" in capfd.readouterr().out
    assert_same(whole, parts)


def test_what_a_kill_cut_off_is_not_read(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.log_metrics({"train/rate": 1.5, "epoch": 0}, 3)
    log.log_metrics({"val/rate": 2.5}, 3)
    size = log.size()
    log.log_metrics({"train/rate": 3.5}, 4)
    assert read_metrics(tmp_path) == {"train/rate": [(3, 1.5), (4, 3.5)], "val/rate": [(3, 2.5)]}
    os.truncate(log.path, log.size() - 3)
    assert read_metrics(tmp_path) == {"train/rate": [(3, 1.5)], "val/rate": [(3, 2.5)]}
    log.cut(size)
    log.log_metrics({"train/rate": 4.5}, 4)
    assert read_metrics(tmp_path) == {"train/rate": [(3, 1.5), (4, 4.5)], "val/rate": [(3, 2.5)]}


@pytest.mark.parametrize(("before", "now", "step"), [(4, 8, 4), (8, 4, 1), (4, 8, 10)])
def test_a_run_goes_on_in_the_middle_of_an_epoch_with_others(tmp_path: Path, before: int, now: int, step: int) -> None:
    """As with another number of devices: of 24 images, 6 batches an epoch are 3 then, or the other way round."""
    path = tmp_path / "some.ckpt"
    for size, start in ((before, None), (now, path)):
        watch, save = Watch(), SaveAt("on_train_batch_end", step, path)
        callbacks = watch, save, Keeping(tmp_path / f"{size}.ckpt", Log(tmp_path), Timer())
        fit = trainer(tmp_path, *callbacks, max_epochs=3, enable_checkpointing=True)
        fit.fit(lit(schedule="cosine"), images := make(size), ckpt_path=start)
    assert images.train.number == 3 * 24 // now
    begun = step * before // now
    assert fit.global_step == step + 3 * 24 // now - begun
    places = [k * now / (3 * 24) for k in range(begun, 3 * 24 // now)]
    assert watch.rates == pytest.approx([0.02 * (0.5 + 0.5 * math.cos(math.pi * place)) for place in places])


class Tell(Callback):
    """Tells one rank to end, in its seventh step."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (1, 6):
            os.kill(os.getpid(), signal.SIGTERM)


def test_all_ranks_end_after_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree at the ends of epochs, here of three steps, and two steps later."""
    monkeypatch.setattr(keeping, "STEPS", 2)
    path = tmp_path / "last.ckpt"
    callbacks = Tell(), Averaging(0.5), Keeping(path, Log(tmp_path), Timer())
    fit = trainer(tmp_path, *callbacks, devices=2, strategy="ddp_fork", max_epochs=4, enable_checkpointing=True)
    with pytest.raises(ProcessExitedException, match="exit code 143"):
        fit.fit(lit(), make())
    assert torch.load(path, weights_only=True)["global_step"] == 8
