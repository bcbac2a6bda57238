"""The registry of methods."""

from __future__ import annotations

import inspect
import json

import pytest

from actlas.core.errors import InputError
from actlas.core.lens import Lens
from actlas.core.methods import _METHODS, find_method, method, methods
from tests.core.tiny import TEXTS, tiny

DATA = {
    "corpus": TEXTS * 4,
    "labelled": [
        (f"{w} is up!", f"{w} is down.")
        for w in ["cat", "dog", "sun", "moon", "tree", "lake", "road", "hill"]
    ],
}
QUICK = {"tuned-lens": {"steps": 2, "batch_tokens": 128, "held_out": 1}}


def test_every_method_is_described_well_enough_for_the_command_line() -> None:
    found = methods()
    assert {"probe", "pca", "tuned-lens"} <= set(found)
    for name, info in found.items():
        assert info.name == name and info.summary and name in info.example and "\n" not in info.summary
        leading = list(inspect.signature(info.fit).parameters)[: 1 if info.data == "none" else 2]
        assert leading == ["model", "data"][: len(leading)]
        json.dumps(info.to_json())
    probe = found["probe"]
    assert probe.needs_site and probe.options["method"] == "logistic" and probe.data == "labelled"
    assert probe.to_json()["options"]["site"] == {"required": True}
    assert not found["tuned-lens"].needs_site


@pytest.mark.parametrize("name", ["probe", "pca", "tuned-lens"])
def test_every_method_of_core_fits_through_the_registry(name: str) -> None:
    info = find_method(name)
    options = {"site": "blocks.1.resid_post"} if info.needs_site else {}
    fitted = info.fit(tiny(), DATA[info.data], **options, **QUICK.get(name, {}))
    assert isinstance(fitted, Lens) and info.returns == "Lens" and fitted.measurements


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean probe"):
        find_method("prob")
    with pytest.raises(InputError, match="there are .*pca"):
        find_method("xyzzy")


def test_wrong_registrations_are_refused() -> None:
    def fit(model: object, data: object, *, site: str, depth: int = 3) -> None: ...

    registered = method(
        "for-this-test", room="core", returns="Edit", data="pairs", summary="s", example="for-this-test"
    )
    try:
        assert registered(fit) is fit
        assert find_method("for-this-test").options == {"site": ..., "depth": 3}
    finally:
        del _METHODS["for-this-test"]
    with pytest.raises(ValueError, match="two methods are called 'pca'"):
        method("pca", room="core", returns="Lens", summary="s")(fit)
    with pytest.raises(ValueError, match="not a known kind"):
        method("x", room="core", returns="Thing", summary="s")  # type: ignore[arg-type]
