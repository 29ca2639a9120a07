"""The slides obey their rules, and the committed files show what slides.md says."""

import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from pptx import Presentation
from pptx.util import Pt
from pypdf import PdfReader

FOLDER = Path(__file__).parents[2] / "experiments/walkthrough/slides"
FILES = [FOLDER / "slides.pptx", FOLDER / "slides.pdf"]
CHART = FOLDER / "figures/samplers.png"
LARGEST = 5_000_000  # bytes of both files


def load(name):
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"slides_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


deck = load("build")
figures = load("figures")


@pytest.fixture(scope="module")
def slides():
    return deck.read_slides()


@pytest.fixture(scope="module")
def built(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    deck.build(slides, folder)
    return [folder / path.name for path in FILES]


def list_texts(slide):
    """What the audience reads in boxes of text, in order."""
    texts = [slide.title, *map(deck.strip_markup, slide.text), *slide.code]
    return [*texts, *[f"Source: {', '.join(n for n, _ in slide.sources)}"] * bool(slide.sources)]


def list_pictures(slide):
    return [hashlib.sha1(picture.path.read_bytes()).hexdigest() for picture in slide.pictures]


def list_paragraphs(page):
    shapes = [shape for shape in page.shapes if shape.has_text_frame and shape.name != "number"]
    return [p for shape in shapes for p in shape.text_frame.paragraphs if p.text]


def squeeze(text):
    return re.sub(r"\s+", "", text)


def check_pptx(path, slides):
    pages = list(Presentation(path).slides)
    assert len(pages) == len(slides)
    for page, slide in zip(pages, slides, strict=True):
        assert page.shapes.title.text == slide.title
        assert sorted(p.text for p in list_paragraphs(page)) == sorted(list_texts(slide))
        assert page.notes_slide.notes_text_frame.text.split() == slide.notes.split()
        held = [shape for shape in page.shapes if hasattr(shape, "image")]
        found = {shape.image.sha1 for shape in held}
        assert set(list_pictures(slide)) <= found, f"{slide.title}: an older figure"
        assert len(held) == len(slide.pictures) + bool(slide.equation)
        assert all(shape._element.nvPicPr.cNvPr.get("descr") for shape in held)


def check_pdf(path, slides):
    pages = PdfReader(path).pages
    assert len(pages) == len(slides)
    for number, (page, slide) in enumerate(zip(pages, slides, strict=True), start=1):
        found = squeeze(re.sub("[\u2022\x7f]", "", page.extract_text()))  # bullets
        expected = [*list_texts(slide), *[str(number)] * (not slide.cover)]
        assert sorted(found) == sorted(squeeze("".join(expected))), slide.title
        assert all(squeeze(text) in found for text in expected), slide.title


def test_the_source_obeys_the_rules(slides):
    assert deck.find_problems(slides) == []
    assert 18 <= len(slides) <= 30


def test_each_number_is_in_a_page_that_the_slide_cites(slides):
    assert {s.title: n for s in slides if (n := deck.list_unfounded_numbers(s))} == {}


def test_each_cited_page_exists(slides):
    for slide in slides:
        for name, target in slide.sources:
            assert (FOLDER / target).is_file(), target
            assert (FOLDER / target).resolve().is_relative_to((FOLDER.parents[2] / name).resolve())


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("A few words.", "word " * 40, "42 words, at most 40"),
        ("A few words.", "- " + "word " * 30 + "\n- b" * 8, "leaves no place for the figure"),
        (
            "A title",
            "A title that goes on for much longer than one line of a slide",
            "at most 12.1",
        ),
        ("A few words.", "An arrow \u2192.", "Helvetica lacks '\u2192'"),
        ("labels 16 pt", "labels 4 pt", "Labels of 4 pt become"),
        ("labels 16 pt", "16 pt", "this is no figure"),
        ("figures/samplers.png", "figures/nowhere.png", "nowhere.png is missing"),
        ("![A chart]", "![]", "has no text for those who cannot see it"),
        ("Notes: ", "", "no speaker notes"),
        ("Source: ", "From: ", "no source"),
        ("$$ x $$", "$$ " + "x + " * 60 + "x $$", "the equation is"),
        ("## ", "# ", "only the first title"),
    ],
)
def test_a_slide_that_breaks_a_rule_is_refused(before, after, reason, tmp_path):
    text = f"""# Cover

Notes: Spoken.

## A title

A few words.

$$ x $$

![A chart]({CHART} "labels 16 pt")

Source: [experiments/bits_per_dim](../../bits_per_dim/README.md)

Notes: Spoken.
"""
    source = tmp_path / "slides.md"
    source.write_text(text)
    deck.build(deck.read_slides(source), tmp_path)
    head, middle, tail = text.rpartition(before)
    assert middle
    source.write_text(head + after + tail)
    with pytest.raises(deck.DeckError, match=re.escape(reason)):
        deck.build(deck.read_slides(source), tmp_path)


