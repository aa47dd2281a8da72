"""What other threads see of a group's volumes while records are followed."""

from __future__ import annotations

from cdp.journal.batch import RESIZE, Record
from cdp.replica.course import Course


def test_a_volume_that_is_declared_disturbs_nobody_who_reads_the_names() -> None:
    """The figures of the process are made from them; an error there ends it."""
    course = Course({"names": {"db": 1, "log": 2}})
    reading = iter(course.names.items())
    first = next(reading)
    course.follow(Record(1, 1, RESIZE, 0, 3, 0, 4096, memoryview(b"late")))
    assert [first, *reading] == [("db", 1), ("log", 2)]
    assert course.names == {"db": 1, "log": 2, "late": 3}
