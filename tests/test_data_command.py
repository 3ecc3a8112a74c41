"""`python -m vlae data NAME` tells what a set holds and draws it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import ROOT, overrides, write_files

from vlae.__main__ import main
from vlae.data import independent_pixels
from vlae.datasets import digits


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """The command's output; its pictures lie in `drawn`."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vlae", *arguments, "-o", str(tmp_path / "drawn")])
        main()
        return capsys.readouterr().out

    return run


def test_digits(told, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, splits = told("data", "digits"), digits(Path())
    mean = splits.test.images.numpy().mean() / 16
    assert all(word in out for word in ("1,297", "250", "1x8x8", "levels: 17", f"{mean:.4f}"))
    assert f"{independent_pixels(splits):.4f} bits/dim on test" in out
    # 16 columns of 8x8 pixels, ten times as large, two pixels of frame on each side; all of them images of the split
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "test.png"))
    assert drawn.shape == (4 * 84, 16 * 84)
    tiles = drawn.reshape(4, 84, 16, 84).swapaxes(1, 2)[..., 2:-2, 2:-2][..., ::10, ::10].reshape(64, 8, 8)
    known = {image.tobytes() for image in (splits.test.images[:, 0].numpy() * (255 / 16)).round().astype(np.uint8)}
    assert len(known & {tile.tobytes() for tile in tiles}) >= 60


@pytest.mark.parametrize("data", ["cifar10", "omniglot_original", "caltech101", "images"])
def test_other_sets(told, data: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_files(tmp_path)
    out = told("data", data, *overrides(data, tmp_path))
    assert {"train.png", "validation.png", "test.png"} == {path.name for path in (tmp_path / "drawn").iterdir()}
    assert ("nats per image" in out) == (data in ("omniglot_original", "caltech101"))  # of two levels


def test_settings_may_stand_behind_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(ROOT)
    folder = str(tmp_path / "drawn")
    monkeypatch.setattr(sys, "argv", ["vlae", "data", "-o", folder, "images", *overrides("images", tmp_path)])
    main()
    assert "3x8x32" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["vlae", "data", "digits", "--colour"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "unknown: --colour" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["nope"], "Could not find 'data/nope'"),
        (["images", "data.folder=nowhere"], "data.folder=nowhere: no such folder"),
        (["digits", "+data.colour=1"], "data.colour=1: unknown key"),
        (["digits", "data._target_=os.system"], "data._target_='os.system': not allowed"),
    ],
)
def test_one_line_says_what_is_wrong(told, arguments: list[str], found: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as error:
        told("data", *arguments)
    assert found in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "drawn").exists()


def test_outside_a_checkout(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"no config\.yaml; run this in a checkout"):
        told("data", "digits")
