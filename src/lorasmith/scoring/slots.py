"""Slot error rate of E2E: what a description leaves out or makes up, by string match."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")
FAMILY = r"famil(?:y|ies)|kids?\b|child(?:ren)?"
NOT = r"\b(?:not|no|non|none|adults?)\b|n't\b|n’t\b|unfriendly"
STARS = r"(?:[\s-]*star|[\s-]*(?:out[\s-]*)?(?:of|/)[\s-]*(?:5|five))"
SAYS: Mapping[str, Mapping[str, str]] = {
    "pricerange": {
        "cheap": r"cheap|inexpensive|low[\s-]*(?:cost|price|budget)|affordable|budget",
        "moderate": r"moderate|mid[\s-]*(?:range|price)|average[\s-]*price|reasonabl|medium",
        "high": r"high[\s-]*(?:end\s*)?(?:price|cost|in price)?|expensive|pricey|upscale",
        "less than £20": r"less than £?\s*20|under £?\s*20|below £?\s*20|cheap|low[\s-]*price|inexpensive",
        "£20-25": r"£?\s*20\s*(?:-|–|to|and)\s*£?\s*25|moderate|mid[\s-]*(?:range|price)",
        "more than £30": r"(?:more than|over|above) £?\s*30|£?\s*30 (?:and|or) (?:up|more|above)|high|expensive",
    },
    "customer rating": {
        "low": r"low|poor|bad|not (?:well|highly)|(?:1|one)" + STARS,
        "average": r"average|moderate|decent|ok\b|(?:3|three)" + STARS,
        "high": r"high|excellent|great|good|well[\s-]*(?:rated|reviewed)|(?:5|five)" + STARS,
        "1 out of 5": r"low|poor|(?:1|one)" + STARS,
        "3 out of 5": r"average|(?:3|three)" + STARS,
        "5 out of 5": r"high|excellent|(?:5|five)" + STARS,
    },
    "area": {
        "riverside": r"river",
        "city centre": r"cent(?:re|er)|city|downtown",
    },
}
"""Slot → value → what says it. Words that come with other meanings too ("high") lean to counting as said."""
ABSENT = {
    "pricerange": r"price|cheap|expensive|£",
    "customer rating": r"rating|rated|stars?\b|out of (?:5|five)",
    "familyfriendly": FAMILY,
}
"""Slot → what speaks of it at all, where the meaning does not: then it is made up."""


def slots_of(meaning: str) -> dict[str, str]:
    """name[Alimentum], area[riverside] → {"name": "Alimentum", "area": "riverside"}; names lowercased."""
    return {name.strip().lower(): value.strip() for name, value in SLOT.findall(meaning)}


def slot_error_rate(outputs: Sequence[str], meanings: Sequence[str]) -> float:
    """(slots that are missing, wrong or made up) / (slots asked for), over all outputs; may exceed 1.

    Names, foods and places must occur as they are written, case aside; rating, price, area and family
    friendliness by a small table of synonyms. A match of strings, not of meaning: it is for comparing.
    """
    faults = sum(len(slot_faults(o, m)) for o, m in zip(outputs, meanings, strict=True))
    return faults / max(1, sum(len(slots_of(m)) for m in meanings))


def slot_faults(output: str, meaning: str) -> list[str]:
    """Slots of one meaning that the output lacks or gets wrong, and those it makes up."""
    asked, text = slots_of(meaning), output.lower()
    missing = [name for name, value in asked.items() if not _says(text, name, value)]
    made_up = [name for name, pattern in ABSENT.items() if name not in asked and re.search(pattern, text)]
    return missing + made_up


def _says(text: str, name: str, value: str) -> bool:
    if name == "familyfriendly":
        about = re.search(FAMILY, text) or re.search(r"adult", text)
        return bool(about) and (value.lower() == "no") == bool(re.search(NOT, _around_family(text)))
    pattern = SAYS.get(name, {}).get(value.lower())
    if pattern is not None:
        return re.search(pattern, text) is not None
    return " ".join(value.lower().split()) in " ".join(text.split())


def _around_family(text: str) -> str:
    """The clause that speaks of families: a "not" elsewhere is about something else."""
    clauses = re.split(r"[.;!?]|, (?:but|and|with|it)\b", text)
    return " ".join(clause for clause in clauses if re.search(FAMILY + "|adult", clause))
