"""Findings and the page they make."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OK, WARN, BAD = "ok", "warn", "BAD"


@dataclass(frozen=True)
class Finding:
    """One line. ``level`` BAD: training will not work here; WARN: it will, slower or not everywhere."""

    name: str
    value: str
    level: str = OK
    advice: str = ""


@dataclass
class Report:
    """Sections in the order in which they were made."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)

    def section(self, title: str, check: Callable[[], list[Finding]]) -> None:
        """Run one group of checks; a check that itself breaks down is a finding, not the end of the report."""
        try:
            self.sections[title] = check()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.sections[title] = [Finding("check", "broke down", BAD, reason)]

    @property
    def findings(self) -> list[Finding]:
        return [finding for section in self.sections.values() for finding in section]

    @property
    def is_broken(self) -> bool:
        return any(finding.level == BAD for finding in self.findings)

    def text(self) -> str:
        """The page."""
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = []
        for title, findings in self.sections.items():
            lines += [*([""] if lines else []), title]
            for f in findings:
                flag = "" if f.level == OK else f"  [{f.level}]"
                lines.append(f"  {f.name:<{width}}  {f.value}{flag}" + (f" {f.advice}" if f.advice else ""))
        num_bad = sum(f.level == BAD for f in self.findings)
        num_warn = sum(f.level == WARN for f in self.findings)
        verdict = f"{num_bad} broken, {num_warn} to look at" if num_bad or num_warn else "all well"
        return "\n".join([*lines, "", verdict])

    def to_json(self) -> str:
        plain: dict[str, Any] = {
            title: [dataclasses.asdict(finding) for finding in findings] for title, findings in self.sections.items()
        }
        return json.dumps({"broken": self.is_broken, "sections": plain}, indent=1)
