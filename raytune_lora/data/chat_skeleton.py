"""Skeletons of chat templates: which part of the text that a template writes is the assistant's.

A skeleton is a conversation of a row's shape with made-up words for its texts, rendered once. What stands between the
words is the template's own text, and a row's text must be exactly that with the row's messages in the places of the
words; what stands for calls of tools may be anything, if there is only one way to find it. The header that
``add_generation_prompt`` writes says where the assistant's own part begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise, product, takewhile

from raytune_lora.data.chat_messages import CALL, ID, TEXT, THOUGHT, WORD, Message, forms, ids_of, word
from raytune_lora.data.rows import ASSISTANT, USER
from raytune_lora.data.templates import RowRefused

Span = tuple[int, int, int]  # first character, the one after the last, turn
Render = Callable[[Sequence[Message], bool], str]  # of messages, with the generation prompt or without

MARKS_REMEDY = (
    "put {% generation %} and {% endgeneration %} around the assistant's part in a copy of the template, and name that "
    "file with data.template.chat_template"
)
_PART_OF_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
_MOST_FORMS = 64  # of the text between two answers


@dataclass(frozen=True)
class _Text:
    """A place of a text that is not the assistant's."""

    kind: str  # TEXT or ID
    number: int  # of the message, or of the id
    fixed: str  # the template's text before it


@dataclass(frozen=True)
class Answer:
    """A place of an assistant's message."""

    number: int  # of the message
    fixed: str  # the template's text before the assistant's part
    lead: str  # text after the generation prompt, such as an empty thought; trained with the message
    between: str  # the template's text between thought and text
    closing: str  # what ends the turn, trained with it; of a message with calls, the end tokens alone
    after: int  # how many characters after its last word the turn ends
    kinds: frozenset[str]  # of its words: TEXT, THOUGHT, CALL, ID
    exact: bool  # it is its forms and nothing else; else whatever the template makes of its calls
    prompted: bool  # what stands before it is the generation prompt


@dataclass(frozen=True)
class Skeleton:
    """The places in the text of conversations of one shape."""

    slots: tuple[_Text | Answer, ...]
    tail: str  # the template's text after the last message
    ends: bool  # the last answer is closed by an end token

    @property
    def last(self) -> Answer:
        """The place of the last answer."""
        return next(slot for slot in reversed(self.slots) if isinstance(slot, Answer))


class Ends:
    """The tokens that may end a turn."""

    def __init__(self, tokens: Sequence[str], final: str | None) -> None:
        """
        Args:
            tokens: all of them, longest first; some begin a turn instead.
            final: the end-of-sequence token, which begins none.
        """
        token = "|".join(re.escape(end) for end in tokens) or "(?!)"
        self.tokens = tuple(tokens)
        self.one, self.run = re.compile(rf"\s*(?:{token})"), re.compile(rf"\s*(?:{token})+")
        self.final = re.compile(rf"\s*(?:{re.escape(final)})+" if final else "(?!)")

    def after(self, text: str, tail: str, last: bool) -> int:
        """How many characters of the text after an answer end its turn: the end token, but no newline and no header.

        What ends a turn is what follows it where it is the last, so that the next turn's header, which may begin with a
        special token too, is not taken for it. A template that closes earlier turns alone, or otherwise, does so by the
        end-of-sequence token.

        Args:
            text: up to the next message.
            tail: the text after the answer where nothing follows it.
            last: whether this is the row's last answer.
        """
        common = common_start(text, tail)
        if self.one.match(tail):
            found = self.run.match(common) or self.one.match(text)
            return found.end() if found else 0
        if not last and (found := self.final.match(text)):
            return found.end()
        # The tokenizer knows no end token here; the row gets one at its end, and all that leads to it is trained.
        return len(text) if last else len(common.rstrip())

    def after_calls(self, text: str, tail: str, last: bool) -> tuple[int, int]:
        """The same of a message with calls, whose own text goes on after its last word: where the end tokens are."""
        common = common_start(text, tail)
        found = list(self.one.finditer(common))
        if not found or common[found[-1].end() :].strip():
            if not last and (final := self.final.search(text)):
                return final.span()
            end = len(text) if last else len(common.rstrip())
            return end, end
        first = len(found) - 1
        while first and found[first - 1].end() == found[first].start():
            first -= 1
        return found[first].start(), found[-1].end()


