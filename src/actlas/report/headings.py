"""Which of the nine sections of a model card a Markdown text really has.

A section is there if headings that mean it (in English or one of six other languages) have at least 20
words or a filled table under them, after template text is taken out: "More Information Needed",
comments, instructions, labels without an answer, table rows without a value. A template scores nothing.

The nine sections are those of *Model Cards for Model Reporting* (Mitchell et al. 2019, section 4).
Presence is not quality, and this score is not for ranking other people's models.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

LEAST_WORDS = 20
LONGEST_HEADING = 400
"""A longer line is no heading (and would be slow to match)."""

_MEANINGS: dict[str, str] = {
    "model details": (
        "model details|model description|model summary|model overview|model information|model info"
        "|overview|description|details|about|about the model|about this model|the model|architecture"
        "|model architecture|model architecture and objective|technical specifications|technical details"
        "|model specifications|model development|training procedure|training hyperparameters"
        "|hyperparameters|model|summary|modelldetails|modellbeschreibung|beschreibung|uberblick"
        "|architektur|details du modele|description du modele|description du modele|presentation"
        "|presentation du modele|detalles del modelo|descripcion del modelo|descripcion"
        "|descricao do modelo|detalhes do modelo|descricao|dettagli del modello|descrizione del modello"
        "|descrizione|模型详情|模型介绍|模型描述|模型简介|模型概述|モデルの詳細|モデル詳細|モデル概要"
        "|概要"
    ),
    "intended use": (
        "intended use|intended uses|uses|use|direct use|downstream use|out of scope use|out of scope uses"
        "|intended uses and limitations|intended use and users|primary intended uses"
        "|primary intended users|use cases|intended use cases|usage and limitations|intended usage"
        "|intended users|applications|purpose|intended purpose|intended applications|recommended uses"
        "|appropriate uses|primary uses|verwendungszweck|beabsichtigte verwendung|vorgesehene verwendung"
        "|verwendung|einsatzzweck|anwendungsbereich|utilisation prevue|utilisations prevues|usage prevu"
        "|usages prevus|cas d utilisation|utilisation|uso previsto|usos previstos|casos de uso|uso"
        "|uso pretendido|usos pretendidos|utilizzo previsto|usi previsti|预期用途|用途|使用场景|适用范围"
        "|意図された用途|想定される用途|利用目的|使用目的"
    ),
    "factors": (
        "factors|relevant factors|evaluation factors|groups|subgroups|demographic factors|demographics"
        "|factors and subgroups|relevant groups|faktoren|einflussfaktoren|facteurs|facteurs pertinents"
        "|factores|factores relevantes|fatores|fatores relevantes|fattori|fattori rilevanti|因素|影响因素"
        "|评估因素|要因|因子"
    ),
    "metrics": (
        "metrics|evaluation metrics|performance metrics|performance measures|model performance measures"
        "|measures|decision thresholds|metriken|bewertungsmetriken|messgroßen|messgrossen|kennzahlen"
        "|metriques|metriques d evaluation|mesures|metricas|metricas de evaluacion|metricas de avaliacao"
        "|metriche|metriche di valutazione|指标|评估指标|评价指标|評価指標|指標|メトリクス"
    ),
    "evaluation data": (
        "evaluation data|evaluation dataset|evaluation datasets|test data|testing data|test dataset"
        "|test set|eval data|validation data|evaluation data set|benchmark data|evaluation and test data"
        "|evaluierungsdaten|evaluationsdaten|testdaten|bewertungsdaten|donnees d evaluation"
        "|donnees de test|datos de evaluacion|datos de prueba|dados de avaliacao|dados de teste"
        "|dati di valutazione|dati di test|评估数据|测试数据|评估数据集|評価データ|テストデータ"
        "|評価用データ"
    ),
    "training data": (
        "training data|training dataset|training datasets|training set|training corpus|training details"
        "|training|pretraining data|pre training data|pretraining corpus|training data set|data|dataset"
        "|datasets|fine tuning data|finetuning data|training and data|trainingsdaten|trainingsdatensatz"
        "|trainingsdatensatze|donnees d entrainement|donnees d apprentissage"
        "|jeu de donnees d entrainement|datos de entrenamiento|dados de treinamento|dados de treino"
        "|dati di addestramento|dati di training|训练数据|训练数据集|训练语料|学習データ|訓練データ"
        "|トレーニングデータ"
    ),
    "quantitative analyses": (
        "quantitative analyses|quantitative analysis|results|evaluation results|evaluation|performance"
        "|benchmarks|benchmark results|model performance|evaluations|benchmark|unitary results"
        "|intersectional results|disaggregated results|experimental results|quantitative results"
        "|eval results|evaluation and results|ergebnisse|auswertung|evaluierung|evaluation der ergebnisse"
        "|quantitative analysen|quantitative auswertung|leistung|resultats|analyses quantitatives"
        "|evaluation et resultats|resultados|analisis cuantitativos|analisis cuantitativo|evaluacion"
        "|analises quantitativas|avaliacao|risultati|analisi quantitative|valutazione|定量分析|评估结果"
        "|实验结果|结果|性能|評価結果|結果|定量的分析|性能評価"
    ),
    "ethical considerations": (
        "ethical considerations|ethics|ethical issues|ethical concerns|ethical aspects|risks|bias"
        "|bias and risks|bias and fairness|fairness|biases|risks and harms|potential harms"
        "|societal impact|social impact|responsible ai|safety|safety considerations"
        "|bias risks and limitations|risks and limitations|bias and limitations"
        "|risks limitations and biases|ethical considerations and limitations|broader impact"
        "|ethische uberlegungen|ethik|ethische aspekte|ethische erwagungen|risiken"
        "|considerations ethiques|ethique|enjeux ethiques|consideraciones eticas|etica"
        "|consideracoes eticas|considerazioni etiche|伦理考量|伦理考虑|道德考量|偏见与风险|倫理的考慮"
        "|倫理的配慮|倫理的考慮事項|倫理面の考慮"
    ),
    "caveats and recommendations": (
        "caveats and recommendations|caveats|recommendations|limitations|known limitations"
        "|limitations and caveats|limitations and recommendations|known issues|caveats and limitations"
        "|bias risks and limitations|risks and limitations|bias and limitations"
        "|risks limitations and biases|model limitations|ethical considerations and limitations"
        "|einschrankungen|einschrankungen und empfehlungen|empfehlungen|vorbehalte und empfehlungen"
        "|hinweise und empfehlungen|grenzen|mises en garde et recommandations|limites et recommandations"
        "|limites|recommandations|limitations et recommandations|advertencias y recomendaciones"
        "|limitaciones|recomendaciones|limitaciones y recomendaciones|limitacoes|recomendacoes"
        "|ressalvas e recomendacoes|limitacoes e recomendacoes|avvertenze e raccomandazioni|limitazioni"
        "|raccomandazioni|limiti e raccomandazioni|注意事项与建议|局限性|限制|建议|注意事项和建议"
        "|注意事項と推奨事項|制限事項|推奨事項|注意点と推奨事項"
    ),
}
"""Headings that mean each section, without accents."""

SECTIONS = tuple(_MEANINGS)

_JOINTS = re.compile(r" (?:and|by|per|und|nach|et|par|y|e|por) ")
_GENERIC = frozenset(
    ("details", "summary", "overview", "description", "about", "data", "dataset", "datasets", "model")
    + ("training", "use", "uses")
)
"""Words that name a section at the top level, but below another section's heading only a part of it."""
_PREFIXES = {"results": "quantitative analyses", "evaluation results": "quantitative analyses"}
_TEMPLATE = tuple(
    re.compile(p, re.IGNORECASE)
    for p in (
        r"\[?[ \t]{0,4}more information (?:is )?needed(?: for further recommendations)?[ \t]{0,4}\]?\.?",
        r"\[?[ \t]{0,4}information (?:is )?needed[ \t]{0,4}\]?",
        r"users \(both direct and downstream\) should be made aware of the risks, biases and "
        r"limitations of the model\.?",
        r"use the code below to get started with the model\.?",
        r"carbon emissions can be estimated using the .{0,200}?presented in .{0,200}?(?:\)|\])\.?",
        r"\{\{.{0,400}?\}\}",
        r"\{%.{0,400}?%\}",
        r"\[optional\]",
        r"this model card has been generated automatically[^\n]{0,300}",
        r"this is the model card of a .{0,20}transformers model that has been pushed on the hub\.?",
        r"you should probably proofread and complete it[^\n]{0,80}",
    )
)
_PLACEHOLDER = re.compile(
    r"(?:not provided|n ?/? ?a|todo|tbd|tba|none|unknown"
    r"|to be (?:added|done|determined|completed|filled(?: in)?)"
    r"|fill (?:this|me) in|coming soon|placeholder|lorem ipsum.*|xxx+|\.\.\.|…|-+|–|—|\?+|)",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_LABEL = re.compile(r"^\s*(?:[-*+]\s+|\d+[.)]\s+)?\**\s*[^.:|]{1,60}:\s*\**\s*$")


@dataclass(frozen=True)
class Found:
    """What a card has of one section.

    Attributes:
        section: name of the section.
        words: words under its headings, template text taken out.
        tables: filled tables under its headings.
    """

    section: str
    words: int = 0
    tables: int = 0

    @property
    def present(self) -> bool:
        """Whether there is enough to count."""
        return self.words >= LEAST_WORDS or self.tables > 0


def find_sections_of_card(text: str) -> dict[str, Found]:
    """Return, for each of the nine sections, how much of it a card's Markdown has.

    Args:
        text: the card without its front matter; any text is handled, in linear time.
    """
    words = dict.fromkeys(SECTIONS, 0)
    tables = dict.fromkeys(SECTIONS, 0)
    for sections, lines in _blocks(_COMMENT.sub(" ", text)):
        count, filled = _content(lines)
        for section in sections:
            words[section] += count
            tables[section] += filled
    return {s: Found(s, words[s], tables[s]) for s in SECTIONS}


def normalise_heading(heading: str) -> str:
    """Return a heading in lower case without accents, numbering, marks and extras in brackets."""
    text = re.sub(r"<[^<>]{0,200}>|\[optional\]|\{#[^{}]{0,80}\}", " ", heading, flags=re.IGNORECASE)
    text = (
        re.sub(r"\[([^\[\]]{0,200})\]\([^()]{0,300}\)", r"\1", text)
        .replace("&amp;", "&")
        .replace("&", " and ")
    )
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"[^\w\s]|_", " ", text)
    text = re.sub(r"^\s*(?:\d+\s+)+", "", text)
    return " ".join(text.split())


