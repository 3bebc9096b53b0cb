"""docs/evaluation.md: its snippets run as they stand there, one after the other, and print what they say."""

import csv
import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
COLUMNS = ("Index", "Goal", "Target", "Behavior", "Category", "Source")


def test_the_page_s_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Path("behaviors.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([COLUMNS, *((at, f"fix jurgrim {at}", "sure ,", "fix", "Kitchen", "made up") for at in range(40))])
    # Judges that are asked in vain wait between their tries.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    Path("judge.txt").write_text(re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1])
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 3
    assert len(names["prompts"]) == 32
    assert [bool(verdict.error) for verdict in names["verdicts"]] == [True]  # no judge listens there
    printed = re.findall(r"^print\(.*\) +# (.*)$", "".join(snippets), re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == printed
