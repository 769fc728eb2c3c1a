"""From the bytes of a caption member to the text that is trained on."""

import json
from functools import lru_cache
from typing import NamedTuple

from meru_fast.data.errors import BadSampleError

PREFIX_PROBABILITY = 0.5


class Caption(NamedTuple):
    """A caption as stored. `subreddit` is None where the data set has none."""

    text: str
    subreddit: str | None


def parse(data: bytes, is_txt: bool) -> Caption:
    """Read a .json or .txt member.

    Raises:
        BadSampleError: wrong encoding, invalid JSON, no caption. An empty one is no fault: the subreddit supervises.
    """
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("caption is not UTF-8") from error
    if is_txt:
        return Caption(content.strip(), None)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("invalid JSON") from error
    if not isinstance(record, dict) or not isinstance(record.get("caption"), str):
        raise BadSampleError("no caption in the JSON")
    subreddit = record.get("subreddit")
    return Caption(record["caption"], subreddit if isinstance(subreddit, str) and subreddit else None)


def compose(caption: Caption, draw: float, prefix_probability: float = PREFIX_PROBABILITY) -> str:
    """The text to train on: with some probability "words of the subreddit : caption" (MERU section 4, RedCaps).

    Args:
        draw: uniform in [0, 1); prefixed where it is below `prefix_probability`, or the caption is empty.
    """
    if caption.subreddit is None or (caption.text and draw >= prefix_probability):
        return caption.text
    return f"{segment(caption.subreddit)} : {caption.text}"


@lru_cache(maxsize=65536)
def segment(subreddit: str) -> str:
    """Words of a subreddit's name: "itookapicture" is "i took a picture"."""
    return " ".join(_wordsegment().segment(subreddit)) or subreddit


@lru_cache(maxsize=1)
def _wordsegment():
    """The library with its word counts, loaded once: a second and about 100 MB, so only where a prefix is asked for."""
    import wordsegment

    wordsegment.load()
    return wordsegment
