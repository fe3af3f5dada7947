"""``python -m tests.upstream``: what it says without the published files, and how it compares."""

import random

import pytest
import torch

from tests.integrations.tiny import pair, prompts
from tests.upstream.__main__ import UPSTREAMS, main
from tests.upstream.compare import Case, Loop, Result, compare
from tests.upstream.models import Trio


def test_absent_files_are_skipped_with_the_reason(tmp_path, capsys):
    (tmp_path / "LLaDA").mkdir()
    assert main(["--dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(UPSTREAMS)
    assert all(": skipped: no " in line for line in lines)
    with pytest.raises(SystemExit):
        main(["lada", "--dir", str(tmp_path)])
    assert "expected names among llada, fast-dllm" in capsys.readouterr().err


def test_differences_and_failures_are_counted():
    """Every third case differs in a token, every fifth in its forwards, every seventh fails."""
    plain, own = pair("llada")
    trio = Trio(plain, torch.nn.Module(), own)
    numbers = iter(range(1000))

    def draw(rng: random.Random) -> Case:
        return Case(trio, prompts(1, 3)[0], None, {"number": next(numbers)})

    def original(case: Case) -> Result:
        if case.options["number"] % 7 == 6:
            raise IndexError("beyond the schedule")
        return Result(case.prompt, 4)

    def dropin(case: Case) -> Result:
        number = case.options["number"]
        return Result(case.prompt + (number % 3 == 2), 4 + (number % 5 == 4))

    report = compare(Loop(draw, original, dropin, original), 30)
    ran = [number for number in range(35) if number % 7 != 6][:30]
    equal = sum(number % 3 != 2 and number % 5 != 4 for number in ran)
    assert (report.calls, report.equal, report.ties) == (30, equal, 0)
    assert len(report.differences) == 30 - equal
    assert report.failures == {"IndexError: beyond the schedule": 4}
    assert report.restated == report.restated_equal == 30
    assert "3 tokens differ, forwards 4, got 4" in report.differences[0]
