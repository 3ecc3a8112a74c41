"""Weights & Biases: a run's curves, settings, pictures and weights in a dashboard."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vlae.records import flat
from vlae.schema import check

Kind = Literal["train", "report"]


class Tracker(WandbLogger):
    """One run of W&B, begun by what is logged first. On ranks other than the first all of it does nothing."""

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        known = self.experiment.config.as_dict()
        news = [pair for pair in flat(dict(params)).items() if pair not in known.items()]
        super().log_hyperparams(dict(news))  # W&B warns of what a sweep has locked

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        # W&B's own step is the optimiser's too, so that a resumed run goes on behind what it logged; it must not fall
        behind = max(step or 0, self.experiment.step)
        self.experiment.log({**metrics, "trainer/global_step": step}, step=behind)


@rank_zero_only
def conclude(tracker: Tracker, metrics: dict[str, Any], checkpoint: Path) -> None:
    """Makes `metrics`, those of the best weights, the run's summary, and their checkpoint its artifact."""
    import wandb

    run = tracker.experiment
    run.summary.update(metrics)
    artifact = wandb.Artifact(f"model-{run.id}", "model", metadata=metrics)
    # uploaded, be it by a later sync, from where it is, without copies
    artifact.add_file(str(checkpoint), skip_cache=True, policy="immutable")
    run.log_artifact(artifact, aliases=["best"])


def login() -> None:
    """ValueError where W&B has no key and nobody to ask for it, cannot be reached, or refuses the key."""
    import wandb

    try:
        wandb.login(force=True)
    except wandb.Error as error:
        raise ValueError(f"wandb.mode=online: {error}") from error


def run_id(folder: Path) -> str | None:
    """The run of W&B that earlier starts in `folder` were: each left wandb/[offline-]run-<time>-<id>/run-<id>.wandb."""
    found = sorted(folder.glob("wandb/*run-*/run-*.wandb"))
    return found[-1].stem.removeprefix("run-") if found else None


def tracker(
    *,
    mode: Literal["offline", "online", "disabled"],
    project: str,
    group: str | None,
    entity: str | None,
    folder: Path,
    kind: Kind,
) -> list[Tracker]:
    """Empty where `mode` is disabled."""
    if mode == "disabled":
        return []
    if mode == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")  # read at import
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(f"wandb.mode={mode}: wandb is not installed; install it or set wandb.mode=disabled") from error
    if mode == "online":
        rank_zero_only(login)()
    os.environ["WANDB_DATA_DIR"] = str(folder.absolute() / "wandb")  # tables' files, until they are uploaded
    made = Tracker(
        project=project,
        entity=entity,
        group=group,
        name=folder.absolute().name if kind == "train" else kind,
        job_type=kind,
        mode=mode,
        save_dir=folder,
        id=os.environ.get("WANDB_RUN_ID") or run_id(folder),  # an agent gives the ids of its runs
    )
    made._wandb_init.pop("anonymous", None)  # Lightning passes it, of which W&B warns
    return [made]


@contextmanager
def tracked(settings: dict[str, Any], folder: Path, kind: Kind = "train") -> Iterator[list[Tracker]]:
    """The logger of a run, if any, which goes on with the run that `folder` holds and ends with the block.

    `settings` are those of the section `wandb`. A block that raises leaves a failed run.

    Raises:
        ValueError: for a setting that does not fit, without wandb, or online without an account, before anything is
            written.
    """
    check(tracker, settings, "wandb", supplied=("folder", "kind"))
    trackers = tracker(**settings, folder=folder, kind=kind)
    if not trackers:
        yield trackers
        return
    import wandb

    code = 1
    harmless: tuple[type[Exception], ...] = ()
    try:
        yield trackers
        code = 0
    except FloatingPointError as error:
        if wandb.run:
            wandb.run.alert("The loss is not finite", str(error), "ERROR")
        raise
    except SystemExit:  # SLURM may have ended W&B's service, too; a job that is to come back must not fail of it
        harmless = (Exception,)
        raise
    finally:  # or the next run in this process would go on in this one
        with suppress(*harmless):
            wandb.finish(exit_code=code)
