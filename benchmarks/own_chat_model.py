"""The commands of docs/own-chat-model.md, run one after the other in an empty folder and timed.

    python benchmarks/own_chat_model.py [--road teach|begin]

After each road the questions in other words, none of which was learnt, are asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "own-chat-model.md"
ROADS = {"teach": "Teach a model", "begin": "Begin with nothing"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(command: list[str]) -> float:
    """Seconds that a command of Pellucid took; its output goes to the terminal."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], check=True)
    return time.perf_counter() - began


def answers_right(model: str, file: Path) -> tuple[int, int]:
    """Questions whose whole answer is the one in the file, and how many there are."""
    import pellucid

    lm = pellucid.load(model)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = 0
    for row in rows:
        messages = [{"role": "user", "content": row["instruction"]}]
        ids = lm.tokenizer.chat.encode(messages)
        answer = lm.generate(ids, temperature=0, max_new_tokens=40).strip()
        right += answer == row["output"]
        sys.stdout.write(f"  {row['instruction']}\n    {answer}\n")
    return right, len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--road", choices=ROADS, help="one road only (default: both)")
    road = parser.parse_args().road
    _, *sections = PAGE.read_text("utf-8").split("\n## ")
    said = {section.splitlines()[0]: section for section in sections}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for part in said.values():
            for block in blocks(part, "python"):
                exec(compile(block, str(PAGE), "exec"), {})
        results = [walked(said, name) for name in ([road] if road else ROADS)]
    sys.stdout.write("\n".join(results) + "\n")


def walked(said: dict[str, str], road: str) -> str:
    """Run the commands of a road; what they took and what the model answers, in words."""
    section = next(text for title, text in said.items() if title.startswith(ROADS[road]))
    (commands,) = blocks(section, "sh")
    took: list[str] = []
    model = ""
    for line in commands.splitlines():
        words = shlex.split(line)
        if words[:2] == ["pellucid", "chat"]:
            model = words[words.index("-m") + 1]
        elif words[0] == "pellucid":
            took.append(f"{words[1]} {run(words):.0f} s")
    right, asked = answers_right(model, Path("other-words.jsonl"))
    return f"{road}: {', '.join(took)}; {right} of {asked} questions in other words answered right"


if __name__ == "__main__":
    main()
