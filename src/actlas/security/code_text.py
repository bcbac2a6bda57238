"""Source code as text: comments and documentation strings taken out, also of code that does not parse.

    without(code, ("comments", "docstrings"), language="python")

A scanner, not a parser: generated code is often cut in the middle. In Python a documentation string is a
string that stands where a statement begins. In C-like languages comments are `//` and `/* */`. What is
inside string literals stays. Lines that become empty are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from actlas.core.errors import InputError

PARTS = ("comments", "docstrings")
LANGUAGES = ("python", "c")
_PYTHON = re.compile(
    r"""(?P<string>(?:[rRbBuUfF]{0,2})(?:\"{3}.*?(?:\"{3}|\Z)|'{3}.*?(?:'{3}|\Z)
        |"(?:\\.|[^"\\\n])*(?:"|(?=\n)|\Z)|'(?:\\.|[^'\\\n])*(?:'|(?=\n)|\Z)))
        |(?P<comment>\#[^\n]*)""",
    re.VERBOSE | re.DOTALL,
)
_C = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\n])*(?:"|(?=\n)|\Z)|'(?:\\.|[^'\\\n])*(?:'|(?=\n)|\Z))
        |(?P<comment>//[^\n]*|/\*.*?(?:\*/|\Z))""",
    re.VERBOSE | re.DOTALL,
)


def without(code: str, parts: Collection[str], language: str = "python") -> str:
    """Return code without comments, documentation strings, or both.

    Args:
        code: source text, whole or cut.
        parts: of `"comments"` and `"docstrings"`.
        language: `"python"` or `"c"` (also C++, Java, JavaScript, Go, Rust).

    Raises:
        InputError: an unknown part or language.
    """
    unknown = [p for p in parts if p not in PARTS]
    if unknown or language not in LANGUAGES:
        raise InputError(
            f"cannot take {unknown[0] if unknown else parts!r} out of {language!r}; parts are "
            f"{', '.join(PARTS)}, languages {', '.join(LANGUAGES)}"
        )
    if not parts:
        return code
    pattern = _PYTHON if language == "python" else _C

    def keep(found: re.Match[str]) -> str:
        if found.group("comment") is not None:
            return "" if "comments" in parts else found.group()
        is_doc = language == "python" and "docstrings" in parts and _begins(code, found.start())
        return "" if is_doc else found.group()

    lines = pattern.sub(keep, code).split("\n")
    touched = code.split("\n")
    blank = {i for i, line in enumerate(touched) if not line.strip()}
    same = len(lines) == len(touched)
    return "\n".join(x.rstrip() for i, x in enumerate(lines) if x.strip() or (same and i in blank))


def _begins(code: str, at: int) -> bool:
    """Whether only white space stands between `at` and the beginning of a line that no bracket continues."""
    start = code.rfind("\n", 0, at) + 1
    if code[start:at].strip():
        return False
    before = code[:start].rstrip()
    return not before or before[-1] not in "(,[{=+%\\"
