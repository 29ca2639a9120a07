"""Build slides.pptx and slides.pdf from slides.md.

uv run python experiments/walkthrough/slides/build.py

Both files come from one layout: a list of texts and pictures with their places in inches. Text is
measured in Helvetica, whose widths equal those of Arial, so that lines break alike in both. The
format of slides.md is described in experiments/walkthrough/README.md.
"""

import io
import re
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

try:
    from PIL import Image
    from pptx import Presentation
    from pptx.dml.color import RGBColor
    from pptx.enum.shapes import MSO_SHAPE
    from pptx.enum.text import MSO_ANCHOR, PP_ALIGN
    from pptx.oxml.ns import qn
    from pptx.oxml.xmlchemy import OxmlElement
    from pptx.util import Inches, Pt
    from reportlab.lib.colors import HexColor
    from reportlab.lib.enums import TA_RIGHT
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.lib.utils import ImageReader
    from reportlab.pdfbase.pdfmetrics import stringWidth
    from reportlab.pdfgen.canvas import Canvas
    from reportlab.platypus import Paragraph
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing: run `uv sync`, or `pip install python-pptx reportlab`.")

HERE = Path(__file__).parent
SOURCE = HERE / "slides.md"
STUDIES = HERE.parents[1]

MOST_WORDS = 40  # of title, text and commands
TITLE, CODE, COVER, FOOT = 36, 24, 54, 13  # points
BODY, BESIDE, ALONE = 26, 28, 30  # points of text above a figure, beside it, and without one
EQUATION = 30
LEAST_LABEL = 12  # points, of a figure's labels as they are shown
STUDY_LABEL = 10  # points, matplotlib's default
LEAST_FIGURE = 1.5  # inches of height
LEAST_DENSITY = 50  # pixels of a picture per inch of the slide
WIDTH, HEIGHT, MARGIN = 13.333, 7.5, 0.6  # inches
TOP, BOTTOM = 1.55, 6.8  # of the part between title and foot
COLUMN, GAP = 4.3, 0.5
MARK = (MARGIN, 0.42, 0.9, 0.08)  # left, top, width and height of the bar above a title
LEADING = 1.2
DARK, GREY, ACCENT = "1f2933", "616e7c", "0b6e99"


class DeckError(ValueError):
    """A rule that slides.md breaks, with one line for each place."""


@dataclass
class Picture:
    """Figure of a slide.

    Args:
        path: File.
        alt: Text for readers who do not see it.
        labels: Points of its smallest labels, as drawn.
    """

    path: Path
    alt: str
    labels: float


@dataclass
class Slide:
    """A section of slides.md.

    Args:
        line: Line of the title in slides.md.
        title: Title.
        cover: Whether the title is that of the whole deck.
        text: Paragraphs; those of a list begin with "- ".
        equation: Formula in matplotlib's mathtext, or nothing.
        pictures: Figures.
        code: Commands.
        sources: Name and target of each cited page.
        notes: What the speaker says.
    """

    line: int
    title: str
    cover: bool = False
    text: list[str] = field(default_factory=list)
    equation: str = ""
    pictures: list[Picture] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    sources: list[tuple[str, str]] = field(default_factory=list)
    notes: str = ""


# Reading


def read_slides(source: Path = SOURCE) -> list[Slide]:
    """Read the slides of a Markdown file.

    Raises:
        DeckError: If the file does not begin with a title, or if the line of a figure is wrong.
    """
    slides: list[Slide] = []
    blocks = split_blocks(source.read_text())
    for line, block in blocks:
        if heading := re.fullmatch(r"(##?) (.+)", block):
            slides.append(Slide(line, heading[2], cover=heading[1] == "#"))
        elif not slides:
            raise DeckError(f"{source.name}:{line}: the first line must be a title, `# Title`.")
        else:
            read_block(slides[-1], block, source.parent)
    return slides


def split_blocks(text: str) -> list[tuple[int, str]]:
    """Split text at empty lines outside code; return each block with the number of its line."""
    blocks: list[tuple[int, str]] = []
    code = False
    open_block = False
    for number, line in enumerate(text.splitlines(), start=1):
        starts = line.startswith("```")
        if not line.strip() and not code:
            open_block = False
        elif open_block:
            blocks[-1] = (blocks[-1][0], f"{blocks[-1][1]}\n{line}")
        else:
            blocks.append((number, line))
            open_block = True
        code ^= starts
    return blocks


