"""README's tables of binary images: trains named rows, scores them, and writes the tables from what was kept.

    python benchmarks/tables.py mnist_static_vlae --seed 1 --samples 128     # a row, or several
    python benchmarks/tables.py mnist_static_vlae --seed 1 --images 1000     # then 4,096 samples of some images
    python benchmarks/tables.py all                                          # days on a processor
    python benchmarks/tables.py --readme             # only writes the tables, and those of results/ablations.md

A row is trained by `train.py` in runs/tables/ROW_SEED, on training and validation images as the paper's are; an
interrupted one goes on there. Training is compiled, which needs a C++ compiler; a processor without AMX may train
faster with `--precision 32-true`, which the record tells. It is scored by `python -m vlae evaluate` on the whole test
split or on `--images` of it, the same for all rows. Kept are results/tables/ROW_SEED.json (the record of training and
of the one-sample bound), ROW_SEED_nll.json and ROW_SEED_nll_part.json (the records of the importance-sampled NLL of
all images and of a part) and ROW_SEED.png (the learning curves). What is kept is not made again, nor replaced by a
score of fewer samples or images.
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
PRECISION = "bf16-mixed"  # of training, if none is asked for


class Row(NamedTuple):
    label: str
    overrides: str


LADDER = "experiment=mnist_static trainer.max_epochs=8"  # equal images for what differs in one part
ROWS = {
    "mnist_static_decoder": Row("decoder alone: window, no code", f"{LADDER} model.code=0"),
    "mnist_static_plain": Row(
        "no window, Gaussian prior", f"{LADDER} model.decoder.receptive_field=none model.prior.depth=0"
    ),
    "mnist_static_plain_af": Row("no window, AF prior", f"{LADDER} model.decoder.receptive_field=none"),
    "mnist_static_gauss": Row("window, Gaussian prior", f"{LADDER} model.prior.depth=0"),
    "mnist_static_iaf": Row("window, IAF posterior", f"{LADDER} model.prior.depth=0 model.encoder.posterior=iaf"),
    "mnist_static_af": Row("window, AF prior: the VLAE", LADDER),
    "mnist_static_paper": Row("VLAE of the paper's own sizes and decoder", f"{LADDER} model=paper"),
    "mnist_static_vlae": Row("VLAE, 16 epochs", "experiment=mnist_static"),
    "mnist_static_long": Row("VLAE, 24 epochs", "experiment=mnist_static trainer.max_epochs=24"),
    "mnist_static_longer": Row("VLAE, 32 epochs", "experiment=mnist_static trainer.max_epochs=32"),
    "mnist_static_large": Row("VLAE, larger decoder, 16 epochs", "experiment=mnist_static model=binary_large"),
    "mnist_decoder": Row("decoder alone, 16 epochs", "experiment=mnist model.code=0"),
    "mnist_vlae": Row("VLAE, 16 epochs", "experiment=mnist"),
    "mnist_long": Row("VLAE, 48 epochs", "experiment=mnist trainer.max_epochs=48"),
    "mnist_large": Row("VLAE, larger decoder, 16 epochs", "experiment=mnist model=binary_large"),
    "caltech101_decoder": Row("decoder alone", "experiment=caltech101 model.code=0"),
    "caltech101_vlae": Row("VLAE", "experiment=caltech101"),
    "caltech101_dropout": Row("VLAE, dropout 0.5", "experiment=caltech101 model.decoder.dropout=0.5"),
    "omniglot_original_decoder": Row("decoder alone", "experiment=omniglot_original model.code=0"),
    "omniglot_original_plain": Row(
        "plain VAE", "experiment=omniglot_original model.decoder.receptive_field=none model.prior.depth=0"
    ),
    "omniglot_original_vlae": Row("VLAE", "experiment=omniglot_original"),
}
PUBLISHED = {  # label, rate and NLL in nats as printed, how it was estimated
    "mnist_static": [
        ("DRAW (2015)", "", "< 80.97", "bound"),
        ("IAF VAE, as VLAE reports it (2017)", "", "79.88", "IS"),
        ("AF VAE (VLAE, 2017)", "", "79.30", "IS, 4,096"),
        ("PixelRNN (2016)", "0", "79.20", "exact"),
        ("VLAE (2017)", "13.3", "79.03", "IS, 4,096"),
        ("PixelVAE, gated, no up-sampling (2017)", "", "about 79.02", "IS, 1,000"),
        ("PixelVAE with a RealNVP prior (2019)", "", "79.01", "IS"),
        ("BIVA, as cited with RealNVP priors (2019)", "", "78.59", "not stated"),
        ("PixelVAE++ (2019)", "", "78.00", "unverified"),
    ],
    "mnist": [
        ("decoder alone (VLAE, 2017)", "0", "87.55", "exact"),
        ("Gaussian prior (VLAE, appendix D, 2017)", "10.60", "79.48", "IS, 4,096"),
        ("IAF VAE (2016)", "", "79.10", "IS, 128"),
        ("AF prior (VLAE, appendix D, 2017)", "11.73", "78.94", "IS, 4,096"),
        ("VLAE (2017)", "", "78.53", "IS, 4,096"),
        ("ResNet VAE with a RealNVP prior (2019)", "", "78.49", "IS"),
        ("NVAE without flows (2020)", "", "78.01", "IS, 1,000"),
        ("LMConv, eight orders, 60,000 images (2020)", "0", "77.58", "exact"),
        ("CR-NVAE, with augmentation (2021)", "", "76.93", "unverified"),
        ("MISVAE, mixtures of posteriors (2024)", "", "76.67", "IS"),
    ],
    "caltech101": [
        ("Discrete VAE (2017)", "", "97.6", "not stated"),
        ("decoder alone (VLAE, 2017)", "0", "89.26", "exact"),
        ("SpARN, as VLAE reports it (2015)", "", "88.48", "not stated"),
        ("DVAE++ (2018)", "", "81.88", "unverified"),
        ("VLAE (2017)", "", "77.36", "IS, 4,096"),
    ],
}
TITLES = {  # and the training images of ours
    "mnist_static": ("Static MNIST", "60,000"),
    "mnist": ("Dynamic MNIST", "60,000"),
    "caltech101": ("Caltech-101 silhouettes", "6,364"),
    "omniglot_original": ("OMNIGLOT's originals (not comparable with published figures)", "24,345"),
}
BEGIN, END = "<!-- tables: python benchmarks/tables.py --readme -->\n", "<!-- end of tables -->\n"


def read(path: Path) -> dict[str, Any]:
    """A record, empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def train(row: str, seed: int, precision: str) -> Path:
    """Trains a row or goes on with it; the folder of the run."""
    name = f"{row}_{seed}"
    folder = Path("runs") / "tables" / name
    record, curves = KEPT / f"{name}.json", KEPT / f"{name}.png"
    if not record.exists():
        asked, begun = f"{ROWS[row].overrides} trainer.precision={precision}", ROOT / f"{folder}.txt"
        if (ROOT / folder).exists() and begun.exists() and begun.read_text() != asked:
            sys.exit(f"{folder}: begun as `{begun.read_text()}`, cannot go on as `{asked}`; remove it to train anew")
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(asked)
        own = ["data.train_on_validation=true", f"seed={seed}", f"record=tables/{name}", f"folder={folder}"]
        own += [f"trainer.precision={precision}"]
        quiet = ["compile=true", "wandb.mode=disabled", "trainer.enable_progress_bar=false"]
        subprocess.run([sys.executable, "train.py", *ROWS[row].overrides.split(), *own, *quiet], cwd=ROOT, check=True)
        if not record.exists():
            sys.exit(f"{record}: not there, and {folder} is finished; remove the folder to train again")
    drawn = ROOT / folder / "learning_curves.png"  # not without matplotlib
    if drawn.exists() and not curves.exists():
        shutil.copy(drawn, curves)
    return folder


