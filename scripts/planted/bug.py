"""One planted bug."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lora_lite"


@dataclass(frozen=True)
class Bug:
    """`old` stands exactly once in `file` (below the package); `tests` are pytest arguments, the narrowest that must
    fail once it reads `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def mutated(self, package: Path = PACKAGE) -> str:
        """The file with the bug.

        Raises:
            LookupError: the text is not there exactly once.
        """
        path = package / self.file
        text = path.read_text() if path.is_file() else ""
        if text.count(self.old) != 1:
            raise LookupError(
                f"{self.name}: {self.file} holds this text {text.count(self.old)} times: {self.old.strip()[:70]!r}"
            )
        return text.replace(self.old, self.new)

    @property
    def test_files(self) -> list[Path]:
        """The files that `tests` names."""
        return [ROOT / word.split("::")[0] for word in self.tests.split() if word.startswith("tests/")]
