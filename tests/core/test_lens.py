"""What every lens can do: saving, rebuilding, editing, substituting; and a new kind in a few lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.edits import Add
from actlas.core.errors import ArtifactError, FingerprintError, InputError, NonFiniteError, ShapeError
from actlas.core.lens import LENS_TYPES, Lens, rebuild_lens
from actlas.core.measurement import Measurement
from actlas.core.pca import PCA
from actlas.core.probe import Probe
from tests.core.tiny import tiny


@dataclass(kw_only=True, eq=False)
class Directions(Lens):
    """A toy dictionary, as the docstring of the base shows it."""

    basis: Tensor
    names: tuple[str, ...] = ()
    scale: float = 1.0

    @property
    def channels(self) -> int:
        return self.basis.shape[1]

    @property
    def features(self) -> int:
        return self.basis.shape[0]

    def encode(self, x: Tensor) -> Tensor:
        return self.flat(x) @ self.basis.to(x).T / self.scale

    def decode(self, codes: Tensor) -> Tensor:
        return self.scale * codes @ self.basis.to(codes)

    def score(self, x: Tensor) -> Tensor:
        return self.encode(x)[..., 0]

    def direction(self, feature: int) -> Tensor:
        return self.basis[feature]


SITE = "blocks.1.resid_post"


def basis(k: int = 4, d: int = 32) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(0)))
    return q.T.contiguous()


@pytest.fixture
def lens() -> Directions:
    quality = Measurement("reconstruction", 0.5, "fraction", 10, low=0.4, high=0.6, group={"site": SITE})
    return Directions(
        site=SITE, basis=basis(), names=("a", "b", "c", "d"), scale=2.0, measurements=(quality,)
    )


def test_save_and_load_give_the_same_lens(lens: Directions, tmp_path: Path) -> None:
    model = tiny()
    lens.save(tmp_path / "l", model)
    for loaded in (Lens.load(tmp_path / "l", model), Directions.load(tmp_path / "l")):
        assert isinstance(loaded, Directions)
        assert torch.equal(loaded.basis, lens.basis)
        assert (loaded.site, loaded.names, loaded.scale) == (SITE, lens.names, 2.0)
        assert loaded.measurements == lens.measurements
        assert loaded.fingerprint == model.fingerprint
        loaded.save(tmp_path / "again")  # it knows its model by now
    x = torch.randn(3, 32)
    assert torch.equal(Lens.load(tmp_path / "again").encode(x), lens.encode(x))


def test_a_lens_for_another_model_is_refused(lens: Directions, tmp_path: Path) -> None:
    lens.save(tmp_path / "l", tiny())
    other = tiny("gpt2")
    with pytest.raises(FingerprintError, match="another model"):
        Lens.load(tmp_path / "l", other)
    assert Lens.load(tmp_path / "l", other, force=True).fingerprint is None
    loaded = Lens.load(tmp_path / "l")
    with pytest.raises(FingerprintError), other.edit(loaded.edit(0)):
        pass
    with pytest.raises(ArtifactError, match="holds a Directions, not a Probe"):
        Probe.load(tmp_path / "l")
    with pytest.raises(InputError, match="saved for a model"):
        Directions(site=SITE, basis=basis()).save(tmp_path / "n")


def test_tampered_lenses_are_refused_and_nothing_is_executed(lens: Directions, tmp_path: Path) -> None:
    manifest = lens.save(tmp_path / "l", tiny()) / "manifest.json"
    good = json.loads(manifest.read_text())
    for change, said in (
        ({"type": "Popen", "args": "true"}, "unknown type"),
        ({**good["lens"], "command": "true"}, "no field 'command'"),
        ({k: v for k, v in good["lens"].items() if k != "site"}, "lacks 'site'"),
        ({**good["lens"], "measurements": [{"nonsense": 1}]}, "cannot be rebuilt"),
        ([], "holds no lens"),
    ):
        manifest.write_text(json.dumps({**good, "lens": change}))
        with pytest.raises(ArtifactError, match=said) as caught:
            Lens.load(tmp_path / "l")
        assert "\n" not in str(caught.value)


def test_lenses_with_nan_or_wrong_shapes_are_refused() -> None:
    bad = torch.full((32,), float("nan"))
    with pytest.raises(NonFiniteError, match=r"Probe\.weight"):
        Probe(site=SITE, weight=bad, bias=torch.zeros(()), steer=torch.zeros(32))
    with pytest.raises(ShapeError):
        Probe(site=SITE, weight=torch.zeros(32), bias=torch.zeros(()), steer=torch.zeros(31))
    record = {"type": "PCA", "site": SITE, "total": 1.0, "count": 3}
    with pytest.raises(ArtifactError, match="cannot be rebuilt"):
        rebuild_lens(
            record, {"mean": torch.zeros(3), "components": torch.zeros(2, 4), "variance": torch.zeros(2)}
        )


def test_edit_steers_along_a_feature(lens: Directions) -> None:
    model = tiny()
    plain = model.trace("hello", SITE)[SITE]
    for edit, factor in ((lens.edit(2, 3.0), 3.0), (lens.edit(2) * -2, -2.0)):
        with model.edit(edit):
            steered = model.trace("hello", SITE)[SITE]
        torch.testing.assert_close(steered, plain + factor * lens.basis[2], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no feature 4; it has 0 to 3"):
        lens.edit(4)


def test_substitute_puts_in_the_reconstruction_and_survives_saving(lens: Directions, tmp_path: Path) -> None:
    model = tiny()
    plain = model.trace("hello", SITE)[SITE]
    lens.substitute().save(tmp_path / "s", model)
    for edit in (lens.substitute(), Edit.load(tmp_path / "s", model)):
        with model.edit(edit):
            found = model.trace("hello", SITE)[SITE]
        torch.testing.assert_close(found, plain @ lens.basis.T @ lens.basis, rtol=1e-5, atol=1e-5)


def test_a_lens_gates_an_edit_and_is_saved_with_it(lens: Directions, tmp_path: Path) -> None:
    model = tiny()
    site = "blocks.2.mlp.out"
    vector = torch.ones(32)
    plain = model.trace("hello there", [SITE, site])
    score = lens.score(plain[SITE])
    threshold = float(score.median())
    edit = Add(site, vector).when(lens, threshold)
    edit.save(tmp_path / "e", model)
    for gated in (edit, Edit.load(tmp_path / "e", model)):
        with model.edit(gated):
            found = model.trace("hello there", site)[site]
        moved = (found - plain[site]).abs().amax(-1) > 0.5
        assert torch.equal(moved, score > threshold) and 0 < int(moved.sum()) < moved.numel()


def test_heads_are_flattened_to_read_and_restored_to_edit() -> None:
    model = tiny()
    site = "blocks.1.attn.z"
    lens = Directions(site=site, heads=4, basis=basis())
    trace = model.trace("hello", site)
    assert lens.score(trace[site]).shape == trace[site].shape[:2]
    assert torch.equal(lens.encode(trace[site]), lens.encode(trace[site].flatten(2)))
    with model.edit(lens.edit(1, 5.0)):
        found = model.trace("hello", site)[site]
    torch.testing.assert_close(found, trace[site] + 5 * lens.basis[1].reshape(4, 8), rtol=1e-5, atol=1e-5)
    with model.edit(lens.substitute()):
        found = model.trace("hello", site)[site]
    torch.testing.assert_close(
        found.flatten(2), trace[site].flatten(2) @ lens.basis.T @ lens.basis, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ShapeError, match="reads 32 channels a token"):
        lens.encode(torch.zeros(2, 5))


def test_moving_a_lens(lens: Directions) -> None:
    wide = lens.to(dtype=torch.float64)
    assert wide.basis.dtype == torch.float64 and lens.basis.dtype == torch.float32
    assert wide.names == lens.names and wide.measurements == lens.measurements


def test_what_a_lens_cannot_do_is_said() -> None:
    class Bare(Lens):
        pass

    bare = Bare(site=SITE)
    for ask in (bare.encode, bare.decode, bare.score):
        with pytest.raises(InputError, match="Bare"):
            ask(torch.zeros(2))
    with pytest.raises(InputError, match="no directions"):
        bare.edit()
    del LENS_TYPES["Bare"]


def test_two_lenses_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two lenses are called PCA"):
        type("PCA", (Lens,), {"__module__": "somewhere"})
    assert LENS_TYPES["PCA"] is PCA