def score(row: str, folder: Path, samples: int, images: int | None, ranks: int) -> None:
    """Estimates the NLL of a row or goes on with it, by so many processes."""
    from vlae.evaluation import refuse_loss  # torch, for which --readme need not wait

    if "model.code=0" in ROWS[row].overrides:  # one sample is exact
        samples, images = 1, None
    kept = KEPT / f"{folder.name}_nll{'' if images is None else '_part'}.json"
    if old := read(kept):
        if old["samples"] >= samples and old["images"] >= (images or 0):
            return
        try:
            refuse_loss(kept, samples, images or old["images"], split="test")
        except ValueError as error:
            sys.exit(str(error))
    if not (ROOT / folder).exists():
        print(f"{folder}: no run here to score; remove {KEPT / folder.name}.json to train it again", file=sys.stderr)
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


COLUMNS = "model | records | bound | rate | distortion | NLL | K | NLL by gap of a part | K | parameters | images seen"
HEAD = COLUMNS.split(" | ")


def line(label: str, name: str) -> list[str]:
    """The cells of one run. Of a part the gap between bound and NLL alone is taken: images differ far less in it."""
    files = {"training": "", "NLL": "_nll", "part": "_nll_part"}
    records = {text: read(KEPT / f"{name}{kind}.json") for text, kind in files.items()}
    links = [f"[{text}](results/tables/{name}{files[text]}.json)" for text in records if records[text]]
    trained, whole, part = records.values()
    bounds = (whole or trained)["metrics"]
    cells = [f"{bounds[f'test/{figure}']:.2f}" for figure in ("nelbo", "rate", "distortion")]
    for scored, figure in ((whole, "nll"), (part, "gap")):
        if not scored:
            cells += ["", ""]
            continue
        value, error = (scored["metrics"][f"test/{figure}{kind}"] for kind in ("", "_standard_error"))
        nll = bounds["test/nelbo"] - value if figure == "gap" else value
        cells += [f"{nll:.2f}±{error:.2f}", f"{scored['samples']:,} x {scored['images']:,}"]
    return [label, ", ".join(links), *cells, *(f"{trained[figure]:,}" for figure in ("parameters", "images_seen"))]


