"""A wrong setting is refused by one message that names the key, what was found and what is allowed."""

import sys
from typing import Any, Literal

import pytest
import torch

from vlae.schema import check, construct


class Decoder:
    def __init__(
        self,
        width: int,
        rate: float = 0.5,
        *,
        shape: tuple[int, int, int] = (1, 8, 8),
        mode: Literal["hard", "soft"] | None = None,
        widths: list[int] = [8],  # noqa: B006
        reach: tuple[int, ...] = (),
        extra: dict[str, float] | None = None,
        gate: bool = True,
        anything: Any = None,
        levels: int,
    ):
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width, self.levels = width, levels


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file under a package's name, with something foreign inside, as an import would leave it there."""
    monkeypatch.setitem(sys.modules, "mine.decoder", sys.modules[__name__])
    monkeypatch.setattr(Decoder, "__module__", "mine.decoder")


def decoder(allow: tuple[str, ...] = ("mine",), **settings: Any) -> Decoder:
    return construct({"_target_": "mine.decoder.Decoder", **settings}, "model.decoder", allow, levels=2)


def test_builds() -> None:
    made = decoder(width=3)
    assert (type(made), made.width, made.levels) == (Decoder, 3, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate", 1),
        ("rate", 1e-3),
        ("shape", [3, 32, 32]),
        ("shape", (3, 32, 32)),
        ("mode", "hard"),
        ("mode", None),
        ("widths", []),
        ("widths", [1, 2, 3]),
        ("reach", [1, 2, 3, 4]),
        ("reach", []),
        ("extra", {"a": 1, "b": 0.5}),
        ("gate", False),
        ("anything", object()),
    ],
)
def test_right_types(key: str, value: object) -> None:
    decoder(width=1, **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("width", "abc", "int"),
        ("width", 1.0, "int"),
        ("width", True, "int"),
        ("width", None, "int"),
        ("rate", "1e-3", "float"),
        ("rate", False, "float"),
        ("shape", [3, 32], "tuple[int, int, int]"),
        ("shape", [3, 32, 32.0], "tuple[int, int, int]"),
        ("mode", "medium", "'hard' or 'soft' or None"),
        ("widths", 8, "list[int]"),
        ("widths", "88", "list[int]"),
        ("widths", [8, "8"], "list[int]"),
        ("reach", [1, None], "tuple[int, ...]"),
        ("extra", {"a": "b"}, "dict[str, float] or None"),
        ("extra", {1: 0.5}, "dict[str, float] or None"),
        ("gate", 1, "bool"),
    ],
)
def test_wrong_types(key: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        decoder(**({"width": 1} | {key: value}))
    assert str(caught.value) == f"model.decoder.{key}={value!r}: expected {expected}"


ALLOWED = "width, rate, shape, mode, widths, reach, extra, gate, anything"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widht": 32}, f"model.decoder.widht=32: unknown key, did you mean width? allowed: {ALLOWED}"),
        ({"width": 1, "q": "r"}, f"model.decoder.q='r': unknown key; allowed: {ALLOWED}"),
        # what the data decide is not the user's
        ({"width": 1, "levels": 9}, f"model.decoder.levels=9: unknown key; allowed: {ALLOWED}"),
        ({}, "model.decoder.width: missing; expected int"),
        ({"width": 0}, "model.decoder: width must be at least 1, got 0"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        decoder(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "not allowed; it must start with vlae. or mine."),
        ("minerals.Decoder", "not allowed; it must start with vlae. or mine."),
        ("Decoder", "not allowed; it must start with vlae. or mine."),
        (None, "not allowed; it must start with vlae. or mine."),
        ("vlae.decodr.PixelCNN", "No module named 'vlae.decodr'"),
        ("mine.decoder.Decodr", "mine.decoder defines no class or function 'Decodr'"),
        # imported into a module of the package, yet from elsewhere
        ("mine.decoder.pytest", "mine.decoder defines no class or function 'pytest'"),
        ("vlae.schema.import_module", "vlae.schema defines no class or function 'import_module'"),
        ("vlae.import_module", "vlae defines no class or function 'import_module'"),
    ],
)
def test_foreign_or_unknown_targets(target: object, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        construct({"_target_": target}, "model.decoder", allow=("vlae.", "mine"))
    assert str(caught.value) == f"model.decoder._target_={target!r}: {reason}"


def test_nothing_foreign_is_imported() -> None:
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="not allowed"):
        construct({"_target_": "antigravity.fly"}, "model.prior")
    assert "antigravity" not in sys.modules


def test_a_custom_class_must_take_what_the_program_supplies() -> None:
    with pytest.raises(
        ValueError, match=r"^model.decoder: Decoder has no argument 'channels', which it is always given$"
    ):
        construct({"_target_": "mine.decoder.Decoder", "width": 1}, "model.decoder", ("mine",), channels=3)


def test_torch_signatures_are_schemas_too() -> None:
    check(torch.optim.AdamW, {"lr": 1e-3, "betas": [0.9, 0.99]}, "optimizer", supplied=["params"])
    with pytest.raises(ValueError, match=r"^optimizer\.lr='fast': expected float or Tensor$"):
        check(torch.optim.AdamW, {"lr": "fast"}, "optimizer", supplied=["params"])
