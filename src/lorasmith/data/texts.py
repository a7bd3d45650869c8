"""What is wrong with a text by itself: damaged encoding, another model's markup, another language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from lorasmith.data.duplicates import parts, question
from lorasmith.data.records import Problem, Record
from lorasmith.data.template import Specials

INVISIBLE = "\u200b\u200c\u2060\ufeff\u00ad\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069"
"""Zero-width and direction characters (the joiner U+200D is left out: emoji and Indic scripts need it)."""

LOST = "\ufffd"

FOREIGN_MARKUP = (
    "<|im_start|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "[INST]", "[/INST]", "<<SYS>>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "### Instruction:", "### Response:", "<|endoftext|>",
)  # fmt: skip
ROLE_LINE = re.compile(r"^(?:User|Human|Assistant|System|Bot)\s*:", re.MULTILINE)

STOPWORDS = {
    "English": "the and is of to in that for it with was on are this you be as at have not what my can i",
    "German": "der die das und ist nicht ein eine ich zu mit auf für von den dem wie sie auch es im war",
    "French": "le la les des est et une un dans pour que qui pas sur vous je du avec ce sont il elle au",
    "Spanish": "el los las de que y en un una por con para es no se del lo como más su al está",
    "Italian": "il di che è la per un una non sono con del della mi si come più anche questo gli ha",
    "Portuguese": "o os que e do da em um uma para não com por mais as dos se na no ao são você",
    "Dutch": "de het een en van is dat niet op te zijn voor met die aan ik je er maar ook wat",
}
_WORDS = {language: frozenset(words.split()) for language, words in STOPWORDS.items()}
SCRIPTS = (
    "LATIN",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "CYRILLIC",
    "ARABIC",
    "HEBREW",
    "GREEK",
    "DEVANAGARI",
    "THAI",
)
RARE = 0.05
"""A language in fewer records than this is more likely a mistake than a choice."""


QUOTED = re.compile(r'"[^"\n]{1,200}"|“[^”\n]{1,200}”')


def odd_texts(records: Sequence[Record], specials: Specials) -> Iterator[Problem]:
    """Empty turns, control tokens in the text, damaged characters, markup of another template."""
    for record in records:
        turns = parts(record)
        empty = [name for name, text in turns if not text.strip()]
        if empty:
            yield _problem(record, "empty-turn", f"the {empty[0]} turn is empty")
        if record.kind != "text":  # a text may well be rendered already
            markup = [s for _, text in turns for s in specials.texts if s in text]
            if markup:
                said = f"the text holds {markup[0]!r}, which becomes a control token"
                yield _problem(record, "special-token", said)
        for _, text in turns:
            yield from _damage(record, text)
        yield from _foreign_markup(record, turns, specials)


def _damage(record: Record, text: str) -> Iterator[Problem]:
    if LOST in text:
        yield _problem(record, "encoding", f"holds U+FFFD, where characters were lost: {_around(text, LOST)}")
    control = next((c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\r\t"), None)
    if control is not None:
        yield _problem(record, "control-character", f"holds U+{ord(control):04X}: {_around(text, control)}")
    hidden = next((c for c in text if c in INVISIBLE), None)
    if hidden is not None:
        name = unicodedata.name(hidden, "no name").lower()
        yield _problem(record, "invisible-character", f"holds U+{ord(hidden):04X} ({name})")
    wrong = mojibake(text)
    if wrong is not None:
        yield _problem(record, "mojibake", f"{wrong[0]!r} is UTF-8 read as another encoding: {wrong[1]!r}")


def mojibake(text: str) -> tuple[str, str] | None:
    """A run of characters that is valid UTF-8 when written as Windows-1252, and what it then says."""
    for run in re.findall(
        r"[\u0080-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122\u20ac]{2,}",
        text,
    ):
        for encoding in ("cp1252", "latin-1"):
            try:
                meant = run.encode(encoding).decode("utf-8")
            except UnicodeError:
                continue
            return run, meant
    return None


def _foreign_markup(
    record: Record, turns: Sequence[tuple[str, str]], specials: Specials
) -> Iterator[Problem]:
    """Markup that serving would not send: the base's own template wraps what the user says."""
    for role, text in turns:
        found = next((m for m in FOREIGN_MARKUP if m in text and m not in specials.texts), None)
        if found is None and record.kind == "completion" and len(ROLE_LINE.findall(text)) > 1:
            found = ROLE_LINE.findall(text)[0]
        if found:
            said = f"the {role} turn holds {found!r}, markup of another template; serving adds this base's own around it"
            yield _problem(record, "template-mismatch", said)
            return


def odd_languages(records: Sequence[Record]) -> Iterator[Problem]:
    """Records in a language that hardly any other record is in."""
    found = [language(question(record)) for record in records]
    counts = Counter(name for name in found if name)
    known = sum(counts.values())
    for record, name in zip(records, found, strict=True):
        if name and known >= 20 and counts[name] / known < RARE:
            main, _ = counts.most_common(1)[0]
            said = f"looks like {name}, as do {counts[name] - 1} other records; most are {main}"
            yield _problem(record, "language", said)


def language(text: str) -> str | None:
    """The script, or for Latin letters the language, where the text is clear about it; what it quotes aside."""
    text = QUOTED.sub(" ", text)
    letters = Counter(
        next((s for s in SCRIPTS if unicodedata.name(c, "").startswith(s)), "OTHER")
        for c in text
        if c.isalpha()
    )
    if sum(letters.values()) < 8:
        return None
    script, count = letters.most_common(1)[0]
    if count < 0.6 * sum(letters.values()):
        return None
    if script != "LATIN":
        return script.capitalize()
    words = re.findall(r"[^\W\d_]+", text.casefold())
    scores = Counter({name: sum(w in known for w in words) for name, known in _WORDS.items()})
    (best, hits), (_, second) = scores.most_common(2)
    kinds = len(_WORDS[best].intersection(words))  # "come, come; … come" is one word of Italian
    is_clear = len(words) >= 6 and kinds >= 3 and hits >= 2 * second and hits >= 0.2 * len(words)
    return best if is_clear else None


def _problem(record: Record, kind: str, message: str) -> Problem:
    return Problem(record.line, kind, message, is_dropped=False)


def _around(text: str, character: str) -> str:
    at = text.index(character)
    return repr(text[max(0, at - 12) : at + 12])
