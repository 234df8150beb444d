"""The report of a real run in a real browser: what was measured stands there, what was not is named; what is no run is refused.

A screenshot is kept as artifacts/report.png.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opt_ds.errors import UserError
from opt_ds.serving.report import write_report
from tests.serving.test_commands import opt_ds
from tests.tiny import LOSSES

ARTIFACTS = Path(__file__).parents[2] / "artifacts"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def evaluated(run: Path, raw_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run, with a summary and a classification in its folder."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(run, folder)
    given = ("--checkpoint", folder, "--store", raw_store, "--split", "valid")
    gallery = ("--candidates", 4, "--matching-candidates", 4)
    assert opt_ds("evaluate", "summary", *given, *gallery, "--output", folder / "result.json") == 0
    assert opt_ds("evaluate", "classification", *given, "--min-positives", 1, "--output", folder / "classification.json") == 0
    return folder


def test_the_page_shows_the_figures_beside_the_papers(
    evaluated: Path, browser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from selenium.webdriver.common.by import By

    assert opt_ds("report", evaluated) == 0
    assert "not measured    retrieval, two stages, transcription, captioning, image generation" in capsys.readouterr().out
    page = evaluated / "report.html"
    browser.get_log("browser")
    browser.get(page.as_uri())
    assert not browser.get_log("browser"), "nothing is missing, nothing is loaded from elsewhere"
    titles = [found.text for found in browser.find_elements(By.TAG_NAME, "figcaption")]
    others = {"loss, weighted sum", "learning rate", "gradient norm", "samples per second"}
    assert others < set(titles) <= {*others, *LOSSES}
    widths = "return [...document.querySelectorAll('.curves svg')].map(drawing => drawing.getBoundingClientRect().width)"
    drawn = browser.execute_script(widths)
    assert len(drawn) == len(titles) and min(drawn) > 100
    images = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert images and min(images) > 100
    text = browser.find_element(By.TAG_NAME, "body").text
    summary = json.loads((evaluated / "result.json").read_text())
    assert f"{summary['validation']['mlm']['loss']:,.3f}" in text
    assert f"{100 * summary['splits']['valid']['transcription']['A']['wer']:.1f}" in text
    for papers in ("41.96", "58.11", "30.24"):
        assert papers in text
    assert "2\nof 2 steps" in text and "train.max_steps" in text, "the setting that is not the preset's"
    assert "opt-ds evaluate captioning" in text
    ARTIFACTS.mkdir(exist_ok=True)
    browser.set_window_size(1100, 2400)
    browser.save_screenshot(str(ARTIFACTS / "report.png"))


def test_a_run_that_has_just_begun_has_a_page(run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    shutil.copytree(run, young, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl", "validation.json"))
    line = '{"step": 1, "kind": "train", "train/loss": "nan", "optimizer/lr": 0.1}'
    (young / "metrics.jsonl").write_text(f'{line}\n{{"step": 2, "ki')
    assert "summary" in write_report(young, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<b>0</b>of 2 steps" in page and page.count("<svg") == 1


def test_what_is_no_run_is_refused(evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json there"):
        write_report(tmp_path, tmp_path / "page.html")
    with pytest.raises(UserError, match=r"--ablation .*: no ablation\.json"):
        write_report(evaluated, tmp_path / "page.html", tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config\.yaml there: restore it, or name another run"):
        write_report(tmp_path, tmp_path / "page.html")
    broken = tmp_path / "broken"
    shutil.copytree(evaluated, broken)
    (broken / "captioning.json").write_text("{")
    with pytest.raises(UserError, match=r"captioning\.json: damaged, no valid JSON: evaluate again"):
        write_report(broken, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
