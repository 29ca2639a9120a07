"""Draw the deck's own figures into figures/: diagrams, and charts of the studies.

uv run python experiments/walkthrough/slides/figures.py

The charts read their numbers from the tables of the studies' pages. The file of a chart stores the
cells that it shows, so that a test notices a chart that is older than its page.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle
from PIL import Image

HERE = Path(__file__).parent
STUDIES = HERE.parents[1]
FOLDER = HERE / "figures"

ACCENT, DARK, GREY, LIGHT, PALE = "#0b6e99", "#1f2933", "#7b8794", "#cbd2d9", "#e3f1f7"
SMALL, NORMAL, LARGE = 18, 20, 24  # points, at the size at which a slide shows the figure
DPI = 144
SEED = 4
TEST_IMAGE, SAMPLE = (0, 1), (1, 0)  # row and column in the pictures of the bundled study
ROWS = np.linspace(0.02, 0.95, 6)  # a codebook of six rows with one number each, for the diagrams

Cells = dict[str, Any]
DRAWINGS: dict[str, Callable[[], tuple[Figure, Cells]]] = {}


def drawing(function: Callable[[], tuple[Figure, Cells]]) -> Callable[[], tuple[Figure, Cells]]:
    """Register a function that returns a figure and the cells of the tables that it shows."""
    DRAWINGS[function.__name__.removeprefix("draw_")] = function
    return function


def draw_figures(folder: Path = FOLDER) -> None:
    """Write each figure to `folder`."""
    folder.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        figure, cells = draw()
        text = {"Software": None, "Description": json.dumps(cells)}
        figure.savefig(folder / f"{name}.png", dpi=DPI, metadata=text)


# Tables of the studies


def read_table(page: Path, *columns: str) -> list[dict[str, str]]:
    """Return the rows of the first table of `page` that has `columns`, without their markup.

    Raises:
        ValueError: If no table has the columns.
    """
    lines = page.read_text().splitlines()
    for start, line in enumerate(lines):
        header = split_row(line)
        if header and set(columns) <= set(header):
            rows = []
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append(dict(zip(header, split_row(row), strict=True)))
            return rows
    raise ValueError(f"{page}: no table has the columns {', '.join(columns)}.")


def split_row(line: str) -> list[str]:
    """Return the cells of a table's line, or nothing for another line."""
    if not line.startswith("|"):
        return []
    return [re.sub(r"[*`]", "", cell).strip() for cell in line.strip()[1:-1].split("|")]


def read_number(cell: str) -> float:
    """Return the first number of a cell."""
    found = re.search(r"\d+(?:\.\d+)?", cell)
    if found is None:
        raise ValueError(f"The cell '{cell}' has no number.")
    return float(found.group())


# Parts of figures


