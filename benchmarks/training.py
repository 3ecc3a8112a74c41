"""Images per second of training, through Lightning as `python train.py` trains and in a bare PyTorch loop.

Both run the same model on the same batches with the same noise, objective, clipping, optimiser, schedule, average of
the weights and precision. Lightning has every callback and logger of a real run, W&B's too, but for validations. The
two take turns, so that a change in what else the machine does meets both, and the one that comes first changes; each
figure is the median over the turns, `ratio` that of the ratios of neighbouring turns. One JSON line a model.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn

from vlae.data import Images, TrainingBatches
from vlae.datasets import Part, Splits, cifar10, default_root, digits, mnist_grey, mnist_static
from vlae.experiment import Settings, quiet, trainer_for
from vlae.noise import generator
from vlae.records import commit, emit, hardware
from vlae.tracking import tracked
from vlae.training import LitVLAE

STEPS = 10**6  # of the schedule: more than any measurement takes
DATA = {"small": digits, "binary": mnist_static, "grey": mnist_grey, "colour": cifar10, "colour_small": cifar10}
NOISE: dict[Callable[..., Splits], tuple[int, tuple[int, int, int]]] = {
    mnist_static: (2, (1, 28, 28)),
    mnist_grey: (256, (1, 28, 28)),
    cifar10: (256, (3, 32, 32)),
}


def data_for(model: str) -> Callable[[Path], Splits]:
    """The data set that a model config is for, or noise of its shape where the files are missing."""
    try:
        DATA[model](default_root())
    except FileNotFoundError:
        levels, shape = NOISE[DATA[model]]
        pixels = torch.randint(levels, (50_000, *shape), generator=generator("random"), dtype=torch.uint8)

        def noise(root: Path) -> Splits:
            return Splits(Part(pixels), Part(pixels), Part(pixels), levels)

        return noise
    return DATA[model]


def settings(model: str, overrides: list[str]) -> dict[str, Any]:
    """What `python train.py` makes of its command line."""
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", [f"model={model}", *overrides]), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items() if key != "folder"}


def images_for(dataset: Callable[[Path], Splits], batch: int, seed: int) -> Images:
    """The data set, its training images repeated where they would not make ten batches."""

    def repeated(root: Path) -> Splits:
        splits = dataset(root)
        x, y = splits.train
        index = torch.arange(len(x)).repeat(-(-10 * batch // len(x)))
        return splits._replace(train=Part(x[index], None if y is None else y[index]))

    return Images(repeated, root=None, batch_size=batch, eval_batch_size=batch, seed=seed)


def lit(config: dict[str, Any], images: Images) -> LitVLAE:
    keys = ("model", "seed", "optimizer", "objective", "compile")
    return LitVLAE(shape=images.shape, levels=images.levels, **{key: config[key] for key in keys})


class Loop:
    """Training without Lightning."""

    def __init__(self, config: dict[str, Any], images: Images, device: torch.device) -> None:
        torch.compiler.reset()  # or another batch size than the last loop's would be compiled for any size
        parts = lit(config, images).to(device)
        self.model, self.objective, self.code, self.device = parts.model, parts.objective, parts.code, device
        self.seed, self.decay, self.clip = config["seed"], config["averaging"], config["trainer"]["gradient_clip_val"]
        self.bf16 = config["trainer"]["precision"] == "bf16-mixed"
        self.batches = TrainingBatches(images.splits.train, images.batch_size, self.seed, world=1, rank=0)
        self.parameters = list(self.model.parameters())
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.optimizer = parts.optimization.optimizer(self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: parts.optimization.factor(step, STEPS)
        )
        self.number = 0

    def step(self) -> None:
        self.learn(self.batches[self.number].x.to(self.device, non_blocking=True))

    def learn(self, x: Tensor) -> None:
        noise = generator("eps", self.seed, self.number, device=self.device)
        eps = torch.randn((len(x), self.code), generator=noise, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self.model(x, eps), self.number)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.number += 1
        with torch.no_grad():
            weight = 1 - min(self.decay, (1 + self.number) / (10 + self.number))
            torch._foreach_lerp_(self.averaged, self.parameters, weight)


class Turns(Callback):
    """Ends of steps are compared with ends of steps: a turn of Lightning holds all that it does between two, epochs'
    ends too. The loop has two turns after every second one of Lightning. The first two pairs warm up.
    """

    def __init__(self, loop: Loop, seconds: float, turns: int) -> None:
        self.loop, self.seconds, self.turns = loop, seconds, turns
        self.lightning: list[float] = []  # steps per second of each turn
        self.bare: list[float] = []
        self.begun, self.number = time.perf_counter(), 0

    def wait(self) -> None:
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if time.perf_counter() - self.begun < self.seconds:
            return
        self.wait()
        self.lightning.append((trainer.global_step - self.number) / (time.perf_counter() - self.begun))
        if len(self.lightning) % 2 == 0:  # Lightning, loop, loop, Lightning, ...
            self.bare += [self.turn(), self.turn()]
            trainer.should_stop = len(self.bare) >= self.turns + 3
        self.begun, self.number = time.perf_counter(), trainer.global_step

    def turn(self) -> float:
        begun, first = time.perf_counter(), self.loop.number
        while time.perf_counter() - begun < self.seconds:
            self.loop.step()
        self.wait()
        return (self.loop.number - first) / (time.perf_counter() - begun)


def filling_batch(config: dict[str, Any], dataset: Callable[[Path], Splits], device: torch.device, batch: int) -> int:
    """The first of batch, 2 batch, 4 batch ... whose step takes 20 ms: below, a GPU waits for Python."""
    while True:
        loop = Loop(config, images_for(dataset, batch, config["seed"]), device)
        measured = Turns(loop, seconds=1, turns=0)
        measured.turn()
        if measured.turn() <= 1 / 0.020:
            return batch
        batch *= 2


def measure(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    precision = f"trainer.precision={arguments.precision}"
    config = settings(name, [precision, f"compile={arguments.compile}", f"trainer.max_steps={STEPS}"])
    config["trainer"] |= {"max_epochs": -1, "limit_val_batches": 0}
    dataset = data_for(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = arguments.batch or (128 if device.type == "cpu" else filling_batch(config, dataset, device, 128))
    torch.manual_seed(config["seed"])
    images = images_for(dataset, batch, config["seed"])
    model = lit(config, images)
    turns = Turns(Loop(config, images, device), arguments.seconds, arguments.turns)
    with TemporaryDirectory() as temporary, redirect_stdout(sys.stderr):  # the bar, which is part of what is measured
        folder = Path(temporary)
        with tracked(config["wandb"], folder) as loggers:
            trainer = trainer_for(Settings(**config), images, folder, loggers)
            trainer.callbacks.append(turns)  # type: ignore[attr-defined]
            trainer.fit(model, images)
    pairs = list(zip(turns.lightning[1:], turns.bare, strict=False))[2:]  # neighbours, either of them first in turn
    lightning, bare = (batch * median(turn) for turn in zip(*pairs, strict=True))
    return {
        "bench": "training",
        "model": name,
        "data": dataset.__name__,
        "device": hardware(device),
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "compile": arguments.compile,
        "batch": batch,
        "parameters": sum(p.numel() for p in turns.loop.parameters),
        "lightning_images_per_s": round(lightning, 1),
        "bare_images_per_s": round(bare, 1),
        "ratio": round(median(ours / theirs for ours, theirs in pairs), 4),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--batch", type=int, help="default: 128; on a GPU what makes a step last 20 ms")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    parser.add_argument("--turns", type=int, default=30, help="of each, besides two to warm up; even")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    arguments = parser.parse_args()
    quiet()
    for model in arguments.models:
        emit(measure(model, arguments), arguments.out)


if __name__ == "__main__":
    main()
