"""`python -m actlas.papers [FOLDER]`: write the documentation's pages about papers."""

from __future__ import annotations

import sys

from actlas.papers.render import render_docs

for file in render_docs(sys.argv[1] if len(sys.argv) > 1 else "docs"):
    print(file)