def make_canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of that size in inches, with one unit per inch and no axes."""
    figure = Figure((width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, size: float = NORMAL, **options: Any) -> None:
    """Write centred text."""
    options = {"ha": "center", "va": "center", "color": DARK, **options}
    axes.text(x, y, text, fontsize=size, **options)


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], **options: Any
) -> None:
    """Draw an arrow between two points."""
    options = {"color": GREY, "linewidth": 2.5, "mutation_scale": 22, **options}
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", shrinkA=0, shrinkB=0, **options))


def draw_network(
    axes: Axes, x: float, y: float, name: str, width: float = 1.5, narrows: bool = True
) -> None:
    """Draw a trapezoid that narrows to the right (encoder) or to the left (decoder)."""
    tall, short = 1.15, 0.6
    left, right = (tall, short) if narrows else (short, tall)
    corners = [(x, y - left), (x, y + left), (x + width, y + right), (x + width, y - right)]
    axes.add_patch(Polygon(corners, closed=True, facecolor=DARK, edgecolor="none"))
    write(axes, x + width / 2, y, name, color="white", weight="bold", size=SMALL)


def draw_box(
    axes: Axes, x: float, y: float, width: float, height: float, name: str, **options: Any
) -> None:
    """Draw a filled box around a centre, with its name."""
    options = {"facecolor": DARK, "edgecolor": "none", **options}
    axes.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, **options))
    write(axes, x, y, name, color="white", weight="bold", size=SMALL)


def draw_picture(axes: Axes, x: float, y: float, side: float, pixels: np.ndarray) -> None:
    """Draw grey pixels as a square around a centre."""
    half = side / 2
    limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
    extent = (x - half, x + half, y - half, y + half)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent, zorder=2)
    axes.set(**limits, aspect="auto")  # a picture changes both


def draw_cells(
    axes: Axes,
    x: float,
    y: float,
    cell: float,
    colours: np.ndarray,
    names: np.ndarray | None = None,
    size: float = SMALL,
) -> None:
    """Draw a grid of coloured cells around a centre, with an optional name in each."""
    rows, columns = colours.shape
    left, top = x - columns * cell / 2, y + rows * cell / 2
    for (row, column), colour in np.ndenumerate(colours):
        corner = left + column * cell, top - (row + 1) * cell
        patch = Rectangle(corner, cell, cell, facecolor=colour, edgecolor="white", linewidth=1.5)
        axes.add_patch(patch)
        if names is not None:
            centre = corner[0] + cell / 2, corner[1] + cell / 2
            ink = "white" if str(names[row, column]) in "45" else DARK
            write(axes, *centre, str(names[row, column]), size=size, color=ink)


def cut_picture(name: str, row: int, column: int) -> np.ndarray:
    """Return one 28x28 image from a picture of the bundled study, which doubles pixels."""
    with Image.open(STUDIES / "bundled_data" / name) as picture:
        pixels = np.asarray(picture.convert("L"))
    top, left = 2 + 58 * row, 2 + 58 * column
    return pixels[top : top + 56 : 2, left : left + 56 : 2]


def imitate_encoder(pixels: np.ndarray) -> np.ndarray:
    """Return a number in [0, 1] for each of 7x7 patches, which stands for the encoder's vector.

    It is the mean of the patch, with noise, so that vectors differ from the rows of the codebook.
    """
    noise = np.random.default_rng(SEED).normal(0, 0.05, (7, 7))
    return (pixels.reshape(7, 4, 7, 4).mean((1, 3)) / 255 + noise).clip(0, 1)


def choose_codes(values: np.ndarray) -> np.ndarray:
    """Return the nearest of the rows for each value."""
    return np.abs(values[..., None] - ROWS).argmin(-1)


def shade(values: np.ndarray) -> np.ndarray:
    """Return a colour from pale to the accent for each value in [0, 1]."""
    low, high = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (PALE, ACCENT))
    mixed = (low + (high - low) * np.asarray(values)[..., None]).astype(int)
    return np.apply_along_axis(lambda c: "#{:02x}{:02x}{:02x}".format(*c), -1, mixed)


# Diagrams


@drawing
def draw_pixels() -> tuple[Figure, Cells]:
    """An image next to the numbers of a part of it."""
    figure, axes = make_canvas(7.2, 3.7)
    pixels = cut_picture("reconstructions.png", *TEST_IMAGE)
    draw_picture(axes, 1.8, 1.85, 3.3, pixels)
    row, column, side = 6, 8, 5
    part = pixels[row : row + side, column : column + side]
    cell = 3.3 / 28
    left, top = 0.15 + column * cell, 3.5 - row * cell
    box = {"fill": False, "edgecolor": ACCENT, "linewidth": 3, "zorder": 3}
    axes.add_patch(Rectangle((left, top - side * cell), side * cell, side * cell, **box))
    big = 0.64
    corner = 3.9
    for (i, j), level in np.ndenumerate(part):
        place = corner + j * big, 3.45 - (i + 1) * big
        axes.add_patch(Rectangle(place, big, big, facecolor=str(level / 255), edgecolor=LIGHT))
        ink = "black" if level > 110 else "white"
        write(axes, place[0] + big / 2, place[1] + big / 2, str(level), color=ink, size=16)
    axes.add_patch(Rectangle((corner, 3.45 - side * big), side * big, side * big, **box))
    for end in (3.45, 3.45 - side * big):
        start = top if end == 3.45 else top - side * cell
        axes.plot([left + side * cell, corner], [start, end], color=ACCENT, linewidth=1.5, zorder=3)
    return figure, {}


@drawing
def draw_stages() -> tuple[Figure, Cells]:
    """Stage 1 describes images by codes; stage 2 writes new codes for the decoder."""
    figure, axes = make_canvas(12.1, 4.9)
    image, copy, sample = (
        cut_picture("reconstructions.png", *TEST_IMAGE),
        cut_picture("reconstructions.png", TEST_IMAGE[0] + 1, TEST_IMAGE[1]),
        cut_picture("samples.png", *SAMPLE),
    )
    for y, pixels, out in ((3.75, image, copy), (1.25, sample, sample)):
        codes = choose_codes(imitate_encoder(pixels))
        draw_cells(axes, 6.55, y, 0.29, shade(ROWS)[codes])
        draw_arrow(axes, (5.05, y), (5.5, y))
        draw_arrow(axes, (7.62, y), (8.07, y))
        draw_network(axes, 8.15, y, "decoder", narrows=False)
        draw_arrow(axes, (9.72, y), (10.17, y))
        draw_picture(axes, 11.15, y, 1.9, out)
    for y, number in ((3.75, "1"), (1.25, "2")):
        write(axes, 0.35, y, number, size=44, color=ACCENT, weight="bold")
    draw_picture(axes, 1.95, 3.75, 1.9, image)
    draw_arrow(axes, (2.97, 3.75), (3.42, 3.75))
    draw_network(axes, 3.5, 3.75, "encoder")
    draw_box(axes, 4.25, 1.25, 1.5, 1.2, "prior", facecolor=ACCENT)
    write(axes, 2.3, 1.25, "class", size=LARGE)
    draw_arrow(axes, (2.97, 1.25), (3.42, 1.25))
    axes.plot([0.1, 12.0], [2.5, 2.5], color=LIGHT, linewidth=1.5)
    return figure, {}


@drawing
def draw_model() -> tuple[Figure, Cells]:
    """The whole model, from the image to its reconstruction, with the codebook and the prior."""
    figure, axes = make_canvas(11.8, 4.6)
    y = 3.1
    image = cut_picture("reconstructions.png", *TEST_IMAGE)
    copy = cut_picture("reconstructions.png", TEST_IMAGE[0] + 1, TEST_IMAGE[1])
    vectors = imitate_encoder(image)
    codes = choose_codes(vectors)
    draw_picture(axes, 0.72, y, 1.34, image)
    draw_network(axes, 1.85, y, "encoder", width=1.25)
    draw_cells(axes, 4.52, y, 0.28, shade(vectors))
    draw_cells(axes, 7.28, y, 0.28, shade(ROWS)[codes], codes, size=15)
    draw_network(axes, 8.72, y, "decoder", width=1.25, narrows=False)
    draw_picture(axes, 11.08, y, 1.34, copy)
    for x in (1.43, 3.14, 8.3, 10.0):
        draw_arrow(axes, (x, y), (x + 0.38, y))
    draw_arrow(axes, (5.55, y), (6.25, y), color=ACCENT, linewidth=4)
    names = {0.72: "image", 4.52: "vectors", 7.28: "codes", 11.08: "rebuilt"}
    for x, name in names.items():
        write(axes, x, 4.35, name)
    height = 0.28
    for row, colour in enumerate(shade(ROWS)):
        bottom = 1.75 - (row + 1) * height
        patch = Rectangle((5.15, bottom), 1.5, height, facecolor=colour, edgecolor="white")
        axes.add_patch(patch)
        write(axes, 4.95, bottom + height / 2, str(row), size=16)
    write(axes, 3.85, 0.91, "codebook")
    draw_arrow(axes, (5.9, 1.8), (5.9, 2.95), color=ACCENT, linewidth=4)
    draw_box(axes, 7.8, 0.91, 1.3, 0.9, "prior", facecolor=ACCENT)
    draw_arrow(axes, (7.8, 2.08), (7.8, 1.4))
    return figure, {}


def draw_regions(axes: Axes, rows: np.ndarray) -> None:
    """Draw the border of each row's region."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    x, y = np.meshgrid(np.linspace(left, right, 120), np.linspace(low, high, 120))
    places = np.stack([x, y], -1)
    distances = np.sqrt(((places[None] - rows[:, None, None]) ** 2).sum(-1))
    for row, own in enumerate(distances):
        lead = own - np.delete(distances, row, axis=0).min(0)
        axes.contour(x, y, lead, levels=[0], colors=LIGHT, linewidths=1.5, zorder=0)


