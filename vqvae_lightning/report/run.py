"""`report.html` of one pipeline run."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vqvae_lightning.configs import read_config
from vqvae_lightning.files import write_text
from vqvae_lightning.report import plots
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_curves, read_result


def write_report(folder: Path) -> Path:
    """Write `report.html`, one page without links to other files.

    Args:
        folder: Folder of a pipeline whose other stages are finished.

    Returns:
        Path of the page.
    """
    run = RunFolder(folder)
    result = read_result(folder)
    stages = {name: read_result(run.stage(name).path) for name in ("evaluation", "samples")}
    assert result is not None
    assert stages["evaluation"] is not None
    assert stages["samples"] is not None
    names = stages["evaluation"]["class_names"]
    curves = {name: read_curves(run.stage(name).metrics) for name in ("vqvae", "prior")}
    nets = {name: read_config(run.stage(name).config)["model"]["net"] for name in curves}
    likelihood = nets["vqvae"].get("likelihood")  # configs of older runs lack it
    with np.load(run.stage("evaluation").codes) as arrays:
        histogram, codes = arrays["histogram"], arrays["codes"]
        images = arrays["images"]
    pictures = {
        "samples": run.samples_picture,
        "reconstructions": run.reconstructions_picture,
        "nearest": run.stage("evaluation").nearest_picture,
    }
    split = result["split"]
    page = load_template("template.html").render(
        result=result,
        split=split,
        value=lambda name: result["metrics"].get(f"{split}/{name}", {}).get("value"),
        conditional=bool(nets["prior"]["num_classes"]),
        fitted=likelihood is None or likelihood["_target_"].endswith(".SquaredError"),
        drawn=describe_drawing(stages["samples"].get("drawing")),
        judged=describe_drawing(stages["evaluation"].get("drawing")),
        columns=[names[number] for number in stages["samples"]["column_classes"]],
        stages=result["seconds"],
        pictures={name: inline_png(path) for name, path in pictures.items()},
        progress=[inline_png(path) for path in _pick_evenly(run.stage("prior").pictures, 4)],
        losses=Markup(plots.plot_losses(curves["vqvae"])),
        usage=Markup(plots.plot_usage(curves["vqvae"], histogram.shape[-1])),
        prior=Markup(plots.plot_prior(curves["prior"], split, result["metrics"])),
        histogram=Markup(plots.plot_histogram(histogram)),
        code_maps=Markup(plots.plot_code_maps(images, codes, histogram)),
        rate=Markup(plots.plot_rate(result["metrics"], split)),
        config=run.config.read_text(encoding="utf-8"),
        folder=str(folder),
    )
    write_text(run.report, page)
    return run.report


def describe_drawing(drawing: dict[str, Any] | None) -> str:
    """Describe how samples were drawn; nothing for results of older versions, which do not say."""
    given = {name: value for name, value in (drawing or {}).items() if value is not None}
    if given.get("top_p") == 1:
        del given["top_p"]  # all codes, as without it
    return ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in given.items())


def load_template(name: str) -> Template:
    """Load a page of this folder, in which a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("vqvae_lightning", "report"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(name)


def inline_png(path: Path) -> dict[str, Any]:
    """Encode a PNG as a data URI, with its name for the alternative text."""
    data = base64.b64encode(path.read_bytes()).decode()
    return {"name": path.stem, "uri": f"data:image/png;base64,{data}"}


def _pick_evenly(folder: Path, count: int) -> list[Path]:
    """Pick `count` PNG files evenly in order of name, including the first and the last."""
    paths = sorted(folder.glob("*.png"))
    last = len(paths) - 1
    return (
        [paths[i] for i in sorted({round(k * last / (count - 1)) for k in range(count)})]
        if paths
        else []
    )