def test_a_grid_of_few_pixels_is_refused(slides, tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "few.png")
    slide = deck.Slide(1, "A title", pictures=[deck.Picture(tmp_path / "few.png", "Few", 10)])
    with pytest.raises(deck.DeckError, match=r"few.png has \d+ pixels per inch"):
        deck.lay_out(slide, 1)


def test_what_does_not_fit_is_refused():
    slide = deck.Slide(1, "A title", text=["- b"] * 10)
    with pytest.raises(deck.DeckError, match=r"the text is \d\.\d inches too high"):
        deck.lay_out(slide, 1)
    slide = deck.Slide(1, "A title", code=["ls"] * 12, pictures=[deck.Picture(CHART, "A", 16)])
    with pytest.raises(deck.DeckError, match="no place for the figure"):
        deck.lay_out(slide, 1)
    slide = deck.Slide(1, "A title", code=["ls " * 30])
    with pytest.raises(deck.DeckError, match=r"a command is \d+\.\d inches wide"):
        deck.lay_out(slide, 1)


def test_an_unfounded_number_stops_the_build(slides, tmp_path):
    changed = deck.Slide(7, "A title", text=["Error 0.12345"], notes="Spoken.")
    changed.sources = [("experiments/bits_per_dim", "../../bits_per_dim/README.md")]
    with pytest.raises(deck.DeckError, match=r"md:7: 'A title': no cited page.*number 0.12345"):
        deck.build([slides[0], changed], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shown", "exact", "same"),
    [
        ("0.0353", "0.035276", True),
        ("0.0354", "0.035276", False),
        ("341", "341.42", True),
        ("3", "3.04", False),
        ("0.4", "0.41", False),
        ("512", "512", True),
        ("0.50", "0.5", False),
    ],
)
def test_a_number_may_be_rounded_but_not_to_one_digit(shown, exact, same):
    assert deck.is_rounded(shown, exact) == same


def test_numbers_are_read_with_their_thousands():
    text = "10 000 steps, 16,384 vectors, 7x7, K=512, 0.24 of 3.89, 14.9 minutes."
    expected = ["10000", "16384", "7", "7", "512", "0.24", "3.89", "14.9"]
    assert deck.list_numbers(text) == expected


def test_the_build_writes_both_files_from_the_source(slides, built):
    check_pptx(built[0], slides)
    check_pdf(built[1], slides)


def test_equal_sources_give_equal_files(slides, built, tmp_path):
    deck.build(slides, tmp_path)
    for path in built:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_committed_files_show_the_source(slides):
    check_pptx(FILES[0], slides)
    check_pdf(FILES[1], slides)
    assert sum(path.stat().st_size for path in FILES) < LARGEST


def test_text_is_large_and_inside_the_slide(slides):
    given = Presentation(FILES[0])
    least = {"title": Pt(32), "text": Pt(22), "code": Pt(22), "source": Pt(12), "number": Pt(12)}
    assert abs(given.slide_width / given.slide_height - 16 / 9) < 1e-3
    for page in given.slides:
        for shape in page.shapes:
            assert min(shape.left, shape.top) >= 0
            assert shape.left + shape.width <= given.slide_width
            assert shape.top + shape.height <= given.slide_height
            for paragraph in shape.text_frame.paragraphs if shape.has_text_frame else ():
                assert all(run.font.size >= least[shape.name] for run in paragraph.runs)


def test_figures_are_those_of_the_script_and_show_todays_tables():
    assert {path.stem for path in figures.FOLDER.iterdir()} == set(figures.DRAWINGS)
    for name, draw in figures.DRAWINGS.items():
        with Image.open(figures.FOLDER / f"{name}.png") as image:
            shown = json.loads(image.text["Description"])
        assert shown == draw()[1], f"{name}.png is older than its page: run build.py"


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pptx", None)
    with pytest.raises(SystemExit, match=r"pptx is missing: run `uv sync`, or `pip install"):
        load("build")
