"""Questions with known answers for los-net: capital, continent and currency of every country of the table."""

from __future__ import annotations

from dataclasses import dataclass

from actlas.data.facts_table import COUNTRIES

#: currency -> countries, by the names of `actlas.data.facts_table`; countries without an entry are left out
_CURRENCIES = {
    "euro": "France Germany Italy Spain Portugal Austria Belgium Greece Ireland Finland Estonia Latvia"
    " Lithuania Croatia",
    "pound": "England Scotland Egypt Syria Lebanon Sudan",
    "krona": "Sweden Iceland",
    "krone": "Norway Denmark",
    "ruble": "Russia",
    "zloty": "Poland",
    "forint": "Hungary",
    "hryvnia": "Ukraine",
    "lev": "Bulgaria",
    "leu": "Romania",
    "lek": "Albania",
    "yen": "Japan",
    "yuan": "China",
    "rupee": "India Nepal Pakistan",
    "baht": "Thailand",
    "dong": "Vietnam",
    "rial": "Iran",
    "riyal": "Qatar",
    "lira": "Turkey",
    "dinar": "Iraq Jordan Serbia Algeria Tunisia Libya",
    "afghani": "Afghanistan",
    "taka": "Bangladesh",
    "dram": "Armenia",
    "lari": "Georgia",
    "shilling": "Kenya Uganda Somalia",
    "cedi": "Ghana",
    "birr": "Ethiopia",
    "dirham": "Morocco",
    "franc": "Senegal Mali",
    "kwacha": "Zambia",
    "kwanza": "Angola",
    "naira": "Nigeria",
    "dollar": "Canada Jamaica Australia Fiji Zimbabwe",
    "peso": "Cuba Argentina Chile Colombia Uruguay",
    "sol": "Peru",
    "bolivar": "Venezuela",
    "gourde": "Haiti",
}
CURRENCY = {country: unit for unit, names in _CURRENCIES.items() for country in names.split()}

_FRAMES = {
    "capital": "The capital of {} is the city of",
    "continent": "{} is a country on the continent of",
    "currency": "The currency of {} is the",
}


@dataclass(frozen=True)
class Fact:
    """A prompt, what its continuation must say, and where it came from."""

    prompt: str
    gold: tuple[str, ...]
    country: str
    relation: str

    def right(self, answer: str) -> bool:
        """Whether an answer says it, in any case."""
        return any(g.lower() in answer.lower() for g in self.gold)


def facts() -> list[Fact]:
    """Return every fact, country by country."""
    out = []
    for country in COUNTRIES:
        known = {"capital": (country.capital,), "continent": (country.continent,)}
        if country.name in CURRENCY:
            known["currency"] = (CURRENCY[country.name],)
        for relation, gold in known.items():
            out.append(Fact(_FRAMES[relation].format(country.name), gold, country.name, relation))
    return out
