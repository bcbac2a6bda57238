"""Edits through a dictionary: identities, scope of the change, saving, massive rows, heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actlas.core.dictionary import as_operation
from actlas.core.edit import Edit
from actlas.core.errors import InputError, ShapeError
from actlas.core.lens import Lens
from actlas.core.model import Model
from actlas.dictionaries import TopKSAE

SITE = "blocks.1.resid_post"
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def sae(site: str = SITE, d: int = 32, **options: object) -> TopKSAE:
    found = TopKSAE.create(site, d, 48, k=6, seed=1)
    return replace(found, scale=0.5, b_dec=0.1 * torch.ones(d), **options)  # type: ignore[arg-type]


def read(model: Model, *edits: Edit) -> torch.Tensor:
    with model.edit(*edits):
        return model.trace(IDS, SITE)[SITE]


def test_reconstruction_is_the_formula() -> None:
    lens, x = sae(), torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2))
    pre = (x * 0.5 - lens.b_dec) @ lens.W_enc.T + lens.b_enc
    z = torch.zeros_like(pre).scatter(-1, pre.topk(6).indices, pre.topk(6).values).relu()
    torch.testing.assert_close(lens.encode(x).dense(), z)
    expected = (z @ lens.W_dec + lens.b_dec) / 0.5
    torch.testing.assert_close(lens.reconstruct(x), expected)
    torch.testing.assert_close(lens.decode(z), expected)
    torch.testing.assert_close(expected, z @ lens.atoms + lens.offset)


def test_substitute_writes_the_reconstruction(toy: Model) -> None:
    lens = sae()
    plain = read(toy)
    torch.testing.assert_close(read(toy, lens.substitute()), lens.reconstruct(plain))
    assert torch.equal(read(toy, lens.substitute() * 0.0), plain)
    assert torch.equal(read(toy, lens.substitute(keep_error=True)), plain)


def test_feature_operations_change_codes_and_nothing_else(toy: Model) -> None:
    lens = sae()
    plain = read(toy)
    codes = lens.encode(plain)
    f, g = (int(i) for i in codes.counts().topk(2).indices)
    changed = read(toy, lens.edit({f: 0.0, g: ("scale", 3.0)}))
    expected = (
        plain - codes.of(f).unsqueeze(-1) * lens.atoms[f] + 2 * codes.of(g).unsqueeze(-1) * lens.atoms[g]
    )
    torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(
        read(toy, lens.substitute(error="keep", without=[f])),
        plain - codes.of(f).unsqueeze(-1) * lens.atoms[f],
    )
    torch.testing.assert_close(read(toy, lens.edit({f: ("add", 2.0)})), plain + 2 * lens.atoms[f])
    torch.testing.assert_close(read(toy, lens.edit(f, 2.0)), plain + 2 * lens.atoms[f])


def test_parts_of_the_error(toy: Model) -> None:
    lens, plain = sae(), read(toy)
    error_map = 0.2 * torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    x_hat, linear = lens.reconstruct(plain), plain @ error_map
    torch.testing.assert_close(
        read(toy, lens.substitute(error="linear", error_map=error_map)), x_hat + linear
    )
    torch.testing.assert_close(
        read(toy, lens.substitute(error="nonlinear", error_map=error_map)), plain - linear
    )


def test_massive_rows_pass(toy: Model) -> None:
    plain = read(toy)
    norms = plain.norm(dim=-1)
    limit = float(norms.median())
    changed = read(toy, sae(skip_above=limit).substitute())
    massive = norms > limit
    assert torch.equal(changed[massive], plain[massive])
    assert not torch.isclose(changed[~massive], plain[~massive]).all()


def test_heads_are_joined(toy: Model) -> None:
    site = "blocks.1.attn.z"
    lens = sae(site)
    z = toy.trace(IDS, site)[site]
    with toy.edit(lens.substitute()):
        changed = toy.trace(IDS, site)[site]
    assert changed.shape == z.shape
    torch.testing.assert_close(changed.flatten(-2), lens.reconstruct(z))


def test_save_and_load(toy: Model, tmp_path: Path) -> None:
    lens = replace(sae(), fingerprint=toy.fingerprint)
    back = Lens.load(lens.save(tmp_path / "lens"), toy)
    assert isinstance(back, TopKSAE) and back.k == 6 and torch.equal(back.W_dec, lens.W_dec)
    for i, edit in enumerate(
        (lens.edit({3: 1.5, 4: ("scale", 2)}), lens.substitute(error="keep", without=[1, 2]))
    ):
        loaded = Edit.load(edit.save(tmp_path / str(i)), toy)
        assert loaded.describe() == edit.describe()
        assert torch.equal(read(toy, loaded), read(toy, edit))


def test_same_with_a_cache_and_padding(toy: Model) -> None:
    edit = sae().substitute()
    with toy.edit(edit):
        fast = toy.generate(IDS[:1], max_new_tokens=6).tokens[0]
        slow = toy.generate(IDS[:1], max_new_tokens=6, use_cache=False).tokens[0]
        padded = toy.generate(["w1 w2", "w3 w4 w5 w6 w7"], max_new_tokens=6).tokens
        alone = [toy.generate(t, max_new_tokens=6).tokens[0] for t in ("w1 w2", "w3 w4 w5 w6 w7")]
    assert torch.equal(fast, slow)
    for a, b in zip(padded, alone, strict=True):
        assert torch.equal(a, b)


def test_bad_edits(toy: Model) -> None:
    lens = sae()
    for given, match in (
        ({}, "no feature was given"),
        ({48: 0.0}, "no feature 48"),
        ({1: "off"}, "no operation"),
        ({1: ("times", 2.0)}, "no operation"),
        ({1: float("nan")}, "no operation"),
    ):
        with pytest.raises(InputError, match=match):
            lens.edit(given)  # type: ignore[arg-type]
    for options, match in (
        ({"error": "half"}, "must be 'drop'"),
        ({"error": "linear"}, "needs error_map"),
        ({"error_map": torch.eye(32)}, "takes no error_map"),
        ({"without": [48]}, "no feature 48"),
    ):
        with pytest.raises(InputError, match=match):
            lens.substitute(**options)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"reads 32 channels, but blocks.1.mlp.act is \[.*48\]"):
        read(toy, replace(lens, site="blocks.1.mlp.act").substitute())
    with pytest.raises(ShapeError, match=r"must be \[32, 32\]"):
        read(toy, lens.substitute(error="linear", error_map=torch.eye(5)))
    assert toy.installed == ()
    assert as_operation(2) == ("set", 2.0)
