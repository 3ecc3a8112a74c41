"""A sweep as one HTML page that needs no network and no server, its figures beside it as PNG."""

import base64
import io
import re
from collections.abc import Iterable
from datetime import timedelta
from html import escape
from importlib.resources import files
from math import inf
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from vlae.charts import INK, RULE, Draw, charts, order, sweep, text
from vlae.sweeps import Job, jobs, points, short, varied

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("font.size", "legend.fontsize", "legend.title_fontsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "svg.fonttype": "none",
    "svg.hashsalt": "vlae",
}
COLUMNS = {"val/nelbo": "NELBO", "val/rate": "rate", "val/distortion": "distortion", "val/bits_per_dim": "bits/dim"}


class Cell(NamedTuple):
    """HTML, and what its column is sorted by; without that it comes last."""

    html: str
    key: float | str | None = None


def figure(key: str, value: float | int | None, spread: float | None = None) -> Cell:
    digits = 0 if key in ("steps", "n") else 4 if "bits" in key else 2
    more = "" if spread is None else f' <span class="faint">± {spread:.{digits}f}</span>'
    return Cell("&ndash;" if value is None else f"{value:,.{digits}f}{more}", value)


def chosen(run: Job, names: Iterable[str]) -> list[Cell]:
    """Settings, sorted as in the figures."""
    orders = [order(text(run.settings, name)) for name in names]
    return [Cell(escape(value), size if kind < 2 else value or None) for kind, size, value in orders]


def framed(title: str, caption: str, html: str) -> str:
    head = f"<figcaption><h3>{escape(title)}</h3>{escape(caption)}</figcaption>"
    return f'<figure class="plot">{head}{html}</figure>'


def table(label: str, heads: dict[str, str], rows: list[list[Cell]]) -> str:
    """Sorted by a click on one of its heads, which are given by what they mean in full."""
    kinds = ["" if isinstance(key, str) else "number" for _, key in rows[0]]
    sort = {"val/nelbo": ' aria-sort="ascending"'}
    head = "".join(
        f'<th scope="col" class="{kind}" title="{escape(full)}"{sort.get(full, "")}>'
        f'<button type="button">{escape(name)}</button></th>'
        for kind, (full, name) in zip(kinds, heads.items(), strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}" data-key="{"" if key is None else escape(str(key))}">{html}</td>'
            for kind, (html, key) in zip(kinds, row, strict=True)
        )
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f'<caption class="unseen">{escape(label)}</caption><thead><tr>{head}</thead><tbody>{body}</table></div>'
    )


def table_of_runs(runs: list[Job], names: dict[str, str], folder: Path) -> str:
    rows = []
    for run in runs:
        seconds, place = run.metrics.get("wall_s"), str(run.folder.relative_to(folder))
        time = Cell("&ndash;" if seconds is None else str(timedelta(seconds=round(seconds))), seconds)
        state = Cell(f'<span class="chip {run.state}">{run.state}</span>', run.state)
        reason = " ".join(run.reason.split())
        kind, said = ("reason", reason) if reason else ("path", place)
        last = Cell(f'<span class="{kind}" title="{escape(place)}">{escape(said)}</span>', place)
        figures = [figure(key, run.metrics.get(key)) for key in (*COLUMNS, "test/nelbo", "steps")]
        rows.append([*chosen(run, names), *figures, time, state, last])
    heads = {**names, **COLUMNS, "test/nelbo": "test NELBO", "steps": "steps", "of training and test": "time"}
    heads |= {"done, failed or unfinished": "state", "folder, or why it failed": "run"}
    return table("Runs, the lowest NELBO on validation first", heads, rows)


def table_of_points(runs: list[Job], names: dict[str, str]) -> str:
    keys, rows = list(COLUMNS)[:3], []
    for point in points(runs):
        row = [*chosen(point.runs[0], names), figure("n", point.done)]
        rows.append(row + [figure(key, point.means.get(key), point.spreads.get(key)) for key in keys])
    heads = {**names, "runs that are done": "n", **{key: COLUMNS[key] for key in keys}}
    caption = "Means ± sample standard deviation over n seeds."
    return framed("Models, the lowest NELBO first", caption, table("Models", heads, rows))


