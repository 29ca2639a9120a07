"""Build a Weights & Biases workspace from the names that training and evaluation log.

    uv run --extra wandb python experiments/dashboard.py ENTITY [--project NAME] [--show]

It needs an account (`wandb login`), except with `--show`, which only prints the panels.
"""

import argparse

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

STEP = "trainer/global_step"
SECTIONS = {
    "VQ-VAE: what is lost": {
        "reconstruction error": ["train/nmse", "val/nmse"],
        "balance of the losses": [
            "train/nmse",
            "train/commitment_weighted",
            "train/codebook_weighted",
            "train/kl_weighted",
        ],
        "signal to noise": ["val/psnr_db"],
    },
    "VQ-VAE: how the codebook is used": {
        "perplexity": ["train/perplexity", "val/perplexity"],
        "share of codes in use": ["train/codebook_use", "val/codebook_use"],
        "codes revived": ["train/revived_codes"],
        "codebook drift": ["val/codebook_drift"],
        "active latent channels": ["val/active_dims"],
    },
    "Prior": {
        "nats per code": [
            "train/nats_per_code",
            "val/nats_per_code",
            "val/unigram_nats_per_code",
        ],
        "bits per code": ["train/bits_per_code", "val/bits_per_code"],
        "codes predicted": ["train/accuracy", "val/accuracy"],
    },
    "Optimization": {
        "loss": ["train/loss", "val/loss"],
        "learning rate": ["train/learning_rate"],
    },
}
"""Curves over steps: the panels of each section, and the names that share a panel."""

PICTURES = ["val/reconstructions", "val/codes", "val/samples", "nearest"]
METRICS = [
    "test/nmse",
    "test/total_bits_per_dim",
    "test/sample_accuracy",
    "test/sample_fid",
    "test/reconstruction_fid",
]
"""Metrics of the evaluation, drawn as one bar per run."""


def sections() -> list[ws.Section]:
    """Make the sections of the workspace, pictures first."""
    pictures = [wr.MediaBrowser(title=name, media_keys=[name]) for name in PICTURES]
    curves = [
        ws.Section(
            name=name,
            panels=[wr.LinePlot(title=title, x=STEP, y=lines) for title, lines in panels.items()],
            is_open=True,
        )
        for name, panels in SECTIONS.items()
    ]
    bars = [wr.BarPlot(title=name, metrics=[name]) for name in METRICS]
    return [
        ws.Section(name="Pictures", panels=pictures, is_open=True),
        *curves,
        ws.Section(name="Evaluation", panels=bars, is_open=True),
    ]


def main() -> None:
    """Build the workspace, or print its panels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entity", help="user or team")
    parser.add_argument("--project", default="vqvae_lightning")
    parser.add_argument(
        "--show", action="store_true", help="print the panels without building anything"
    )
    options = parser.parse_args()
    if options.show:
        for section in sections():
            print(section.name, *(panel.title for panel in section.panels), sep="\n  ")
        return
    workspace = ws.Workspace(
        entity=options.entity,
        project=options.project,
        name="vqvae_lightning",
        sections=sections(),
        auto_generate_panels=True,  # histograms have no panel class of their own
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")]),
    )
    print(workspace.save().url)


if __name__ == "__main__":
    main()
