"""Countries with their capitals and continents, as of 2024.

Left out on purpose: countries whose seat of government is disputed or elsewhere than the capital, and names
that need an article.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    """A country, its capital and its continent."""

    name: str
    capital: str
    continent: str


_TABLE = {
    "Europe": (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna"
        " Belgium:Brussels Greece:Athens Ireland:Dublin Poland:Warsaw Hungary:Budapest Sweden:Stockholm"
        " Norway:Oslo Denmark:Copenhagen Finland:Helsinki Russia:Moscow Ukraine:Kyiv Romania:Bucharest"
        " Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Albania:Tirana Iceland:Reykjavik Estonia:Tallinn"
        " Latvia:Riga Lithuania:Vilnius England:London Scotland:Edinburgh"
    ),
    "Asia": (
        "Japan:Tokyo China:Beijing India:Delhi Thailand:Bangkok Vietnam:Hanoi Nepal:Kathmandu Iran:Tehran"
        " Iraq:Baghdad Turkey:Ankara Syria:Damascus Lebanon:Beirut Qatar:Doha Afghanistan:Kabul"
        " Pakistan:Islamabad Bangladesh:Dhaka Mongolia:Ulaanbaatar Armenia:Yerevan Georgia:Tbilisi"
        " Jordan:Amman"
    ),
    "Africa": (
        "Egypt:Cairo Kenya:Nairobi Ghana:Accra Ethiopia:Addis_Ababa Morocco:Rabat Algeria:Algiers"
        " Tunisia:Tunis Libya:Tripoli Senegal:Dakar Uganda:Kampala Zimbabwe:Harare Zambia:Lusaka"
        " Sudan:Khartoum Angola:Luanda Mali:Bamako Somalia:Mogadishu Nigeria:Abuja"
    ),
    "America": (
        "Canada:Ottawa Cuba:Havana Argentina:Buenos_Aires Peru:Lima Chile:Santiago Colombia:Bogota"
        " Venezuela:Caracas Ecuador:Quito Uruguay:Montevideo Jamaica:Kingston Haiti:Port_au_Prince"
        " Nicaragua:Managua Brazil:Brasilia"
    ),
    "Oceania": "Australia:Canberra Fiji:Suva Samoa:Apia",
}

COUNTRIES = tuple(
    Country(entry.split(":")[0], entry.split(":")[1].replace("_", " "), continent)
    for continent, entries in _TABLE.items()
    for entry in entries.split()
)

# Countries that lie on one continent beyond doubt.
CLEAR = tuple(c for c in COUNTRIES if c.name not in {"Turkey", "Russia", "Georgia", "Armenia", "Egypt"})