@drawing
def draw_nearest() -> tuple[Figure, Cells]:
    """Vectors in the plane move to the nearest of a few rows; lines bound the rows' regions."""
    figure, axes = make_canvas(6.6, 4.6)
    generator = np.random.default_rng(SEED)
    rows = np.array([(1.1, 1.1), (3.2, 0.9), (5.4, 1.4), (1.6, 3.4), (3.9, 2.9), (5.7, 3.8)])
    vectors = np.concatenate([row + generator.normal(0, 0.42, (5, 2)) for row in rows])
    draw_regions(axes, rows)
    nearest = ((vectors[:, None] - rows) ** 2).sum(-1).argmin(1)
    for vector, row in zip(vectors, rows[nearest], strict=True):
        axes.plot(*zip(vector, row, strict=True), color=LIGHT, linewidth=2, zorder=1)
    axes.scatter(*vectors.T, s=70, color=GREY, zorder=2)
    axes.scatter(*rows.T, s=330, color=ACCENT, zorder=3)
    for number, row in enumerate(rows):
        write(axes, *row, str(number), color="white", size=16, weight="bold", zorder=4)
    return figure, {}


@drawing
def draw_gradient() -> tuple[Figure, Cells]:
    """The gradient skips the look-up: that of the chosen row is copied to the vector."""
    figure, axes = make_canvas(12.1, 3.5)
    y = 2.3
    draw_network(axes, 0.1, y, "encoder")
    draw_network(axes, 9.35, y, "decoder", narrows=False)
    for x, name, size in ((3.0, "$z$", 30), (8.0, "$q=e$", LARGE)):
        axes.add_patch(Circle((x, y), 0.5, facecolor=PALE, edgecolor=ACCENT, linewidth=2.5))
        write(axes, x, y, name, size=size)
    draw_box(axes, 5.5, y, 2.3, 1.0, "nearest row", facecolor=GREY)
    for start, end in ((1.7, 2.4), (3.6, 4.25), (6.75, 7.4), (8.6, 9.25), (10.95, 11.4)):
        draw_arrow(axes, (start, y), (end, y))
    write(axes, 11.75, y, "loss")
    back = {"color": ACCENT, "linewidth": 4, "mutation_scale": 30}
    draw_arrow(axes, (11.0, 0.9), (8.25, 1.6), connectionstyle="arc3,rad=-0.25", **back)
    draw_arrow(axes, (7.75, 1.6), (3.25, 1.6), connectionstyle="arc3,rad=-0.3", **back)
    draw_arrow(axes, (2.75, 1.6), (0.9, 1.0), connectionstyle="arc3,rad=-0.25", **back)
    write(axes, 5.5, 0.35, "gradient, copied", size=LARGE, color=ACCENT, weight="bold")
    return figure, {}


