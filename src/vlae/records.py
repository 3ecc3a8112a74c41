"""Files that say what was measured, by which code, on what."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what starts jobs only reads records
    import torch

RESUMABLE = ("trainer", "wandb", "record")  # sections of a run's settings that may change when it goes on


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `model.prior.depth: 4`."""
    pairs: dict[str, Any] = {}
    for key, value in config.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether runs of these settings have the same result: not where they log to and what they show counts."""
    shown = ("wandb.", "trainer.enable_", "trainer.log_every_n_steps")
    one, two = ({k: v for k, v in flat(each).items() if not k.startswith(shown)} for each in (old, new))
    return one == two


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file `path` at the end, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


def write(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is whole or not there."""
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def emit(measurement: dict[str, Any], out: Path | None) -> None:
    """A benchmark's measurement as one JSON line, printed and, if `out` is given, appended to it."""
    line = json.dumps(measurement)
    print(line, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(line + "\n")


def commit() -> str:
    """The commit of the code that runs, `-dirty` if code differs from it, `unknown` outside a checkout."""
    git, file = ["git", "-C", str(Path(__file__).parent)], Path(__file__).name
    code = [":/src", ":/conf", ":/benchmarks", ":/train.py"]
    try:
        # or this is a package inside somebody's own checkout
        subprocess.run([*git, "ls-files", "--error-unmatch", file], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False).returncode
        return f"{head}-dirty" if changed else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(device: "torch.device") -> str:
    """The processor or GPU by name, and the threads that torch uses on a processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"
