"""`LitVLAE`: a VLAE as Lightning trains it, and the running average of its weights."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vlae.data import Batch
from vlae.model import VLAE, Terms, build
from vlae.muon import Muon
from vlae.noise import generator, seed_of
from vlae.objective import Objective
from vlae.schema import check


class Averaging(WeightAveraging):
    """Exponential average, decay min(decay, (1 + n) / (10 + n)) after n steps: right from the first validation.

    Validation, checkpoints' `state_dict` and the module after training hold the average.
    """

    def __init__(self, decay: float):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"averaging={decay}: must be at least 0 (none) and below 1")
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module moves there only after this hook
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        average = self._average_model.module
        self.weights = list(average.parameters()), list(pl_module.parameters())
        # copied: a mean of the soft free bits' gamma would mean nothing; what is not stored, masks, never changes
        stored = pl_module.state_dict().keys()
        pairs = zip(average.named_buffers(), pl_module.buffers(), strict=True)
        self.buffers = [(mean, now) for (name, mean), now in pairs if name in stored]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # instead of AveragedModel's update, which waits for the device and takes a millisecond more
        n = self._latest_update_step
        if trainer.global_step > n:
            decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
            torch._foreach_lerp_(*self.weights, 1 - decay)
            for mean, now in self.buffers:
                mean.copy_(now)
            self._latest_update_step = trainer.global_step


class Optimization:
    """Optimiser and schedule: `lr` reached over `warmup_steps`, then constant or down to zero at the end."""

    def __init__(
        self,
        *,
        name: Literal["adamax", "muon"],
        lr: float,
        weight_decay: float,
        schedule: Literal["constant", "cosine", "linear"],
        warmup_steps: int,
    ):
        for key, value in (("lr", lr), ("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{key}={value}: must be finite and not negative")
        self.name, self.lr, self.weight_decay = name, lr, weight_decay
        self.schedule, self.warmup_steps = schedule, warmup_steps

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        if self.name == "muon":
            return Muon(module.named_parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.Adamax(module.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def factor(self, step: float, steps: float) -> float:
        """Share of `lr` at one of `steps` optimiser steps."""
        done = min(1.0, step / max(1, steps))
        end = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done}[self.schedule]
        return min(1.0, (step + 1) / (self.warmup_steps + 1)) * end


class LitVLAE(LightningModule):
    """Trains a VLAE on the batches of `Images`, with noise that is a function of the seed and the batch.

    Logs `train/loss` and `{train,val,test}/{rate,distortion,nelbo,bits_per_dim}`: nats per image, the last bits per
    dimension. Those of training are of the global batch, of the last one where batches are accumulated.

    Raises:
        ValueError: for a setting that does not fit, or if a fresh model of black and white is not at D ln 2 nats.
        FloatingPointError: as soon as the loss is not finite; no checkpoint is written after that.
    """

    def __init__(
        self,
        *,
        model: dict[str, Any],
        shape: tuple[int, int, int],
        levels: int,
        seed: int,
        optimizer: dict[str, Any],
        objective: dict[str, Any],
        compile: bool = False,
        allow: tuple[str, ...] = ("vlae.",),
    ):
        super().__init__()
        check(Optimization, optimizer, "optimizer")
        check(Objective, objective, "objective")
        self.model = build(model, shape, levels, allow)
        self.optimization = Optimization(**optimizer)
        self.objective = Objective(**objective)
        # plain types only: a checkpoint must open with weights_only=True
        settings = {"model": model, "optimizer": optimizer, "objective": objective, "seed": seed}
        self.save_hyperparameters({**settings, "shape": list(shape), "levels": levels})
        self.code: int = self.model.prior.code  # type: ignore[assignment]  # numbers of a code
        self.seed, self.levels, self.dims = seed, levels, math.prod(shape)
        self.meters = nn.ModuleDict({"rate": MeanMetric("disable"), "distortion": MeanMetric("disable")})
        self.fresh = True
        self.broken: Tensor | None = None
        self.row: dict[str, Tensor] = {}  # to be logged with the step
        self.scores: dict[str, float] = {}  # of the latest validation
        self.begun: dict[str, float] | None = None  # where in its schedule a run was that goes on
        if compile:  # in place, so that the names of the weights stay
            self.model.compile()

    def start_from(self, other: VLAE) -> None:
        """Take the weights of a trained model.

        Raises:
            ValueError: if it has other weights, naming the first that differs.
        """
        mine, theirs = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (self.model, other))
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise ValueError(f"init_from: {name} is {theirs.get(name)} there and {mine.get(name)} in this model")
        self.model.load_state_dict(other.state_dict())
        self.fresh = False

    def refuse_endless(self, trainer: Trainer) -> None:
        """ValueError where the schedule falls towards an end that there is not."""
        if self.optimization.schedule != "constant" and trainer.max_epochs == trainer.max_steps == -1:
            raise ValueError(
                f"optimizer.schedule={self.optimization.schedule}: needs trainer.max_steps or trainer.max_epochs"
            )

    def configure_optimizers(self) -> Any:
        optimizer = self.optimization.optimizer(self.model)
        self.refuse_endless(self.trainer)
        steps = float(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.optimization.factor(self.place(step), steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def place(self, step: int) -> float:
        """Where in its schedule a run is: at `step`, but for one that went on with more or fewer steps an epoch."""
        if self.begun is None:
            return float(step)
        by_epochs = self.trainer.estimated_stepping_batches != self.trainer.max_steps
        longer = self.steps_per_epoch / self.begun["steps_per_epoch"] if by_epochs else 1
        return self.begun["place"] * longer + step - self.begun["step"]

    def figures(self, split: str, rate: Tensor, distortion: Tensor) -> dict[str, Tensor]:
        """The contract's metrics of a split from mean rate and distortion in nats."""
        nelbo = rate + distortion
        values = {"rate": rate, "distortion": distortion, "nelbo": nelbo}
        values["bits_per_dim"] = nelbo / (self.dims * math.log(2))
        return {f"{split}/{name}": value for name, value in values.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # noise of the global batch, of which each rank takes its slice
        noise = generator("eps", self.seed, batch.number, device=self.device)
        size = (self.trainer.world_size, len(batch.x), self.code)
        eps = torch.randn(size, generator=noise, device=self.device)[self.trainer.global_rank]
        # dropout draws from the global generator, which no checkpoint holds and which is alike on all ranks
        torch.manual_seed(seed_of("dropout", self.seed, batch.number, self.trainer.global_rank))
        terms: Terms = self.model(batch.x, eps)
        loss = self.objective(terms, self.trainer.global_step, self.average)
        self.guard(terms, loss, batch.number)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:  # a log call costs as much as a small layer
            # on the CPU: Lightning reads what the bar shows at every step, which would wait for the device
            values = self.average(torch.stack([loss, terms.rate.mean(), terms.distortion.mean()]).detach()).cpu()
            figures = self.figures("train", values[1], values[2])
            self.row = {"train/loss": values[0], **figures}
            self.log_dict(self.row, logger=False, batch_size=len(batch.x))
            shown = {name: figures[f"train/{name}"] for name in ("rate", "distortion", "bits_per_dim")}
            self.log_dict(shown, prog_bar=True, logger=False, batch_size=len(batch.x))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # here, as Lightning logs a step only after the hook in which it is saved: a killed run would miss it
        row = {name: value.item() for name, value in self.row.items()}
        for logger in self.loggers if row else ():
            logger.log_metrics({**row, "epoch": self.trainer.current_epoch}, self.trainer.global_step)
        self.row = {}

    def average(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value.clone(), reduce_op="mean")  # type: ignore[return-value]

    def guard(self, terms: Terms, loss: Tensor, number: int) -> None:
        """Checks a fresh model's first loss, and that losses are finite: at once on CPU, else every 50 batches."""
        if number == 0 and self.fresh and self.levels == 2 and self.model.likelihood.channels == 1:
            first, uniform = terms.distortion.mean().item(), self.dims * math.log(2)
            if not abs(first - uniform) < 0.05 * uniform:
                raise ValueError(f"a fresh model must start near {uniform:.1f} nats (D ln 2), this one at {first:.1f}")
        self.watch(loss)
        if self.device.type == "cpu" or number % 50 == 0:
            self.stop_if_broken()

    def watch(self, value: Tensor) -> None:
        """Remembers, without waiting for the device, whether a value was not finite."""
        bad = ~torch.isfinite(value.detach()).all()
        self.broken = bad if self.broken is None else self.broken | bad

    def stop_if_broken(self) -> None:
        if self.broken is not None and self.broken.item():
            files = (getattr(callback, "best_model_path", "") for callback in self.trainer.checkpoint_callbacks)
            kept = [file for file in files if file]
            raise FloatingPointError(
                f"the loss is not finite at step {self.trainer.global_step}; "
                f"last good checkpoint: {kept[-1] if kept else 'none yet'}; "
                "try a lower optimizer.lr, trainer.gradient_clip_val or trainer.precision=32-true"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for parameter in self.parameters():
            self.watch(parameter)
        self.stop_if_broken()
        # of the latest validation, which is that of the averaged weights in a best checkpoint
        scores = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        self.scores |= {name: value for name, value in scores.items() if name.startswith("val/")}
        checkpoint["metrics"] = dict(self.scores)
        step, per_epoch = self.trainer.global_step, self.steps_per_epoch
        checkpoint["schedule"] = {"step": step, "place": self.place(step), "steps_per_epoch": per_epoch}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.scores, self.begun = checkpoint["metrics"], checkpoint.get("schedule")

    def evaluation_start(self, split: str) -> None:
        # one draw for the whole split: the same figures for any batch size and number of devices
        size = len(getattr(self.trainer.datamodule.splits, split).images)  # type: ignore[attr-defined]
        self.eps = torch.randn(size, self.code, generator=generator("eps", self.seed, split)).to(self.device)

    def evaluation_step(self, batch: Batch) -> None:
        # in float32 whatever trains: bfloat16 costs 0.01 bits/dim and more on CIFAR-10
        float32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(self.device.type, enabled=False), float32:
            terms = self.model(batch.x, self.eps[batch.index])
        self.watch(terms.elbo)
        self.meters["rate"].update(terms.rate)
        self.meters["distortion"].update(terms.distortion)

    def evaluation_end(self, split: str) -> None:
        self.stop_if_broken()
        self.log_dict(self.figures(split, *(meter.compute() for meter in self.meters.values())), sync_dist=True)
        for meter in self.meters.values():
            meter.reset()

    def on_validation_epoch_start(self) -> None:
        self.stop_if_broken()
        self.evaluation_start("validation")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        self.evaluation_end("val")

    def on_test_epoch_start(self) -> None:
        self.evaluation_start("test")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        self.evaluation_end("test")
