"""The typed configuration of data: where rows come from, what is checked, how they are written and divided."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from raytune_lora.config.plain import MISSING


class Format(Enum):
    """The form of a file's records; ``auto`` recognizes each record by its fields."""

    auto = "auto"
    alpaca = "alpaca"  # instruction, input (may be empty or absent), output
    chat = "chat"  # messages: a list of {role, content}
    sharegpt = "sharegpt"  # conversations: a list of {from, value}
    completion = "completion"  # prompt, completion
    text = "text"  # text


class Action(Enum):
    """What a check does about the rows it finds."""

    off = "off"  # not looked for
    report = "report"  # counted and shown
    mask = "mask"  # personal data only: replaced by its kind in brackets
    drop = "drop"  # counted, shown and left out
    stop = "stop"  # the job ends before it starts


class TemplateKind(Enum):
    """How a row becomes text: by the patterns below, or by a chat template in the tokenizer's language (Jinja)."""

    text = "text"
    chat = "chat"


class TrainOn(Enum):
    """What of a row is trained."""

    answers = "answers"  # every turn of the assistant
    last = "last"  # the assistant's last turn
    all = "all"  # every token


class Truncation(Enum):
    """What becomes of a row of more than ``max_length`` tokens."""

    drop = "drop"  # left out
    right = "right"  # its end is cut off; left out if nothing trained remains
    left = "left"  # its start is cut off


@dataclass
class TemplateConfig:
    """How a row is written for the model."""

    kind: TemplateKind = TemplateKind.text
    system: str = "{text}\n\n"
    with_input: str = "### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:\n"  # a user's turn
    without_input: str = "### Instruction:\n{text}\n\n### Response:\n"  # a user's turn
    between: str = "\n\n"  # after an answer that another turn follows
    chat_template: str | None = None  # file of a Jinja template that is used instead of the model's own


@dataclass
class QualityConfig:
    """What is looked for in the rows, and what is done about it. See ``raytune_lora.data.quality`` for each check."""

    unreadable: Action = Action.drop  # drop or stop: cannot be trained on
    missing_fields: Action = Action.drop  # drop or stop
    wrong_types: Action = Action.drop  # drop or stop
    empty_fields: Action = Action.drop  # drop or stop
    nothing_trained: Action = Action.drop  # drop or stop: every answer is marked as one that is not to be trained
    unused_fields: Action = Action.report  # fields of a record that have no place in its form
    unwritten: Action = Action.report  # thoughts, or text beside calls, that the template leaves out
    generation_prompt: Action = Action.report  # the template prompts otherwise than it writes a whole conversation
    mixed_formats: Action = Action.report
    encoding: Action = Action.report
    control_characters: Action = Action.report
    leftovers: Action = Action.report
    exact_duplicates: Action = Action.drop
    near_duplicates: Action = Action.report
    contradictions: Action = Action.report
    leakage: Action = Action.drop
    harmful: Action = Action.report
    outliers: Action = Action.report
    similarity: float = 0.7  # share of common pairs of words (Jaccard) from which rows are near duplicates; pairs that
    # more than about 20 rows share (a fixed instruction, a template around short inputs) count for next to nothing, and
    # so do sentences that two rows share where they ask different things about them
    max_dropped: float = 0.5  # share of the rows that may be left out before the job stops
    harmful_words: str | None = None  # YAML of words by language, instead of the list that comes with the package


@dataclass
class PiiConfig:
    """Personal data and secrets: what is done about each kind; null takes ``action``."""

    action: Action = Action.report
    email: Action | None = None
    phone: Action | None = None
    credit_card: Action | None = None
    iban: Action | None = None
    resident_number: Action | None = None  # Korean, with its checksum
    ssn: Action | None = None  # of the United States
    ip_address: Action | None = None
    secret: Action | None = None  # keys and tokens


@dataclass
class MixConfig:
    """Another source that is mixed into the training rows."""

    path: str | None = None  # as data.path
    share: float = 0.15  # of the mixed training rows
    format: Format = Format.auto
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Instruction data; a variant says where the rows come from."""

    kind: str = MISSING
    template: TemplateConfig = field(default_factory=TemplateConfig)
    train_on: TrainOn = TrainOn.answers
    max_length: int = 512  # tokens of a row
    truncation: Truncation = Truncation.drop
    validation: float = 0.1  # share of the rows
    test: float = 0.1  # share of the rows
    stratify: str | None = None  # column whose values keep their shares in every split
    quality: QualityConfig = field(default_factory=QualityConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    mix: dict[str, MixConfig] = field(default_factory=dict)
    benchmarks: list[str] = field(default_factory=list)  # files whose rows must not be trained on
    processes: int | None = None  # that prepare; null: one a core


@dataclass
class FileDataConfig(DataConfig):
    """The user's own files: JSONL, JSON, CSV, Parquet or Arrow, also gzipped or zstandard, or a data set of the hub.

    Where names of files or folders, keys of a JSON object, splits on the hub, or ``split_column`` in every row say
    train, validation or test, they are what the rows are for.
    """

    kind: str = "file"
    path: str | None = None  # file, folder, pattern with *, URI (s3://…), or `owner/name` on the hub
    format: Format = Format.auto
    columns: dict[str, str] = field(default_factory=dict)  # field of the format -> column of the file
    split: str = "train"  # hub only
    split_column: str | None = "split"  # says of each row whether it is for train, validation or test; null: none does
    subset: str | None = None  # hub only: the name of a configuration
    revision: str | None = None  # hub only: branch, tag or commit
    validation_path: str | None = None  # files of validation rows, instead of a share
    test_path: str | None = None  # files of test rows, instead of a share


@dataclass
class ExtractionDataConfig(DataConfig):
    """Generated messages and the JSON record each of them holds, in English and Korean."""

    kind: str = "extraction"
    rows: int = 800
    korean: float = 0.15  # share of the rows
    seed: int = 0


@dataclass
class FakeDataConfig(DataConfig):
    """Generated arithmetic-like rows, small enough for a tiny model: for tests and dry runs."""

    kind: str = "fake"
    rows: int = 200
    seed: int = 0


SOURCES: tuple[type, ...] = (FileDataConfig, ExtractionDataConfig, FakeDataConfig)