def read_block(slide: Slide, block: str, folder: Path) -> None:
    """Add a block to a slide."""
    if slide.notes:
        slide.notes += "\n\n" + " ".join(block.split())
    elif block.startswith("Notes: "):
        slide.notes = " ".join(block.removeprefix("Notes: ").split())
    elif block.startswith("Source: "):
        slide.sources = re.findall(r"\[([^]]+)\]\(([^)]+)\)", block)
    elif block.startswith("```"):
        slide.code += block.splitlines()[1:-1]
    elif block.startswith("$$"):
        slide.equation = block.strip("$ \n")
    elif block.startswith("!["):
        pattern = r'!\[([^]]*)\]\(([^\s)]+)(?: "labels ([\d.]+) pt")?\)'
        if rest := re.sub(pattern, "", block).strip():
            raise DeckError(f"'{slide.title}': this is no figure: {rest}")
        for alt, path, labels in re.findall(pattern, block):
            slide.pictures.append(Picture(folder / path, alt, float(labels or STUDY_LABEL)))
    elif block.startswith("- "):
        slide.text += ["- " + join_lines(item) for item in block[2:].split("\n- ")]
    else:
        slide.text.append(join_lines(block))


def join_lines(block: str) -> str:
    """Return a block on one line, with percent signs that stay at their numbers."""
    return re.sub(r"(?<=\d) %", "\u00a0%", " ".join(block.split()))


def strip_markup(text: str) -> str:
    """Return text without the marks of bold and of a list."""
    return strip_bullet(text).replace("**", "")


def strip_bullet(text: str) -> str:
    """Return the text of a paragraph without the mark of a list."""
    return text.removeprefix("- ")


def count_words(slide: Slide) -> int:
    """Count the words that the audience reads, without the source."""
    return len(" ".join([slide.title, *map(strip_markup, slide.text), *slide.code]).split())


# Rules


def find_problems(slides: list[Slide]) -> list[str]:
    """Return what breaks a rule, one line for each place."""
    problems = []
    for slide in slides:
        for problem in find_slide_problems(slide):
            problems.append(f"{SOURCE.name}:{slide.line}: '{slide.title}': {problem}")
    if not slides or [slide.cover for slide in slides] != [True] + [False] * (len(slides) - 1):
        problems.append(f"{SOURCE.name}: only the first title must begin with a single #.")
    return problems


def find_slide_problems(slide: Slide) -> list[str]:
    """Return what breaks a rule on one slide."""
    problems = []
    if (words := count_words(slide)) > MOST_WORDS:
        problems.append(f"{words} words, at most {MOST_WORDS}. Move some to the notes.")
    if not slide.notes:
        problems.append("no speaker notes. Add a paragraph `Notes: ...`.")
    if not slide.sources and not slide.cover:
        problems.append("no source. Add a line `Source: [study](../../study/README.md)`.")
    for text in (slide.title, *slide.text, *slide.code, *[name for name, _ in slide.sources]):
        missing = [c for c in text if not c.encode("cp1252", "ignore")]
        if missing:
            problems.append(f"Helvetica lacks {missing[0]!r}. Write it in an equation or a figure.")
    for picture in slide.pictures:
        if not picture.path.is_file():
            problems.append(f"figure {picture.path} is missing.")
        if not picture.alt:
            problems.append(f"figure {picture.path.name} has no text for those who cannot see it.")
    if problems:
        return problems
    try:
        lay_out(slide, 1)
    except DeckError as error:
        problems += str(error).splitlines()
    return problems


def list_unfounded_numbers(slide: Slide) -> list[str]:
    """Return the numbers of a slide and its notes that no cited page or table has.

    A number may be rounded from one with more decimals.
    """
    known: set[str] = set()
    for _, target in slide.sources:
        page = (HERE / target).resolve()
        if STUDIES in page.parents:
            known.update(list_numbers(page.read_text()))
    alt = [picture.alt for picture in slide.pictures]
    shown = list_numbers(" ".join([slide.title, *slide.text, *alt, slide.notes]))
    return [number for number in shown if not any(is_rounded(number, one) for one in known)]


