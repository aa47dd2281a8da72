"""The relay's word to the collector: datagrams that may be lost, late, foreign, or more than fit."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from cdp.journal.acknowledged import MAX_DRAINED, SOCKET_NAME, Acknowledged, Ear, Mouth

DEEP = "x" * 120  # a path that no socket address holds


def test_what_is_said_is_heard_once(tmp_path: Path) -> None:
    folder = tmp_path / DEEP
    folder.mkdir()
    ear, mouth = Ear(str(folder)), Mouth(str(folder))
    news = Acknowledged(3, 2**40, False)
    assert mouth.say(news) and mouth.say(news)
    assert ear.take() == [news]
    assert mouth.say(news, again=True) and mouth.say(Acknowledged(3, 2**40, True))
    assert ear.take() == [news, Acknowledged(3, 2**40, True)]
    ear.close()
    mouth.close()


def test_nobody_listening_is_no_failure_and_who_comes_hears_it(tmp_path: Path) -> None:
    """Promise 10: a relay goes on whether the collector is there or not, and whether it asks or not."""
    mouth, news = Mouth(str(tmp_path)), Acknowledged(1, 7, False)
    assert mouth.say(news)
    for _ in range(2):  # the second ear takes the place of a socket that was left behind
        ear = Ear(str(tmp_path))
        assert mouth.say(news, again=True)
        assert ear.take() == [news]
        ear.close()
        assert os.path.lexists(tmp_path / SOCKET_NAME)
    mouth.close()


def test_a_full_ear_is_said_and_nothing_newer_is_lost(tmp_path: Path) -> None:
    """Promise 9: the kernel's queue is the only one; what did not fit is said again."""
    ear, mouth = Ear(str(tmp_path)), Mouth(str(tmp_path))
    seq = 1
    while mouth.say(Acknowledged(1, seq, False)):
        seq += 1
        assert seq < 100_000
    assert 1 <= len(ear.take()) <= MAX_DRAINED
    assert mouth.say(Acknowledged(1, seq, False))
    heard = ear.take()
    while more := ear.take():
        heard += more
    assert heard[-1].seq == seq
    ear.close()
    mouth.close()


def test_what_is_no_such_datagram_promises_nothing(tmp_path: Path) -> None:
    ear, mouth = Ear(str(tmp_path)), Mouth(str(tmp_path))
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for raw in (b"", b"CDPA", b"\0" * 24, b"CDPA" + b"\xff" * 21, b"CDPB" + b"\xff" * 20):
        stranger.sendto(raw, str(tmp_path / SOCKET_NAME))
    assert ear.take() == []
    assert mouth.say(Acknowledged(1, 1, False)) and len(ear.take()) == 1
    stranger.close()
    ear.close()
    mouth.close()
