"""`python -m bench.quantize_page`: write the table of docs/quantize.md from stored results.

Text between `<!-- methods -->` and `<!-- end -->` is replaced by what the stored reproductions of AWQ and
ZeroQuant-V2 measured, and `results/quantize.json` (`python -m bench quantize`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from bench.harness import RESULTS, ROOT

PAGE = ROOT / "docs" / "quantize.md"
_PART = re.compile(r"<!-- methods -->\n.*?<!-- end -->", re.DOTALL)
_SOURCES = {
    "awq": {
        "rtn": "round to nearest",
        "awq-scale": "AWQ, scales only",
        "awq": "AWQ",
        "weight-scale": "scales from weights (control)",
        "permuted": "scales permuted (control)",
    },
    "zeroquant-v2": {
        "rtn": "round to nearest",
        "rank 8": "with a branch of rank 8",
        "rank 8, weighted": "with a branch of rank 8, weighted by the inputs",
        "rtn, groups of 32": "round to nearest, groups of 32",
    },
}


def rows() -> list[str]:
    """Return the lines of the table."""
    out = ["| method | where | bits a weight | KL to the full model | perplexity ratio |"]
    out.append("| --- | --- | ---: | ---: | ---: |")
    for slug, names in _SOURCES.items():
        file = ROOT / "src" / "actlas" / "papers" / "results" / f"{slug}.json"
        if not file.is_file():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        step = record["settings"]["step"]
        blocks = "all blocks" if step == 1 else f"one block in {step}"
        where = f"[{slug}](papers/{slug}.md), {blocks}"
        out += _lines(record["measured"], names, where)
    file = RESULTS / "quantize.json"
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        found = list(record["prices"].values())
        names = {
            "rtn": "round to nearest",
            "gptq": "GPTQ",
            "awq": "AWQ",
            "same-recipe": "GPTQ without its range search",
            "llm-compressor": "llm-compressor's GPTQ",
        }
        out += _lines(found, names, "`python -m bench quantize`, all blocks")
    return out


def _lines(measured: list[dict[str, Any]], names: dict[str, str], where: str) -> list[str]:
    found = {(m["name"], m["group"].get("variant")): m for m in measured if "over" not in m["group"]}
    out = []
    for name, title in names.items():
        kl = found.get(("kl-to-base", name))
        if kl is None:
            continue
        bits, ratio = found.get(("bits-per-weight", name)), found[("perplexity-ratio", name)]
        said = "" if bits is None else f"{bits['value']:.2f}"
        out.append(f"| {title} | {where} | {said} | {_with_interval(kl)} | {_with_interval(ratio)} |")
    return out


def _with_interval(m: dict[str, Any]) -> str:
    return f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})"


def main() -> None:
    """Rewrite the page."""
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(["<!-- methods -->", *rows(), "", "<!-- end -->"])
    PAGE.write_text(_PART.sub(lambda _: table, text), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
