"""Batches are functions of (seed, number): the same after a resume and on any number of ranks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from vlae.data import Batch, EvaluationBatches, Images, TrainingBatches, independent_pixels
from vlae.datasets import Part, Splits, digits
from vlae.noise import generator


def toy(root: Path, levels: int = 2) -> Splits:
    """23 / 7 / 8 images; grey levels of which 2 levels are drawn, or 256 levels as they are."""
    images = (torch.randint(256, (n, 1, 3, 5), generator=generator("toy", n)).to(torch.uint8) for n in (23, 7, 8))
    return Splits(*(Part(x, torch.arange(len(x))) for x in images), levels=levels, dynamic=levels == 2)


def toy_grey(root: Path) -> Splits:
    return toy(root, levels=256)


def make(**settings: Any) -> Images:
    return Images(**{"dataset": toy, "root": None, "batch_size": 4, "eval_batch_size": 3, "seed": 1} | settings)


def plain(batch: Batch) -> tuple[int, list[int], list[int]]:
    return batch.number, batch.index.tolist(), batch.x.flatten().tolist()


class Recorder(LightningModule):
    """Keeps what it is shown; raises in the step of batch `die_at`."""

    def __init__(self, die_at: int | None = None, folder: Path | None = None) -> None:
        super().__init__()
        self.weight, self.die_at, self.folder = nn.Parameter(torch.zeros(())), die_at, folder
        self.seen: list[tuple[int, list[int], list[int]]] = []
        self.validated: list[tuple[int, list[int], list[int]]] = []

    def training_step(self, batch: Batch) -> Tensor:
        if batch.number == self.die_at:
            raise RuntimeError("killed")
        self.seen.append(plain(batch))
        return self.weight**2

    def validation_step(self, batch: Batch) -> None:
        self.validated.append(plain(batch))

    def on_train_end(self) -> None:
        if self.folder:  # ranks report by file
            torch.save([self.seen, self.validated], self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **settings: Any) -> Trainer:
    off = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    rest = {"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 1}
    return Trainer(**off | rest | {"default_root_dir": folder} | settings)


class SaveAt(Callback):
    """Saves once, in the hook and after the batch of the epoch that it is told."""

    def __init__(self, path: Path, hook: str, batch: int) -> None:
        self.path, self.batch = path, batch
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: Any) -> None:
        if not self.path.exists() and not trainer.sanity_checking and trainer.fit_loop.batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


LENGTHS: dict[str, dict[str, Any]] = {"epochs": {"max_epochs": 3}, "steps": {"max_steps": 14, "max_epochs": -1}}
PLACES = [("on_train_batch_end", k) for k in (0, 2, 4)] + [("on_validation_end", 1), ("on_validation_end", 3)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("validate", "hook", "batch"),
    [(2, *place) for place in PLACES]
    + [(1.0, "on_train_batch_end", 2), (1.0, "on_validation_end", 4), (1.0, "on_train_epoch_end", 4)],
)
def test_a_resumed_run_sees_the_batches_an_uninterrupted_one_sees(
    tmp_path: Path, length: str, validate: float, hook: str, batch: int
) -> None:
    settings = LENGTHS[length] | {"val_check_interval": validate}
    whole, path = Recorder(), tmp_path / "some.ckpt"
    trainer(tmp_path, callbacks=[SaveAt(path, hook, batch)], **settings).fit(whole, make())
    assert [number for number, _, _ in whole.seen] == list(range(len(whole.seen)))
    assert all(number == -1 for number, _, _ in whole.validated)

    rest = Recorder()
    trainer(tmp_path, **settings).fit(rest, make(), ckpt_path=path)
    assert rest.seen == whole.seen[batch + 1 :]
    assert len(rest.seen) > 1
    passes = -(-7 // 3)  # of all passes over validation the draw is one and the same
    assert rest.validated[-passes:] == whole.validated[-passes:] == whole.validated[1 : 1 + passes]


def test_a_batch_that_raised_comes_again(tmp_path: Path) -> None:
    whole = Recorder()
    trainer(tmp_path, max_epochs=2).fit(whole, make())
    killed, path = Recorder(die_at=7), tmp_path / "killed.ckpt"
    run = trainer(tmp_path, max_epochs=2)
    with pytest.raises(RuntimeError, match="killed"):
        run.fit(killed, make())
    run.save_checkpoint(path)
    rest = Recorder()
    trainer(tmp_path, max_epochs=2).fit(rest, make(), ckpt_path=path)
    assert killed.seen + rest.seen == whole.seen


def test_an_epoch_cut_short_goes_on_in_the_next(tmp_path: Path) -> None:
    whole, limited = Recorder(), Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, make())
    trainer(tmp_path, max_epochs=4, limit_train_batches=3).fit(limited, make())
    assert limited.seen == whole.seen[:12]


def test_lightning_takes_the_stream_for_resumable(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "some.ckpt"
    trainer(tmp_path, max_epochs=2, callbacks=[SaveAt(path, "on_train_batch_end", 1)]).fit(Recorder(), make())
    trainer(tmp_path, max_epochs=2).fit(Recorder(), make(), ckpt_path=path)
    assert not [w for w in recwarn if "resum" in str(w.message) or "worker" in str(w.message)]


def test_another_batch_size_enters_at_the_same_place() -> None:
    data = make(batch_size=2)
    data.setup("fit")
    data.load_state_dict({"number": 2 * 5 + 2, "per_epoch": 5, "fingerprint": data.fingerprint})
    assert data.train_dataloader().number == 2 * 11 + 4


def test_every_epoch_is_another_permutation() -> None:
    batches = TrainingBatches(toy(Path()).train, 4, seed=0, world=1, rank=0)
    first, second = (torch.cat([batches[5 * epoch + k].index for k in range(5)]) for epoch in (0, 1))
    assert len(set(first.tolist())) == len(set(second.tolist())) == 20
    assert not torch.equal(first, second)
    assert torch.equal(batches[3].index, first[12:16])  # asked for again, after another epoch
    other = TrainingBatches(toy(Path()).train, 4, seed=1, world=1, rank=0)
    assert not torch.equal(other[0].index, batches[0].index)


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("accumulate", "flip"), [(1, True), (2, False)])
def test_two_ranks_see_what_one_process_sees(tmp_path: Path, accumulate: int, flip: bool) -> None:
    def each(batches: list[tuple[int, list[int], list[int]]]) -> list[tuple[int, list[int]]]:
        rows = ((index, np.array(x).reshape(len(index), -1).tolist()) for _, index, x in batches)
        return sorted(image for index, x in rows for image in zip(index, x, strict=True))

    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    one = Recorder()
    trainer(tmp_path, **settings).fit(one, make(batch_size=8, eval_batch_size=4, flip=flip))
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", **settings)
    run.fit(Recorder(folder=tmp_path), make(batch_size=4, eval_batch_size=2, flip=flip))
    (seen0, validated0), (seen1, validated1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one.seen == [(n, i + j, x + y) for (n, i, x), (_, j, y) in zip(seen0, seen1, strict=True)]
    assert len(validated0) == len(validated1)
    assert len(each(one.validated)) == 2 * 7  # every image once in each of two passes
    assert each(validated0 + validated1) == each(one.validated)


@pytest.mark.parametrize("size", [5, 24, 100, 101])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 200])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_is_shared_without_padding(size: int, batch_size: int, world: int) -> None:
    part = Part(torch.zeros(size, 1, 1, 1, dtype=torch.uint8))
    ranks = [list(EvaluationBatches(part, batch_size, 0, world, rank)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    lengths = {len(batch.index) for batches in ranks for batch in batches}
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= batch_size or batch_size * len(ranks[0]) * world < size  # only to have no rank idle
    assert sorted(torch.cat([batch.index for batches in ranks for batch in batches]).tolist()) == list(range(size))
    assert all((batch.y == -1).all() for batches in ranks for batch in batches)


def test_training_is_binarised_anew_and_evaluation_once() -> None:
    data = make(batch_size=23)
    data.setup("fit")
    stream = data.train_dataloader()
    draws = torch.stack([data.on_after_batch_transfer(stream[n]).x[stream[n].index.argsort()] for n in range(400)])
    grey = data.splits.train.images / 255
    sigma = (grey * (1 - grey) / 400).sqrt()
    assert draws.unique().tolist() == [0, 1]
    assert ((draws.double().mean(0) - grey).abs() <= 4.5 * sigma).all()  # grey 0 and 255 exactly

    def images(loader: EvaluationBatches) -> Tensor:
        batches = list(loader)
        return torch.cat([b.x for b in batches])[torch.cat([b.index for b in batches]).argsort()]

    fixed = images(data.test_dataloader())
    assert torch.equal(fixed, images(make(eval_batch_size=8).test_dataloader()))
    assert torch.equal(fixed, data.part("test").images)
    assert torch.equal(fixed, images(make(seed=2).test_dataloader()))
    assert set(fixed.unique().tolist()) == {0, 1}


def mirrored(data: Images, numbers: range) -> Tensor:
    """Which images of the training batches come mirrored: all others come as they are."""
    found, stream = [], data.train_dataloader()
    for number in numbers:
        batch = stream[number]
        true, shown = data.splits.train.images[batch.index], data.on_after_batch_transfer(batch).x
        same, turned = ((shown == each).flatten(1).all(1) for each in (true, true[..., range(true.shape[3])[::-1]]))
        assert (same ^ turned).all()
        found.append(turned)
    return torch.stack(found)


def test_every_second_training_image_is_mirrored() -> None:
    """By a function of seed and number, for each image by itself, and whatever has been drawn before."""
    data = make(dataset=toy_grey, flip=True)
    found = mirrored(data, range(500))
    assert abs(found.double().mean() - 0.5) < 4.5 * 0.5 / found.numel() ** 0.5
    pairs = torch.bincount(2 * found[:, 0].long() + found[:, 1].long(), minlength=4)
    assert ((pairs - 125).abs() < 4.5 * (125 * 0.75) ** 0.5).all()
    assert torch.equal(mirrored(make(dataset=toy_grey, flip=True), range(7, 9)), found[7:9])
    assert not torch.equal(mirrored(make(dataset=toy_grey, flip=True, seed=2), range(20)), found[:20])
    assert not mirrored(make(dataset=toy_grey), range(20)).any()


def test_evaluation_is_never_mirrored() -> None:
    plain, flipped = make(dataset=toy_grey), make(dataset=toy_grey, flip=True)
    for name in ("train", "validation", "test"):
        assert torch.equal(flipped.part(name).images, plain.part(name).images)
    for ours, theirs in (
        (flipped.val_dataloader(), plain.val_dataloader()),
        (flipped.test_dataloader(), plain.test_dataloader()),
    ):
        for batch, other in zip(ours, theirs, strict=True):
            assert torch.equal(flipped.on_after_batch_transfer(batch).x, other.x)


def test_a_binarised_image_is_mirrored_as_it_is_drawn() -> None:
    """The pixels are those without mirrors: only their places change."""
    plain, flipped = make(), make(flip=True)
    turned = mirrored(make(dataset=toy_grey, flip=True), range(50))
    for number, each in enumerate(turned):
        drawn = plain.on_after_batch_transfer(plain.train_dataloader()[number]).x
        shown = flipped.on_after_batch_transfer(flipped.train_dataloader()[number]).x
        assert set(shown.unique().tolist()) <= {0, 1}
        for image, before, mirror in zip(shown.tolist(), drawn.tolist(), each.tolist(), strict=True):
            assert image == [[row[::-1] if mirror else row for row in channel] for channel in before]


def test_other_sets_pass_unchanged() -> None:
    data = make(dataset=toy_grey)
    data.setup("fit")
    batch = data.on_after_batch_transfer(data.train_dataloader()[7])
    assert torch.equal(batch.x, data.splits.train.images[batch.index])
    assert torch.equal(batch.y, batch.index)
    assert (data.shape, data.levels, batch.x.dtype) == ((1, 3, 5), 256, torch.uint8)


@pytest.mark.filterwarnings("ignore:Total length of `list`")  # the empty validation is meant
def test_train_on_validation(tmp_path: Path) -> None:
    data, model = make(train_on_validation=True), Recorder()
    trainer(tmp_path, max_epochs=1).fit(model, data)
    assert len(data.splits.train.images) == len(data.splits.train.labels) == 30
    assert len(model.seen) == 7
    assert model.validated == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: 0"),
        ({"eval_batch_size": -1}, "data.eval_batch_size: -1"),
        ({"batch_size": 24}, "data.batch_size: 24 images .* 1 devices.* only 23; at most 23"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings).setup("fit")


def test_independent_pixels() -> None:
    """Against a slow count, on digits and on both readings of grey images."""
    for splits in (digits(Path()), toy(Path()), toy_grey(Path())):
        train, test = splits.train.images.numpy(), splits.test.images.numpy()
        bits = []
        for pixel in np.ndindex(train.shape[1:]):
            column, seen = train[(slice(None), *pixel)], test[(slice(None), *pixel)]
            if splits.dynamic:
                ink = (sum(int(v) / 255 for v in column) + 1) / (len(column) + 2)
                bits += [-(v / 255) * math.log2(ink) - (1 - v / 255) * math.log2(1 - ink) for v in seen.tolist()]
            else:
                bits += [-math.log2(((column == v).sum() + 1) / (len(column) + splits.levels)) for v in seen]
        assert independent_pixels(splits) == pytest.approx(np.mean(bits), rel=1e-12)
    assert independent_pixels(digits(Path())) == pytest.approx(2.433, abs=1e-3)


def unsound(**changes: Any) -> Splits:
    """`toy` with another training split, or other fields."""
    splits = toy_grey(Path())
    part = {key: changes.pop(key) for key in ("images", "labels") if key in changes}
    return splits._replace(train=splits.train._replace(**part), **changes)


@pytest.mark.parametrize(
    ("splits", "found"),
    [
        (
            unsound(images=torch.full((23, 1, 3, 5), math.nan)),
            r"train images of torch\.float32 .*345 values that are not",
        ),
        (unsound(images=torch.zeros(23, 3, 5, dtype=torch.uint8)), r"train images of torch\.uint8 \[23, 3, 5\]"),
        (unsound(images=torch.zeros(0, 1, 3, 5, dtype=torch.uint8)), r"\[0, 1, 3, 5\]; .*none of them 0"),
        (unsound(images=torch.zeros(23, 1, 3, 4, dtype=torch.uint8)), r"validation images .*the same in every split"),
        (unsound(images=torch.zeros(23, 2, 3, 5, dtype=torch.uint8)), r"train images .*; C must be 1, grey, or 3"),
        (unsound(levels=16), r"with the value \d+; 16 levels are 0\.\.15"),
        (unsound(levels=300), "300 levels; 2 to 256"),
        (unsound(dynamic=True), "2 if dynamic"),
        (unsound(labels=None), r"validation images .* with labels, unlike those for train"),
        (unsound(labels=torch.zeros(22, dtype=torch.long)), r"labels of torch\.int64 \[22\]; int64 \[N\]"),
        (unsound(labels=torch.zeros(23)), r"labels of torch\.float32 \[23\]"),
        (unsound(labels=torch.full((23,), -1)), "from 0 is wanted"),
        ((torch.zeros(3), torch.zeros(3)), "a tuple, not Splits"),
        (unsound(images=np.zeros((23, 1, 3, 5), np.uint8)), "for train Part of ndarray of Tensor, not a Part"),
        (unsound(labels=list(range(23))), "for train Part of Tensor of list, not a Part"),
        (unsound(validation=None), "for validation NoneType, not a Part"),
        (unsound(test=torch.zeros(3, 1, 3, 5)), "for test Tensor, not a Part"),
        (unsound(levels=2.5), "levels=2.5, not an int"),
        (unsound(levels="2"), "levels='2', not an int"),
    ],
)
def test_what_is_no_data_set_is_refused(splits: Any, found: str) -> None:
    with pytest.raises(ValueError, match=r"data\._target_ returned.*" + found):
        _ = make(dataset=lambda root: splits).splits


def test_other_images_are_refused_on_resume(tmp_path: Path) -> None:
    def one_more(root: Path) -> Splits:
        splits = toy_grey(root)
        return splits._replace(test=Part(*(torch.cat([tensor, tensor[:1]]) for tensor in splits.test)))

    def fit(dataset: Any, epochs: int, **more: Any) -> None:
        trainer = Trainer(max_epochs=epochs, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.fit(Recorder(), make(dataset=dataset), weights_only=True, **more)

    fit(toy_grey, 1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    fit(toy_grey, 2, ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="not those that training began with"):
        fit(one_more, 3, ckpt_path=checkpoint)