def common_start(first: str, second: str) -> str:
    """The longest text that both begin with."""
    pairs = zip(first, second, strict=False)
    return first[: next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))]


def parting(first: str, second: str) -> int:
    """Where the first text begins to read otherwise, a tag that they share in part included."""
    return len(_PART_OF_TAG.sub("", common_start(first, second)))


# --------------------------------------------------------------------------------------------------------------- making


@dataclass(frozen=True)
class _Found:
    """A word in a text."""

    kind: str
    number: int
    start: int
    end: int


def _found(text: str) -> list[_Found]:
    return [_Found(m[1], int(m[2]), m.start(), m.end()) for m in WORD.finditer(text)]


def make_skeleton(words: Sequence[Message], render: Render, ends: Ends) -> Skeleton:
    """The skeleton of the conversations that the words stand for.

    Raises:
        RowRefused: the template does not write every message, each answer once and in order; or what ``render`` raises.
    """
    text = render(words, False)
    found = _found(text)
    answers = [number for number, message in enumerate(words) if message.role == ASSISTANT]
    regions = [_region(number, words, found, render) for number in answers]
    inside = [at for region in regions for at in region]
    told = {number for number, message in enumerate(words) if message.role != ASSISTANT and message.text}
    written = {each.number for at, each in enumerate(found) if each.kind == TEXT}
    own = [at for at, each in enumerate(found) if each.kind != ID and words[each.number].role == ASSISTANT]
    if not all(regions) or inside != sorted(set(inside)) or not told <= written or not set(own) <= set(inside):
        raise RowRefused(
            "the chat template does not write every message of a conversation of "
            f"{', '.join(message.role for message in words)}, each answer once and in order, so that the answers "
            f"cannot be found in its text: {MARKS_REMEDY}"
        )
    slots: list[_Text | Answer] = []
    at, closed = 0, False
    first = {region[0]: number for number, region in zip(answers, regions, strict=True)}
    for place, each in enumerate(found):
        if place in first:
            number = first[place]
            run = [found[n] for n in regions[answers.index(number)]]
            following = found[place + len(run)].start if place + len(run) < len(found) else len(text)
            slot, closed = _answer(number, words, text, (at, following), run, render, ends)
            slots.append(slot)
            at = run[-1].end + slot.after
        elif place not in inside:
            slots.append(_Text(each.kind, each.number, text[at : each.start]))
            at = each.end
    return Skeleton(tuple(slots), text[at:], closed)


def _region(number: int, words: Sequence[Message], found: Sequence[_Found], render: Render) -> range:
    """Which of the words in the text are an answer's: its own, and the ids around them; empty where they are scattered.

    Args:
        number: of the answer.
        words: the skeleton's messages.
        found: the words in its text.
        render: the template.
    """
    own = [at for at, each in enumerate(found) if each.kind != ID and each.number == number]
    once = [found[at].kind for at in own if found[at].kind != CALL]
    if (
        not own
        or len(once) > len(set(once))
        or any(found[at].kind != ID and at not in own for at in range(own[0], own[-1] + 1))
    ):
        return range(0)
    if not words[number].calls:
        return range(own[0], own[-1] + 1)
    kinds = [found[at].kind for at in own]
    for text in _alone(words, number, render):
        alone = _found(text)
        mine = [at for at, each in enumerate(alone) if each.kind != ID and each.number == number]
        if [alone[at].kind for at in mine] == kinds:
            break
    if not mine:
        return range(0)
    before = mine[0] - len(_found(render(words[:number], False)))
    after = sum(1 for _ in takewhile(lambda each: each.kind == ID, alone[mine[-1] + 1 :]))
    return range(own[0] - max(before, 0), own[-1] + 1 + after)


