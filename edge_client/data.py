"""From records to examples and batches: everything between a client's text and the tensors that training sees.

A record is tokenised once (`encode`), whole records are dealt to training or held out (`split`), and each side is then
cut or packed to `max_length` (`arrange`). `prepare` does the three in this order, so that no record ends up on both
sides. Token ids are kept as 32-bit arrays; they become int64 tensors one batch at a time.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from jinja2 import TemplateError

from farfield.protocols.errors import BackboneError, DataError
from farfield.protocols.sections import Data
from farfield.protocols.seeds import derive

from .records import CLASSIFICATION, Chat, Completion, Labelled, Message, Record, Text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is read and not predicted: the value that PyTorch's losses leave out."""

MIN_TOKENS = 8
"""What is left at the end of a stream or of a long text is an example only if it has this many tokens."""

Ids: TypeAlias = "array[int]"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenExample:
    """Tokens to predict: `input_ids` and `labels`, int32 arrays of the same length.

    `labels[i]` is `input_ids[i]`, or `IGNORED` where nothing is to be learnt; the model's shift by one is not made
    here. Where every token counts, both are the same array. Neither is ever changed.
    """

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True, slots=True)
class ClassExample:
    """The tokens of a text, an int32 array, and its class."""

    input_ids: Ids
    label: int


Example: TypeAlias = TokenExample | ClassExample


@dataclass(frozen=True, slots=True)
class ClientData:
    """A client's examples: those it trains on, and those that only evaluation sees. All are of one kind."""

    train: list[Example]
    held_out: list[Example]


def prepare(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    task: str,
    seed: int,
    where: object,
    planted: Sequence[Record] = (),
) -> ClientData:
    """Tokenise, split and arrange a client's records; takes them one by one, so that their text is never all in memory.

    Args:
        planted: records that an audit puts among those that are trained on, in places that depend on `seed`.

    Raises:
        DataError: a record that does not fit the task or the tokenizer (`where` and its number, from 1), or nothing
            left to train on (`where`).
        BackboneError: the tokenizer has no end-of-text token.
    """
    train, held_out = split(_encoded(records, tokenizer, data, task, where), data.held_out, seed)
    generator = random.Random(derive(seed, "planted"))
    for example in _encoded(planted, tokenizer, data, task, "planted"):
        train.insert(generator.randrange(len(train) + 1), example)
    prepared = ClientData(arrange(train, data), arrange(held_out, data))
    if not prepared.train:
        what = "no usable example" if train else "no records"
        hint = f"Training needs texts that come to {MIN_TOKENS} tokens or more, with something to learn in them."
        raise DataError(what, where=where, hint=hint)
    return prepared


def tokenize(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, data: Data, task: str, where: object = "records"
) -> list[Example]:
    """The examples that `records` make; what `prepare` does without holding any out. Raises as `prepare` does."""
    return arrange(_encoded(records, tokenizer, data, task, where), data)


def _encoded(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, data: Data, task: str, where: object
) -> list[Example]:
    return [
        encode(record, tokenizer, data, task, f"{where}, record {number}") for number, record in enumerate(records, 1)
    ]


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, data: Data, task: str, where: object) -> Example:
    """One record as one example.

    * A text is its tokens and the end-of-text token.
    * A completion is the prompt's tokens, the completion's and the end-of-text token. The two are tokenised apart, so
      no token reaches over the boundary. If that is longer than `max_length`, the prompt loses its beginning; if the
      completion alone is too long, it loses its end. With `completion_only` the prompt's labels are `IGNORED`.
    * A chat is what the tokenizer's own template makes of it, then the end-of-text token unless the template wrote
      one. With `completion_only` only what assistants wrote, the template's mark at its end included, has labels.
    * A labelled text is what the tokenizer makes of it, with its special tokens, cut to `max_length`.

    Where the tokenizer begins a sequence with a token of its own, so does every text, completion and prompt here. Texts
    and chats may be longer than `max_length`: see `arrange`.

    Raises: as `prepare`.
    """
    if (task == CLASSIFICATION) != isinstance(record, Labelled):
        expected = "texts with labels" if task == CLASSIFICATION else "texts, completions or chats"
        raise DataError(f"a record of the kind {type(record).__name__}", where=where, hint=f"{task} takes {expected}.")
    match record:
        case Labelled(text, label):
            ids = tokenizer(text, truncation=True, max_length=data.max_length, verbose=False)["input_ids"]
            if not ids:
                raise DataError("the tokenizer makes no tokens of the text", where=where)
            return ClassExample(array("i", ids), label)
        case Text(text):
            all_ids = array("i", [*_beginning(tokenizer), *_ids(tokenizer, text), _end(tokenizer)])
            return TokenExample(all_ids, all_ids)
        case Completion():
            return _completion(record, tokenizer, data)
        case Chat(messages):
            return _chat(messages, tokenizer, data, where)


