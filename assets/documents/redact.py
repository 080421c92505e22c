"""Personal data leaves a text: e-mail addresses, phone, card and account numbers, IP addresses, US SSNs.

Belongs here: what counts as personal data and what stands in its place, as a pure function of the text, and
the cache of its results. Does not belong here: names, places and other things that no pattern finds;
pseudonyms of users and authors (feedback); which texts to redact (corpus, warehouse).

Presidio's recognisers are called one by one. Its analyzer engine is not used: it wants a language model and
downloads one; and its e-mail recogniser, which downloads a list of domains, has its pattern replaced.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import psycopg
    from presidio_analyzer import EntityRecognizer

# Changes with every change of what is found or of what replaces it.
POLICY = "patterns-1"
PHONE_REGIONS = ("US", "GB", "DE", "FR", "CH", "AU", "IN")
MIN_KEY_BYTES = 16
BATCH_TEXTS = 500

_LABELS = {
    "CREDIT_CARD": "CARD",
    "EMAIL_ADDRESS": "EMAIL",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "PHONE_NUMBER": "PHONE",
    "US_SSN": "SSN",
}
_TOKEN = re.compile(rf"<(?:{'|'.join(_LABELS.values())})(?:_[a-z2-7]{{8}})?>")

# Bounded, so that a long run of letters costs time in proportion to its length. The last label must be
# letters: "lodash@4.17.21" is a version.
_EMAIL = (
    r"[\w!#$%&'*+/=?^`{|}~-](?:[\w.!#$%&'*+/=?^`{|}~-]{0,62}[\w!#$%&'*+/=?^`{|}~-])?"
    r"@(?:\w(?:[\w-]{0,61}\w)?\.){1,8}(?:xn--[\w-]{2,59}|[^\W\d_]{2,24})(?![^\W_])"
)
# Every issuer's first digits, 12 to 19 digits in all; the checksum decides.
_CARD = r"(?<![\w+])(?<!\d\.)(?<!\w-)(?:1800|2131|2[2-7]\d{2}|[3-6]\d{3})(?:[ -]?\d){8,15}(?!\w|-\w|\.\d)"
_SSN = r"(?<!\w)(?<!\d\.)(?<!\w-)\d{3}([- ])\d{2}\1\d{4}(?!\w|-\w|\.\d)"

# Runs of digits that are certainly no phone numbers, whatever stands around them.
_NO_PHONE = re.compile(
    r"""
    \b\d{4}[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])(?!\d)(?:[T ]\d{1,2}(?=:))?       # 2026-10-01 12:
    | (?<![\d.])(?:0?[1-9]|[12]\d|3[01])([-/.])(?:0?[1-9]|[12]\d|3[01])\1(?:19|20)\d\d(?![\d.-])  # 01.10.2026
    | \b(?:isbn|issn|ean|gtin)(?:-1[03])?[:\s]{0,3}[\dX][\dX -]{6,18}
    | (?<!\d)0?1234567890?(?!\d)
    | (?<!\d)97[89](?:[ -]?\d){9}[ -]?[\dX](?!\d)                                                # an ISBN
    | \b(?:
        (?:sku|order|invoice|ticket|serial|version|release|build|commit|tracking|rma|po)
        (?:[ \t]{0,3}(?:no\b\.?|nr\b\.?|number|id\b|code|[#:=-]|[ \t])){0,4}
      | (?:case|part|item|article|model|customer|account|reference|ref)
        (?:[ \t]{0,3}(?:no\b\.?|nr\b\.?|number|id\b|code|\#)){1,2}[ \t:=-]{0,3}
      ) [A-Z]{0,4}-?\d[\d.-]*\d
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CANDIDATE = re.compile(
    r"(?<![\w+])(?<!\w[-_/.])(?:\+|\((?=\+?\d{1,6}\))\+?)?\d(?:[ \u00a0().\-/\u2010-\u2013]{0,3}\d){6,16}(?!\w)"
)
_LABEL_BEFORE = re.compile(
    r"(?<![A-Za-z])(?:phone|telephone|tel|mobile|cell|cellphone|handy|fax|whatsapp|sms|hotline|call"
    r"|(?:call|ring|text|reach|phone)(?:ed|ing)?\s(?:me|us|him|her|them|at|on|under)(?:\s(?:at|on|under))?)"
    r"(?:[\s_]?(?:no|number|nr)\b)?[\s.:=#*)-]{0,6}$",
    re.IGNORECASE,
)
_LABEL_AFTER = re.compile(r"[ \t]{0,2}[-,(]?[ \t]{0,2}(?:office|fax|mobile|phone|tel)\b", re.IGNORECASE)

# Four numbers with dots between are as often a version or a section.
_NO_ADDRESS_BEFORE = re.compile(
    r"(?:[<>=~!]=[ ]?|\u00a7[ ]?|\b(?:section|version|release|chapter|rev)[s. :-]{0,2}|\b(?:v|ec)[ .]?)$",
    re.IGNORECASE,
)


class Finding(NamedTuple):
    """Personal data in a text: code point offsets, type, and how sure it is (0 to 1)."""

    start: int
    end: int
    type: str
    score: float


@dataclass(frozen=True)
class Redaction:
    """A text without the personal data that was found.

    Attributes:
        text: With a token in the place of each finding.
        findings: How many of each type were replaced, as in {"EMAIL_ADDRESS": 2}.
    """

    text: str
    findings: dict[str, int]


class Redactor:
    """Replaces personal data by tokens: ``<EMAIL>``, or with a key ``<EMAIL_k7q2mnbv>``.

    With a key, equal values get equal tokens, so that joins and duplicates survive; whoever has the key can
    guess short values such as phone numbers, so it is to be kept as the data itself.

    Args:
        key: 16 bytes or more; None for tokens that say the type only.
    """

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) < MIN_KEY_BYTES:
            raise ValueError(
                f"the redaction key has {len(key)} bytes; it needs {MIN_KEY_BYTES} or more: generate a random one"
            )
        self._key = key

    @property
    def policy(self) -> str:
        """Names everything but the text that a redaction depends on; part of cache keys."""
        types = "+".join(sorted(_LABELS.values())).lower()
        return f"{POLICY}:{types}:{'key-' + hashlib.sha256(self._key).hexdigest()[:8] if self._key else 'unkeyed'}"

    def redact(self, text: str) -> Redaction:
        """The text without personal data. Redacting the result again changes nothing."""
        found: Counter[str] = Counter()
        # What stands next to a number can keep it from being recognised, and may itself have been replaced.
        while findings := find(text):
            parts, position = [], 0
            for finding in findings:
                parts += [
                    text[position : finding.start],
                    self._token(finding.type, text[finding.start : finding.end]),
                ]
                position = finding.end
                found[finding.type] += 1
            text = "".join([*parts, text[position:]])
        return Redaction(text, dict(sorted(found.items())))

    def _token(self, kind: str, value: str) -> str:
        if self._key is None:
            return f"<{_LABELS[kind]}>"
        value = (
            value.casefold() if kind in ("EMAIL_ADDRESS", "IP_ADDRESS") else re.sub(r"\W", "", value).upper()
        )
        digest = hmac.digest(self._key, f"{kind}\0{value}".encode(), "sha256")
        return f"<{_LABELS[kind]}_{base64.b32encode(digest)[:8].decode().lower()}>"


def find(text: str) -> list[Finding]:
    """Personal data in a text outside of redaction tokens: in order, not overlapping.

    Findings that overlap become one that covers them all, of the type that is surest, then longest.
    """
    found = sorted(finding for search in _searches(text) for finding in search(text))
    if not found:
        return []
    tokens = [match.span() for match in _TOKEN.finditer(text)]
    merged: list[Finding] = []
    best: list[tuple[float, int]] = []
    for finding in found:
        if any(finding.start < end and start < finding.end for start, end in tokens):
            continue
        rank = (finding.score, finding.end - finding.start)
        if not merged or finding.start >= merged[-1].end:
            merged.append(finding)
            best.append(rank)
            continue
        last = merged[-1]
        winner = finding if rank > best[-1] else last
        merged[-1] = Finding(last.start, max(last.end, finding.end), winner.type, winner.score)
        best[-1] = max(rank, best[-1])
    return merged


def _searches(text: str) -> Iterator[Callable[[str], Iterator[Finding]]]:
    if "@" in text:
        yield _emails
    if re.search(r"\d", text):
        yield from (_cards, _ibans, _ssns, _phones)
    if re.search(r"\d\.\d|:\w*:", text):
        yield _ips


def _emails(text: str) -> Iterator[Finding]:
    return _presidio("EMAIL_ADDRESS", 0.95, text)


def _cards(text: str) -> Iterator[Finding]:
    return _presidio("CREDIT_CARD", 0.9, text)


def _ibans(text: str) -> Iterator[Finding]:
    return _presidio("IBAN_CODE", 1.0, text)


def _ssns(text: str) -> Iterator[Finding]:
    return _presidio("US_SSN", 0.7, text)


def _ips(text: str) -> Iterator[Finding]:
    for finding in _presidio("IP_ADDRESS", 0.8, text):
        address = ipaddress.ip_interface(text[finding.start : finding.end].partition("%")[0]).ip
        if _NO_ADDRESS_BEFORE.search(text, max(0, finding.start - 12), finding.start):
            continue
        # Nobody's address, and masks. "1::2" is a slice of a list far more often than an address.
        if address.is_loopback or address.is_unspecified or str(address).startswith(("255.", "ffff:")):
            continue
        if address.version == 6 and len(re.findall(r"[0-9A-Fa-f]+", text[finding.start : finding.end])) < 3:
            continue
        yield finding


def _presidio(kind: str, score: float, text: str) -> Iterator[Finding]:
    for result in _recognisers()[kind].analyze(text, [kind], None):  # type: ignore[arg-type]
        yield Finding(result.start, result.end, kind, score)


@cache
def _recognisers() -> dict[str, EntityRecognizer]:
    from presidio_analyzer import Pattern, PatternRecognizer
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        IbanRecognizer,
        IpRecognizer,
        UsSsnRecognizer,
    )

    return {
        "EMAIL_ADDRESS": PatternRecognizer("EMAIL_ADDRESS", patterns=[Pattern("e-mail", _EMAIL, 0.5)]),
        "CREDIT_CARD": CreditCardRecognizer(patterns=[Pattern("card", _CARD, 0.5)]),
        "IBAN_CODE": IbanRecognizer(),
        "IP_ADDRESS": IpRecognizer(),
        "US_SSN": UsSsnRecognizer(patterns=[Pattern("ssn", _SSN, 0.5)]),
    }


def _phones(text: str) -> Iterator[Finding]:
    # libphonenumber is a hundred times slower than a pattern, so it sees only what looks like a number. Digits
    # alone are phone numbers, order numbers or ids: what stands around them, or a country code, must tell.
    masked = _NO_PHONE.sub(lambda match: "x" * len(match.group()), text)
    for match in _CANDIDATE.finditer(masked):
        start, end = match.span()
        value = match.group()
        labelled = _LABEL_BEFORE.search(masked, max(0, start - 40), start) or _LABEL_AFTER.match(masked, end)
        digits = sum(character.isdigit() for character in value)
        if labelled or (value.lstrip("(").startswith("+") and digits >= 9):
            yield Finding(start, end, "PHONE_NUMBER", 0.6)
        elif digits >= 9 and _looks_dialled(value):
            yield from (
                Finding(start + first, start + last, "PHONE_NUMBER", 0.5)
                for first, last in _numbers_in(value)
            )


def _looks_dialled(value: str) -> bool:
    groups = re.findall(r"\d+", value)
    if "." in value:
        return re.fullmatch(r"\d{3}\.\d{3}\.\d{4}|0\d(?:\.\d\d){4}", value) is not None
    if "/" in value:
        return re.match(r"\(?0\d{1,5}\)?[ ]?/", value) is not None
    if len(groups) > 1:
        return len(groups) <= 6
    return groups[0].startswith("0") and 10 <= len(groups[0]) <= 14


def _numbers_in(value: str) -> set[tuple[int, int]]:
    import phonenumbers

    return {
        (match.start, match.end)
        for region in PHONE_REGIONS
        for match in phonenumbers.PhoneNumberMatcher(value, region, leniency=phonenumbers.Leniency.VALID)
    }


def sha256(text: str) -> str:
    """Of the UTF-8 text, lowercase hex: the key of a text in ``corpus.redaction``."""
    return hashlib.sha256(text.encode()).hexdigest()


def redact_texts(conn: psycopg.Connection[Any], texts: Iterable[str], redactor: Redactor) -> int:
    """Put the redaction of each text into ``corpus.redaction`` unless it is there.

    Each batch is committed on its own. Safe to stop, to run twice, and at once with itself.

    Returns:
        The number of texts redacted now; equal texts count once.
    """
    new = 0
    remaining = iter(texts)
    while by_hash := {sha256(text): text for text in islice(remaining, BATCH_TEXTS)}:
        with conn.transaction(), conn.cursor() as cursor:
            cursor.execute(
                "select text_sha256 from corpus.redaction where policy = %s and text_sha256 = any(%s)",
                [redactor.policy, list(by_hash)],
            )
            for (known,) in cursor.fetchall():
                del by_hash[known]
            done = [(key, redactor.redact(text)) for key, text in sorted(by_hash.items())]
            cursor.executemany(
                "insert into corpus.redaction (text_sha256, policy, redacted, findings) values (%s, %s, %s, %s::jsonb)"
                " on conflict do nothing",
                [(key, redactor.policy, found.text, json.dumps(found.findings)) for key, found in done],
            )
        new += len(done)
    return new