def _alone(words: Sequence[Message], number: int, render: Render) -> Iterator[str]:
    """A conversation up to an answer: with a question after it unless it is the last, since some write that otherwise.

    Then without one, as templates that keep only the last question's thoughts write the answer.
    """
    upto, after = words[: number + 1], len(words)
    if number < after - 1:
        with suppress(RowRefused):
            yield render((*upto, Message(USER, word(TEXT, after), after)), False)
    yield render(upto, False)


def _answer(
    number: int,
    words: Sequence[Message],
    text: str,
    around: tuple[int, int],
    run: Sequence[_Found],
    render: Render,
    ends: Ends,
) -> tuple[Answer, bool]:
    """An answer's place, and whether an end token closes it.

    Args:
        number: of the message.
        words: the skeleton's messages.
        text: the skeleton's.
        around: where what is before the answer begins, and what is after it ends.
        run: the answer's words.
        render: the template.
        ends: tokens.
    """
    message = words[number]
    last = not any(each.role == ASSISTANT for each in words[number + 1 :])
    before, after = text[around[0] : run[0].start], text[run[-1].end : around[1]]
    begin, prompted = _begin(before, number, words, text, render)
    alone = text if number == len(words) - 1 else render(words[: number + 1], False)
    tail = alone[_found(alone)[-1].end :] if _found(alone) else after
    kinds = [each.kind for each in run]
    exact = kinds in ([TEXT], [THOUGHT, TEXT])
    if message.calls:
        start, end = ends.after_calls(after, tail, last)
        closed = ends.one.match(after[start:end]) is not None
    else:
        start, end = 0, ends.after(after, tail, last)
        closed = ends.one.match(tail) is not None
    answer = Answer(
        number,
        before[:begin],
        before[begin:],
        text[run[0].end : run[1].start] if kinds == [THOUGHT, TEXT] else "",
        after[start:end],
        after=end,
        kinds=frozenset(kinds),
        exact=exact,
        prompted=prompted,
    )
    return answer, closed


def _begin(before: str, number: int, words: Sequence[Message], whole: str, render: Render) -> tuple[int, bool]:
    """Where in the text before an answer's words the model's own part begins, and whether the model is prompted so.

    It begins after the generation prompt, since what is rendered beyond that (Qwen3's empty thought, Llama-2's space)
    the model writes itself when it answers. A template without a generation prompt may still write such a space.
    """
    prompt = words[:number]
    if not prompt:
        return len(before), False
    asked, plain = render(prompt, True), render(prompt, False)
    header = after_last(asked)
    beyond = before[len(header) :]
    if before.startswith(header) and (asked != plain or not beyond.strip()):
        return len(header), whole.startswith(asked)
    message = words[number]
    if not message.calls and not message.thought:
        return len(before), False
    # It begins where it does for an answer of text alone in the same place; two tags may share their first letters.
    text = word(TEXT, number)
    rest = next((words[at:] for at in range(number, len(words)) if words[at].role == USER), ())
    simple = render((*prompt, replace(message, text=text, thought="", calls=()), *rest), False)
    usual = after_last(simple.split(text)[0])
    common = common_start(before, usual)
    return len(common if common == usual else _PART_OF_TAG.sub("", common)), False


def after_last(text: str) -> str:
    """The text after its last word."""
    found = _found(text)
    return text[found[-1].end :] if found else text


# ------------------------------------------------------------------------------------------------------------- locating


def locate(messages: Sequence[Message], text: str, skeleton: Skeleton) -> list[Span] | None:
    """The trained parts of a row's text, one an answer.

    None where the text is not the skeleton with the row's messages in their places, or is so in several ways.
    """
    return _follow(messages, text, skeleton) or _search(messages, text, skeleton)