def _completion(record: Completion, tokenizer: PreTrainedTokenizerBase, data: Data) -> TokenExample:
    completion = [*_ids(tokenizer, record.completion), _end(tokenizer)][: data.max_length]
    room = data.max_length - len(completion)
    beginning = _beginning(tokenizer)[:room]
    prompt = _ids(tokenizer, record.prompt)
    prompt = beginning + prompt[max(0, len(prompt) - (room - len(beginning))) :]
    ids = array("i", prompt + completion)
    return TokenExample(ids, array("i", [IGNORED] * len(prompt) + completion) if data.completion_only else ids)


def _chat(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, data: Data, where: object) -> TokenExample:
    if not tokenizer.chat_template:
        hint = "Use a backbone that was made for chats, or give the data as prompts and completions."
        raise DataError("a chat, but the backbone's tokenizer has no chat template", where=where, hint=hint)
    if data.completion_only and not tokenizer.is_fast:
        hint = "Use one of the tokenizers library, or set [data] completion_only = false in the Plan."
        what = "this kind of tokenizer cannot say where a token stands in the text"
        raise BackboneError(what, where=tokenizer.name_or_path, hint=hint)
    whole = _rendered(messages, tokenizer, where)
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=data.completion_only, verbose=False)
    ids: list[int] = encoding["input_ids"]
    end = _end(tokenizer)
    # Templates may write a line break after the last end-of-text token.
    ending = [] if end in ids[-2:] else [end]
    all_ids = array("i", ids + ending)
    if not data.completion_only:
        return TokenExample(all_ids, all_ids)
    spans = _assistant_spans(messages, whole, tokenizer, where)
    labels = array("i", [IGNORED]) * len(all_ids)
    for index, (start, stop) in enumerate(encoding["offset_mapping"]):
        if any(first <= start and stop <= last for first, last in spans):
            labels[index] = all_ids[index]
    if ending and messages[-1].role == "assistant":
        labels[-1] = end
    return TokenExample(all_ids, labels)


def _assistant_spans(
    messages: tuple[Message, ...], whole: str, tokenizer: PreTrainedTokenizerBase, where: object
) -> list[tuple[int, int]]:
    """Where in `whole` each assistant's message stands, from after its header to the end of its turn.

    The header is found as what the template writes to ask for an answer, so that training predicts exactly what
    generating will have to. Nothing asks for the answer of an assistant who speaks first: its header counts as its own.
    """
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _rendered(messages[:index], tokenizer, where, ask=True) if index else ""
        after = _rendered(messages[: index + 1], tokenizer, where)
        if not (after.startswith(before) and whole.startswith(after)):
            hint = "Set [data] completion_only = false in the Plan to learn whole chats."
            raise DataError(
                "the chat template rewrites earlier turns, so answers cannot be told apart", where=where, hint=hint
            )
        spans.append((len(before), len(after)))
    return spans


