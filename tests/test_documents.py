"""What README, records, weights and notebooks say is true: the code runs, the figures are those of the records."""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from runpy import run_path
from statistics import mean, stdev

import nbformat
import pytest
import torch
from jupyter_client import KernelManager
from nbclient import NotebookClient
from safetensors import safe_open

import vlae

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLES = ROOT / "results" / "tables"
TRAINED = sorted(path for path in TABLES.glob("*.json") if "_nll" not in path.name)
RECORDS = [*sorted((ROOT / "results").glob("*.json")), *TRAINED]
FIELDS = {
    "name",
    "command",
    "commit",
    "date",
    "hardware",
    "data",
    "split",
    "binarisation",
    "seed",
    "parameters",
    "steps",
    "images_seen",
    "wall_s",
    "metrics",
}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
@pytest.mark.usefixtures("unchecked")
def test_readme_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_is_whole(path: Path) -> None:
    record = json.loads(path.read_text())
    assert set(record) == FIELDS
    name = str(path.relative_to(ROOT / "results").with_suffix(""))
    assert record["name"] == name
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), "measured from files that no commit holds"
    assert (ROOT / "conf" / "data" / f"{record['data']}.yaml").exists()
    export = f" export .* {path.stem.removesuffix('_weights')}$"
    assert re.search(rf" record={name}( |$)|{export}", record["command"])
    for name in ("rate", "distortion", "nelbo", "bits_per_dim"):
        assert isinstance(record["metrics"][f"{record['split']}/{name}"], float)