def sections_meant(heading: str) -> list[str]:
    """Return which of the nine sections a heading means; none, one, or two ("risks and limitations")."""
    name = normalise_heading(heading)
    if name in _NORMALISED:
        return _NORMALISED[name]
    for prefix, section in _PREFIXES.items():
        if name.startswith(prefix + " "):
            return [section]
    parts = [part for part in _JOINTS.split(name) if part]
    if len(parts) > 1:  # "metrics and thresholds", "performance by group": what its first part means
        return _NORMALISED.get(parts[0], [])
    return []


_NORMALISED: dict[str, list[str]] = {}
for _section, _names in _MEANINGS.items():
    for _heading in dict.fromkeys(normalise_heading(name) for name in _names.split("|")):
        _NORMALISED.setdefault(_heading, []).append(_section)


def _blocks(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (sections, lines) of each heading; a deeper heading that means nothing belongs to its parent."""
    current: list[str] = []
    level = 0
    lines: list[str] = []
    fence = ""
    previous = ""
    for line in text.splitlines():
        mark = re.match(r" {0,3}(```+|~~~+)", line)
        if mark and (not fence or mark.group(1).startswith(fence)):
            fence = "" if fence else mark.group(1)
        heading = None if fence or len(line) > LONGEST_HEADING else _HEADING.match(line)
        depth, title = (len(heading.group(1)), heading.group(2)) if heading else (0, "")
        if (
            not fence
            and not heading
            and re.fullmatch(r" {0,3}(=+|-{3,}) *", line)
            and previous.strip()
            and (not previous.lstrip().startswith(("|", "-", "*", ">")))
        ):
            depth, title = (1 if "=" in line else 2), previous.strip()
            lines = lines[:-1]
        bold = (
            None
            if fence or depth or len(line) > LONGEST_HEADING
            else re.fullmatch(r"\s*\*\*([^*]{2,60})\*\*:?\s*", line)
        )
        if bold and sections_meant(bold.group(1)):
            depth, title = 6, bold.group(1)
        previous = line
        if not depth:
            lines.append(line)
            continue
        meant = sections_meant(title)
        generic = normalise_heading(title) in _GENERIC
        if current and depth > level and (not meant or generic):
            continue
        yield current, lines
        current, level, lines = meant, depth, []
    yield current, lines


def _content(lines: list[str]) -> tuple[int, int]:
    """Return the words and filled tables of a block, template text taken out."""
    body = "\n".join(lines)
    for pattern in _TEMPLATE:
        body = pattern.sub(" ", body)
    words = 0
    rows: list[list[str]] = []
    tables = 0
    for line in [*body.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            rows.append([cell.strip(" *`_") for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            filled, said = _table(rows)
            tables += filled
            words += said
            rows = []
        if not _LABEL.match(line):
            words += _count(line)
    return words, tables


def _table(rows: list[list[str]]) -> tuple[int, int]:
    """A table counts if a row below its header has a value beside its first cell (or is that one cell)."""
    if len(rows) < 3 or not all(re.fullmatch(r":?-+:?", cell) for cell in rows[1] if cell):
        return 0, sum(_count(" ".join(row)) for row in rows)
    full = [row for row in rows[2:] if any(not _PLACEHOLDER.fullmatch(c) for c in (row[1:] or row))]
    return int(bool(full)), sum(_count(" ".join(row)) for row in full)


def _count(line: str) -> int:
    """Words of a line; two ideographs or kana count as one word; a placeholder counts nothing."""
    text = re.sub(r"https?://\S+|<[^<>]{0,200}>", " ", line)
    bare = text.strip(" \t>*+#-_.`")
    label = re.match(r"[^.:|]{1,60}:", bare)
    answer = bare[label.end() :] if label else bare
    if len(answer) < 400 and _PLACEHOLDER.fullmatch(answer.strip(" *_`.")):
        return 0
    return len(_WORD.findall(_CJK.sub(" ", text))) + len(_CJK.findall(text)) // 2