def _follow(messages: Sequence[Message], text: str, skeleton: Skeleton) -> list[Span] | None:
    """The spans, where every message stands in the text as it is, trimmed, or without its thought."""
    spans: list[Span] = []
    nexts = [*(slot.fixed for slot in skeleton.slots[1:]), skeleton.tail]
    ids = ids_of(messages)
    at = len(skeleton.slots[0].fixed)
    if not text.startswith(skeleton.slots[0].fixed):
        return None
    for slot, following in zip(skeleton.slots, nexts, strict=True):
        if isinstance(slot, Answer):
            if not slot.exact:
                return None
            following = slot.closing + following
        ends = (at + len(form) for form in _slot_forms(slot, messages, ids) if text.startswith(form, at))
        end = next((end for end in ends if text.startswith(following, end)), None)
        if end is None:
            return None
        if isinstance(slot, Answer):
            spans.append((at, end + len(slot.closing), messages[slot.number].turn))
        at = end + len(following)
    return spans if at == len(text) else None


def _slot_forms(slot: _Text | Answer, messages: Sequence[Message], ids: Sequence[str]) -> list[str]:
    """What may stand in a place."""
    if isinstance(slot, _Text):
        return forms(messages[slot.number]) if slot.kind == TEXT else [ids[slot.number]]
    message = messages[slot.number]
    texts = forms(message)
    if THOUGHT in slot.kinds:
        thought = message.thought
        thoughts = dict.fromkeys((thought, thought.strip(), thought.strip("\n"), thought.rstrip(), thought.lstrip()))
        return [f"{slot.lead}{each}{slot.between}{text}" for each, text in product(thoughts, texts)]
    return [*(slot.lead + text for text in texts), *texts] if slot.lead else texts


def _search(messages: Sequence[Message], text: str, skeleton: Skeleton) -> list[Span] | None:
    """The spans, where answers may have become anything, if there is only one way to find them.

    What stands between answers is sought from the start, each time the first, and from the end, each time the last:
    where both come to the same places there are no others.
    """
    gaps = _gaps(messages, skeleton)
    answers = [slot for slot in skeleton.slots if isinstance(slot, Answer)]
    heads = [len(gap) for gap in gaps[0] if text.startswith(gap)]
    tails = [len(text) - len(gap) for gap in gaps[-1] if text.endswith(gap)]
    if not heads or not tails:
        return None
    first, last = [(0, max(heads))], [(min(tails), len(text))]
    for gap in gaps[1:-1]:
        places = [(at, at + len(each)) for each in gap if (at := text.find(each, first[-1][1])) >= 0]
        first += [min(places, key=lambda place: (place[1], place[0]))] if places else []
    for gap in reversed(gaps[1:-1]):
        places = [(at, at + len(each)) for each in gap if (at := text.rfind(each, 0, last[0][0])) >= 0]
        last = [max(places), *last] if places else last
    first, last = [*first, last[-1]], [first[0], *last]
    if first != last or len(first) != len(gaps) or any(one[1] > other[0] for one, other in pairwise(first)):
        return None
    return [
        (begin[1], end[0] + len(slot.closing), messages[slot.number].turn)
        for slot, (begin, end) in zip(answers, pairwise(first), strict=True)
    ]


def _gaps(messages: Sequence[Message], skeleton: Skeleton) -> list[list[str]]:
    """What may stand before the first answer, between two, and after the last, the end of a turn included."""
    ids = ids_of(messages)
    gaps: list[list[str]] = [[""]]
    for slot in skeleton.slots:
        gaps[-1] = [gap + slot.fixed for gap in gaps[-1]]
        if isinstance(slot, Answer):
            gaps.append([slot.closing])
            continue
        several = [gap + form for gap in gaps[-1] for form in _slot_forms(slot, messages, ids)]
        gaps[-1] = list(dict.fromkeys(several))[:_MOST_FORMS]
    gaps[-1] = [gap + skeleton.tail for gap in gaps[-1]]
    return gaps
