"""`Images`: a data set in memory, as the batches a LightningModule trains and is scored on."""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor

from vlae.datasets import Part, Splits, default_root
from vlae.noise import generator
from vlae.schema import check, resolve


class Batch(NamedTuple):
    """`index` of each image in its split; `y` -1 without labels; `number` of the training batch since the start of
    training, the key of all noise of its step (-1 in evaluation)."""

    x: UInt8[Tensor, "B C H W"]
    y: Int64[Tensor, " B"]
    index: Int64[Tensor, " B"]  # type: ignore[assignment]  # a tuple's method of that name is not missed
    number: int


def draw(grey: UInt8[Tensor, "*N"], uniform: Tensor) -> UInt8[Tensor, "*N"]:
    """Bernoulli(grey / 255), from uniform noise."""
    return (255 * uniform < grey).to(torch.uint8)


def take(part: Part, index: Int64[Tensor, " B"], number: int = -1) -> Batch:
    """The images of a split at `index`."""
    labels = torch.full_like(index, -1) if part.labels is None else part.labels[index]
    return Batch(part.images[index], labels, index, number)


class TrainingBatches:
    """An endless stream in which batch `number` is a function of (seed, number), so that it can be entered anywhere.

    Epoch after epoch another permutation; `batch_size` images a device; each of `world` ranks takes its slice of the
    global batch; images that do not fill a last global batch wait for the next epoch. An iteration goes on where the
    last one ended, be it in the middle of an epoch (a resume, trainer.limit_train_batches).
    """

    def __init__(self, part: Part, batch_size: int, seed: int, world: int, rank: int) -> None:
        self.part, self.batch_size, self.seed, self.world, self.rank = part, batch_size, seed, world, rank
        self.number = 0
        self.epoch, self.order = -1, torch.empty(0)
        if len(self) == 0:
            raise ValueError(
                f"data.batch_size: {batch_size} images on each of {world} devices, but training has only "
                f"{len(part.images)}; at most {len(part.images) // world}"
            )

    def __len__(self) -> int:
        return len(self.part.images) // (self.world * self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        epoch, k = divmod(number, len(self))
        if epoch != self.epoch:
            self.order = torch.randperm(len(self.part.images), generator=generator("order", self.seed, epoch))
            self.epoch = epoch
        start = (k * self.world + self.rank) * self.batch_size
        return take(self.part, self.order[start : start + self.batch_size], number)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            self.number += 1
            yield self[self.number - 1]

    # without these two Lightning would warn that the order cannot be resumed; but it drops a loader's state that was
    # saved at the end of an epoch, so `Images` keeps the number
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class EvaluationBatches:
    """Every image once, shared out among `world` ranks without padding: equally many batches each, none empty, sizes
    differ by one at most. The order is drawn by the seed, so that the first batches are a fair part of the split."""

    def __init__(self, part: Part, batch_size: int, seed: int, world: int, rank: int) -> None:
        size = len(part.images)
        if size < world:
            raise ValueError(f"trainer.devices: {world} devices cannot share {size} images; at most {size}")
        batches = min(-(-size // (world * batch_size)), size // world)
        order = torch.randperm(size, generator=generator("evaluation order", seed))
        self.part, self.chunks = part, order.tensor_split(batches * world)[rank::world]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Batch]:
        return (take(self.part, index) for index in self.chunks)


def sound(splits: Any) -> Splits:
    """The splits of a data set if they are whole numbers below `levels` in equal shapes, with a class each or none."""
    if not isinstance(splits, Splits):
        raise ValueError(f"data._target_ returned a {type(splits).__name__}, not Splits")
    for name, part in zip(Splits._fields, splits[:3], strict=False):
        kinds = [type(part).__name__, *(type(one).__name__ for one in (part if isinstance(part, Part) else ()))]
        if kinds not in (["Part", "Tensor", "Tensor"], ["Part", "Tensor", "NoneType"]):
            found = " of ".join(kinds)
            raise ValueError(f"data._target_ returned for {name} {found}, not a Part of Tensor and Tensor or None")
    if type(splits.levels) is not int:
        raise ValueError(f"data._target_ returned levels={splits.levels!r}, not an int")
    if not 2 <= splits.levels <= 256 or (splits.dynamic and splits.levels != 2):
        raise ValueError(f"data._target_ returned {splits.levels} levels; 2 to 256 are allowed, 2 if dynamic")
    shape = splits.train.images.shape[1:]
    for name, (images, labels) in zip(("train", "validation", "test"), splits[:3], strict=True):
        found = f"data._target_ returned for {name} images of {images.dtype} {list(images.shape)}"
        if images.is_floating_point():
            found += f" with {int((~images.isfinite()).sum())} values that are not finite"
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape or images.shape[1:] != shape:
            raise ValueError(f"{found}; uint8 [N C H W] is wanted, none of them 0, C H W the same in every split")
        if images.shape[1] not in (1, 3):
            raise ValueError(f"{found}; C must be 1, grey, or 3, red, green and blue")
        if not splits.dynamic and (top := int(images.max())) >= splits.levels:
            raise ValueError(f"{found} with the value {top}; {splits.levels} levels are 0..{splits.levels - 1}")
        if (labels is None) != (splits.train.labels is None):
            raise ValueError(f"{found} {'without' if labels is None else 'with'} labels, unlike those for train")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1] or labels.min() < 0):
            raise ValueError(f"{found} and labels of {labels.dtype} {list(labels.shape)}; int64 [N] from 0 is wanted")
    return splits


