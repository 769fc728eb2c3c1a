"""CLIP's byte-pair tokenizer on the `tokenizers` library, and captions packed end to end without padding."""

import gzip
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import ftfy
import regex
import tokenizers
import torch
from torch import Tensor

VOCAB_SIZE = 49408
CONTEXT_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407

# CLIP's split into words: special strings, English clitics, runs of letters, single digits, runs of other characters.
_CLITICS = r"'s|'t|'re|'ve|'m|'ll|'d"
_WORDS = rf"{_CLITICS}|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
_SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>"
_WORDS_OR_SPECIAL = regex.compile(rf"{_SPECIAL}|{_WORDS}", regex.IGNORECASE)


class Tokenizer:
    """Text to token ids, equal to those of OpenAI's CLIP and of MERU.

    The vocabulary has 49,408 entries; 49406 starts and 49407 ends a text. The two special strings are honoured where
    they occur in raw text, as the published tokenizers do.
    """

    def __call__(self, text: str | Sequence[str]) -> list[Tensor]:
        """Ids of every text as int32 tensors [n], with start and end, neither truncated nor padded.

        Raises:
            TypeError: not a string, or not strings.
        """
        texts = text if isinstance(text, Iterable) and not isinstance(text, str) else [text]
        return [torch.tensor(self.encode(item), dtype=torch.int32) for item in texts]

    def encode(self, text: str) -> list[int]:
        """Ids of one text as a list. Raises TypeError: not a string."""
        if not isinstance(text, str):
            raise TypeError(f"expected a string, got {type(text).__name__}: {text!r}")
        text = clean(text)
        special = START in text or END in text
        return [START_ID, *(_encode_with_special(text) if special else _bpe().encode(text).ids), END_ID]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The (cleaned) text of the ids, without start and end."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return _bpe().decode([index for index in ids if index < START_ID]).strip()


def clean(text: str) -> str:
    """Repair mojibake, undo (double) HTML escapes, collapse white space, lower-case."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy changes nothing in plain ASCII, slowly
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def _bpe() -> tokenizers.Tokenizer:
    packed = resources.files("meru_fast").joinpath("assets/clip_bpe_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in map(str.split, lines)]
    # Ids count the 256 bytes (printable ones first, each as its stand-in), the same ending a word, and the merges.
    stand_ins = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=lambda char: (ord(char) > 255, ord(char)))
    words = [*stand_ins, *(f"{char}</w>" for char in stand_ins), *("".join(pair) for pair in merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"(?i){_WORDS}"), behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # That letter is the byte-level stand-in of a space.
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("</w>", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"),
            tokenizers.decoders.ByteLevel(),
        ]
    )
    return tokenizer


def _encode_with_special(text: str) -> list[int]:
    """Ids of a text in which a special string occurs; it counts only where a word could start."""
    ids: list[int] = []
    done = 0
    for match in _WORDS_OR_SPECIAL.finditer(text):
        if match.group() in (START, END):
            ids += _bpe().encode(text[done : match.start()]).ids
            ids.append(START_ID if match.group() == START else END_ID)
            done = match.end()
    return ids + _bpe().encode(text[done:]).ids


@dataclass(frozen=True)
class PackedTokens:
    """Captions laid end to end, so that the text tower does no work on padding.

    Attributes:
        ids: int32 [total], the tokens of all captions.
        cu_seqlens: int32 [b + 1], where each caption starts, and the total.
        lengths: the b lengths on the host, so that nobody has to ask the device for them.
    """

    ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.lengths:
            object.__setattr__(self, "lengths", tuple(self.cu_seqlens.diff().tolist()))

    @classmethod
    def from_list(cls, tokens: Sequence[Tensor], context_length: int = CONTEXT_LENGTH) -> "PackedTokens":
        """Pack ragged captions (which are left as they are).

        A caption longer than `context_length` is cut there and gets its last token (the end of text) as its last.
        A caption is represented at its largest id, the first end of text, and attention is causal: what follows that
        cannot matter and is dropped.

        Raises:
            ValueError: an empty caption, or no captions.
            TypeError: captions that are no token ids.
        """
        if len(tokens) == 0:
            raise ValueError("no captions to pack")
        parts, lengths = [], []
        for index, caption in enumerate(tokens):
            if not isinstance(caption, Tensor):
                raise TypeError(
                    f"caption {index} is {caption!r}, not a tensor of token ids: pass Tokenizer()(captions)"
                )
            if caption.ndim != 1 or len(caption) == 0:
                raise ValueError(f"caption {index}: expected ids of shape [n], n > 0, got {tuple(caption.shape)}")
            if len(caption) > context_length:
                caption = torch.cat([caption[: context_length - 1], caption[-1:]])
            end = int(caption.argmax()) + 1
            parts.append(caption[:end])
            lengths.append(end)
        ids = torch.cat(parts).to(torch.int32)
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(ids, starts.to(ids.device), tuple(lengths))

    def to_list(self) -> list[Tensor]:
        """The captions as int32 tensors [n]."""
        return list(self.ids.split(self.lengths))

    def to_padded(self, pad: int = 0) -> Tensor:
        """The captions as int32 [b, longest], padded on the right."""
        return torch.nn.utils.rnn.pad_sequence(self.to_list(), batch_first=True, padding_value=pad)

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> "PackedTokens":
        ids, starts = (part.to(device, non_blocking=non_blocking) for part in (self.ids, self.cu_seqlens))
        return PackedTokens(ids, starts, self.lengths)

    def pin_memory(self) -> "PackedTokens":
        return PackedTokens(self.ids.pin_memory(), self.cu_seqlens.pin_memory(), self.lengths)

    def __getitem__(self, rows: slice) -> "PackedTokens":
        """The captions of a slice of rows, as when a batch is cut into micro-batches.

        Raises:
            ValueError: a step other than 1.
        """
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of packed captions has step 1, got {step}")
        lengths = self.lengths[start:stop]
        first = sum(self.lengths[:start])
        starts = self.cu_seqlens[start : start + len(lengths) + 1]
        return PackedTokens(self.ids[first : first + sum(lengths)], starts - first, lengths)

    def __len__(self) -> int:
        return len(self.lengths)