def _rendered(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: object, *, ask: bool = False
) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, ValueError, TypeError) as error:
        # The template wrote the message and may have put the chat into it, which must not leave the machine.
        hint = "Many templates want a user's message first and then the two sides in turn."
        raise DataError(
            f"the chat template refuses the chat ({type(error).__name__})", where=where, hint=hint
        ) from None
    assert isinstance(text, str)
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every sequence: its beginning-of-text token, or nothing."""
    special: list[int] = tokenizer("", verbose=False)["input_ids"]
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise BackboneError(
            "the tokenizer has no end-of-text token", where=tokenizer.name_or_path, hint="Set its eos_token."
        )
    return int(end)


def arrange(examples: Sequence[Example], data: Data) -> list[Example]:
    """`examples` in lengths of at most `max_length`, without those that have nothing to predict.

    With `packing`, tokens (and labels) of all examples in turn make one stream that is cut into blocks of exactly
    `max_length`; without, each example that is longer is cut into pieces. A last block or piece of fewer than
    `MIN_TOKENS` tokens is dropped, but without packing a short record is kept whole; with `truncate` only the first
    piece of each is kept. Class examples are returned as
    they are: they have been cut and are never packed.
    """
    tokens = [example for example in examples if isinstance(example, TokenExample)]
    if len(tokens) < len(examples):
        return list(examples)
    pieces = (
        _pieces(_joined(tokens), data.max_length, MIN_TOKENS)
        if data.packing
        else _each_cut(tokens, data.max_length, truncate=data.truncate)
    )
    # Labels from the second on: nothing predicts the first token.
    return [piece for piece in pieces if any(label != IGNORED for label in islice(piece.labels, 1, None))]


def _each_cut(examples: list[TokenExample], size: int, *, truncate: bool) -> Iterator[TokenExample]:
    for example in examples:
        pieces = _pieces(example, size, MIN_TOKENS) if len(example.input_ids) > size else iter([example])
        yield from islice(pieces, 1) if truncate else pieces


def _joined(examples: list[TokenExample]) -> TokenExample:
    ids, labels = array("i"), array("i")
    every_token_counts = all(example.labels is example.input_ids for example in examples)
    for example in examples:
        ids.extend(example.input_ids)
        if not every_token_counts:
            labels.extend(example.labels)
    return TokenExample(ids, ids if every_token_counts else labels)


def _pieces(example: TokenExample, size: int, smallest: int) -> Iterator[TokenExample]:
    for start in range(0, len(example.input_ids), size):
        ids = example.input_ids[start : start + size]
        if len(ids) >= smallest:
            same = example.labels is example.input_ids
            yield TokenExample(ids, ids if same else example.labels[start : start + size])


def split(examples: Sequence[T], held_out: float, seed: int) -> tuple[list[T], list[T]]:
    """`examples` to train on, and those held out; each in the order they came in.

    Which ones are held out depends on `seed`, `held_out` and on how many there are, never on what they hold. The share
    is rounded to whole examples; if it is more than 0 and there are two or more, either side has at least one. A
    single example is trained on.
    """
    count = round(held_out * len(examples))
    count = min(max(count, 1), len(examples) - 1) if held_out > 0 and len(examples) > 1 else 0
    chosen = set(random.Random(derive(seed, "split")).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [example for index, example in enumerate(examples) if index in chosen]


def batches(examples: Sequence[T], batch_size: int, seed: int | None, epoch: int) -> Iterator[list[T]]:
    """`examples` in batches of `batch_size`, the last one perhaps smaller, every example once.

    The order is another for every `seed` and `epoch`, and the same on every machine; with the seed None it is that of
    `examples`.
    """
    order = list(range(len(examples)))
    if seed is not None:
        random.Random(derive(seed, "epoch", epoch)).shuffle(order)
    for start in range(0, len(order), batch_size):
        yield [examples[index] for index in order[start : start + batch_size]]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of examples of one kind, for a model's `forward`; padded on the right to the longest.

    Returns:
        input_ids: int64[batch, length], `pad_id` where padded.
        attention_mask: int64[batch, length], 1 for tokens and 0 for padding.
        labels: int64[batch, length] with `IGNORED` on padding for token examples; int64[batch] for class examples.
    """
    import torch

    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    classes = []
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        input_ids[row, :size] = torch.frombuffer(example.input_ids, dtype=torch.int32)
        attention_mask[row, :size] = 1
        if isinstance(example, TokenExample):
            labels[row, :size] = torch.frombuffer(example.labels, dtype=torch.int32)
        else:
            classes.append(example.label)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.tensor(classes, dtype=torch.int64) if classes else labels,
    }