def list_numbers(text: str) -> list[str]:
    """Return the numbers in a text as written, without the spaces or commas between thousands."""
    found = re.findall(r"(?<![\w.])\d{1,3}(?:[ ,]\d{3})+(?!\d)|\d+(?:\.\d+)?", text)
    return [re.sub(r"[ ,]", "", number) for number in found]


def is_rounded(number: str, exact: str) -> bool:
    """Return whether `number` is `exact`, or `exact` with fewer decimals and two digits left."""
    if number == exact:
        return True
    decimals = len(number.partition(".")[2])
    significant = len(number.replace(".", "").lstrip("0"))
    fewer = decimals < len(exact.partition(".")[2])
    return fewer and significant >= 2 and f"{float(exact):.{decimals}f}" == number


# Layout


@dataclass
class Box:
    """Something at a place of a slide, in inches from the upper left.

    Args:
        left: Left edge.
        top: Upper edge.
        width: Width.
        height: Height.
        texts: Paragraphs, or nothing for a picture.
        points: Size of the text.
        role: "title", "text", "code", "source" or "number"; "picture" or "equation".
        picture: Bytes of a picture.
        alt: Text for readers who do not see the picture.
    """

    left: float
    top: float
    width: float
    height: float
    texts: list[str] = field(default_factory=list)
    points: float = BODY
    role: str = "text"
    picture: bytes = b""
    alt: str = ""


def style(box: Box) -> ParagraphStyle:
    """Return how the PDF sets a box's paragraphs."""
    bold = box.role == "title"
    fonts = {"code": "Courier"}
    return ParagraphStyle(
        box.role,
        fontName="Helvetica-Bold" if bold else fonts.get(box.role, "Helvetica"),
        fontSize=box.points,
        leading=LEADING * box.points,
        textColor=HexColor(f"#{GREY if box.role in ('source', 'number') else DARK}"),
        alignment=TA_RIGHT if box.role == "number" else 0,
        spaceAfter=0.5 * box.points if box.role == "text" else 0,
    )


def make_paragraphs(box: Box) -> list[Paragraph]:
    """Return a box's paragraphs for the PDF, with bold text in the accent colour."""
    paragraphs = []
    for text in box.texts:
        marked = escape(strip_bullet(text))
        marked = re.sub(r"\*\*(.+?)\*\*", rf'<font color="#{ACCENT}"><b>\1</b></font>', marked)
        look = style(box)
        if text.startswith("- "):
            look.leftIndent = 0.9 * box.points
            look.bulletFontSize = box.points
            paragraphs.append(Paragraph(marked, look, bulletText="\u2022"))
        elif box.role == "code":
            paragraphs.append(Paragraph(marked.replace(" ", "\u00a0"), look))
        else:
            paragraphs.append(Paragraph(marked, look))
    return paragraphs


def measure(box: Box) -> float:
    """Return the height in inches that a box's paragraphs need."""
    heights = [p.wrap(72 * box.width, 1e6)[1] + p.getSpaceAfter() for p in make_paragraphs(box)]
    last = 0.5 * box.points if box.role == "text" and heights else 0
    return (sum(heights) - last) / 72


def lay_out(slide: Slide, number: int) -> list[Box]:
    """Place everything on a slide.

    The figures stand below or beside the text, wherever they are larger.

    Raises:
        DeckError: If something does not fit, or if a figure would be too small to read.
    """
    inside = WIDTH - 2 * MARGIN
    if slide.cover:
        return lay_out_cover(slide)
    boxes = [place_title(slide)]
    top = TOP
    if slide.equation:
        box = place_equation(slide.equation, inside)
        box.left, box.top = MARGIN, top
        top += box.height + 0.3
        boxes.append(box)
    if slide.code:
        box = Box(MARGIN, top, inside, 0, slide.code, CODE, "code")
        widest = max(stringWidth(line, "Courier", CODE) for line in slide.code) / 72
        if widest > inside:
            raise DeckError(f"a command is {widest:.1f} inches wide, at most {inside:.1f}.")
        box.height = measure(box)
        top += box.height + 0.35
        boxes.append(box)
    boxes += place_text_and_pictures(slide, top)
    boxes += place_foot(slide, number)
    for box in boxes:
        if box.role not in ("source", "number") and box.top + box.height > BOTTOM + 0.01:
            over = box.top + box.height - BOTTOM
            raise DeckError(f"the {box.role} is {over:.1f} inches too high. Shorten it.")
    return boxes


