"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_a_certificate_takes_at_most_twelve_lines():
    assert len([line for line in SNIPPETS[0].splitlines() if line.strip()]) <= 12


def test_snippets_run_one_after_the_other(capsys):
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"class \d within l2 distance 0\.\d{3}, false with probability 0\.001", out)
    assert out.rstrip().endswith("()")   # no contradictions


def test_results_name_their_commands():
    for command in ("art-rs demo", "tests/benchmarks/test_goals.py --benchmark-enable", "tests/test_sequences.py -s"):
        assert command in README


def test_no_placeholder_is_left():
    assert "@@" not in README
    assert "TODO" not in README