@drawing
def draw_losses() -> tuple[Figure, Cells]:
    """The three terms of the loss, and which part of the model each moves."""
    figure, axes = make_canvas(12.1, 4.3)
    terms = (
        ("reconstruction", r"$\Vert x - \hat{x} \Vert^2$", (True, False, True)),
        ("codebook", r"$\Vert \mathrm{sg}[z] - e \Vert^2$", (False, True, False)),
        ("commitment", r"$\beta\,\Vert z - \mathrm{sg}[e] \Vert^2$", (True, False, False)),
    )
    places = (7.3, 9.25, 11.15)
    for x, name in zip(places, ("encoder", "codebook", "decoder"), strict=True):
        write(axes, x, 3.9, name, weight="bold")
    for number, (name, formula, moved) in enumerate(terms):
        y = 2.95 - 1.15 * number
        axes.plot([0.1, 12.0], [y + 0.58] * 2, color=LIGHT, linewidth=1.5)
        write(axes, 0.15, y, name, size=LARGE, ha="left", weight="bold")
        write(axes, 4.6, y, formula, size=28)
        for x, moves in zip(places, moved, strict=True):
            look = {
                "facecolor": ACCENT if moves else "white",
                "edgecolor": ACCENT if moves else LIGHT,
            }
            axes.add_patch(Circle((x, y), 0.26, linewidth=2.5, **look))
    return figure, {}


