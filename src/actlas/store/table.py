"""The token table of a snapshot, under SQL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlas.core.errors import InputError, did_you_mean
from actlas.store.tokens import SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa

_DOCUMENTS = "SELECT document, min(row) AS first FROM tokens GROUP BY document ORDER BY first"


class TokenTable:
    """The Parquet files of some shards as one table.

    Args:
        store: the store's folder, for errors.
        files: in the order of the rows.
    """

    def __init__(self, store: Path, files: Sequence[Path]) -> None:
        self._store, self._paths = store, [str(path) for path in files]

    @cached_property
    def whole(self) -> pa.Table:
        """All of it, in memory."""
        return self._dataset.to_table()

    def ask(self, sql: str) -> pa.Table:
        """Return what DuckDB answers; the table is called `tokens`.

        Raises:
            InputError: SQL that DuckDB does not take, with what it says.
        """
        import duckdb

        with duckdb.connect(":memory:") as connection:
            connection.register("tokens", self._dataset)
            try:
                answer = connection.sql(sql)
                if answer is None:
                    raise InputError(f"the query {sql!r} returns no rows; write one that begins with SELECT")
                return answer.to_arrow_table()
            except duckdb.Error as error:
                said = " ".join(str(error).split())
                raise InputError(f"the query {sql!r} cannot be answered: {said}") from error

    def rows(self, numbers: Sequence[int]) -> pa.Table:
        """Return the entries of some rows, in row order; rows that are not there are left out."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = pa.array(numbers, pa.int64())
        return self._dataset.filter(pc.field("row").isin(wanted)).to_table().sort_by("row")

    def documents(self) -> list[str]:
        """Return the documents, in order."""
        found: list[str] = self.ask(_DOCUMENTS)["document"].to_pylist()
        return found

    def text(self, document: str) -> str:
        """Return the text of a document, or raise InputError if there is none of that name."""
        import pyarrow.compute as pc

        table = self._dataset.to_table(columns=["row", "text"], filter=pc.field("document") == document)
        if not len(table):
            names = self.documents()
            near = did_you_mean(document, names) or f" (it has {len(names):,})"
            raise InputError(f"{self._store} has no document {document!r}{near}")
        return "".join(table.sort_by("row")["text"].to_pylist())

    @cached_property
    def _dataset(self) -> Any:
        import pyarrow.dataset as ds

        return ds.dataset(self._paths, schema=SCHEMA, format="parquet")
