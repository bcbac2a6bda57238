"""Reading a store: every row once, in an order of its own, under SQL, and while it grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actlas.core.errors import ArtifactError, InputError, SiteError
from actlas.store import Store
from tests.core.tiny import tiny

from .made import CORPUS, OTHER, SITE, small


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small(tmp_path_factory.mktemp("stores") / "acts", gradient=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_batches_hold_every_row_once_and_what_read_gives(tmp_path: Path, dtype: str) -> None:
    store = small(tmp_path / "acts", dtype=dtype)
    seen = []
    for batch in store.batches(50):
        assert set(batch) == {SITE, OTHER, "row"} and len(batch["row"]) <= 50
        for site in (SITE, OTHER):
            assert batch[site].dtype == torch.float32
            assert torch.equal(batch[site], store.read(site, batch["row"]))
        seen.append(batch["row"])
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(store.rows))


def test_shuffling_reaches_across_the_whole_store(store: Store) -> None:
    rows = torch.cat([b["row"] for b in store.batches(40, sites=SITE, seed=1)])
    again = torch.cat([b["row"] for b in store.batches(40, sites=SITE, seed=1)])
    other = torch.cat([b["row"] for b in store.batches(40, sites=SITE, seed=2)])
    assert torch.equal(rows, again) and not torch.equal(rows, other)
    assert int(rows[:40].max()) - int(rows[:40].min()) > store.rows / 2
    correlation = torch.corrcoef(torch.stack([rows.double(), torch.arange(store.rows).double()]))[0, 1]
    assert abs(float(correlation)) < 5 / store.rows**0.5
    in_order = torch.cat([b["row"] for b in store.batches(40, shuffle=False)])
    assert torch.equal(in_order, torch.arange(store.rows))


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_go_on_where_they_stopped(store: Store, shuffle: bool) -> None:
    everything = list(store.batches(64, shuffle=shuffle, seed=3))
    for start in (0, 1, len(everything) - 1, len(everything), len(everything) + 5):
        rest = list(store.batches(64, shuffle=shuffle, seed=3, start=start))
        assert [b["row"].tolist() for b in rest] == [b["row"].tolist() for b in everything[start:]]


def test_a_condition_chooses_rows(store: Store) -> None:
    wanted = [r["row"] for r in store.query("SELECT row FROM tokens WHERE text = 'e' ORDER BY row")]
    assert 10 < len(wanted) < store.rows
    assert store.select("text = 'e'").tolist() == wanted
    given = torch.cat([b["row"] for b in store.batches(7, where="text = 'e' -- a comment")])
    assert sorted(given.tolist()) == wanted
    with pytest.raises(InputError, match="no row of .* meets the condition"):
        store.batches(7, where="text = 'nothing'")
    with pytest.raises(InputError, match="cannot be answered: .*txet"):
        store.batches(7, where="txet = 'e'")


def test_read_takes_rows_in_any_order(store: Store) -> None:
    whole = store.read(SITE, slice(None))
    rows = [store.rows - 1, 0, 150, 150, 3]
    assert torch.equal(store.read(SITE, rows), whole[rows])
    assert torch.equal(store.read(SITE, torch.tensor(rows)), whole[rows])
    assert torch.equal(store.read(SITE, 5), whole[5:6])
    assert torch.equal(store.read(SITE, slice(10, 300, 7)), whole[10:300:7])
    assert store.read(SITE, []).shape == (0, 32)
    kept = whole.clone()
    store.read(SITE, rows).zero_()
    assert torch.equal(store.read(SITE, slice(None)), kept)


def test_bad_reading_is_refused_in_one_line(store: Store, tmp_path: Path) -> None:
    for call, error, said in (
        (lambda: store.read(SITE, [store.rows]), InputError, f"no row {store.rows}; it has 0 to"),
        (lambda: store.read(SITE, -1), InputError, "no row -1"),
        (lambda: store.read(SITE, [[1]]), InputError, "must be a list of row numbers"),
        (lambda: store.read("blocks.1.resid_pots", 0), SiteError, f"did you mean {SITE}"),
        (lambda: store.channels("x"), SiteError, f"it has {SITE}, {OTHER}"),
        (lambda: store.batches(0), InputError, "batch must be at least 1"),
        (lambda: store.batches(5, start=-1), InputError, "start at least 0"),
        (lambda: store.batches(5, sites="embed"), SiteError, "holds no activations of 'embed'"),
        (lambda: store.query("SELECT nope FROM tokens"), InputError, "cannot be answered: .*nope"),
        (lambda: store.text("d9"), InputError, "has no document 'd9'"),
        (lambda: Store(tmp_path / "none"), ArtifactError, "does not exist"),
    ):
        with pytest.raises(error, match=said) as failed:
            call()  # type: ignore[no-untyped-call]
        assert "\n" not in str(failed.value)


def test_a_reader_keeps_its_snapshot_while_the_store_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actlas.store import harvesting

    seen: list[tuple[Store, torch.Tensor, int]] = []
    make = harvesting.make_shard

    def make_and_read(*arguments: object) -> object:
        record = make(*arguments)  # type: ignore[arg-type]
        reader = Store(tmp_path / "acts")
        assert not reader.complete
        seen.append((reader, reader.read(SITE, range(reader.rows)), len(reader.tokens)))
        return record

    monkeypatch.setattr(harvesting, "make_shard", make_and_read)
    whole = small(tmp_path / "acts")
    assert len(seen) == len(whole.shards) and [len(r.shards) for r, _, _ in seen] == list(
        range(1, len(seen) + 1)
    )
    for reader, rows, tokens in seen:
        assert reader.rows == len(rows) == tokens < whole.rows + 1
        assert torch.equal(reader.read(SITE, range(reader.rows)), rows)
        assert torch.equal(whole.read(SITE, range(reader.rows)), rows)
        assert len(reader.query("SELECT row FROM tokens")) == reader.rows
        assert sum(len(b["row"]) for b in reader.batches(32)) == reader.rows


def test_shards_that_are_made_out_of_order_show_when_the_gap_is_closed(tmp_path: Path) -> None:
    store = small(tmp_path / "acts")
    manifest = store.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    record = store.path / "shards" / "00001.json"
    held = record.read_text()
    record.unlink()
    assert Store(store.path).shards == ["00000"]
    record.write_text(held)
    assert Store(store.path).shards == store.shards


def test_documents_and_the_tokens_table(store: Store) -> None:
    assert store.documents == [str(i) for i in range(len(CORPUS))]
    assert [store.text(str(i)) for i in range(3)] == CORPUS[:3]
    assert len(store.tokens) == store.rows == len(store)
    assert repr(store).startswith("<Store ") and store.model_name == "tiny-llama"
    store.check(tiny())


def test_a_context_stays_in_its_document(store: Store) -> None:
    first = store.query("SELECT min(row) AS row FROM tokens WHERE document = '1'")[0]["row"]
    found = store.context(first + 2, before=8, after=4)
    text = CORPUS[1]
    assert found.text == text[:2] + f"«{text[2]}»" + text[3:7]
    assert (found.document, found.position, found.row, found.index) == ("1", 2, first + 2, 2)
    assert found.token == tiny().tokenizer(text)["input_ids"][2]