@drawing
def draw_order() -> tuple[Figure, Cells]:
    """The prior reads the codes above and to the left, and predicts the next one."""
    figure, axes = make_canvas(7.2, 4.4)
    codes = choose_codes(imitate_encoder(cut_picture("reconstructions.png", *TEST_IMAGE)))
    row, column, cell = 3, 3, 0.6
    known = np.arange(49).reshape(7, 7) < row * 7 + column
    colours = np.where(known, shade(ROWS)[codes], "#ffffff")
    names = np.where(known, codes.astype(str), "")
    draw_cells(axes, 2.2, 2.2, cell, colours, names)
    left, top = 2.2 - 3.5 * cell, 2.2 + 3.5 * cell
    for place in np.argwhere(~known):
        corner = left + place[1] * cell, top - (place[0] + 1) * cell
        axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=LIGHT))
    here = left + column * cell, top - (row + 1) * cell
    axes.add_patch(Rectangle(here, cell, cell, facecolor="white", edgecolor=ACCENT, linewidth=4))
    write(
        axes, here[0] + cell / 2, here[1] + cell / 2, "?", size=LARGE, color=ACCENT, weight="bold"
    )
    draw_arrow(axes, (here[0] + cell, 2.2), (4.85, 2.2), color=ACCENT, linewidth=3.5)
    for number, share in enumerate((0.1, 0.25, 0.6, 0.95, 0.45, 0.15)):
        y = 3.7 - 0.6 * number
        axes.add_patch(Rectangle((5.3, y - 0.2), 1.7 * share, 0.4, facecolor=ACCENT))
        write(axes, 5.08, y, str(number), size=SMALL)
    return figure, {}


# Charts of the studies


@drawing
def draw_samplers() -> tuple[Figure, Cells]:
    """Fréchet distance of new images from each sampler; that of the PixelCNN is strong."""
    page = STUDIES / "traditional_autoencoders/README.md"
    rows = read_table(page, "images", "Fréchet distance", "precision")
    rows = [row for row in rows if "reconstructions" not in row["images"]]
    names = [row["images"] for row in rows]
    cells = [row["Fréchet distance"].split()[0] for row in rows]
    values = [read_number(cell) for cell in cells]
    figure = Figure((7.8, 5.1), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(labelsize=SMALL, colors=DARK, length=0)
    colours = [ACCENT if "PixelCNN" in name else LIGHT for name in names]
    bars = axes.barh(names, values, color=colours, height=0.68)
    labels = axes.bar_label(bars, cells, padding=6, fontsize=NORMAL, color=DARK)
    for name, label in zip(names, labels, strict=True):
        label.set_weight("bold" if "PixelCNN" in name else "normal")
    axes.invert_yaxis()
    axes.set(xticks=[], xlim=(0, 1.3 * max(values)))
    axes.set_xlabel("Fréchet distance, lower is better", fontsize=SMALL, color=DARK)
    return figure, dict(zip(names, cells, strict=True))


if __name__ == "__main__":
    draw_figures()
