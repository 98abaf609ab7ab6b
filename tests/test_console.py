"""Progress without a terminal: a line now and then, none for what is short."""

from __future__ import annotations

from vtexport.cli.console import Lines


class Watch:
    """Lines on a clock that moves by hand."""

    def __init__(self) -> None:
        self.now, self.said = 0.0, list[str]()
        self.lines = Lines(self.said.append, lambda: self.now)

    def pass_time(self, seconds: int, each: int = 0) -> None:
        """Let `seconds` pass, of which every tenth is looked at; `each` steps are done in every tenth."""
        for _ in range(seconds // 10):
            self.now += 10
            self.lines.advance(each)
            self.lines.look()


def test_a_short_stage_gets_no_line() -> None:
    watch = Watch()
    watch.lines.look()
    for _ in range(20):
        watch.lines.begin("trace", 3)
        watch.now += 4
        watch.lines.advance(1)
        watch.lines.look()
        watch.lines.end()
        watch.lines.look()
    assert watch.said == []


def test_a_long_stage_says_how_far_it_is() -> None:
    watch = Watch()
    watch.lines.begin("measure pairs", 30)
    watch.pass_time(40, each=4)
    assert watch.said == [f"  measure pairs: {4 * n} of 30, {10 * n} s" for n in (1, 2, 3, 4)]
    watch.lines.end()
    watch.pass_time(40)
    assert len(watch.said) == 4


def test_a_slow_stage_gets_a_line_a_minute() -> None:
    watch = Watch()
    watch.lines.begin("measure pairs", 1000)
    watch.pass_time(190, each=1)
    assert watch.said == [f"  measure pairs: {n} of 1000, {10 * n} s" for n in (1, 7, 13, 19)]


def test_steps_that_are_not_counted_are_seen_to_run() -> None:
    watch = Watch()
    watch.lines.begin("compile", None)
    watch.pass_time(130)
    assert watch.said == ["  compile: 10 s", "  compile: 70 s", "  compile: 130 s"]