def lay_out_cover(slide: Slide) -> list[Box]:
    """Place the title, its text and one square picture."""
    side = HEIGHT - 2 * MARGIN
    width = WIDTH - 2 * MARGIN - GAP - side if slide.pictures else WIDTH - 2 * MARGIN
    title = Box(MARGIN, 1.6, width, 0, [slide.title], COVER, "title")
    title.height = measure(title)
    text = Box(MARGIN, title.top + title.height + 0.4, width, 0, slide.text, BESIDE)
    text.height = measure(text)
    if text.top + text.height > BOTTOM:
        raise DeckError("title and text do not fit. Shorten them.")
    zone = (WIDTH - MARGIN - side, MARGIN, side, side)
    return [title, text, *place_pictures(slide.pictures, zone), *place_foot(slide, 1)]


def place_title(slide: Slide) -> Box:
    """Place the title on one line.

    Raises:
        DeckError: If it needs two.
    """
    box = Box(MARGIN, 0.62, WIDTH - 2 * MARGIN, LEADING * TITLE / 72, [slide.title], TITLE, "title")
    width = stringWidth(slide.title, "Helvetica-Bold", TITLE) / 72
    if width > box.width:
        raise DeckError(f"the title is {width:.1f} inches wide, at most {box.width:.1f}.")
    return box


def place_equation(formula: str, width: float) -> Box:
    """Draw a formula at its natural size.

    Raises:
        DeckError: If it is wider than the slide.
    """
    from matplotlib import mathtext
    from matplotlib.font_manager import FontProperties

    buffer = io.BytesIO()
    look = FontProperties(size=EQUATION, math_fontfamily="cm")
    dpi = 288
    mathtext.math_to_image(f"${formula}$", buffer, prop=look, dpi=dpi, color=f"#{DARK}")
    with Image.open(buffer) as image:
        size = image.width / dpi, image.height / dpi
    if size[0] > width:
        raise DeckError(f"the equation is {size[0]:.1f} inches wide, at most {width:.1f}.")
    return Box(0, 0, *size, role="equation", picture=buffer.getvalue(), alt=formula)


def place_text_and_pictures(slide: Slide, top: float) -> list[Box]:
    """Place text and figures in the lower part of a slide."""
    inside = WIDTH - 2 * MARGIN
    wide = Box(MARGIN, top, inside, 0, slide.text, BODY if slide.pictures else ALONE)
    wide.height = measure(wide)
    if not slide.pictures:
        return [wide] if slide.text else []
    below = top + wide.height + 0.25 if slide.text else top
    zone_below = (MARGIN, below, inside, BOTTOM - below)
    if not slide.text:
        return place_pictures(slide.pictures, zone_below)
    narrow = Box(MARGIN, top, COLUMN, 0, slide.text, BESIDE)
    narrow.height = measure(narrow)
    zone_beside = (MARGIN + COLUMN + GAP, top, inside - COLUMN - GAP, BOTTOM - top)
    choices = [(narrow, zone_beside), (wide, zone_below)]
    fitting = [
        (box, zone)
        for box, zone in choices
        if zone[3] > LEAST_FIGURE and box.top + box.height <= BOTTOM
    ]
    if not fitting:
        raise DeckError("the text leaves no place for the figure. Shorten it.")
    area = {id(box): measure_pictures(slide.pictures, zone)[0] for box, zone in fitting}
    text, zone = max(fitting, key=lambda choice: area[id(choice[0])])
    return [text, *place_pictures(slide.pictures, zone)]


Zone = tuple[float, float, float, float]


def measure_pictures(pictures: list[Picture], zone: Zone) -> tuple[float, list[Zone]]:
    """Return the area and places of pictures in a row or a column, whichever is larger."""
    left, top, width, height = zone
    shapes = [read_size(picture)[0] / read_size(picture)[1] for picture in pictures]
    gaps = 0.3 * (len(pictures) - 1)
    tall = min(height, (width - gaps) / sum(shapes))
    across = min(width, (height - gaps) / sum(1 / shape for shape in shapes))
    in_row = sum(tall * tall * shape for shape in shapes)
    in_column = sum(across * across / shape for shape in shapes)
    places = []
    if in_row >= in_column:
        x = left + (width - gaps - tall * sum(shapes)) / 2
        for shape in shapes:
            places.append((x, top + (height - tall) / 2, tall * shape, tall))
            x += tall * shape + 0.3
    else:
        y = top + (height - gaps - across * sum(1 / shape for shape in shapes)) / 2
        for shape in shapes:
            places.append((left + (width - across) / 2, y, across, across / shape))
            y += across / shape + 0.3
    return max(in_row, in_column), places


