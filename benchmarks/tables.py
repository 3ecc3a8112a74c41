"""README's tables of binary images: trains named rows, scores them, and writes the tables from what was kept.

    python benchmarks/tables.py mnist_static_vlae --seed 1 --samples 128     # a row, or several
    python benchmarks/tables.py mnist_static_vlae --seed 1 --images 1000     # then 4,096 samples of some images
    python benchmarks/tables.py all                                          # days on a processor
    python benchmarks/tables.py --readme                                     # only writes the tables

A row is trained by `train.py` in runs/tables/ROW_SEED, on training and validation images as the paper's are; an
interrupted one goes on there. It is scored by `python -m vlae evaluate` on the whole test split or on `--images` of it,
the same for all rows. Kept are results/tables/ROW_SEED.json (the record of training and of the one-sample bound),
ROW_SEED_nll.json and ROW_SEED_nll_part.json (the records of the importance-sampled NLL of all images and of a part)
and ROW_SEED.png (the learning curves). What is kept is not made again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "tables"


class Row(NamedTuple):
    label: str
    overrides: str


ROWS = {
    "mnist_static_decoder": Row("decoder alone: window, no code", "experiment=mnist_static model.code=0"),
    "mnist_static_plain": Row(
        "no window, Gaussian prior", "experiment=mnist_static model.decoder.receptive_field=none model.prior.depth=0"
    ),
    "mnist_static_plain_af": Row("no window, AF prior", "experiment=mnist_static model.decoder.receptive_field=none"),
    "mnist_static_gauss": Row("window, Gaussian prior", "experiment=mnist_static model.prior.depth=0"),
    "mnist_static_iaf": Row(
        "window, IAF posterior", "experiment=mnist_static model.prior.depth=0 model.encoder.posterior=iaf"
    ),
    "mnist_static_vlae": Row("VLAE: window, AF prior", "experiment=mnist_static"),
    "mnist_static_paper": Row("VLAE of the paper's own sizes and decoder", "experiment=mnist_static model=paper"),
    "mnist_decoder": Row("decoder alone", "experiment=mnist model.code=0"),
    "mnist_vlae": Row("VLAE", "experiment=mnist"),
    "caltech101_decoder": Row("decoder alone", "experiment=caltech101 model.code=0"),
    "caltech101_vlae": Row("VLAE", "experiment=caltech101"),
    "caltech101_dropout": Row("VLAE, dropout 0.2", "experiment=caltech101 model.decoder.dropout=0.2"),
    "omniglot_original_decoder": Row("decoder alone", "experiment=omniglot_original model.code=0"),
    "omniglot_original_plain": Row(
        "plain VAE", "experiment=omniglot_original model.decoder.receptive_field=none model.prior.depth=0"
    ),
    "omniglot_original_vlae": Row("VLAE", "experiment=omniglot_original"),
}
PUBLISHED = {  # label, NLL in nats as printed, how it was estimated
    "mnist_static": [
        ("DRAW (2015)", "< 80.97", "bound"),
        ("IAF VAE, as VLAE reports it (2017)", "79.88", "IS"),
        ("AF VAE (VLAE, 2017)", "79.30", "IS, 4,096"),
        ("VLAE (2017)", "79.03", "IS, 4,096"),
        ("PixelVAE, gated, no up-sampling (2017)", "79.02", "IS, 1,000"),
        ("PixelVAE with a RealNVP prior (2019)", "79.01", "IS"),
        ("BIVA (2019)", "78.59", "IS"),
    ],
    "mnist": [
        ("decoder alone (VLAE, 2017)", "87.55", "exact"),
        ("IAF VAE (2016)", "79.10", "IS, 128"),
        ("VLAE (2017)", "78.53", "IS, 4,096"),
        ("ResNet VAE with a RealNVP prior (2019)", "78.49", "IS"),
        ("NVAE (2020)", "78.01", "IS, 1,000"),
        ("LMConv, eight orders, 60,000 images (2020)", "77.58", "exact"),
    ],
    "caltech101": [
        ("Discrete VAE (2017)", "97.6", "IS"),
        ("decoder alone (VLAE, 2017)", "89.26", "exact"),
        ("VLAE (2017)", "77.36", "IS, 4,096"),
    ],
}
TITLES = {
    "mnist_static": "Static MNIST, 60,000 training images",
    "mnist": "Dynamic MNIST, 60,000 training images",
    "caltech101": "Caltech-101 silhouettes, 6,364 training images",
    "omniglot_original": "OMNIGLOT's originals, 24,345 training images; not comparable with published figures",
}
BEGIN, END = "<!-- tables: python benchmarks/tables.py --readme -->\n", "<!-- end of tables -->\n"


def read(path: Path) -> dict[str, Any]:
    """A record, empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def train(row: str, seed: int) -> Path:
    """Trains a row or goes on with it; the folder of the run."""
    name = f"{row}_{seed}"
    folder = Path("runs") / "tables" / name
    if not (KEPT / f"{name}.json").exists():
        own = ["data.train_on_validation=true", f"seed={seed}", f"record=tables/{name}", f"folder={folder}"]
        quiet = ["wandb.mode=disabled", "trainer.enable_progress_bar=false"]
        subprocess.run([sys.executable, "train.py", *ROWS[row].overrides.split(), *own, *quiet], cwd=ROOT, check=True)
        shutil.copy(ROOT / folder / "learning_curves.png", KEPT / f"{name}.png")
    return folder


