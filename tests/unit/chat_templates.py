"""Small tokenizers with the chat templates of the known families, conversations for them, and their golden files.

The templates follow the families' published prompt formats. ``python -m tests.unit.chat_templates`` writes the golden
files anew; what it writes is then to be read against those formats.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_lora.config.data import DataConfig, TemplateConfig, TemplateKind
from raytune_lora.data.encode import IGNORED, Encoded, encode
from raytune_lora.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn

GOLDEN = Path(__file__).parent / "golden" / "templates"
CHAT = DataConfig(kind="file", template=TemplateConfig(kind=TemplateKind.chat), max_length=2000)

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Meta's Llama 2 model card: spaces around both texts, the system text inside the first user's turn, BOS for every pair.
LLAMA2 = """{% set ns = namespace(system='') %}
{% for m in messages %}
{% if m.role == 'system' %}
{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}
{% elif m.role == 'user' %}
{{- bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' -}}
{% set ns.system = '' %}
{% else %}
{{- ' ' + m.content.strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""

LLAMA3 = """{{- bos_token -}}
{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{% endif %}"""

# Mistral's tokenizer V3: the system text stands before the last user's message.
MISTRAL = """{{- bos_token -}}
{% if messages[0].role == 'system' %}
{% set system = messages[0].content + '\n\n' %}
{% set turns = messages[1:] %}
{% else %}
{% set system = '' %}
{% set turns = messages %}
{% endif %}
{% set last = (turns | selectattr('role', 'equalto', 'user') | list) | length %}
{% for m in turns %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns') }}
{% endif %}
{% if m.role == 'user' %}
{{- '[INST] ' + (system if loop.index0 // 2 + 1 == last else '') + m.content + '[/INST]' -}}
{% else %}
{{- ' ' + m.content.strip() + eos_token -}}
{% endif %}
{% endfor %}"""

GEMMA = """{{- bos_token -}}
{% if messages[0].role == 'system' %}
{{ raise_exception('no system role') }}
{% endif %}
{% for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<start_of_turn>model\n' -}}
{% endif %}"""

# Qwen3: answers after the last question have a thought, be it empty; earlier answers lose theirs.
QWEN3 = """{% set ns = namespace(last=-1) %}
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' -}}
{% if m.role == 'assistant' %}
{% set thought, answer = '', m.content %}
{% if '</think>' in m.content %}
{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}
{% endif %}
{% if loop.index0 > ns.last %}
{{- '<think>\n' + thought + '\n</think>\n\n' -}}
{% endif %}
{{- answer -}}
{% else %}
{{- m.content -}}
{% endif %}
{{- '<|im_end|>\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' -}}
{% endif %}"""

MARKED = """{% for m in messages %}
{{- '<|' + m.role + '|>\n' -}}
{% if m.role == 'assistant' %}
{% generation %}{{- m.content + '<|end|>' -}}{% endgeneration %}
{% else %}
{{- m.content + '<|end|>' -}}
{% endif %}
{{- '\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|assistant|>\n' -}}
{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A chat template with the tokenizer that it comes with."""

    template: str
    sentencepiece: bool  # space and byte tokens as Llama-2's; else bytes as GPT-2's
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end: str  # of a turn
    trained: str = "{answer}{end}"
    trained_last: str | None = None  # where the last answer has more
    thinks: bool = False

    def tokenizer(self) -> Any:
        make = sentencepiece_tokenizer if self.sentencepiece else byte_level_tokenizer
        return make(self.special, bos_token=self.bos, eos_token=self.eos, chat_template=self.template)

    def conversations(self) -> dict[str, Row]:
        """The rows of its golden file."""
        rows = dict(CONVERSATIONS)
        rows["markers"] = talk(
            (USER, f"What does {self.end} mean?\n{self.special[0]}user"),
            (ASSISTANT, f"{self.end} ends a turn.\nNot this one."),
            (USER, f"And two {self.end}{self.end}?"),
            (ASSISTANT, f"The same: {self.end}"),
        )
        if self.thinks:
            rows["thoughts"] = talk(
                (USER, "Two plus two?"),
                (ASSISTANT, "<think>\nEasy.\n</think>\n\nFour."),
                (USER, "Plus one?"),
                (ASSISTANT, "<think>\nFour and one.\n</think>\n\nFive."),
            )
        return rows

    def expected(self, row: Row) -> str:
        """What of a row must be trained, said without looking at how it is found."""
        answers = [turn.text for turn in row.turns if turn.role == ASSISTANT]
        if self.thinks:
            answers = [*(answer.split("</think>\n\n")[-1] for answer in answers[:-1]), answers[-1]]
        last = self.trained_last if self.trained_last and "<think>" not in answers[-1] else self.trained
        forms = [*[self.trained] * (len(answers) - 1), last]
        return "".join(form.format(answer=answer, end=self.end) for form, answer in zip(forms, answers, strict=True))


FAMILIES = {
    "chatml": Family(CHATML, False, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
    "llama2": Family(LLAMA2, True, ("<s>", "</s>"), "<s>", "</s>", "</s>", " {answer} {end}"),
    "llama3": Family(
        LLAMA3,
        False,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": Family(MISTRAL, True, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>", " {answer}{end}"),
    "gemma": Family(
        GEMMA, True, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>"
    ),
    "qwen3": Family(
        QWEN3,
        False,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        None,
        "<|im_end|>",
        "<|im_end|>",
        trained_last="<think>\n\n</think>\n\n{answer}{end}",
        thinks=True,
    ),
    "marked": Family(MARKED, False, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), None, "<|end|>", "<|end|>"),
}


def talk(*turns: tuple[str, str]) -> Row:
    """A conversation."""
    return Row(tuple(Turn(role, text) for role, text in turns))


CONVERSATIONS = {
    "single": talk((USER, "What is the capital of France?"), (ASSISTANT, "The capital is Paris.")),
    "system": talk(
        (SYSTEM, "Answer in one word."),
        (USER, "What is two plus two?"),
        (ASSISTANT, "Four."),
        (USER, "And plus one?"),
        (ASSISTANT, "Five."),
    ),
    "four": talk(
        (USER, "One?"),
        (ASSISTANT, "Two."),
        (USER, "Three?"),
        (ASSISTANT, "Four."),
        (USER, "Five?"),
        (ASSISTANT, "Six.\n\nOr seven."),
        (USER, "Three?"),
        (ASSISTANT, "Four."),
    ),
    "korean": talk(
        (USER, "한국의 수도는 어디입니까?"),
        (ASSISTANT, "한국의 수도는 서울입니다."),
        (USER, "감사합니다."),
        (ASSISTANT, "천만에요 😀"),
    ),
}

# Tokens of more than one byte: merged letter by letter, so that the golden files can be read. Other words are spelled.
WORDS = sorted(
    re.findall(
        r"\w+",
        "The What Answer And Two Four Five Three One Or Not is the of in one two plus capital Paris France word does "
        "mean end ends turn this same seven user assistant system model INST SYS think Easy 한국 수도 서울 입니다 감사",
    ),
    key=lambda word: (-len(word), word),  # a merge of a longer word comes first
)


def byte_level_tokenizer(special: tuple[str, ...], **settings: Any) -> Any:
    """A byte-level BPE tokenizer, as GPT-2's, with ``<pad>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [split.pre_tokenize_str(word)[0][0] for word in (*(" " + word for word in WORDS), *WORDS)]
    vocab, merges = _merges(sorted(pre_tokenizers.ByteLevel.alphabet()), words)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **settings)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def sentencepiece_tokenizer(special: tuple[str, ...], **settings: Any) -> Any:
    """A BPE tokenizer with ``▁`` for a space, one before the text, and bytes for unknown letters, as Llama-2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(
        {*"".join(WORDS), *"▁.,?!:;\n<>/[]|_()-'\"", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    words = [*("▁" + word for word in WORDS), *WORDS]
    vocab, merges = _merges(["<unk>", *special, *bytes_, *letters], words)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    first = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, vocab[first])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **settings)


def _merges(letters: list[str], words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE vocabulary in which each word is merged from its left end."""
    tokens = dict.fromkeys(letters)
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for at in range(1, len(word)):
            merges.setdefault((word[:at], word[at]))
            tokens.setdefault(word[: at + 1])
    return {token: number for number, token in enumerate(tokens)}, list(merges)


def spelled(tokenizer: Any, number: int) -> bytes:
    """The bytes that a token stands for."""
    token = tokenizer.convert_ids_to_tokens(number)
    if token in tokenizer.get_added_vocab():
        return str(token).encode()
    if "<0x00>" in tokenizer.get_vocab():
        return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
    return bytes(_BYTE_OF[letter] for letter in token)


def _bytes_of_letters() -> dict[str, int]:
    """The byte of each letter of GPT-2's alphabet: printable bytes stand for themselves, the others are moved up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [number for number in range(256) if number not in plain]
    return {chr(n): n for n in plain} | {chr(256 + at): n for at, n in enumerate(moved)}


_BYTE_OF = _bytes_of_letters()


def tokens_of(encoded: Encoded, tokenizer: Any) -> list[list[Any]]:
    """Each token as text (a part of a letter in hexadecimal), and 1 where it is trained."""
    shown = []
    for number, label in zip(encoded.input_ids, encoded.labels, strict=True):
        token = spelled(tokenizer, number)
        try:
            text = token.decode()
        except UnicodeDecodeError:
            text = f"0x{token.hex()}"
        shown.append([text, int(label != IGNORED)])
    return shown


def encode_one(row: Row, cfg: DataConfig, tokenizer: Any) -> Encoded:
    """One row, which must not be left out."""
    (encoded,) = encode([row], cfg, tokenizer)
    assert encoded is not None
    return encoded


def main() -> None:
    """Write the golden files: a line break after each change between trained and not."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer()
        blocks = []
        for title, row in family.conversations().items():
            lines: list[list[str]] = []
            before = None
            for token in tokens_of(encode_one(row, CHAT, tokenizer), tokenizer):
                if token[1] != before or len(lines[-1]) == 10:
                    lines.append([])
                before = token[1]
                lines[-1].append(json.dumps(token, ensure_ascii=False))
            text = ",\n".join("    " + ", ".join(line) for line in lines)
            blocks.append(f"  {json.dumps(title)}: [\n{text}\n  ]")
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
