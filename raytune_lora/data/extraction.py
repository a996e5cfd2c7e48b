"""The quickstart's task: short messages in English and Korean, and the strict JSON record that each of them holds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from typing import Any

from raytune_lora.errors import UserError

Alpaca = dict[str, str]

_INSTRUCTION = "Extract the record as JSON."
_INSTRUCTION_KO = "JSON으로 추출하세요."

_ENGLISH = (
    "Hi, {name} from {company} here. Please send {amount} to our {city} office by {date}.",
    "{company} ({city}) paid {amount} on {date}. Contact: {name}.",
    "On {date} {name} signed for {amount} with {company} in {city}.",
    "Invoice of {amount} for {company}, {city}, due {date}. Ask for {name}.",
    "{name} asks if {company} can refund {amount} before {date}. She is in {city}.",
    "We met {name} in {city} on {date}; {company} offers {amount}.",
)
_KOREAN = (
    "{company} {name}입니다. {date}까지 {city}로 {amount} 보내 주세요.",
    "{date} {city} {company}, {amount} 계약. 담당 {name}.",
    "{company}({city}) {date} {amount} 지급, 담당 {name}.",
)
_ENGLISH_DATES: tuple[Callable[[date], str], ...] = (
    lambda d: f"{d:%B} {d.day}, {d.year}",
    lambda d: f"{d.day} {d:%b} {d.year}",
    lambda d: d.isoformat(),
)
_CITIES = ("Berlin", "Boston", "Chicago", "Dublin", "London", "Madrid", "Paris", "Rome", "Sydney", "Toronto")
_CITIES_KO = ("서울", "부산", "인천", "대구", "대전", "광주", "수원", "제주")
_COMPANIES_KO = ("한빛", "대한", "동아", "미래", "서해", "금강", "태양", "하나")
_KINDS_KO = ("상사", "전자", "무역", "식품")


def version() -> str | None:
    """Of the package whose lists the messages are made of; None where it is missing."""
    try:
        return metadata.version("faker")
    except metadata.PackageNotFoundError:
        return None


def extraction_records(rows: int, korean: float, seed: int) -> Iterator[Alpaca]:
    """Messages and their records, made by Faker.

    Args:
        rows: how many.
        korean: the share of Korean ones.
        seed: the same seed gives the same rows.

    Raises:
        UserError: Faker is not installed.
    """
    try:
        from faker import Faker
    except ImportError as error:
        raise UserError(
            "data=extraction needs Faker: pip install 'raytune-lora[quickstart]', or use data.path=my.jsonl"
        ) from error
    rng = random.Random(seed)
    english, hangul = Faker("en_US"), Faker("ko_KR")
    english.seed_instance(seed)
    hangul.seed_instance(seed)
    for _ in range(rows):
        yield _korean(hangul, rng) if rng.random() < korean else _english(english, rng)


def _english(faker: Any, rng: random.Random) -> Alpaca:
    day, amount = _day(rng), rng.randint(10, 9999)
    words = {
        "name": f"{faker.first_name_female()} {faker.last_name()}",
        "company": f"{faker.last_name()} {faker.company_suffix()}",
        "city": rng.choice(_CITIES),
        "date": rng.choice(_ENGLISH_DATES)(day),
        "amount": rng.choice((f"${amount:,}", f"{amount} dollars", f"USD {amount}")),
    }
    return _alpaca(_INSTRUCTION, rng.choice(_ENGLISH).format(**words), _record(words, day, amount))


def _korean(faker: Any, rng: random.Random) -> Alpaca:
    day, amount = _day(rng), rng.randint(1, 999) * 1000
    words = {
        "name": faker.name(),
        "company": rng.choice(_COMPANIES_KO) + rng.choice(_KINDS_KO),
        "city": rng.choice(_CITIES_KO),
        "date": rng.choice((f"{day.year}년 {day.month}월 {day.day}일", f"{day:%Y.%m.%d}")),
        "amount": f"{amount:,}원",
    }
    return _alpaca(_INSTRUCTION_KO, rng.choice(_KOREAN).format(**words), _record(words, day, amount))


def _alpaca(instruction: str, message: str, record: str) -> Alpaca:
    return {"instruction": instruction, "input": message, "output": record}


def _day(rng: random.Random) -> date:
    return date(rng.randint(2020, 2026), rng.randint(1, 12), rng.randint(1, 28))


def _record(words: dict[str, str], day: date, amount: int) -> str:
    record = {key: words[key] for key in ("name", "company", "city")}
    return json.dumps({**record, "date": day.isoformat(), "amount": amount}, ensure_ascii=False)