def test_readme_tables_agree_with_records() -> None:
    # | what | [name](results/name.json) | nelbo | rate | distortion | ...
    rows = re.findall(r"^\|[^|]*\| \[(\w+)\]\(results/\1\.json\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.M)
    assert rows
    for name, *shown in rows:
        metrics = json.loads((ROOT / "results" / f"{name}.json").read_text())["metrics"]
        assert shown == [f"{metrics[f'test/{figure}']:.2f}" for figure in ("nelbo", "rate", "distortion")]


def test_readme_tables_of_binary_images_agree_with_their_records() -> None:
    """And each record has its row, of its own name and settings."""
    made = run_path(str(ROOT / "benchmarks" / "tables.py"))
    text = README.partition(made["BEGIN"])[2].partition(made["END"])[0]
    assert text == f"\n{made['tables']()}\n", "python benchmarks/tables.py --readme"
    rows = [row.split(" | ") for row in re.findall(r"^\| (.* \| \[training\]\(.*) \|$", text, re.M)]
    linked = [re.findall(r"results/tables/(\w+)\.json", row[1]) for row in rows]
    assert sorted(name for names in linked for name in names) == sorted(path.stem for path in TABLES.glob("*.json"))
    for (label, _, *cells), (name, *more) in zip(rows, linked, strict=True):
        record = json.loads((TABLES / f"{name}.json").read_text())
        row = made["ROWS"][name.removesuffix(f"_{record['seed']}")]
        assert label.removesuffix(f", seed {record['seed']}") == row.label
        assert f"train.py {row.overrides} data.train_on_validation=true seed={record['seed']} " in record["command"]
        scored = {each: json.loads((TABLES / f"{each}.json").read_text()) for each in more}
        for each in scored.values():
            assert re.fullmatch(r"[0-9a-f]{40}", each["commit"])
            assert f"evaluate runs/tables/{name} " in each["command"]
            assert (each["data"], each["split"], each["seed"]) == (record["data"], "test", record["seed"])
        whole = scored.get(f"{name}_nll")
        bounds, trained = (whole or record)["metrics"], record["metrics"]
        bound = bounds["test/nelbo"]
        assert abs(bound - trained["test/nelbo"]) < 0.2  # of other noise, and of the same weights
        expected = [f"{bounds[f'test/{figure}']:.2f}" for figure in ("nelbo", "rate", "distortion")]
        if whole:
            found = whole["metrics"]
            expected.append(f"{found['test/nll']:.2f}±{found['test/nll_standard_error']:.2f}")
            expected.append(f"{whole['samples']:,} x {whole['images']:,}")
        else:
            expected += ["", ""]
        if part := scored.get(f"{name}_nll_part"):
            found = part["metrics"]
            nll = bound - found["test/nelbo"] + found["test/nll"]
            expected.append(f"{nll:.2f}±{found['test/gap_standard_error']:.2f}")
            expected.append(f"{part['samples']:,} x {part['images']:,}")
        else:
            expected += ["", ""]
        assert cells == [*expected, f"{record['parameters']:,}", f"{record['images_seen']:,}"]


def test_tables_of_ablations_agree_with_their_lines() -> None:
    text = (ROOT / "results" / "ablations.md").read_text()
    assert text == run_path(str(ROOT / "benchmarks" / "tables.py"))["ablated"](), "python benchmarks/tables.py --readme"
    files, tables = [*(ROOT / "results").glob("ablations*.jsonl")], text.split("\n## ")[1:]
    assert len(tables) == len(files)
    for file in files:
        (table,) = (table for table in tables if f"({file.name})" in table)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        rows = re.findall(r"^\| (nothing|`[^|]*=[^|]*`) \| ((?:[\d.]+ \| ){5}[\d,]+) \|$", table, re.M)
        assert len(rows) == len({line["change"] for line in lines}) == len(lines)
        for (change, cells), line in zip(rows, lines, strict=True):
            figures = [f"{line[x]:.2f}" for x in ("nelbo", "rate", "distortion", "nelbo_of_500", "nll_of_500")]
            assert cells.split(" | ") == [*figures, f"{line['parameters']:,}"]
            assert change.strip("`") == (line["change"] or "nothing")
            same = "experiment", "seed", "epochs", "precision", "images_seen", "hardware", "commit"
            assert [line[x] for x in same] == [lines[0][x] for x in same]
            images = {"mnist_static": 50_000, "caltech101": 4_100}[line["experiment"]]
            assert 0 <= 1 - line["images_seen"] / (images * line["epochs"]) < 0.002  # but for a last, unfilled batch
            assert f"`experiment={line['experiment']}`" in table
            assert re.fullmatch(r"[0-9a-f]{40}", line["commit"])


def test_readme_tables_of_the_sweep_agree_with_its_jobs() -> None:
    lines = [json.loads(line) for line in (ROOT / "results/digits_sweep/jobs.jsonl").read_text().splitlines()]
    assert len({json.dumps(line["settings"]) for line in lines}) == 40
    values: dict[tuple[str, int, str], list[float]] = {}
    for line in lines:
        window, depth, _ = (line["settings"][name] for name in sorted(line["settings"]))
        for name in ("nelbo", "rate"):
            values.setdefault((name, depth, window), []).append(line["metrics"][f"test/{name}"])
    shown = re.findall(r"^\| prior depth \| (.*) \|\n.*\n((?:\| \d \| .*\n)+)", README, re.M)
    for name, (windows, rows) in zip(("nelbo", "rate"), shown, strict=True):
        for row in rows.splitlines():
            depth, *cells = row.strip("| ").split(" | ")
            found = [values[name, int(depth), window] for window in windows.split(" | ")]
            assert cells == [f"{mean(each):.2f}±{stdev(each):.2f}" for each in found]


def test_readme_table_of_colour_windows_agrees_with_its_lines() -> None:
    lines = [json.loads(line) for line in (ROOT / "results/windows.jsonl").read_text().splitlines()]
    rows = re.findall(r"^\| (\d+x\d+(?: grey)?) \| (\d+ \| [\d.]+ \| .*) \|$", README, re.M)
    assert [window for window, _ in rows] == ["4x2", "5x3", "7x4", "7x4 grey"]
    for (window, cells), line in zip(rows, lines, strict=True):
        part, kept, chance = line["part"], line["kept"], line["kept_by_chance"]
        shown = [str(line["visible_pixels"]), *(f"{line[name]:.1f}" for name in ("nelbo", "rate", "distortion"))]
        bits = line["nelbo"] / (32 * 32 * 3 * math.log(2))  # the line's own are rounded already
        shown += [f"{x:.3f}" for x in (bits, part["bits_per_dim"], part["nll_bits_per_dim"])]
        shown += [f"{each[of]['correlation']:.2f}" for of in ("luminance", "chroma") for each in (kept, chance)]
        assert (line["window"], cells.split(" | ")) == (window, shown)
        record = json.loads((ROOT / "results" / f"cifar10_small_{window.replace(' ', '_')}.json").read_text())
        assert line["images_seen"] == lines[0]["images_seen"] == record["images_seen"]
        # that was computed in bfloat16
        assert line["bits_per_dim"] == pytest.approx(record["metrics"]["test/bits_per_dim"], rel=5e-3)


def test_readme_table_of_six_epochs_agrees_with_its_lines() -> None:
    lines = [json.loads(line) for line in (ROOT / "results/windows_six_epochs.jsonl").read_text().splitlines()]
    rows = re.findall(r"^\| \[(\w+)\]\(results/\1\.json\) \| (\d+x\d+) \| ([\d.]+ \| .* min) \|$", README, re.M)
    text = " ".join(README.split())
    figures = re.findall(r"(\d+x\d+) ((?:\d\.\d{3}, ){5}\d\.\d{3})", text)
    curves = {window: values.split(", ") for window, values in figures}
    last = re.search(r"training loss of the last epoch, ([\d.]+) and ([\d.]+)", text)
    assert last
    for (name, window, cells), line, training in zip(rows, lines, last.groups(), strict=True):
        shown = [f"{x:.3f}" for x in (line["bits_per_dim"], line["part"]["nll_bits_per_dim"])]
        shown += [f"{line[figure]:.1f}" for figure in ("rate", "distortion")]
        for part in ("luminance", "chroma", "roughness"):
            shown.append(", ".join(f"{line[of][part]['correlation']:.2f}" for of in ("kept", "kept_by_chance")))
        shown.append(f"{line['training_s'] / 60:.0f} min")
        assert (line["window"], cells.split(" | ")) == (window, shown)
        record = json.loads((ROOT / "results" / f"{name}.json").read_text())
        assert (line["images_seen"], line["training_s"]) == (record["images_seen"], record["wall_s"])
        for figure in ("rate", "distortion", "bits_per_dim"):
            assert line[figure] == pytest.approx(record["metrics"][f"test/{figure}"], rel=1e-4)
        log = (ROOT / "results/cifar10_six_epochs" / f"log_{window}.jsonl").read_text().splitlines()
        steps = [json.loads(step) for step in log]
        validated = [step for step in steps if "val/bits_per_dim" in step]
        assert curves[window] == [f"{step['val/bits_per_dim']:.3f}" for step in validated]
        late = [step for step in steps if step["step"] > validated[-2]["step"] and "train/bits_per_dim" in step]
        assert f"{mean(step['train/bits_per_dim'] for step in late):.3f}" == training


def test_readme_table_of_rooflines_agrees_with_its_lines() -> None:
    lines = [json.loads(line) for line in (ROOT / "results/roofline.jsonl").read_text().splitlines()]
    rows = [row.split(" | ") for row in re.findall(r"^\| (colour(?:_small)? \| (?:yes|no) \| .*) \|$", README, re.M)]
    expected = []
    for line in sorted(lines, key=lambda line: (line["model"], line["compile"])):
        shares = [line["roofline_share"], line["matmul_share"]]
        named = ("encoder", "prior", "trunk", "window", "pixelwise", "likelihood")
        parts = [f"{line['parts'][part]['step_share']:.0%}".replace("%", " %") for part in named]
        figures = [f"{line['images_per_s']:.1f}", *(f"{share:.0%}".replace("%", " %") for share in shares)]
        compiled = "yes" if line["compile"] else "no"
        expected.append([line["model"], compiled, *figures, f"{line['gflop_per_image']:.2f}", *parts])
    assert rows == expected


def test_readme_tables_of_files_agree_with_their_lines() -> None:
    lines = [json.loads(line) for line in (ROOT / "results/codec.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["bench"] == "codec"]
    rows = re.findall(r"^\|[^|]*\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+%) \| (\d+) \| yes \|", README, re.M)
    assert len(rows) == len(lines)
    for line, shown in zip(lines, rows, strict=True):
        assert line["exact"]
        numbers = round(8 * line["bytes"] / line["images"] / line["bits_per_dim"])  # of an image; that is rounded
        bits = f"{8 * line['bytes'] / line['images'] / numbers:.4f}", f"{line['nelbo_bits_per_dim']:.4f}"
        overhead = f"{Decimal(str(line['overhead'])):.2%}"  # a half as it stands there, not as a float has it
        assert shown == (f"{line['images']:,}", *bits, overhead, str(line["initial_bits"]))
    rows = re.findall(r"^\| [^|]*, [\d,]+ \|((?: [\d,]+ \|){5})$", README, re.M)
    sizes = {tuple(sorted([line["bytes"], *line["sizes"].values()])) for line in lines if line["floats"] == "float32"}
    assert sizes == {tuple(sorted(int(size.replace(",", "")) for size in row.strip(" |").split(" | "))) for row in rows}


def test_shipped_weights_are_small_and_open() -> None:
    path = ROOT / "weights" / "mnist_static.safetensors"
    assert path.stat().st_size <= 8 * 2**20
    with safe_open(path, "pt") as opened:
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}  # noqa: SIM118
    model = vlae.load("mnist_static")
    x = vlae.sample(model, torch.randn(64, 64), torch.rand(64, 1, 28, 28))
    with torch.no_grad():
        nelbo = -model(x, torch.randn(64, 64)).elbo.mean()
    # its own samples cost it what test images do, give or take; other images of as much ink cost far more
    shuffled = x.flatten(1)[:, torch.randperm(784)].view_as(x)
    assert 60 < nelbo < 100 < -model(shuffled, torch.randn(64, 64)).elbo.mean()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One for all notebooks, which import the same slow libraries."""
    manager = KernelManager()
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


FEWER = [("=12,", "=1,"), ("(300, ", "(90, "), ("(500, ", "(100, "), ("(128, ", "(16, ")]
FEWER += [("x[:4].split", "x[:1].split"), ("count in 1, 2, 4, 8:", "count in 1, 2:")]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, kernel: KernelManager) -> None:
    """With fewer epochs, images and turns of loops than shown, as every cell counts here and no figure."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    for cell in notebook.cells:
        for many, few in FEWER:
            cell.source = cell.source.replace(many, few)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # of the notebook before nothing but imports
    client = NotebookClient(notebook, timeout=None, km=kernel)
    client.execute(cleanup_kc=False)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    shown = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "False" not in shown
