"""The progress bar, on a terminal and in a log."""

import contextlib
import io

import torch.distributed as dist

from meru_fast.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, **options) -> str:
    with contextlib.redirect_stderr(stream), progress_bar("sorting", 3, "shards", **options) as advance:
        advance()
        advance(2, note="2 bad")
    return stream.getvalue()


def test_a_log_gets_the_last_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    (line,) = shown(io.StringIO()).splitlines()
    for part in ("sorting ", "3/3", "shards/s", "2 bad"):
        assert part in line


def test_a_terminal_is_clean_afterwards(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal())
    assert "sorting" in text
    assert text.endswith("\x1b[2K")  # the line is erased


def test_only_the_main_process_shows_it(monkeypatch):
    assert shown(io.StringIO(), enabled=False) == ""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    assert shown(io.StringIO()) == ""
    assert "3/3" in shown(io.StringIO(), enabled=True)
