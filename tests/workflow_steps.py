"""A small stand-in for a runner of GitHub's: the `run:` steps of an action or a job, one after another, in a folder.

`uses:` steps are left out. Expressions are resolved in `env:` and `if:` only, where ours stand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

GITHUB = Path(__file__).resolve().parent.parent / ".github"
ACTION = GITHUB / "actions" / "gate"


def load(name: str) -> dict[str, Any]:
    """A YAML file under .github/; the key `on` is read as True by YAML 1.1."""
    return yaml.safe_load((GITHUB / name).read_text(encoding="utf-8"))


@dataclass
class Runner:
    """What a runner keeps between steps."""

    folder: Path
    values: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def outputs(self, step: str) -> dict[str, str]:
        """What a step wrote to GITHUB_OUTPUT."""
        path = self.folder / f"output-{step}"
        return dict(line.split("=", 1) for line in path.read_text().splitlines()) if path.exists() else {}

    @property
    def summary(self) -> str:
        """The step summary."""
        path = self.folder / "summary"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def resolve(self, text: str) -> str:
        """Expressions replaced by their values; an output that no step wrote is empty, as on GitHub."""
        def value(match: re.Match[str]) -> str:
            name = match[1].strip()
            step = re.fullmatch(r"steps\.(\w+)\.outputs\.([\w-]+)", name)
            return self.outputs(step[1]).get(step[2], "") if step else self.values[name]
        return re.sub(r"\$\{\{(.*?)\}\}", value, text)

    def run(self, steps: list[dict[str, Any]], leave_out: tuple[str, ...] = ()) -> int:
        """Exit code of the job: steps after a failure run only where they say `always()`."""
        code = 0
        for step in steps:
            if "run" not in step or step.get("id") in leave_out or (code and "always()" not in str(step.get("if", ""))):
                continue
            done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=self.folder, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900, env=self._env(step))
            self.said.append(done.stdout)
            code = code or done.returncode
        return code

    def _env(self, step: dict[str, Any]) -> dict[str, str]:
        tools = str(Path(sys.executable).parent)
        shared = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/"),
                  "GITHUB_OUTPUT": str(self.folder / f"output-{step.get('id')}"),
                  "GITHUB_STEP_SUMMARY": str(self.folder / "summary"), "GITHUB_SERVER_URL": "https://github.com",
                  "GITHUB_REPOSITORY": "o/r", "GITHUB_RUN_ID": "7", "PYTHONPATH": str(GITHUB.parent),
                  "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        given = {name: self.resolve(str(value)) for name, value in (step.get("env") or {}).items()}
        return {**shared, **self.environment, **given}