def card(run: Job, names: dict[str, str], anchor: str) -> str:
    """A run's originals over reconstructions."""
    title = " · ".join(f"{head} {text(run.settings, name)}" for name, head in names.items()) or run.folder.name
    figures = [f"{head} {figure(key, run.metrics[key]).html}" for key, head in COLUMNS.items() if key in run.metrics]
    picture = base64.b64encode((run.folder / "reconstructions.png").read_bytes()).decode()
    return (
        f'<figure class="card" id="{anchor}"><a href="#{anchor}"><img loading="lazy" decoding="async" '
        f'alt="Images and reconstructions: {escape(title)}" src="data:image/png;base64,{picture}"></a>'
        f"<figcaption><strong>{escape(title)}</strong><span>{' · '.join(figures) or run.state}</span>"
        '<a class="close" href="#pictures">smaller</a></figcaption></figure>'
    )


def plot(title: str, caption: str, draw: Draw, path: Path) -> str:
    """Leaves a PNG at `path`; in the page the drawing takes the page's own ink, light or dark."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(5, 4.1), layout="constrained")
        draw(canvas, canvas.subplots())
        canvas.savefig(path, dpi=180)
        canvas.savefig(file := io.StringIO(), format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r'<g id="[^"]*"', "<g", "<svg" + file.getvalue().partition("<svg")[2])  # other figures have them too
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return framed(title, caption, f'<div class="scroll">{svg}</div>')


def defined(items: dict[str, str]) -> str:
    return "".join(f"<div><dt>{name}</dt><dd>{html}</dd></div>" for name, html in items.items())


def report(folder: Path) -> tuple[Path, list[Path]]:
    """Writes the page `folder`/report.html, runs ranked by validation, and PNGs in `folder`/report/; returns both.

    Raises:
        FileNotFoundError: if there is no run in `folder`.
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("a report needs matplotlib, which is not installed; the extra `plots` brings it") from error
    runs = sorted(jobs(folder), key=lambda run: run.metrics.get("val/nelbo", inf))
    names = short(varied(runs))
    settings = [run.settings for run in runs if run.settings]
    same = {name: {text(each, name) for each in settings} for name in (settings or [{}])[0]}
    sets = sorted({text(each, "data._target_").rpartition(".")[2] for each in settings})
    drawing, swept = sweep(runs), []
    for name, head in names.items():
        values = drawing.values(name)
        swept.append(
            f"{head} {', '.join(values) if len(values) < 9 else f'{values[0]} … {values[-1]}, {len(values)} values'}"
        )

    (folder / "report").mkdir(exist_ok=True)
    figures = {folder / "report" / f"{name}.png": chart for name, chart in charts(drawing).items()}
    frames = [plot(*chart, path) for path, chart in figures.items()]
    if any(run.settings for run in runs):
        frames.insert(1, table_of_points(runs, {name: head for name, head in names.items() if name != "seed"}))
    best = runs[0].metrics
    tiles = {
        "best NELBO on validation, nats": figure("val/nelbo", best.get("val/nelbo")).html,
        "the same in bits/dim": figure("val/bits_per_dim", best.get("val/bits_per_dim")).html,
        **{state: str(sum(run.state == state for run in runs)) for state in ("done", "failed", "unfinished")},
    }
    pictured = [run for run in runs if (run.folder / "reconstructions.png").exists()]
    shared = {name: found for name, (found, *more) in same.items() if not more}
    page = Template((files("vlae") / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(folder.resolve().name),
        heading=re.sub("([,._=])", r"\1<wbr>", escape(folder.resolve().name)),  # may break there
        swept=f"{' &times; '.join(map(escape, swept)) or 'One model'} on {escape(', '.join(sets) or 'no data')}",
        tiles=defined(tiles),
        plots="".join(frames),
        runs=table_of_runs(runs, names, folder),
        cards="".join(card(run, names, f"run-{k}") for k, run in enumerate(pictured)),
        settings=defined({escape(name): escape(value) for name, value in shared.items()}),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path, list(figures)