def read_size(picture: Picture) -> tuple[int, int]:
    """Return width and height in pixels."""
    with Image.open(picture.path) as image:
        return image.size


def place_pictures(pictures: list[Picture], zone: Zone) -> list[Box]:
    """Place pictures in the middle of a zone.

    Raises:
        DeckError: If the zone is too low, if one has too few pixels, or if labels were too small.
    """
    if not pictures:
        return []
    if zone[3] < LEAST_FIGURE:
        raise DeckError("the rest leaves no place for the figure. Shorten it.")
    boxes = []
    for picture, place in zip(pictures, measure_pictures(pictures, zone)[1], strict=True):
        with Image.open(picture.path) as image:
            drawn = image.width / image.info["dpi"][0] if "dpi" in image.info else None
            density = image.width / place[2]
        name = picture.path.name
        if density < LEAST_DENSITY:
            raise DeckError(f"{name} has {density:.0f} pixels per inch, at least {LEAST_DENSITY}.")
        # Without a resolution, the file is a grid of images and has no labels.
        if drawn and (shown := picture.labels * place[2] / drawn) < LEAST_LABEL:
            raise DeckError(
                f"{name} is drawn {drawn:.1f} inches wide and shown at {place[2]:.1f}. Labels of "
                f"{picture.labels:g} pt become {shown:.0f} pt, at least {LEAST_LABEL}. Draw "
                f'larger labels, and state their size: ![...]({name} "labels 16 pt").'
            )
        content = picture.path.read_bytes()
        boxes.append(Box(*place, role="picture", picture=content, alt=picture.alt))
    return boxes


def place_foot(slide: Slide, number: int) -> list[Box]:
    """Place the source and the number of a slide."""
    height = LEADING * FOOT / 72
    names = ", ".join(name for name, _ in slide.sources)
    boxes = []
    if names:
        boxes.append(Box(MARGIN, 6.98, 10.5, height, [f"Source: {names}"], FOOT, "source"))
    if not slide.cover:
        boxes.append(Box(WIDTH - MARGIN - 1, 6.98, 1, height, [str(number)], FOOT, "number"))
    return boxes


# Writing


def write_pptx(slides: list[Slide], target: Path) -> None:
    """Write slides with editable text and notes."""
    deck = Presentation()
    deck.slide_width, deck.slide_height = Inches(WIDTH), Inches(HEIGHT)
    deck.core_properties.title = slides[0].title
    deck.core_properties.author = deck.core_properties.last_modified_by = "vqvae_lightning"
    deck.core_properties.comments = ""
    layout = next(one for one in deck.slide_layouts if one.name == "Title Only")
    for number, slide in enumerate(slides, start=1):
        page = deck.slides.add_slide(layout)
        if not slide.cover:
            add_mark(page)
        for box in lay_out(slide, number):
            place = [Inches(value) for value in (box.left, box.top, box.width, box.height)]
            if box.picture:
                shape = page.shapes.add_picture(io.BytesIO(box.picture), *place)
                shape._element.nvPicPr.cNvPr.set("descr", box.alt)
                continue
            if box.role == "title":
                shape = page.shapes.title
                shape.left, shape.top, shape.width, shape.height = place
            else:
                shape = page.shapes.add_textbox(*place)
            shape.name = box.role
            write_frame(shape.text_frame, box)
        page.notes_slide.notes_text_frame.text = slide.notes
    buffer = io.BytesIO()
    deck.save(buffer)
    with zipfile.ZipFile(buffer) as given, zipfile.ZipFile(target, "w") as fixed:
        for name in given.namelist():  # without the time of the build
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            fixed.writestr(entry, given.read(name), zipfile.ZIP_DEFLATED)


def add_mark(page) -> None:
    """Add the short bar above a title."""
    place = [Inches(value) for value in MARK]
    mark = page.shapes.add_shape(MSO_SHAPE.RECTANGLE, *place)
    mark.fill.solid()
    mark.fill.fore_color.rgb = RGBColor.from_string(ACCENT.upper())
    mark.line.fill.background()
    mark._element.remove(mark._element.find(qn("p:style")))  # it would add a shadow
    mark.name = "mark"


