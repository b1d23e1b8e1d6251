from pathlib import Path

import pytest

for file in sorted(Path(__file__).parent.glob("*.py")):
    if file.stem.endswith(("checks", "support")):
        pytest.register_assert_rewrite(f"tests.objectives.{file.stem}")
