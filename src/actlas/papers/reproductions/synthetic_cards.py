"""Thirty synthetic model cards whose sections are known, to test the detector of `actlas.report.audit`.

Six kinds of five cards: complete; templates that nobody filled in; partly filled; sections in another
order under other wordings and heading styles; complete in another language; and texts with defects
(broken front matter, no headings, bytes that are not UTF-8, sections that are too short).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SECTIONS = (
    "model details",
    "intended use",
    "factors",
    "metrics",
    "evaluation data",
    "training data",
    "quantitative analyses",
    "ethical considerations",
    "caveats and recommendations",
)


@dataclass(frozen=True)
class LabelledCard:
    """A card and the sections that a reader would say it has."""

    kind: str
    text: bytes
    sections: frozenset[str]


_ENGLISH = dict(zip(SECTIONS, (s.capitalize() for s in SECTIONS), strict=True))
_OTHER_WORDS = {
    "model details": ("About this model", "1. Model description", "Model overview"),
    "intended use": ("Out-of-scope uses", "Use cases", "Direct use"),
    "factors": ("Evaluation factors", "Relevant factors", "Factors (who and where)"),
    "metrics": ("Metrics and thresholds", "Performance measures", "Metrics:"),
    "evaluation data": ("Test set", "Testing data", "What it was tested on: evaluation data"),
    "training data": ("Training corpus", "Pre-training data", "3) Training set"),
    "quantitative analyses": ("Evaluation results", "Results", "Performance by group"),
    "ethical considerations": ("Bias and fairness", "Ethics", "Risks"),
    "caveats and recommendations": ("Known issues", "Limitations", "Recommendations"),
}
_LANGUAGES = {
    "de": (
        *("Modellbeschreibung", "Vorgesehene Verwendung", "Faktoren", "Metriken", "Evaluationsdaten"),
        *("Trainingsdaten", "Ergebnisse", "Ethische Überlegungen", "Einschränkungen"),
    ),
    "fr": (
        *("Détails du modèle", "Utilisation prévue", "Facteurs", "Métriques", "Données d'évaluation"),
        *("Données d'entraînement", "Résultats", "Éthique", "Avertissements et recommandations"),
    ),
    "es": (
        *("Detalles del modelo", "Uso previsto", "Factores", "Métricas", "Datos de evaluación"),
        *("Datos de entrenamiento", "Resultados", "Consideraciones éticas", "Advertencias y recomendaciones"),
    ),
    "zh": (
        "模型详情",
        "预期用途",
        "影响因素",
        "评估指标",
        "评估数据",
        "训练数据",
        "定量分析",
        "伦理考量",
        "注意事项和建议",
    ),
}
_PROSE = {
    "en": "the model reads short texts in English and was checked by two people on every "
    "release before anyone outside of the team could use it in a product or in a study",
    "de": "das Modell liest kurze Texte auf Deutsch und wurde vor jeder Veröffentlichung von zwei "
    "Personen geprüft bevor jemand außerhalb der Gruppe es in einem Produkt oder einer Studie "
    "verwenden konnte",
    "fr": "le modèle lit de courts textes en français et deux personnes ont vérifié chaque version avant que "
    "quiconque en dehors du groupe puisse employer le modèle dans un produit ou dans une étude",
    "es": "el modelo lee textos breves en español y dos personas revisaron cada versión "
    "antes de que alguien fuera del grupo pudiera usar el modelo en un producto o en un estudio",
    "zh": "该模型读取简短的中文文本在每次发布之前都由两位同事检查过"
    "然后其他团队的人员才能在产品或者研究之中使用这个模型",
}
_UNFILLED = (
    "[More Information Needed]",
    "More information needed",
    "TBD",
    "N/A",
    "[To be added]",
    "...",
)


def labelled_cards(seed: int = 0) -> list[LabelledCard]:
    """Return the thirty cards; their wording and order depend on the seed, their labels do not."""
    rng = random.Random(seed)
    return [
        *(_complete(rng) for _ in range(5)),
        *_templates(rng),
        *(_partial(rng) for _ in range(5)),
        *(_reworded(rng, style) for style in ("#", "##", "underlined", "bold", "nested")),
        *(_foreign(rng, language) for language in ("de", "fr", "es", "zh", "de")),
        *_defects(rng),
    ]


def _text(rng: random.Random, language: str = "en") -> str:
    prose = _PROSE[language]
    if rng.random() < 0.2:
        return f"| group | value |\n| --- | --- |\n| short texts | {rng.random():.2f} |"
    if language == "zh":
        return prose + "。"
    words = prose.split()
    start = rng.randrange(3)
    return " ".join(words[start:]).capitalize() + f". Version {rng.randint(1, 9)}."


def _complete(rng: random.Random) -> LabelledCard:
    body = "".join(f"## {_ENGLISH[s]}\n\n{_text(rng)}\n\n" for s in SECTIONS)
    return _card(
        "complete",
        f"---\nlicense: mit\nlanguage: en\n---\n\n# Reader {rng.randint(1, 99)}\n\n{body}",
        SECTIONS,
    )


def _partial(rng: random.Random) -> LabelledCard:
    filled = set(rng.sample(SECTIONS, rng.randint(2, 6)))
    absent = set(rng.sample([s for s in SECTIONS if s not in filled], 2))
    body = ""
    for s in SECTIONS:
        if s not in absent:
            body += f"## {_ENGLISH[s]}\n\n{_text(rng) if s in filled else rng.choice(_UNFILLED)}\n\n"
    return _card("partly filled", f"# Reader\n\n{body}", filled)


def _reworded(rng: random.Random, style: str) -> LabelledCard:
    order = rng.sample(SECTIONS, len(SECTIONS))
    kept = order[:7]
    body = "# Reader\n\n" if style != "#" else ""
    for s in kept:
        title = rng.choice(_OTHER_WORDS[s])
        heading = {
            "#": f"# {title}",
            "##": f"## {title.upper()} ##",
            "underlined": f"{title}\n{'-' * len(title)}",
            "bold": f"**{title}**",
            "nested": f"## {title}\n\n### Details",
        }[style]
        body += f"{heading}\n\n{_text(rng)}\n\n"
    body += "## How to install\n\n```\npip install reader  # for the intended use described above\n```\n"
    return _card("other wording and order", body, kept)


def _foreign(rng: random.Random, language: str) -> LabelledCard:
    body = "".join(f"## {title}\n\n{_text(rng, language)}\n\n" for title in _LANGUAGES[language])
    return _card("another language", f"# Reader\n\n{body}", SECTIONS)


def _templates(rng: random.Random) -> list[LabelledCard]:
    """Texts that tools write when nobody fills anything in."""
    plain = "# Model card\n\n" + "".join(
        f"## {_ENGLISH[s]}\n\n[More Information Needed]\n\n" for s in SECTIONS
    )
    bullets = "# Model card\n\n" + "".join(
        f"## {_ENGLISH[s]}\n\n- **Developed by:** [More Information Needed]\n- **Kind [optional]:** TBD\n"
        f"- **Languages:** {rng.choice(_UNFILLED)}\n- **Links:**\n\n"
        for s in SECTIONS
    )
    hints = "# Model card\n\n" + "".join(
        f"## {_ENGLISH[s]}\n\n<!-- {_PROSE['en']}: write here what readers must know -->\n\n"
        for s in SECTIONS
    )
    trainer = (
        "---\ntags:\n- generated_from_trainer\n---\n\n<!-- This model card has been generated automatically "
        "according to the information the Trainer had access to. You should probably proofread and "
        "complete it. -->\n\n# outputs\n\n## Model description\n\nMore information needed\n\n"
        "## Intended uses & limitations\n\nMore information needed\n\n"
        "## Training and evaluation data\n\nMore information needed\n"
    )
    hub = _hub_template()
    return [_card("template only", text, ()) for text in (plain, bullets, hints, trainer, hub)]


def _hub_template() -> str:
    """The Hugging Face hub's own template with its default answers (from huggingface_hub)."""
    import re
    from pathlib import Path

    import huggingface_hub

    file = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"
    text = file.read_text(encoding="utf-8")
    text = re.sub(r'\{\{[^}]*?default\("(.*?)", true\)\s*\}\}', r"\1", text)
    return re.sub(r"\A---\n.*?\n---\n", "---\nlibrary_name: transformers\n---\n", text, flags=re.DOTALL)


def _defects(rng: random.Random) -> list[LabelledCard]:
    use = f"## Intended use\n\n{_text(rng)}\n\n"
    broken = f"---\nlicense: [mit\ntags: : :\n---\n\n# Reader\n\n{use}"
    bare = " ".join([_PROSE["en"].capitalize() + "."] * 2)
    latin = f"# Reader\n\n{use}## Training data\n\n{_PROSE['de']}.\n".encode("latin-1")
    short = "# Reader\n\n" + "".join(f"## {_ENGLISH[s]}\n\nSee the paper for this.\n\n" for s in SECTIONS)
    windows = f"\ufeff# Reader\r\n\r\n## Caveats\r\n\r\n{_PROSE['en']}\r\n"
    return [
        _card("defects", broken, {"intended use"}),
        _card("defects", bare, {"model details"}),
        LabelledCard("defects", latin, frozenset({"intended use", "training data"})),
        _card("defects", short, ()),
        _card("defects", windows, {"caveats and recommendations"}),
    ]


def _card(kind: str, text: str, sections: object) -> LabelledCard:
    return LabelledCard(kind, text.encode("utf-8"), frozenset(sections))  # type: ignore[call-overload]
