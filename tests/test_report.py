"""A sweep's page: its numbers, and how it looks and behaves in a browser."""

import json
import re
import shutil
import subprocess
import sys
from html import escape
from itertools import product
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from vlae.charts import charts, order, sweep
from vlae.figures import save
from vlae.report import report
from vlae.sweeps import jobs

HOSTILE = "<script>document.title = 'owned'</script>"
DEPTHS, WINDOWS = [0, 2, 10], ["none", "4x2", "15x8"]  # neither is in the order of its letters


def leave(folder: Path, rate: float | None, distortion: float = 60.0, reason: str = "", **settings: Any) -> None:
    """What a run leaves behind: done if it has a rate, failed with a reason, or else unfinished."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"data": {"_target_": "vlae.datasets.digits"}, "model": {}, "trainer": {"devices": 1}}
    config |= {key: value for key, value in settings.items() if key not in ("depth", "window")}
    if "depth" in settings:
        config["model"]["prior"] = {"depth": settings["depth"]}
    if "window" in settings:
        config["model"]["decoder"] = {"receptive_field": settings["window"]}
    (folder / "config.json").write_text(json.dumps(config))
    curve = [(step, 90 - step / 10) for step in (10, 20, 30)]
    lines = [{"step": step, "val/nelbo": value, "val/rate": 9.0} for step, value in curve]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if reason:
        (folder / "failed.json").write_text(json.dumps({"reason": reason, "settings": {}}))
        return
    save(np.random.default_rng(0).integers(256, size=(40, 30), dtype=np.uint8), folder / "reconstructions.png")
    if rate is not None:
        nelbo = rate + distortion
        val = {"rate": rate, "distortion": distortion, "nelbo": nelbo, "bits_per_dim": nelbo / 44}
        metrics = {f"val/{name}": value for name, value in val.items()}
        metrics |= {"test/nelbo": 100 - nelbo, "wall_s": 65.2, "steps": 30, "parameters": 5}
        (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def figures(tmp_path: Path) -> np.ndarray:
    """Rate and distortion by depth, window and seed of a sweep below `tmp_path`; of the last two points one failed
    and one has no run that is done."""
    values = np.random.default_rng(0).uniform([5, 60], [15, 70], (len(DEPTHS), len(WINDOWS), 2, 2))
    for (i, depth), (j, window), seed in product(enumerate(DEPTHS), enumerate(WINDOWS), (0, 1)):
        folder, settings = tmp_path / "a&b,c_d=1" / f"{depth},{window},{seed}", {"depth": depth, "window": window}
        if (i, j) == (2, 2):
            values[i, j, seed] = nan
            leave(folder, None, reason=HOSTILE + "\nsecond line" if seed else "", **settings, seed=seed)
        elif (i, j, seed) == (2, 1, 1):
            values[i, j, seed] = nan
            leave(folder.with_name("<img src=x onerror=alert(1)>"), None, reason="no $memory$", **settings, seed=seed)
        else:
            leave(folder, *values[i, j, seed], **settings, seed=seed)
    return values


def test_settings_have_an_order() -> None:
    assert sorted(["15x8", "4x2", "none", "10", "9", "1e-3", "b", "a"], key=order) == [
        *["1e-3", "9", "10", "none", "4x2", "15x8", "a", "b"]
    ]


def test_drawn_numbers(figures: np.ndarray, tmp_path: Path) -> None:
    drawings = charts(sweep(jobs(tmp_path / "a&b,c_d=1")))
    axes = {}
    for name, (_, _, draw) in drawings.items():
        canvas = Figure(layout="constrained")
        axes[name] = canvas.subplots()
        draw(canvas, axes[name])
    assert list(axes) == ["rate_distortion", "nelbo_heat_map", "rate_heat_map", "nelbo_learning", "rate_learning"]

    shown = axes["rate_distortion"]
    curves = [line.get_xydata() for line in shown.lines if len(line.get_xydata()) > 1]
    assert len(curves) == 3
    for depth, curve in zip(figures, curves, strict=True):
        means = np.nanmean(depth[: len(curve)], axis=1)  # nothing is done of the last
        np.testing.assert_allclose(curve, means)
    bars = [segment for each in shown.containers for bar in each[2] for segment in bar.get_segments() if len(segment)]
    sizes = np.sort([np.ptp(bar, axis=0) for bar in bars], axis=0)  # half are level, half upright
    hollow = [each[0].get_markerfacecolor() == "none" for each in shown.containers]
    assert sorted(hollow) == [False] * 7 + [True]  # of one point a run failed
    spreads = figures.std(axis=2, ddof=1).reshape(-1, 2)
    spreads = spreads[~np.isnan(spreads[:, 0])]
    np.testing.assert_allclose(sizes[len(spreads) :], 2 * np.sort(spreads, axis=0))

    for name, values in (("nelbo", figures.sum(-1)), ("rate", figures[..., 0])):
        heat = axes[f"{name}_heat_map"]
        assert [label.get_text() for label in heat.get_xticklabels()] == WINDOWS
        assert [label.get_text() for label in heat.get_yticklabels()] == [str(depth) for depth in DEPTHS]
        words = {each.get_position()[::-1]: each.get_text() for each in heat.texts}
        for i, j in product(range(3), range(3)):
            mean, spread = values[i, j].mean(), values[i, j].std(ddof=1)
            expected = {(2, 1): f"{values[2, 1, 0]:.2f}\nn = 1", (2, 2): words[2, 2]}
            assert words[i, j] == expected.get((i, j), f"{mean:.2f}\n± {spread:.2f}")
        assert words[2, 2] in ("failed", "unfinished")
        np.testing.assert_allclose(heat.images[0].get_array()[:2], values[:2].mean(-1))
    assert len(axes["nelbo_learning"].lines) == 18
    np.testing.assert_array_equal(axes["nelbo_learning"].lines[0].get_xydata(), [(10, 89), (20, 88), (30, 87)])


KINDS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "one": ([{"rate": 9.0}], []),
    "seeds": ([{"rate": 9.0, "seed": 0}, {"rate": 8.0, "seed": 1}], []),
    "numbers": ([{"rate": 9.0 + k, "lr": 10.0**-k} for k in range(4)], ["nelbo_against_lr", "rate_against_lr"]),
    "categories": ([{"rate": 9.0, "kind": kind} for kind in ("$soft", "<hard>", None)], ["nelbo_against_kind"]),
    "lacking": (
        [{"rate": 9.0, "depth": 1}, {"rate": 8.0, "depth": 1, "window": "4x2"}],
        [f"{figure}_against_model.decoder.receptive_field" for figure in ("nelbo", "rate")],
    ),
    "together": ([{"rate": 9.0, "depth": k, "width": 8 * k} for k in (0, 1)], ["nelbo_against_model.prior.depth"]),
    "three": (
        [{"rate": 9.0 - d, "depth": d, "window": w, "lr": r} for d in (0, 1) for w in WINDOWS for r in (0.1, 0.2)],
        ["nelbo_heat_map", "rate_heat_map", "nelbo_against_lr", "rate_against_lr"],
    ),
    "sparse": (
        [{"rate": 9.0, "lr": 0.001 * k, "width": (7 * k) % 23} for k in range(1, 20)],
        ["nelbo_against_lr", "rate_against_width"],
    ),
    "nothing done": ([{"rate": None, "depth": k} for k in (0, 1)], []),
    "all failed": ([{"rate": None, "depth": k, "reason": "ValueError: no"} for k in (0, 1)], []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sweep(kind: str, tmp_path: Path) -> None:
    runs, some = KINDS[kind]
    for number, run in enumerate(runs):
        leave(tmp_path / str(number), **run)
    page, pictures = report(tmp_path)
    assert page == tmp_path / "report.html"
    names = {path.stem for path in pictures}
    learnt = {"nelbo_learning", "rate_learning"}
    assert {*some, *learnt} <= names
    assert ("rate_distortion" in names) == (runs[0]["rate"] is not None)
    if not some:
        assert names <= {"rate_distortion", *learnt}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert page.read_text().count("<svg") == len(pictures)
    assert "<hard>" not in page.read_text()


def test_a_run_that_has_just_begun_flattens_no_curve(tmp_path: Path) -> None:
    for name, steps in (("long", range(10, 100, 10)), ("short", range(5, 10))):
        leave(tmp_path / name, None, depth=len(name))
        lines = [json.dumps({"step": step, "val/nelbo": 900 / step}) for step in steps]
        (tmp_path / name / "log.jsonl").write_text("\n".join([*lines, ""]))
    canvas = Figure()
    charts(sweep(jobs(tmp_path)))["nelbo_learning"][2](canvas, axes := canvas.subplots())
    low, high = axes.get_ylim()
    assert 8 < low < 10
    assert 30 < high < 32


def test_runs_whose_settings_cannot_be_read_are_failed_ones(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("")
    page, _ = report(tmp_path)
    assert '<span class="chip failed">failed</span>' in page.read_text()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no runs in this folder"):
        report(tmp_path)
    assert not list(tmp_path.iterdir())
    leave(tmp_path / "one", 9.0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"needs matplotlib.*extra `plots`"):
        report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


PROBE = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
const click = async (table, name) => {
  const head = [...table.tHead.rows[0].cells].find(each => each.textContent === name);
  head.firstChild.click();
  return [head.getAttribute("aria-sort"), [...table.tBodies[0].rows].map(row => row.cells[head.cellIndex].textContent)];
};
window.addEventListener("load", async () => {
  const runs = [...document.querySelectorAll("table")].at(-1), found = {};
  found.before = [...runs.tBodies[0].rows].map(row => row.cells[3].textContent);
  for (const name of ["NELBO", "receptive_field", "receptive_field", "depth", "state"])
    (found[name] ??= []).push(await click(runs, name));
  const images = [...document.images];
  images.forEach(each => { each.loading = "eager"; });
  await Promise.all(images.map(each => each.decode()));
  found.images = images.map(each => [each.naturalWidth, each.naturalHeight]);
  const root = document.documentElement;
  found.width = [innerWidth, root.scrollWidth, document.body.scrollWidth];
  found.wide = [...document.querySelectorAll(".scroll")].map(each => each.getBoundingClientRect().right);
  found.requests = performance.getEntriesByType("resource").map(each => each.name);
  found.title = document.title;
  found.heading = document.querySelector("h1").innerHTML.replace("&amp;", "&");
  found.errors = errors;
  parent.postMessage(found, "*");
});
</script>
"""
FRAMES = """
<meta charset="utf-8">
<pre></pre>
<iframe src="probe.html" width="1280" height="900"></iframe>
<iframe src="probe.html" width="390" height="800"></iframe>
<script>
const found = [];
window.addEventListener("message", event => {
  found.push(event.data);
  if (found.length === 2) document.querySelector("pre").textContent = JSON.stringify(found);
});
</script>
"""


