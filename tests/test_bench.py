"""The script that writes docs/BENCHMARKS.md: a part replaces its own tables and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("scripts/bench/all.py")


def test_every_part_has_its_script_and_its_place_on_the_page(bench: ModuleType) -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    for name, part in bench.PARTS.items():
        assert (ROOT / "scripts" / "bench" / part.script).is_file()
        written = bench.spliced(page, name, r"| \1 |")
        before, after = page.split(f"<!-- {name} -->\n")[0], page.split(f"<!-- /{name} -->")[1]
        assert written == f"{before}<!-- {name} -->\n| \\1 |\n<!-- /{name} -->{after}"
        assert bench.spliced(written, name, r"| \1 |") == written


@pytest.mark.parametrize(
    "page", ["", "<!-- growth -->\n", "<!-- /growth -->\n<!-- growth -->\n", "<!-- growth -->\n<!-- /growth -->\n" * 2]
)
def test_a_page_without_a_place_is_refused(bench: ModuleType, page: str) -> None:
    with pytest.raises(ValueError, match="growth"):
        bench.spliced(page, "growth", "| 1 |")


def test_only_tables_of_a_script_that_ended_well_are_taken(
    bench: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint('versions\\n\\n| a |\\n|---|\\n\\n| b |\\nsaid\\n')\nsys.exit(int(sys.argv[1]))\n"
    )
    assert bench.tables([sys.executable, str(script), "0"]) == "| a |\n|---|\n\n| b |"
    assert bench.tables([sys.executable, str(script), "3"]) is None