class Images(LightningDataModule):
    """Batches of a data set; give its Trainer `use_distributed_sampler=False`, the batches are sharded here.

    `dataset` is a function `root -> Splits`; `root` None is VLAE_DATA_DIR, else a cache folder.
    `batch_size` and `eval_batch_size` are per device. `train_on_validation` adds the validation images to the
    training images and leaves no validation. `flip` shows every second training image, by chance, mirrored.

    Raises:
        ValueError: for a batch size below 1; on first use of the images, if they are not what `Splits` says.
    """

    def __init__(
        self,
        dataset: Callable[..., Splits],
        root: str | None,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        train_on_validation: bool = False,
        flip: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ValueError(f"data.{name}: {size} images; at least 1")
        if not callable(dataset):
            raise ValueError(f"data._target_: {dataset} is no function from the folder of the files to Splits")
        self.dataset, self.root = dataset, Path(root).expanduser() if root else default_root()
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.train_on_validation, self.flip = train_on_validation, flip
        self.train: TrainingBatches | None = None
        self.before: int | None = None  # batches an epoch had, in a run that goes on

    @cached_property
    def splits(self) -> Splits:
        """The data set as its function returns it, with train_on_validation merged into train."""
        splits = sound(self.dataset(self.root))
        if not self.train_on_validation:
            return splits
        (x, y), (more_x, more_y) = splits.train, splits.validation
        labels = None if y is None or more_y is None else torch.cat([y, more_y])
        return splits._replace(train=Part(torch.cat([x, more_x]), labels))

    def part(self, name: Literal["train", "validation", "test"]) -> Part:
        """A split as it is evaluated: a dynamic set in one binarisation, the same for every seed."""
        part: Part = getattr(self.splits, name)
        if not self.splits.dynamic:
            return part
        uniform = torch.rand(part.images.shape, generator=generator("binarise", 0, name))
        return part._replace(images=draw(part.images, uniform))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        c, h, w = self.splits.train.images.shape[1:]
        return c, h, w

    @property
    def levels(self) -> int:
        """Values a pixel can take."""
        return self.splits.levels

    @property
    def dataset_name(self) -> str:
        """Of the data set's function."""
        return getattr(self.dataset, "func", self.dataset).__name__

    @property
    def binarisation(self) -> str:
        """`dynamic`: drawn anew each time; `static`: fixed; `none`: of more than two levels."""
        return "dynamic" if self.splits.dynamic else "static" if self.levels == 2 else "none"

    @property
    def ranks(self) -> tuple[int, int]:
        """(world size, own rank); (1, 0) without a Trainer."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def setup(self, stage: str = "fit") -> None:
        """Read the files; for `fit` also start the training batches at number 0."""
        if stage == "fit":
            self.train = TrainingBatches(self.splits.train, self.batch_size, self.seed, *self.ranks)

    def train_dataloader(self) -> TrainingBatches:
        if self.train is None:
            self.setup()
        assert self.train is not None
        return self.train

    def val_dataloader(self) -> EvaluationBatches | list[Batch]:
        if self.train_on_validation:
            return []
        return EvaluationBatches(self.part("validation"), self.eval_batch_size, self.seed, *self.ranks)

    def test_dataloader(self) -> EvaluationBatches:
        return EvaluationBatches(self.part("test"), self.eval_batch_size, self.seed, *self.ranks)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Binarise a training batch of a dynamic set anew, mirror images at random, on their device."""
        if batch.number < 0:
            return batch
        world, rank = self.ranks

        def noise(key: str, *shape: int) -> Tensor:
            """The slice of the global batch's."""
            stream = generator(key, self.seed, batch.number, device=batch.x.device)
            return torch.rand((world, *shape), generator=stream, device=batch.x.device)[rank]

        x = draw(batch.x, noise("binarise", *batch.x.shape)) if self.splits.dynamic else batch.x
        if self.flip:
            x = torch.where(noise("flip", len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        return batch._replace(x=x)

    @cached_property
    def fingerprint(self) -> str:
        """Of all images and classes: another one, other data."""
        content = hashlib.blake2b(digest_size=8)
        for tensor in (tensor for part in self.splits[:3] for tensor in part if tensor is not None):
            content.update(repr(tensor.shape).encode() + tensor.contiguous().numpy().data)
        return content.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The place in the training batches; a batch handed out but not trained on (interrupted) comes again."""
        if self.train is None or self.trainer is None:
            return {}
        step = self.trainer.fit_loop.epoch_loop.batch_progress.current
        started = step.ready - step.processed  # type: ignore[attr-defined]
        place = {"number": self.train.number - started, "per_epoch": len(self.train)}
        return {**place, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError where training began on other images."""
        if self.train is not None:
            if state_dict["fingerprint"] != self.fingerprint:
                raise ValueError(f"the images below {self.root} or data.folder are not those that training began with")
            # the same place also with another batch size or another number of devices
            self.before = state_dict["per_epoch"]
            self.train.number = state_dict["number"] * len(self.train) // self.before


def images_for(data: dict[str, Any], seed: int, allow: tuple[str, ...]) -> Images:
    """The data that a `data` section describes: its keys are those of `Images` and of the data set's own function."""
    dataset = resolve(data.get("_target_"), "data", allow)
    own = list(signature(dataset).parameters)[1:]  # the first is the root
    settings = {key: value for key, value in data.items() if key != "_target_"}
    chosen = {key: settings.pop(key) for key in own if key in settings}
    check(Images, settings, "data", supplied=("dataset", "seed"), elsewhere=own)
    check(partial(dataset, None), chosen, "data")
    return Images(partial(dataset, **chosen), seed=seed, **settings)


def independent_pixels(splits: Splits) -> float:
    """Bits/dim on test of the best model with independent pixels: the training images' histogram of each pixel, one
    added to every count. Where binarisation is dynamic, the exact mean over it."""
    train, test = (part.images.flatten(1).T for part in (splits.train, splits.test))  # [pixels N]
    if splits.dynamic:
        ink = (train.double().sum(1) / 255 + 1) / (train.shape[1] + 2)
        seen = test.double().mean(1) / 255
        return -(seen * ink.log2() + (1 - seen) * (1 - ink).log2()).mean().item()
    bits = 0.0
    for pixel, scored in zip(train, test, strict=True):  # one by one: the values of a split as floats may not fit
        count = torch.bincount(pixel, minlength=splits.levels).double() + 1
        bits -= (torch.bincount(scored, minlength=splits.levels) * (count / count.sum()).log2()).sum().item()
    return bits / test.numel()