def test_in_a_browser(figures: np.ndarray, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser: chromium, chromium-browser and google-chrome are not installed")
    page, pictures = report(tmp_path / "a&b,c_d=1")
    html = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,|#)", html)
    assert not re.search(r"url\((?!#)|@import", html)
    for hostile in (HOSTILE, "<img src=x"):
        assert hostile not in html
        assert escape(hostile) in html

    (tmp_path / "probe.html").write_text(html.replace("<style>", PROBE + "<style>", 1))
    (tmp_path / "frames.html").write_text(FRAMES)
    line = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    line += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*line, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, [each for each in done.stderr.splitlines() if "CONSOLE" in each]
    text = re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert text, done.stderr[-500:]
    found = json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert [each["width"][0] for each in found] in ([1280, 390], [390, 1280])

    nelbo = np.sort(figures.sum(-1).ravel())  # what is not there comes last
    ranked = [f"{value:.2f}" for value in nelbo[: (~np.isnan(nelbo)).sum()]] + ["\N{EN DASH}"] * 3
    backwards = ranked[:-3][::-1] + ranked[-3:]
    for each in found:
        inner, *content = each["width"]
        assert max(content) <= inner
        assert max(each["wide"]) <= inner
        assert each["requests"] == each["errors"] == []
        assert each["title"] == "a&b,c_d=1"
        assert each["heading"] == "a&b,<wbr>c_<wbr>d=<wbr>1"
        assert each["before"] == ranked
        assert each["NELBO"] == [["descending", backwards]]
        windows = [window for window in WINDOWS for _ in range(6)]
        assert each["receptive_field"] == [["ascending", windows], ["descending", windows[::-1]]]
        assert each["depth"] == [["ascending", [str(depth) for depth in DEPTHS for _ in range(6)]]]
        assert each["state"] == [["ascending", ["done"] * 15 + ["failed"] * 2 + ["unfinished"]]]
        assert each["images"] == [[30, 40]] * 16
    assert [path.parent for path in pictures] == [tmp_path / "a&b,c_d=1" / "report"] * 5
