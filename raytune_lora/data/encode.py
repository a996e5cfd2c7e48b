"""From rows to token ids and labels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from raytune_lora.config.data import DataConfig, TrainOn, Truncation
from raytune_lora.data.rows import Row
from raytune_lora.data.templates import Note, Rendered, RowRefused, Segment, Tokenizer, writer
from raytune_lora.errors import UserError

Span = tuple[int, int, int]  # of trained tokens: the first, the one after the last, the turn
IGNORED = -100  # the label of a token that is not trained, as torch's cross entropy has it


@dataclass(frozen=True)
class Encoded:
    """A row as the model reads it."""

    input_ids: list[int]
    labels: list[int]  # as long as ``input_ids``: the id where the token is trained, else IGNORED
    prompt_length: int  # tokens before the last answer's first trained one; all, where that answer is cut away
    cut: bool  # it was longer than ``max_length``
    notes: tuple[Note, ...] = ()  # of what is trained
    end: int | None = None  # place of the token that ends the last answer; None where it cannot be compared

    @property
    def answer(self) -> list[int] | None:
        """What the model is to write after the prompt, without its end; None where that is not whole."""
        return None if self.end is None else self.input_ids[self.prompt_length : self.end]


def encode(
    rows: Sequence[Row],
    cfg: DataConfig,
    tokenizer: Tokenizer,
    refused: dict[int, RowRefused] | None = None,
    untrained: set[int] | None = None,
) -> list[Encoded | None]:
    """Token ids and labels of many rows at once.

    Text templates: each prompt and each answer is tokenized apart, so that a prompt's ids are the same as when the
    model later answers it; only the row's first piece gets the tokenizer's special tokens. Chat templates: the whole
    text is tokenized at once, as ``apply_chat_template`` does, and a token is trained if its characters are. Masks go
    by place and never by token id, so that an end-of-sequence token is trained also where padding uses the same one. An
    answer whose turn says that it is not trained is context, whatever ``train_on`` is.

    Args:
        rows: of one data set, in any number.
        cfg: template, ``train_on``, ``max_length`` and ``truncation``.
        tokenizer: a fast one, of the base model.
        refused: gets what the template says of each row that it cannot write, by its number, instead of an error.
        untrained: gets the numbers of rows that are short enough and of which no token is trained.

    Returns:
        One for each row; None where the row is left out: the template cannot write it, it is longer than ``max_length``
        and the policy is to drop it, or no trained token that has one before it remains after the cut.

    Raises:
        UserError: what ``templates.writer`` raises, or the tokenizer lacks what the template needs.
    """
    write = writer(cfg.template, tokenizer)
    rendered: list[Rendered | None] = []
    for number, row in enumerate(rows):
        try:
            rendered.append(write(row))
        except RowRefused as error:
            if refused is None:
                raise
            refused[number] = error
            rendered.append(None)
    whole = iter(_whole([each for each in rendered if each and each.whole], tokenizer))
    pieces = iter(_pieces([each for each in rendered if each and not each.whole], tokenizer))
    special = _special_ids(tokenizer)
    encoded: list[Encoded | None] = []
    for number, (row, each) in enumerate(zip(rows, rendered, strict=True)):
        found = None
        if each is not None:
            ids, spans = next(whole if each.whole else pieces)
            short = len(ids) <= cfg.max_length
            found = _finish(ids, spans, row, cfg, tokenizer, special)
            if found is None and short and untrained is not None:
                untrained.add(number)
        encoded.append(replace(found, notes=_notes(each.notes, row, cfg)) if each and found else None)
    return encoded


def _notes(notes: Sequence[Note], row: Row, cfg: DataConfig) -> tuple[Note, ...]:
    """Those about answers that are trained."""
    last = len(row.turns) - 1
    every = cfg.train_on is not TrainOn.last
    return tuple(note for note in notes if note.turn == last or (every and row.turns[note.turn].trained))


def spell(answers: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[str]:
    """Texts of answers, special tokens among them: given and expected answers are compared as this writes them."""
    if not answers:
        return []
    texts = tokenizer.batch_decode(list(answers), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return list(texts)


# ----------------------------------------------------------------------------------------------------------- tokenizing


def _pieces(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[Span]]]:
    """Ids and trained ranges of tokens, each segment tokenized for itself."""
    firsts = _ids([each.segments[0].text for each in rendered], tokenizer, special=True)
    others = iter(_ids([s.text for each in rendered for s in each.segments[1:]], tokenizer, special=False))
    for each, first in zip(rendered, firsts, strict=True):
        if first and first[-1] == tokenizer.eos_token_id:
            first.pop()
        ids: list[int] = []
        spans: list[Span] = []
        for segment in each.segments:
            start = len(ids)
            ids += first if segment is each.segments[0] else next(others)
            if segment.ends:
                ids.append(_eos(tokenizer))
            if segment.trained:
                spans.append((start, len(ids), segment.turn))
        yield ids, spans


def _ids(texts: list[str], tokenizer: Tokenizer, special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoding = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return list(encoding["input_ids"])


def _whole(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[Span]]]:
    """Ids and trained ranges of tokens, each row tokenized in one piece."""
    if not rendered:
        return
    if not tokenizer.is_fast:
        raise UserError(
            f"data.template: chat templates need a fast tokenizer, and {type(tokenizer).__name__} does not say which "
            "characters a token stands for; use data/template=alpaca"
        )
    texts = [each.text for each in rendered]
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    tokens = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    for each, text, (ids, offsets) in zip(rendered, texts, tokens, strict=True):
        spans = _token_spans(each.segments, text, offsets)
        if each.segments[-1].ends:
            ids.append(_eos(tokenizer))
            start = spans.pop()[0] if spans and spans[-1][1] == len(ids) - 1 else len(ids) - 1
            spans.append((start, len(ids), each.segments[-1].turn))
        yield ids, spans


def _token_spans(segments: Sequence[Segment], text: str, offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """Ranges of the tokens that lie within trained segments.

    A token over a segment's edge belongs to it if it holds only white space beyond, such as the space before a word. A
    token that stands for nothing but trimmed white space is where that ends.
    """
    stops = [stop for _, stop in offsets]
    spans = []
    at = 0
    for segment in segments:
        start, at = at, at + len(segment.text)
        if not segment.trained:
            continue
        first, last = bisect_right(stops, start), bisect_right(stops, at)
        if first < last and offsets[first][0] < start and not _reaches_over(text, *offsets[first], start, at):
            first += 1
        if last < len(offsets) and offsets[last][0] < at and _reaches_over(text, *offsets[last], start, at):
            last += 1
        if first < last:
            spans.append((first, last, segment.turn))
    return spans


def _reaches_over(text: str, first: int, stop: int, start: int, end: int) -> bool:
    """Whether the characters from first to stop are, beyond those from start to end, white space and, within, not."""
    beyond = text[first : max(first, start)] + text[min(stop, end) : stop]
    return not beyond.strip() and bool(text[max(first, start) : min(stop, end)].strip())


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "data.template: the model's tokenizer has no end-of-sequence token, so that the model could not learn "
            "where an answer ends; set eos_token in its tokenizer_config.json, or use a chat template with an end token"
        )
    return int(tokenizer.eos_token_id)


# --------------------------------------------------------------------------------------------------- labels and length


def _finish(
    ids: list[int], spans: Sequence[Span], row: Row, cfg: DataConfig, tokenizer: Tokenizer, special: frozenset[int]
) -> Encoded | None:
    last = len(row.turns) - 1
    cut = len(ids) > cfg.max_length
    if cut and cfg.truncation is Truncation.drop:
        return None
    labels = list(ids) if cfg.train_on is TrainOn.all else [IGNORED] * len(ids)
    prompt_length = len(ids)
    for start, end, turn in reversed(spans):
        if turn == last:
            prompt_length = start
        if not row.turns[turn].trained:
            labels[start:end] = [IGNORED] * (end - start)
        elif turn == last or cfg.train_on is TrainOn.answers:
            labels[start:end] = ids[start:end]
    answered = max((end for _, end, turn in spans if turn == last), default=0)
    stop = _last_special(ids, prompt_length, answered, special, tokenizer)
    if cut and cfg.truncation is Truncation.right:
        ids, labels = ids[: cfg.max_length], labels[: cfg.max_length]
        prompt_length = min(prompt_length, len(ids))
        stop = stop if stop is not None and stop < len(ids) else None
    elif cut:
        # A model that was trained with a beginning-of-sequence token has seen no text without it.
        kept = 1 if ids[0] == tokenizer.bos_token_id else 0
        gone = len(ids) - cfg.max_length
        ids, labels = ids[:kept] + ids[kept + gone :], labels[:kept] + labels[kept + gone :]
        stop = stop - gone if stop is not None and prompt_length - gone > kept else None
        prompt_length = max(prompt_length - gone, kept)
    if all(label == IGNORED for label in labels[1:]):  # the first token is never a target
        return None
    compared = prompt_length > 0 and row.turns[last].trained  # else there is no prompt, or no answer to wish for
    return Encoded(ids, labels, prompt_length, cut, end=stop if compared else None)


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """End-of-sequence and the special tokens: one of them ends each trained answer."""
    found = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(found | {tokenizer.eos_token_id} - {None})


def _last_special(
    ids: Sequence[int], start: int, stop: int, special: frozenset[int], tokenizer: Tokenizer
) -> int | None:
    """Where, from start to stop, a special token stands that only white space follows; None where there is none.

    The last one: an answer may itself end with such tokens, as a tool call does, and is not over before all are there.
    """
    for at in range(stop - 1, start - 1, -1):
        if ids[at] in special:
            return at
        if tokenizer.decode([ids[at]]).strip():
            return None
    return None
