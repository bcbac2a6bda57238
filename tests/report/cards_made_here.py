"""Thirty hand-labelled cards: complete, templates, shuffled, in other languages, thin, odd."""

from __future__ import annotations

import random
from pathlib import Path

import huggingface_hub
from jinja2 import Template

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
WORDS = {
    "en": "this part says in plain words what was done and why it matters for people who want to use the model well",
    "de": "dieser teil sagt in einfachen worten was getan wurde und warum es für menschen wichtig ist die das modell nutzen",
    "fr": "cette partie dit avec des mots simples ce qui a été fait et pourquoi cela compte pour les personnes concernées ici",
    "es": "esta parte dice con palabras sencillas lo que se hizo y por qué importa a las personas que usan el modelo",
    "zh": "这一部分用简单的话说明做了什么以及为什么这对想要好好使用这个模型的人来说很重要请仔细阅读以下的内容",
}
FILLER = {k: f"{v}. {v}." for k, v in WORDS.items()}
HEADINGS = {
    "en": ("Model Details", "Intended Use", "Factors", "Metrics", "Evaluation Data", "Training Data",
           "Quantitative Analyses", "Ethical Considerations", "Caveats and Recommendations"),
    "de": ("Modellbeschreibung", "Verwendungszweck", "Faktoren", "Metriken", "Evaluierungsdaten", "Trainingsdaten",
           "Ergebnisse", "Ethische Überlegungen", "Einschränkungen und Empfehlungen"),
    "fr": ("Description du modèle", "Utilisation prévue", "Facteurs", "Métriques", "Données d'évaluation",
           "Données d'entraînement", "Résultats", "Considérations éthiques", "Mises en garde et recommandations"),
    "es": ("Detalles del modelo", "Uso previsto", "Factores", "Métricas", "Datos de evaluación",
           "Datos de entrenamiento", "Resultados", "Consideraciones éticas", "Advertencias y recomendaciones"),
    "zh": ("模型详情", "预期用途", "因素", "评估指标", "评估数据", "训练数据", "评估结果", "伦理考量", "注意事项与建议"),
}  # fmt: skip
LOOSE = ("## 1. Model description", "## Uses", "### Relevant factors", "## Evaluation metrics:", "## Test set",
         "## Pretraining data", "## Evaluation results", "## Bias and fairness", "## **Limitations**")  # fmt: skip
TABLE = "| a | b |\n| --- | --- |\n| x | 0.5 |\n"
EMPTY_TABLE = "| a | b |\n| --- | --- |\n| x | [More Information Needed] |\n| y | not provided |\n"


def hub_template() -> str:
    """The Hub's own card template with nothing filled in."""
    path = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"
    return (
        Template(path.read_text(encoding="utf-8"))
        .render(card_data="license: mit")
        .replace("license: mit", "")
    )


def sections_text(headings: tuple[str, ...], body: str, level: str = "##") -> list[str]:
    return [f"{h if h.startswith('#') else f'{level} {h}'}\n\n{body}\n" for h in headings]


def labelled_cards() -> list[tuple[str, str, frozenset[str]]]:
    """Return (name, text, sections that a reader finds in it)."""
    everything = frozenset(SECTIONS)
    out: list[tuple[str, str, frozenset[str]]] = []
    for language, headings in HEADINGS.items():
        out.append(
            (f"complete, {language}", "\n".join(sections_text(headings, FILLER[language])), everything)
        )
    rng = random.Random(0)
    for seed in range(4):
        parts = sections_text(HEADINGS["en"], FILLER["en"])
        rng.shuffle(parts)
        out.append((f"shuffled {seed}", "# A model\n\n" + "\n".join(parts), everything))
    for language in ("de", "fr"):
        kept = rng.sample(range(9), 5)
        parts = [sections_text(HEADINGS[language], FILLER[language])[k] for k in kept]
        out.append((f"half, {language}", "\n".join(parts), frozenset(SECTIONS[k] for k in kept)))
    out.append(("loose headings", "\n".join(sections_text(LOOSE, FILLER["en"])), everything))
    out.append(("tables instead of words", "\n".join(sections_text(HEADINGS["en"], TABLE)), everything))
    out.append(("deep headings", "\n".join(sections_text(HEADINGS["en"], FILLER["en"], "#####")), everything))
    underlined = "\n".join(f"{h}\n{'=' * len(h)}\n\n{FILLER['en']}\n" for h in HEADINGS["en"])
    out.append(("underlined headings", underlined, everything))
    bold = "\n".join(f"**{h}:**\n\n{FILLER['en']}\n" for h in HEADINGS["en"])
    out.append(("bold headings", bold, everything))
    nothing: frozenset[str] = frozenset()
    out.append(("hub template", hub_template(), nothing))
    out.append(("raw hub template", (Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md")
                .read_text(encoding="utf-8"), nothing))  # fmt: skip
    needed = "\n".join(sections_text(HEADINGS["en"], "[More Information Needed]\n" * 30))
    out.append(("more information needed", needed, nothing))
    out.append(
        ("only comments", "\n".join(sections_text(HEADINGS["en"], f"<!-- {FILLER['en']} -->")), nothing)
    )
    out.append(("empty tables", "\n".join(sections_text(HEADINGS["en"], EMPTY_TABLE)), nothing))
    labels = "".join(
        f"- **Label number {'abcdefghijklmnopqrstuvwxyz'[k]}:** [More Information Needed]\n"
        for k in range(25)
    )
    out.append(("only labels", "\n".join(sections_text(HEADINGS["en"], labels)), nothing))
    out.append(("headings only", "\n".join(sections_text(HEADINGS["en"], "")), nothing))
    out.append(("too short", "\n".join(sections_text(HEADINGS["en"], "It is good. TODO.")), nothing))
    out.append(("empty", "", nothing))
    out.append(("plain text", FILLER["en"] * 5, nothing))
    out.append(("other headings", "\n".join(sections_text(("Installation", "Citation", "Changelog", "Contact"),
                                                          FILLER["en"])), nothing))  # fmt: skip
    code = f"```\n# Metrics\n{FILLER['en']}\n## Factors\n{FILLER['en']}\n```\n"
    out.append(("headings inside code", f"## Installation\n\n{code}", nothing))
    some = sections_text(HEADINGS["en"], FILLER["en"])[:3] + sections_text(HEADINGS["en"], "TBD")[3:]
    out.append(("a third of it", "\n".join(some), frozenset(SECTIONS[:3])))
    nested = f"## Uses\n\n### Direct Use\n\n{WORDS['en']}.\n\n### Installation of it\n\n{WORDS['en']}.\n\n## Citation\n\n{FILLER['en']}\n"
    out.append(("nested uses", nested, frozenset({"intended use"})))
    both = f"## Bias, Risks, and Limitations\n\n{FILLER['en']}\n"
    out.append(
        ("risks and limitations", both, frozenset({"ethical considerations", "caveats and recommendations"}))
    )
    return out
