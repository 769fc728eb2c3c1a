"""Token ids against recorded ones and against a plain byte-pair encoder; packed captions against their definition."""

import gzip
import html
import itertools
import json
import pickle
from importlib import resources
from pathlib import Path

import ftfy
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meru_fast.tokenizer import PackedTokens, Tokenizer, clean

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokens.json").read_text(encoding="utf-8"))


class PlainTokenizer:
    """Byte-pair encoding with CLIP's vocabulary: in every word merge the best pair until none is left."""

    def __init__(self):
        packed = resources.files("meru_fast").joinpath("assets/clip_bpe_merges.txt.gz").read_bytes()
        merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().splitlines()]
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.stand_in = {byte: chr(byte) for byte in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}
        symbols = [self.stand_in[byte] for byte in visible + hidden]
        words = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges)]
        words += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {word: index for index, word in enumerate(words)}
        self.rank = {pair: index for index, pair in enumerate(merges)}
        self.words = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )

    def __call__(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = regex.sub(r"\s+", " ", text).strip().lower()
        ids = [49406]
        for word in self.words.findall(text):
            ids += [self.ids[word]] if word.startswith("<|") and word in self.ids else self.merged(word)
        return [*ids, 49407]

    def merged(self, word: str) -> list[int]:
        parts = [self.stand_in[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]


PLAIN = PlainTokenizer()
WORDS = [
    "<|endoftext|>",
    "!!<|endoftext|>",
    "<|startoftext|>",
    "<|",
    "&amp;",
    "&lt;b&gt;",
    "a",
    "Dog's",
    "I'LL",
    "_",
    "12",
]
ODD = ["naïve", "…", "“x”", "日本", "é", "ﬁ", "â€™", "🙂", "½", "ß", "Ǆ", " ", "\t\n", "\u200b"]
# Libraries differ in the Unicode version they know, so no code points that came lately.
ASSIGNED = st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=8)
FRAGMENTS = st.sampled_from([*WORDS, *ODD])


def test_recorded_ids():
    found = [ids.tolist() for ids in Tokenizer()(GOLDEN["texts"])]
    assert found == GOLDEN["tokens"]
    expected = [49406, 328, 2280, 320, 1674, 281, 529, 2728, 539, 320, 1149, 634, 269, 49407]
    (ids,) = Tokenizer()("i took a picture : itap of a tench.")
    assert ids.tolist() == expected
    assert ids.dtype == torch.int32


def test_nothing_is_truncated():
    (ids,) = Tokenizer()(["word " * 500])
    assert len(ids) == 502


def test_special_strings_count_where_a_word_starts():
    tokenizer = Tokenizer()
    assert tokenizer.encode("hello <|endoftext|> world") == [49406, 3306, 49407, 1002, 49407]
    assert tokenizer.encode("!!<|endoftext|>").count(49407) == 1
    assert tokenizer.encode("<|ENDOFTEXT|>x").count(49407) == 2


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(FRAGMENTS, ASSIGNED, st.text("abc '<|&;", max_size=8)), max_size=8).map("".join))
def test_equals_the_plain_encoder(text):
    assert Tokenizer().encode(text) == PLAIN(text)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_cleaning_ascii_early_changes_nothing(text):
    assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_decode_inverts_encode():
    tokenizer = Tokenizer()
    (ids,) = tokenizer("a red café, 日本語")
    assert tokenizer.decode(ids) == "a red café , 日本語"


def test_a_tokenizer_travels_to_workers():
    assert pickle.loads(pickle.dumps(Tokenizer())).encode("a") == Tokenizer().encode("a")


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="expected a string, got int: 3"):
        Tokenizer()(["a", 3])


def caption(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def test_packing_cuts_long_captions_and_what_follows_their_end():
    long = caption(49406, *range(100), 49407)
    inner = caption(49406, 5, 49407, 6, 49407)
    given = [long.clone(), inner.clone(), caption(49406, 49407)]
    packed = PackedTokens.from_list(given)
    assert packed.lengths == (77, 3, 2)
    assert packed.cu_seqlens.tolist() == [0, 77, 80, 82]
    assert packed.ids[:77].tolist() == [49406, *range(75), 49407]
    assert packed.to_list()[1].tolist() == [49406, 5, 49407]
    assert torch.equal(given[0], long)  # the caller's tensors are not touched
    assert torch.equal(given[1], inner)


def test_packed_views_agree():
    tokens = Tokenizer()(["a dog", "a large dog in the sun", "", "cats"])
    packed = PackedTokens.from_list(tokens)
    assert len(packed) == 4
    assert all(torch.equal(a, b) for a, b in zip(packed.to_list(), tokens, strict=True))
    padded = packed.to_padded()
    assert padded.shape == (4, 8)
    assert padded[0].tolist() == [*tokens[0].tolist(), 0, 0, 0, 0]
    part = packed[1:3]
    assert part.lengths == packed.lengths[1:3]
    assert part.cu_seqlens.tolist() == [0, 8, 10]
    assert torch.equal(part.ids, torch.cat(tokens[1:3]))
    rebuilt = PackedTokens(packed.ids, packed.cu_seqlens)
    assert rebuilt.lengths == packed.lengths
    assert packed.to("cpu").lengths == packed.lengths


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "no captions"), ([caption()], "caption 0"), ([caption(1), caption(1, 2)[None]], "caption 1")],
)
def test_packing_refuses(tokens, message):
    with pytest.raises(ValueError, match=message):
        PackedTokens.from_list(tokens)
