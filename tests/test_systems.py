"""docs/systems.md is what its generator writes today, and its figures are those of the papers."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_up_to_date_and_counts_as_published():
    spec = importlib.util.spec_from_file_location("systems", DOCS / "systems.py")
    systems = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(systems)
    assert (DOCS / "systems.md").read_text(encoding="utf-8") == systems.render(), "run python docs/systems.py"
    rows = [line.split(" | ") for line in systems.render().splitlines() if line.startswith("| LLaVA")][:8]
    # reference/models.md: 336x336, 1000x500, 1920x1080 (B3, C1, C2, C3), and clips of 16 frames
    assert [row[5:9] for row in rows] == [
        ["256", "256", "256", "-"],
        ["576", "576", "576", "-"],
        ["1,312", "1,432", "1,628", "-"],
        ["1,176", "1,752", "1,948", "-"],
        ["1,176", "1,752", "1,948", "2,304"],
        ["1,485", "4,009", "7,269", "3,137"],
        ["144", "648", "2,691", "6,256"],
        ["144", "648", "2,691", "6,256"],  # within 4,000,000 pixels; what stands in front of frames is text
    ]
    assert len({system.name for system in systems.SYSTEMS}) == 8
