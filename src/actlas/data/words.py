"""Word lists for the tasks: common words, so that most tokenizers have them as one token."""

from __future__ import annotations

import re


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mary John Tom James Anna David Sarah Michael Robert William Richard Thomas Charles Daniel Matthew Mark"
    " Paul Steven Andrew Kevin Brian George Edward Laura Emily Kate Jane Alice Peter Henry Jack Simon Adam"
    " Ben Sam Alex Rachel Helen Linda Susan Karen Lisa Nancy Jessica Rose Martin Frank Scott Eric Stephen"
    " Patrick Jason Ryan Gary Larry Anthony Elizabeth Maria Julia Emma"
)

PLACES = _words(
    "store park school office station restaurant hospital library market museum garden house beach"
)

OBJECTS = _words("book ring drink bag box key ball letter gift card ticket map phone coat flower cup basket")

# Singular and plural of things that can be near, behind or beside one another.
NOUNS = (
    ("key", "keys"), ("book", "books"), ("picture", "pictures"), ("door", "doors"), ("window", "windows"),
    ("car", "cars"), ("house", "houses"), ("tree", "trees"), ("table", "tables"), ("chair", "chairs"),
    ("box", "boxes"), ("letter", "letters"), ("road", "roads"), ("building", "buildings"),
    ("garden", "gardens"), ("bridge", "bridges"), ("ship", "ships"), ("lamp", "lamps"), ("wall", "walls"),
    ("stone", "stones"), ("flower", "flowers"), ("bird", "birds"), ("dog", "dogs"), ("horse", "horses"),
    ("computer", "computers"), ("machine", "machines"), ("school", "schools"), ("office", "offices"),
    ("river", "rivers"), ("field", "fields"),
)  # fmt: skip

PEOPLE = (
    ("teacher", "teachers"), ("doctor", "doctors"), ("student", "students"), ("king", "kings"),
    ("soldier", "soldiers"), ("child", "children"), ("man", "men"), ("woman", "women"), ("boy", "boys"),
    ("girl", "girls"), ("friend", "friends"), ("writer", "writers"), ("artist", "artists"),
    ("officer", "officers"), ("player", "players"), ("neighbor", "neighbors"),
)  # fmt: skip

VERBS = (("is", "are"), ("was", "were"), ("has", "have"))

COMMON = _words(
    "time year people way day man thing woman life child world school state family student group country"
    " problem hand part place case week company system program question work number night point home water"
    " room mother area money story fact month book eye job word business issue side kind head house service"
    " friend father power hour game line end member law car city name team minute idea body back parent face"
    " door health person art war history party result change morning reason research girl guy moment air"
    " teacher force education foot boy age policy music process market sense nation plan college interest"
    " death experience effect use class control field development role effort rate heart drug show leader"
    " light voice wife police mind price report decision son view town road arm difference value building"
    " action season society tax director position player record paper space ground form event official"
    " matter center couple site project base star table court oil situation cost industry figure street"
    " image phone data picture practice piece land product doctor wall news test movie north love support"
    " technology step baby computer type film tree source hair window culture chance energy period course"
    " summer plant opportunity term letter condition choice rule south floor call material population"
    " economy hospital church risk fire future bank fish dog bird horse stone river ship"
)

# No word fits two categories, except those that stand in both (orange).
CATEGORIES = {
    "animal": _words("dog cat horse cow lion tiger bear wolf fox sheep mouse rabbit elephant"),
    "fruit": _words("apple banana orange lemon grape pear mango melon apricot"),
    "metal": _words("iron zinc aluminum tin nickel steel lead titanium"),
    "color": _words("red blue green yellow black white purple brown pink orange"),
    "vehicle": _words("car bus train truck bicycle motorcycle plane boat van ship"),
    "tool": _words("hammer knife saw drill spoon shovel fork pen axe"),
    "planet": _words("Mars Venus Jupiter Saturn Neptune"),
    "season": _words("winter spring summer autumn"),
}

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("light", "dark"),
    ("old", "young"), ("happy", "sad"), ("rich", "poor"), ("strong", "weak"), ("hard", "soft"),
    ("early", "late"), ("long", "short"), ("open", "closed"), ("full", "empty"), ("wet", "dry"),
    ("clean", "dirty"), ("left", "right"), ("up", "down"), ("near", "far"), ("good", "bad"),
    ("loud", "quiet"),
)  # fmt: skip

NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen twenty"
)

# Adjectives that only praise or only blame, for any kind of thing that is reviewed.
PRAISE = _words(
    "great wonderful excellent amazing brilliant fantastic beautiful perfect outstanding superb lovely"
)
BLAME = _words("terrible awful horrible bad boring dreadful poor disappointing disgusting ugly worthless")
REVIEWED = {
    "film": ("film", "movie", "story", "acting"),
    "food": ("food", "meal", "restaurant", "soup"),
    "hotel": ("hotel", "room", "service", "breakfast"),
    "product": ("phone", "camera", "product", "computer"),
    "music": ("music", "song", "concert", "album"),
}


def with_articles(text: str) -> str:
    """Write "an" for "a" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
