"""The report: everything on one page, nothing from outside it, and no folder too broken for it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from runfolder import CONFIG, SAMPLES, metrics, write_run

pytest.importorskip("matplotlib")

from mmrlhf import report
from mmrlhf._report import curves


class Page(HTMLParser):
    """Tags, attributes and text of a page; `unclosed` is what was opened and never closed."""

    VOID = ("meta", "img", "br", "path", "use", "rect")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.unclosed: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.unclosed.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def page_of(folder: Path) -> Page:
    path = report.write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.unclosed
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("runs") / "photos"))


def test_whole_run_shows_what_was_trained_and_how_it_went(whole):
    for expected in (
        "finished",
        "recipe mm_dpo",
        "Qwen/Qwen2.5-VL-3B-Instruct · 401 groups · 2351 pairs · 3 left out",
        "1 h 23 min",
        "dpo_pairs.jsonl:1204image images/0412.jpg: truncated after 8192 bytes",
        "9214 tokens, and max_group_tokens is 8192",
        "transformers5.23.0",
        "1 non-finite value left out",
    ):
        assert expected in whole.words
    assert "What this folder lacks" not in whole.words
    assert CONFIG.strip() in "".join(whole.text)


def test_every_panel_is_drawn_with_the_themes_colours(whole):
    titles = [attrs["aria-label"] for attrs in whole.all("svg")]
    assert titles == [f"{panel.title} by step" for panel in curves.PANELS]
    styles = " ".join(attrs.get("style") or "" for _, attrs in whole.tags)
    assert "var(--series-1)" in styles
    assert "var(--series-2)" in styles
    assert not any(ink in styles for ink in curves._INKS)


def test_nothing_is_fetched_and_nothing_runs(whole):
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in whole.tags}
    for tag, attrs in whole.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:image/", "#")), (tag, name, value)
            assert "://" not in (value or ""), (tag, name)
    policy = [attrs["content"] for attrs in whole.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_references_inside_the_svgs_resolve(whole):
    ids = [attrs["id"] for _, attrs in whole.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in whole.tags:
        for value in attrs.values():
            for wanted in re.findall(r"^#(\S+)$|url\(#([^)]+)\)", value or ""):
                assert "".join(wanted) in ids


def test_pictures_are_inside_the_page_and_scaled_down(whole):
    small, wide = whole.all("img")
    assert (small["class"], small["width"], small["height"]) == ("tiny", "64", "64")
    assert (wide["class"], wide["width"], wide["height"]) == ("", "640", "427")
    assert (small["src"] or "").startswith("data:image/png;base64,")
    assert (wide["src"] or "").startswith("data:image/jpeg;base64,")


def test_answers_stand_side_by_side_with_their_differences_marked(tmp_path):
    html = report.write_report(write_run(tmp_path / "run", steps=2)).read_text()
    assert '<mark class="gone">Two</mark> towers, and the rocket has lifted off.' in html
    assert '<mark class="new">Four</mark> towers, and the rocket has <mark class="new">not</mark> lifted off.' in html
    assert "After (unchanged)" in html


def test_responses_are_sorted_best_first_with_ties_beside_each_other(whole):
    best = "A dark red cup of coffee on a matching saucer"
    order = [best, "A cup of coffee with a spoon.", "Coffee on a table.", "A mug of black coffee"]
    places = [whole.words.index(text) for text in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("a b c", "a x c", ["b"], ["x"]),
        ("a b c", "a c", ["b"], []),
        ("a c", "a b c", [], ["b"]),
        ("", "a b", [], ["a b"]),
        ("a b", "", ["a b"], []),
        ("same  words\n", "same  words\n", [], []),
        ("  spaced", "spaced", [], []),
        ("a\nb", "a b", [], []),
        ("on the left.", "on the left, in red.", [], [", in red"]),
        ("it isn't half-closed", "it is half-open", ["isn't half-closed"], ["is half-open"]),
        ("\u732b\u304c", "\u72ac\u304c!", ["\u732b\u304c"], ["\u72ac\u304c!"]),
    ],
)
def test_word_differences(before, after, gone, new):
    left, right = report._words(before, after)
    assert "".join(text for text, _ in left) == before
    assert "".join(text for text, _ in right) == after
    assert [text for text, differs in left if differs] == gone
    assert [text for text, differs in right if differs] == new


@pytest.mark.parametrize(("before", "after", "said"), [("a b", None, "not recorded"), ("a b", "", "an empty answer")])
def test_answers_that_are_absent_or_empty(tmp_path, before, after, said):
    sample = {"before": before, "after": after}
    html = report.write_report(write_run(tmp_path / "run", steps=0, samples=[sample])).read_text()
    assert said in html
    assert ('<mark class="gone">a b</mark>' in html) == (after is not None)


def test_long_texts_are_shown_without_differences():
    words = "word " * (report.DIFF_WORDS + 1)
    assert report._words(words, "other") == ([(words, False)], [("other", False)])


def test_user_text_cannot_become_markup(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    sample = {key: attack for key in ("id", "prompt", "before", "after", "image")}
    sample["responses"] = [{"text": attack, "score": 1, "rank": attack}]
    folder = write_run(tmp_path / "run", steps=3, samples=[sample, {**sample, "after": attack + " more"}])
    skipped = [{"source": attack, "reason": attack}]
    (folder / "run.json").write_text(json.dumps({"status": attack, attack: {attack: attack}, "skipped_rows": skipped}))
    (folder / "config.yaml").write_text(f"recipe: {json.dumps(attack)}\n")
    page = page_of(folder)
    assert not page.all("script")
    assert not page.all("img")
    assert "".join(page.text).count("<script>alert(1)</script>") > 10


def test_pictures_outside_the_folder_are_not_read(tmp_path):
    folder = write_run(tmp_path / "run", steps=2)
    outside = tmp_path / "secret.png"
    outside.write_bytes((folder / "images" / "0.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(outside)
    rows = [{**SAMPLES[0], "image": image} for image in ("../secret.png", str(outside), "images/link.png")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    assert not page.all("img")
    assert page.words.count("lies outside the run folder and was not read") == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "the picture images/0.png could not be read"),
        (b"not a picture", "the picture images/0.png could not be read"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "the picture images/0.png could not be read"),
    ],
    ids=["absent", "text", "broken"],
)
def test_unreadable_pictures_are_named(tmp_path, content, said):
    folder = write_run(tmp_path / "run", steps=2, samples=SAMPLES[:1])
    (folder / "images" / "0.png").unlink()
    if content is not None:
        (folder / "images" / "0.png").write_bytes(content)
    assert said in page_of(folder).words


def test_huge_picture_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "IMAGE_PIXELS", 64 * 64 - 1)
    folder = write_run(tmp_path / "run", steps=2, samples=SAMPLES[:1])
    assert "the picture is too large to show (64 × 64)" in page_of(folder).words


def test_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path):
    page = page_of(tmp_path)
    for name in ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl"):
        assert f"{name} is missing." in page.words
    assert "No step was logged" in page.words
    assert "no status recorded" in page.words
    assert not page.all("svg")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "running"}, "run.json says running: the run goes on, or was killed"),
        ({"status": "failed", "error": "NonFiniteError: 3 steps"}, "It stopped NonFiniteError: 3 steps"),
        ({"status": "interrupted"}, "interrupted"),
        ({"notes": ["the prompt is run once", "a < b"]}, "Noted while training the prompt is run once a < b"),
        ({"status": 3, "notes": "text", "error": None}, "no status recorded"),
    ],
)
def test_how_the_run_stands_is_said(tmp_path, change, said):
    folder = write_run(tmp_path / "run", steps=0)
    facts = json.loads((folder / "run.json").read_text()) | change
    (folder / "run.json").write_text(json.dumps(facts))
    html = report.write_report(folder).read_text()
    assert said in " ".join(Page(html.replace("</", " </")).words.split())


@pytest.mark.parametrize("steps", [0, 1, 2, 9, 10])
def test_short_runs(tmp_path, steps):
    page = page_of(write_run(tmp_path / "run", steps=steps))
    assert len(page.all("svg")) == (len(curves.PANELS) if steps else 0)
    assert ("No step was logged" in page.words) == (steps == 0)
    assert "NaN" not in page.words


def test_long_runs_stay_small(tmp_path):
    short, long = (write_run(tmp_path / str(n), steps=n, samples=[]) for n in (curves.CURVE_POINTS, 6000))
    sizes = [report.write_report(folder).stat().st_size for folder in (short, long)]
    assert sizes[1] < 1.2 * sizes[0]


def test_a_line_cut_off_by_a_kill_is_left_out_and_said(tmp_path):
    folder = write_run(tmp_path / "run", steps=12)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    page = page_of(folder)
    assert "metrics.jsonl: the last line was cut off" in page.words
    assert report.read_run(folder).steps[-1]["step"] == 12


def test_bad_lines_are_counted(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    (folder / "samples.jsonl").write_text('[1]\n{"id": "a"}\nnull\n\n"x"\n')
    page = page_of(folder)
    assert "samples.jsonl: 3 unreadable lines are left out (line 1, 3, 5)." in page.words
    assert page.words.count("not recorded") == 2


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\xff\xfe", ""])
def test_unreadable_config_and_run(tmp_path, content):
    folder = write_run(tmp_path / "run", steps=2)
    (folder / "run.json").write_text(content)
    (folder / "config.yaml").write_text(content)
    assert "run.json could not be read" in page_of(folder).words


def test_binary_files_do_not_stop_it(tmp_path):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 4)
    assert "No step was logged" in page_of(tmp_path).words


def test_metrics_that_are_not_finite_leave_gaps(tmp_path):
    folder = write_run(tmp_path / "run", steps=0)
    values = [0.7, math.nan, math.inf, None, "x", True, 0.5]
    lines = [{"step": i + 1, "loss": value, "grad_norm": math.nan} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert [attrs["aria-label"] for attrs in page.all("svg")] == ["Loss by step"]
    assert "5 non-finite values left out" in page.words


def test_a_resumed_run_counts_each_step_once(tmp_path):
    folder = write_run(tmp_path / "run", steps=0)
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 9.0), (2, 9.0), (3, 9.0), (2, 0.5), (3, 0.4))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["loss"] for row in report.read_run(folder).steps] == [9.0, 0.5, 0.4]


def test_many_samples_are_cut_and_said(tmp_path):
    rows = [{"id": str(i), "before": "a", "after": "b"} for i in range(report.MAX_SAMPLES + 3)]
    page = page_of(write_run(tmp_path / "run", steps=2, samples=rows))
    assert f"{len(rows)} samples were written; the first {report.MAX_SAMPLES} are shown." in page.words
    assert len(page.all("article")) == report.MAX_SAMPLES


def test_smoothing_is_unbiased_and_passes_over_gaps():
    assert np.allclose(curves.smooth(np.full(100, 3.0)), 3.0, rtol=0, atol=1e-12)
    smoothed = curves.smooth(np.array([np.nan, 2.0, np.nan] + [2.0] * 97))
    assert np.isnan(smoothed[0])
    assert np.allclose(smoothed[1:], 2.0, rtol=0, atol=1e-12)


def test_thinning_keeps_means_extremes_and_gaps():
    values = np.arange(10 * curves.CURVE_POINTS, dtype=np.float64)
    values[:10] = np.nan
    values[15] = np.nan
    assert np.array_equal(curves.thin(values)[1:3], [np.mean([10, 11, 12, 13, 14, 16, 17, 18, 19]), 24.5])
    assert np.isnan(curves.thin(values)[0])
    assert curves.thin(values, np.max)[-1] == values[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (5e-7, "5e−07"),
        (0.69314, "0.693"),
        (-1.14, "−1.14"),
        (1523.4, "1523"),
        (15234, "15.2k"),
        (3.8e6, "3.8M"),
        (999_400.0, "999k"),
        (999_900.0, "1M"),
    ],
)
def test_short_figures(value, text):
    assert curves.short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.25, "9.25 s"), (125, "2 min 05 s"), (5025, "1 h 23 min"), (math.nan, "–")]
)
def test_durations(seconds, text):
    assert curves.duration(seconds) == text


def test_same_folder_gives_the_same_page(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    first = report.write_report(folder).read_bytes()
    assert report.write_report(folder).read_bytes() == first
    assert not list(folder.glob(".report-*"))


def test_matplotlib_keeps_its_settings(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.write_report(write_run(tmp_path / "run", steps=3))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, missing):
    real = report.importlib.import_module

    def absent(name, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(report.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=rf"the report needs {missing}: pip install mmrlhf\[report\]"):
        report.write_report(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="run_folder must be the folder of a training run, got"):
        report.write_report(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=2)
    old = report.write_report(folder).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(folder)
    assert (folder / "report.html").read_bytes() == old
    assert not list(folder.glob(".report-*"))


def test_importing_the_report_imports_no_plotting(subprocess_python):
    heavy = ("matplotlib", "jinja2", "PIL", "transformers", "torch")
    code = f"import sys, mmrlhf.report; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess_python(code).strip() == "[]"


def test_made_up_metrics_bear_the_names_training_writes():
    assert set(metrics(1)[0]) >= {key for panel in curves.PANELS for key in panel.curves}
    assert all(line["step"] == i + 1 for i, line in enumerate(metrics(5)))
