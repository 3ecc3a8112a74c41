"""What W&B shows of many runs: a project's dashboard, as code, and the report of a sweep."""

import json
from pathlib import Path
from typing import Any

from vlae.tracking import login, tracked

STEP = "trainer/global_step"
DIALS = {"Prior depth": "model.prior.depth", "Receptive field": "model.decoder.receptive_field"}


def workspace(entity: str | None, project: str) -> Any:
    """Curves, rate against distortion, both by prior depth and by receptive field, pictures and the machine's load.

    Raises:
        ValueError: without wandb-workspaces.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        text = "a dashboard needs wandb-workspaces; install it, or vlae with its extra `dashboards`"
        raise ValueError(text) from error

    def curves(*names: str, x: str = STEP, **more: Any) -> Any:
        return wr.LinePlot(title=" ".join(names), x=x, y=list(names), **more)

    def scatter(split: str) -> Any:
        x, y = f"{split}/rate", f"{split}/distortion"
        return wr.ScatterPlot(title=f"{split}: rate and distortion, nats", x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))

    objective = [curves(f"{split}/{name}") for name in ("nelbo", "bits_per_dim") for split in ("train", "val")]
    terms = [curves(f"{split}/{name}") for name in ("rate", "distortion") for split in ("train", "val")]
    sections = [
        ws.Section("Objective", [curves("train/loss"), *objective, wr.BarPlot(metrics=["test/nelbo"])], is_open=True),
        ws.Section("Rate and distortion", [scatter("val"), scatter("test"), *terms], is_open=True),
    ]
    for title, key in DIALS.items():
        # a flat key: without `.value` the library would take it for a path through nested settings
        by: dict[str, Any] = {"groupby": f"{key}.value", "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
        panels: list[Any] = []
        for name in ("val/nelbo", "val/rate", "val/distortion"):
            panels += [curves(name, **by), wr.BarPlot(title=name, metrics=[name], **by)]
        sections.append(ws.Section(f"By {title.lower()}", panels))
    names = [["reconstructions", "samples"], ["interpolations", "completions"], ["bits", "window", "noise"]]
    media = [wr.MediaBrowser(media_keys=[f"pictures/{name}" for name in row], num_columns=1) for row in names]
    classes = wr.WeavePanelSummaryTable(table_name="reconstructions/by_class")
    system = ["system/proc.memory.rssMB", "system/cpu", "system/gpu.0.gpu", "system/gpu.0.memoryAllocatedBytes"]
    sections += [
        ws.Section("Pictures", [*media, classes], is_open=True),
        ws.Section("System", [curves(name, x="RelativeTime(Process)") for name in system]),
    ]
    return ws.Workspace(
        entity=entity or "",
        project=project,
        name="VLAE",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("JobType") == "train"),  # not the reports
            order=[ws.Ordering(ws.Summary("val/nelbo"), ascending=True)],
        ),
    )


def dashboard(entity: str | None, project: str, output: Path) -> None:
    """Writes the workspace as JSON and, given an entity (an account or a team) and a key, saves it there as a new view.

    Raises:
        ValueError: without wandb-workspaces.
    """
    made = workspace(entity, project)
    # the library has no public way to look at what it would send
    content = made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=2) + "\n")
    try:
        if entity is None:
            raise ValueError("no --entity")
        login()
        place = made.save().url
    except ValueError as error:
        place = f"not saved in W&B: {error}"
    print(f"{output}: the workspace; {place}")


def log_report(
    settings: dict[str, Any], folder: Path, page: Path, figures: list[Path], table: list[dict[str, Any]]
) -> None:
    """Shows a sweep's report in W&B: the run `report` in the group of the sweep, anew each time in the same run.

    `settings` as of `tracked`, of another mode than disabled; a group that is None is the sweep's `folder`. `table` has
    a row for each job.
    """
    settings = {**settings, "group": settings["group"] or folder.absolute().name}
    with tracked(settings, folder, "report") as (tracker,):
        import wandb

        columns: list[Any] = list(dict.fromkeys(name for row in table for name in row))
        rows = [[row.get(name) for name in columns] for row in table]
        shown: dict[str, Any] = {f"report/{path.stem}": wandb.Image(str(path)) for path in figures}
        shown["report/jobs"] = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        shown["report/page"] = wandb.Html(str(page))
        tracker.experiment.log(shown)