def score(folder: Path, samples: int, images: int | None, ranks: int) -> None:
    """Estimates the NLL of a row or goes on with it, by so many processes."""
    kept = KEPT / f"{folder.name}_nll{'' if images is None else '_part'}.json"
    old = read(kept)
    if old and old["samples"] >= samples and old["images"] >= (images or 0):
        return
    start = [sys.executable, "-m"]
    environment = dict(os.environ)
    if ranks > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
        environment["OMP_NUM_THREADS"] = "1"
    part = [] if images is None else ["--images", str(images)]
    command = [*start, "vlae", "evaluate", str(folder), "--samples", str(samples), *part]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    shutil.move(ROOT / folder / "evaluate.json", kept)  # or it would stand in the way of the other


HEAD = "model", "records", "bound", "rate", "distortion", "NLL", "K", "NLL of a part", "K", "parameters", "images seen"


def line(label: str, name: str) -> list[str]:
    """The cells of one run."""
    records = {kind: read(KEPT / f"{name}{kind}.json") for kind in ("", "_nll", "_nll_part")}
    links = {"": "training", "_nll": "NLL", "_nll_part": "part"}
    cells = [
        label,
        ", ".join(f"[{links[kind]}](results/tables/{name}{kind}.json)" for kind in records if records[kind]),
    ]
    trained = records.pop("")
    cells += [f"{trained['metrics'][f'test/{figure}']:.2f}" for figure in ("nelbo", "rate", "distortion")]
    for scored in records.values():
        nll = scored.get("metrics", {})
        error = f"±{nll['test/nll_standard_error']:.2f}" if nll else ""
        cells += [f"{nll['test/nll']:.2f}{error}", f"{scored['samples']:,} x {scored['images']:,}"] if nll else ["", ""]
    return [*cells, *(f"{trained[figure]:,}" for figure in ("parameters", "images_seen"))]


def tables() -> str:
    """The tables in Markdown, of the rows that are done, beside what was published."""
    texts = []
    for data, title in TITLES.items():
        cells = []
        for row, (label, overrides) in ROWS.items():
            done = sorted(KEPT.glob(f"{row}_[0-9].json")) if overrides.split()[0] == f"experiment={data}" else []
            seeds = [f", seed {file.stem[-1]}" if len(done) > 1 else "" for file in done]
            cells += [line(label + seed, file.stem) for file, seed in zip(done, seeds, strict=True)]
        if cells:
            published = [
                [f"*{label}*", "published", "", "", "", nll, kind] for label, nll, kind in PUBLISHED.get(data, [])
            ]
            rows = [HEAD, ["---"] * len(HEAD), *cells, *published]
            lines = ["| " + " | ".join([*row, *[""] * (len(HEAD) - len(row))]) + " |" for row in rows]
            texts.append("\n".join([f"**{title}**, test split, nats an image:", "", *lines, ""]))
    return "\n".join(texts)


def ablations() -> str:
    """The table of what `benchmarks/ablations.py --out results/ablations.jsonl` measured."""
    file = KEPT.parent / "ablations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not lines:
        return ""
    head = ["changed", "bound", "rate", "distortion", "bound of 500", "NLL of 500", "parameters"]
    rows = [head, ["---"] * len(head)]
    for each in lines:
        figures = [f"{each[name]:.2f}" for name in ("nelbo", "rate", "distortion", "nelbo_of_500", "nll_of_500")]
        rows.append([f"`{each['change']}`" if each["change"] else "nothing", *figures, f"{each['parameters']:,}"])
    return "\n".join(
        [
            "**What the number hinges on**: `experiment=mnist_static` with one setting changed, each run on",
            f"{lines[0]['images_seen']:,} training images; validation split, nats an image; NLL with 64 samples of the",
            "same 500 images ([lines](results/ablations.jsonl)):",
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all, or of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, choices=range(10))
    parser.add_argument("--samples", type=int, default=4096, help="codes an image of the NLL")
    parser.add_argument("--images", type=int, help="of the test split, drawn by seed, instead of all")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the images of the NLL")
    parser.add_argument("--readme", action="store_true", help="write README's tables, and train nothing")
    arguments = parser.parse_args()
    rows = [*ROWS] if arguments.rows == ["all"] else arguments.rows
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if bool(rows) == arguments.readme:
        parser.error("name rows, or give --readme")
    KEPT.mkdir(parents=True, exist_ok=True)
    readme = ROOT / "README.md"
    if [readme.read_text().count(mark) for mark in (BEGIN, END)] != [1, 1]:
        parser.error(f"{readme}: needs the lines {BEGIN.strip()} and {END.strip()}, once each")
    for row in rows:
        score(train(row, arguments.seed), arguments.samples, arguments.images, arguments.ranks)
    before, _, rest = readme.read_text().partition(BEGIN)
    made = "\n".join(text for text in (tables(), ablations()) if text)
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