def write_frame(frame, box: Box) -> None:
    """Write a box's paragraphs into a text frame, as the PDF sets them."""
    frame.word_wrap = box.role != "code"
    frame.auto_size = None
    frame.vertical_anchor = MSO_ANCHOR.TOP
    frame.margin_left = frame.margin_right = frame.margin_top = frame.margin_bottom = 0
    colour = GREY if box.role in ("source", "number") else DARK
    for number, text in enumerate(box.texts):
        paragraph = frame.paragraphs[0] if number == 0 else frame.add_paragraph()
        paragraph.alignment = PP_ALIGN.RIGHT if box.role == "number" else PP_ALIGN.LEFT
        paragraph.line_spacing = Pt(LEADING * box.points)
        paragraph.space_before = Pt(0)
        paragraph.space_after = Pt(0.5 * box.points if box.role == "text" else 0)
        if text.startswith("- "):
            set_bullet(paragraph, box.points)
        for part, piece in enumerate(strip_bullet(text).split("**")):
            if piece:
                run = paragraph.add_run()
                run.text = piece
                run.font.size = Pt(box.points)
                run.font.name = "Courier New" if box.role == "code" else "Arial"
                run.font.bold = box.role == "title" or part % 2 == 1
                rgb = ACCENT if part % 2 else colour
                run.font.color.rgb = RGBColor.from_string(rgb.upper())


def set_bullet(paragraph, points: float) -> None:
    """Give a paragraph a bullet and a hanging indent."""
    properties = paragraph._p.get_or_add_pPr()
    indent = str(int(Pt(0.9 * points)))
    properties.set("marL", indent)
    properties.set("indent", f"-{indent}")
    bullet = OxmlElement("a:buChar")
    bullet.set("char", "\u2022")
    properties.append(bullet)


def write_pdf(slides: list[Slide], target: Path) -> None:
    """Write the same slides without their notes."""
    canvas = Canvas(str(target), pagesize=(72 * WIDTH, 72 * HEIGHT), invariant=1)
    canvas.setTitle(slides[0].title)
    canvas.setAuthor("vqvae_lightning")
    for number, slide in enumerate(slides, start=1):
        if not slide.cover:
            canvas.setFillColor(HexColor(f"#{ACCENT}"))
            left, top, width, height = MARK
            place = [72 * v for v in (left, HEIGHT - top - height, width, height)]
            canvas.rect(*place, stroke=0, fill=1)
        for box in lay_out(slide, number):
            if box.picture:
                picture = ImageReader(io.BytesIO(box.picture))
                low = HEIGHT - box.top - box.height
                place = [72 * value for value in (box.left, low, box.width, box.height)]
                canvas.drawImage(picture, *place, mask="auto")
            y = 72 * (HEIGHT - box.top)
            for paragraph in make_paragraphs(box):
                y -= paragraph.wrap(72 * box.width, 1e6)[1]
                paragraph.drawOn(canvas, 72 * box.left, y)
                y -= paragraph.getSpaceAfter()
        canvas.bookmarkPage(str(number))
        canvas.addOutlineEntry(slide.title, str(number))
        canvas.showPage()
    canvas.save()


def build(slides: list[Slide], folder: Path) -> None:
    """Write both files to `folder`.

    Raises:
        DeckError: If a slide breaks a rule.
    """
    problems = find_problems(slides)
    for slide in slides:
        for number in list_unfounded_numbers(slide):
            place = f"{SOURCE.name}:{slide.line}: '{slide.title}'"
            problems.append(f"{place}: no cited page of experiments has the number {number}.")
    if problems:
        raise DeckError("\n".join(problems))
    write_pptx(slides, folder / "slides.pptx")
    write_pdf(slides, folder / "slides.pdf")


def main() -> None:
    """Draw the figures, check the source and write both files."""
    from figures import draw_figures

    draw_figures()
    slides = read_slides()
    build(slides, HERE)
    for path in (HERE / "slides.pptx", HERE / "slides.pdf"):
        print(f"{path}: {len(slides)} slides, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # a rule, a page that is missing, or a table that is
        sys.exit(str(error))
