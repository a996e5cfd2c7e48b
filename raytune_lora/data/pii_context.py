"""What the detectors of personal data share: the match, and the words before it that tell what it is."""

from __future__ import annotations

import re
from typing import NamedTuple


class Match(NamedTuple):
    """One piece of personal data: ``text[start:end]``."""

    kind: str  # of ``pii.KINDS``
    start: int
    end: int


_AROUND = 30  # characters before a number in which a word counts
_WORD = re.compile(r"[^\W\d_]+|[0-9]+")
_WORDS = {
    "phone": "phone telephone cellphone tel call cell mobile mobil fax whatsapp sms dial handy ring rufnummer telefon "
    "telefonnummer telefono teléfono telephone téléphone tél móvil movil portable 電話 携帯 电话 手机",
    "credit_card": "card visa mastercard amex credit debit karte kreditkarte carte tarjeta カード 卡号",
    "ssn": "ssn social",
    "resident_number": "rrn registration",
    "ip_address": "ip ipv4 address server host dns ping gateway",
}
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_KOREAN = re.compile(  # nouns, which particles and other nouns are joined to
    r"(?P<phone>전화|연락처|휴대|핸드폰|팩스)|(?P<credit_card>카드)|(?P<resident_number>주민(?:등록|번호))|(?P<ip_address>서버|주소)"
)
_IDENTIFIER_WORDS = (
    "order orders invoice tracking ticket case reference ref item sku part parts serial model product article batch "
    "lot isbn ean upc gtin asin doi parcel shipment booking reservation transaction receipt contract customer patent "
    "bestellnummer bestellung rechnung rechnungsnummer auftrag auftragsnummer sendung sendungsnummer artikelnummer "
    "commande facture pedido factura 注文番号 订单号"
)
_IDENTIFIERS = frozenset(_IDENTIFIER_WORDS.split())
_KOREAN_IDENTIFIER = re.compile(r"(?:주문|송장|예약|상품|제품|접수|사업자|등록|거래|관리)(?:번호|등록번호)|주문$|송장$")
_BETWEEN = frozenset({"no", "nr", "num", "number", "id", "code", "ref", "is", "was", "ist", "번호", "번호는"})


def words_before(text: str, start: int, around: int = _AROUND) -> list[str]:
    """The words, and runs of digits, in the ``around`` characters before ``start``."""
    return _WORD.findall(text, max(0, start - around), start)


def context(text: str, start: int, around: int = _AROUND) -> str:
    """The kind that the last telling word before ``start`` speaks of; empty without one."""
    for word in reversed(words_before(text, start, around)):
        kind = _KIND_OF.get(word.lower(), "")
        if not kind and not word.isascii() and (korean := _KOREAN.search(word)):
            kind = str(korean.lastgroup)
        if kind:
            return kind
    return ""


def is_identifier(text: str, start: int) -> bool:
    """Whether the words right before ``start`` name a number that is not a person's, such as "order no."."""
    for word in reversed(words_before(text, start)):
        word = word.lower()
        if word in _IDENTIFIERS or (not word.isascii() and _KOREAN_IDENTIFIER.search(word)):
            return True
        if word not in _BETWEEN:
            return False
    return False
