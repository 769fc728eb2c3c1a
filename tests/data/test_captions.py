import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meru_fast.data.captions import Caption, compose, parse, segment
from meru_fast.data.errors import BadSampleError


def test_redcaps_and_img2dataset_captions():
    assert parse(b'{"subreddit": "cats", "caption": "my cat"}', is_txt=False) == ("my cat", "cats")
    record = {"caption": "a b", "url": "u", "key": "000010005", "status": "success", "sha256": "0"}
    assert parse(json.dumps(record).encode(), is_txt=False) == ("a b", None)
    assert parse("\ufeffein Männlein\n".encode(), is_txt=True) == ("ein Männlein", None)
    assert parse(b"", is_txt=True) == ("", None)
    assert parse(b'{"subreddit": "cats", "caption": ""}', is_txt=False) == ("", "cats")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "invalid JSON"),
        (b'{"caption": "cut', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'["caption"]', "no caption"),
        (b'{"subreddit": "cats"}', "no caption"),
        (b'{"caption": null}', "no caption"),
        ('{"caption": "Männlein"}'.encode("latin-1"), "not UTF-8"),
        ('{"caption": "a"}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_bad_captions_say_why(data, reason):
    with pytest.raises(BadSampleError, match=reason):
        parse(data, is_txt=False)


def test_prefix():
    caption = Caption("the old bridge", "itookapicture")
    assert compose(caption, draw=0.49) == "i took a picture : the old bridge"
    assert compose(caption, draw=0.5) == "the old bridge"
    assert compose(caption, draw=0.0, prefix_probability=0) == "the old bridge"
    assert compose(Caption("the old bridge", None), draw=0.0) == "the old bridge"


def test_an_empty_caption_is_supervised_by_its_subreddit():
    assert compose(Caption("", "earthporn"), draw=0.99) == "earth porn : "
    assert compose(Caption("", None), draw=0.0) == ""


def test_names_without_words_stay():
    assert segment("___") == "___"


@given(text=st.text(), subreddit=st.text(min_size=1), extra=st.dictionaries(st.text(), st.integers()))
def test_any_caption_comes_back_as_it_was(text, subreddit, extra):
    record = extra | {"caption": text, "subreddit": subreddit}
    if not any("\ud800" <= letter <= "\udfff" for letter in text + subreddit + "".join(extra)):
        assert parse(json.dumps(record, ensure_ascii=False).encode(), is_txt=False) == (text, subreddit)
    assert parse(json.dumps(record).encode(), is_txt=False) == (text, subreddit)


@given(data=st.binary(), is_txt=st.booleans())
def test_any_bytes_are_a_caption_or_refused(data, is_txt):
    try:
        found = parse(data, is_txt)
    except BadSampleError:
        return
    assert isinstance(found.text, str)