def markdown(about: str, head: list[str], rows: list[list[str]]) -> str:
    """A table under what it is about; short rows end in empty cells."""
    filled = [[*row, *[""] * (len(head) - len(row))] for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([about, "", *("| " + " | ".join(row) + " |" for row in filled), ""])


def tables() -> str:
    """The tables in Markdown, of the rows that are done, beside what was published."""
    texts = []
    for data, (title, seen) in TITLES.items():
        cells = []
        for row, (label, overrides) in ROWS.items():
            done = sorted(KEPT.glob(f"{row}_[0-9].json")) if overrides.split()[0] == f"experiment={data}" else []
            seeds = [f", seed {file.stem[-1]}" if len(done) > 1 else "" for file in done]
            cells += [line(label + seed, file.stem) for file, seed in zip(done, seeds, strict=True)]
        if cells:
            published = [
                [f"*{label}*", "published", "", rate, "", nll, kind]
                for label, rate, nll, kind in PUBLISHED.get(data, [])
            ]
            about = f"**{title}**, test split, nats an image; ours learnt from {seen} images:"
            texts.append(markdown(about, HEAD, [*cells, *published]))
    return "\n".join(texts)


def ablations(file: Path, lines: list[dict[str, Any]]) -> str:
    """The table of the lines of `benchmarks/ablations.py --out FILE`."""
    head = ["changed", "bound", "rate", "distortion", "bound of 500", "NLL of 500", "parameters"]
    rows = []
    for each in lines:
        figures = [f"{each[name]:.2f}" for name in ("nelbo", "rate", "distortion", "nelbo_of_500", "nll_of_500")]
        rows.append([f"`{each['change']}`" if each["change"] else "nothing", *figures, f"{each['parameters']:,}"])
    first = lines[0]
    commit, precision, out = first["commit"][:7], first["precision"], f"results/{file.name}"
    experiment = first["experiment"]
    options = "" if experiment == "mnist_static" else f"--experiment {experiment} "  # older commits lack the option
    options += f"--epochs {first['epochs']}" + ("" if precision == PRECISION else f" --precision {precision}")
    options += f" --seed {first['seed']}" if first["seed"] else ""
    about = f"""## {first["epochs"]} epochs of `experiment={experiment}`

Settings changed in that experiment of commit {commit}, seed {first["seed"]}, {precision}, {first["hardware"]}. By

    python benchmarks/ablations.py {options} --out {out} --changes CHANGE...

([lines]({file.name})):"""
    return markdown(about, head, rows)


ABLATIONS = """# What the number hinges on

One setting of an experiment changed at a time, equal images of the training split seen, the best epoch by the bound.
Validation split, nats an image: *bound* is of one code an image, without free nats; *NLL* is importance-sampled, with
64 codes for each of the same 500 images. What they say stands in the [README](../README.md). Written by
`python benchmarks/tables.py --readme`.
"""


def ablated() -> str:
    """results/ablations.md: a table for each results/ablations*.jsonl with lines."""
    files = sorted(KEPT.parent.glob("ablations*.jsonl"))
    all_lines = [(file, [json.loads(line) for line in file.read_text().splitlines()]) for file in files]
    measured = [(file, lines) for file, lines in all_lines if lines]
    sets = [*TITLES, *(lines[0]["experiment"] for _, lines in measured)]
    measured.sort(key=lambda each: (sets.index(each[1][0]["experiment"]), each[1][0]["epochs"]))
    return "\n".join([ABLATIONS, *(ablations(*each) for each in measured)])


def write(readme: Path) -> None:
    """README's tables, between the two marks, and those of the ablations."""
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}")
    (KEPT.parent / "ablations.md").write_text(ablated())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all, or of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0, choices=range(10))
    parser.add_argument("--samples", type=int, default=4096, help="codes an image of the NLL")
    parser.add_argument("--images", type=int, help="of the test split, drawn by seed, instead of all")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the images of the NLL")
    parser.add_argument("--precision", default=PRECISION, help="of training, where it is not on record yet")
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
        folder = train(row, arguments.seed, arguments.precision)
        score(row, folder, arguments.samples, arguments.images, arguments.ranks)
        write(readme)
    if arguments.readme:
        write(readme)


if __name__ == "__main__":
    main()
