"""Break one line of the code at a time and report whether the tests notice.

    uv run python experiments/mutations.py [--only NAME ...] [--list]

A run of all mutations writes mutations.md.

Each mutation is one edit, with the tests that should fail because of it. The edits are made in a
temporary copy of the working tree, never in the tree itself. The exit status is 1 if a text to
replace is gone, if the named tests fail before any edit, or if more than `MOST_SURVIVORS` mutations
survive.

mutmut 3 and cosmic-ray 8 generate thousands of edits and run one test command for all of them.
Neither accepts chosen edits, each with its own tests. Those keep this program to a few minutes.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGE = "vqvae_lightning"
PAGE = ROOT / "experiments/mutations.md"
MOST_SURVIVORS = 3
SECONDS = 300  # for the tests of one mutation; a mutation that makes them take longer is caught
WHOLE = 3600  # seconds for all tests before any mutation

# Torch and Lightning are imported once, in the process from which every run of pytest is forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytorch_lightning", "torchmetrics.image.fid"])


class Mutation(NamedTuple):
    """One edit, and the tests that should notice it."""

    name: str
    file: str
    """Path relative to `vqvae_lightning`."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Pytest node ids, relative to `tests`."""
    survives: str = ""
    """Why no test can notice the edit; empty if one can."""

    def apply(self, tree: Path) -> str:
        """Edit the file in `tree`.

        Returns:
            The original text of the file.

        Raises:
            ValueError: If the text to replace does not occur exactly once.
        """
        path = tree / PACKAGE / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))
        return text


def mutations_of(file: str, tests: str, *edits: tuple[str, ...]) -> list[Mutation]:
    """Mutations of one file.

    Args:
        file: Path relative to `vqvae_lightning`.
        tests: Test file whose tests should notice.
        *edits: Name, text to replace, new text, and test: a name in `tests`, or the node id of a
            test in another file. A fifth item says why no test can notice the edit.
    """
    found = []
    for name, old, new, test, *why in edits:
        node = test if "::" in test else f"{tests}::{test}"
        found.append(Mutation(f"{Path(file).stem}: {name}", file, old, new, (node,), *why))
    return found


EVALUATION = "evaluation/test_evaluation.py"
ERRORS = f"{EVALUATION}::test_errors_are_those_of_the_rounded_images"
USE = f"{EVALUATION}::test_use_of_the_codebook_is_that_of_the_histograms"
BITS = f"{EVALUATION}::test_bits_per_dim_are_summed_from_masses_and_softmaxes"
OF_A_DECODER = "likelihoods/test_of_an_autoregressive_decoder.py"
PIXEL_DECODER = "networks/test_pixel_decoder.py"
JUDGE = f"{EVALUATION}::test_accuracies_and_distances_are_those_of_logits_and_features"
PRIOR = f"{EVALUATION}::test_a_prior_logs_its_likelihoods_in_nats_and_bits"
PRIOR_STEP = f"{EVALUATION}::test_a_step_of_the_prior_logs_unsmoothed_nats"
VQVAE = f"{EVALUATION}::test_a_vqvae_logs_errors_and_use_of_whole_splits"
VQVAE_STEP = f"{EVALUATION}::test_a_step_of_the_vqvae_logs_its_terms_and_the_use_in_its_batch"

MUTATIONS = (
    *mutations_of(
        "quantizers/lookup.py",
        "quantizers/test_quantizers.py",
        (
            "rows not moved with the vectors",
            "table = codebook.float() - centre",
            "table = codebook.float()",
            "test_codes_are_the_nearest_codebook_rows",
        ),
        (
            "whole squared lengths",
            ".mul_(-0.5)",
            ".mul_(-1)",
            "test_codes_are_the_nearest_codebook_rows",
        ),
        (
            "padding in the race",
            "value=-torch.inf",
            "value=0.0",
            "test_codes_are_the_nearest_codebook_rows",
        ),
        (
            "last tile wins",
            "better = top > best",
            "better = top == top",
            "test_look_up_in_several_blocks_equals_one",
        ),
        (
            "products may be rounded",
            "enabled=False), exact_products():",
            "enabled=False):",
            "test_gpu.py::test_codes_are_exact_where_products_may_be_rounded",
        ),
        (
            "look-up under autocast",
            "with torch.autocast(vectors.device.type, enabled=False), exact_products():",
            "with exact_products():",
            "test_codes_under_autocast_are_those_of_float32",
            "autocast leaves `addmm` with `out` alone; the guard is for a product without it",
        ),
    ),
    *mutations_of(
        "quantizers/gradients.py",
        "quantizers/test_quantizers.py",
        (
            "gradient halved",
            "return gradients[0], None",
            "return gradients[0] / 2, None",
            "test_straight_through_gradient_is_the_identity",
        ),
        (
            "rotation without its factor",
            "return turned * (vectors.norm(dim=-1, keepdim=True) / length), None",
            "return turned, None",
            "test_rotation_gradient_matches_the_paper",
        ),
    ),
    *mutations_of(
        "quantizers/codebook.py",
        "quantizers/test_quantizers.py",
        (
            "latent power without the square",
            "rows.detach().square().mean()",
            "rows.detach().abs().mean()",
            "test_the_latent_power_is_the_mean_square_of_the_encoders_output",
        ),
        (
            "threshold in hits",
            "dead = self.counts < self.revive_below * share",
            "dead = self.counts < self.revive_below",
            "test_revival_finds_the_same_codes_in_batches_of_any_size",
        ),
        (
            "revival to the end",
            "if progress >= self.revive_until:",
            "if progress > 1:",
            "test_revival_stops_for_the_last_share_of_training",
        ),
        (
            "warm-up of any length",
            "if progress > 0:",
            "if progress > 1:",
            "test_warm_up_is_at_most_a_tenth_of_the_training",
        ),
        (
            "one batch for the first rows of a short training",
            "left < POOL_STEPS - 0.5:",
            "self.warmup_steps - self.steps < POOL_STEPS or left <= 0:",
            "quantizers/test_warmup.py"
            "::test_a_warm_up_that_a_short_training_ends_gathers_its_last_steps",
        ),
        (
            "one vector for several dead codes",
            "order = (dead.cumsum(-1) - 1) % len(drawn)",
            "order = order % len(drawn)",
            "test_dead_codes_get_different_vectors_as_long_as_there_are_enough",
        ),
        (
            "evaluation is observed",
            "            if self.training:\n                self.observe(flat, places.flatten())",
            "            self.observe(flat, places.flatten())",
            "test_only_training_calls_change_state",
        ),
    ),
    *mutations_of(
        "quantizers/rows.py",
        "quantizers/test_quantizers.py",
        (
            "centres are sums",
            "sums / counts.clamp(min=1)[..., None]",
            "sums",
            "test_kmeans_finds_separate_clusters",
        ),
    ),
    *mutations_of(
        "quantizers/ema.py",
        "quantizers/test_quantizers.py",
        (
            "decay the wrong way",
            "self.counts.lerp_(fresh[..., 0], 1 - self.decay)",
            "self.counts.lerp_(fresh[..., 0], self.decay)",
            "test_ema_update_equals_a_hand_computed_example",
        ),
        (
            "revived rows without their sums",
            "rows * count[..., None], self.sums",
            "rows, self.sums",
            "test_revival_finds_the_same_codes_in_batches_of_any_size",
        ),
        (
            "rows without hits shrink",
            "torch.where(hits[..., None] > 0, rows, self.codebook)",
            "rows",
            "test_codes_without_hits_stay_where_they_are",
        ),
        (
            "each rank for itself",
            "fresh = all_reduce(torch.cat([self.new_counts[..., None], self.new_sums], dim=-1))",
            "fresh = torch.cat([self.new_counts[..., None], self.new_sums], dim=-1)",
            "quantizers/test_ranks.py::test_two_ranks_end_with_the_codebook_of_one_process",
        ),
    ),
    *mutations_of(
        "quantizers/loss.py",
        "quantizers/test_quantizers.py",
        (
            "codebook term moves the encoder",
            "F.mse_loss(chosen, parts.detach())",
            "F.mse_loss(chosen, parts)",
            "test_each_loss_term_moves_only_its_own_side",
        ),
        (
            "commitment moves the codebook",
            "F.mse_loss(parts, chosen.detach())",
            "F.mse_loss(parts, chosen)",
            "test_each_loss_term_moves_only_its_own_side",
        ),
    ),
    *mutations_of(
        "quantizers/continuous.py",
        "quantizers/test_continuous.py",
        (
            "divergence off by a half",
            "- log_variance - 1) / 2",
            "- log_variance) / 2",
            "test_kl_is_that_of_the_two_normal_distributions",
        ),
        (
            "variance for deviation",
            "(log_variance / 2).exp()",
            "log_variance.exp()",
            "test_samples_have_the_posteriors_mean_and_variance_and_pass_the_gradient",
        ),
    ),
    *mutations_of(
        "pixels.py",
        "networks/test_autoencoder.py",
        (
            "levels cut off, not rounded",
            ".mul(127.5).round()",
            ".mul(127.5)",
            "test_pixels_survive_the_way_to_the_network_and_back",
        ),
    ),
    *mutations_of(
        "networks/autoencoder.py",
        "networks/test_autoencoder.py",
        (
            "blocks without their short cut",
            "x = x + block(x)",
            "x = block(x)",
            "test_a_residual_stack_adds_to_what_it_is_given",
        ),
        (
            "a mean of what the decoder has seen",
            "None if self.autoregressive else self.likelihood.mean(output)",
            "self.likelihood.mean(output)",
            f"{PIXEL_DECODER}::test_a_network_scores_given_images_and_draws_new_ones",
        ),
        (
            "an autoregressive decoder with any likelihood",
            "elif isinstance(self.likelihood, Categorical):",
            "elif self.likelihood:",
            f"{PIXEL_DECODER}::test_another_likelihood_is_refused",
        ),
    ),
    *mutations_of(
        "networks/pixel_decoder.py",
        PIXEL_DECODER,
        (
            "levels innermost",
            "logits.movedim(-1, 1).flatten(1, 2)",
            "logits.movedim(-1, 2).flatten(1, 2)",
            "test_samples_equal_full_reevaluation_and_have_the_likelihood_they_were_drawn_with",
        ),
        (
            "samples that ignore their latents",
            "generator=generator, context=context)",
            "generator=generator, context=0 * context)",
            "test_samples_equal_full_reevaluation_and_have_the_likelihood_they_were_drawn_with",
        ),
    ),
    *mutations_of(
        "networks/pixelcnn.py",
        "networks/test_pixelcnn.py",
        (
            "first layer sees its own code",
            "(0 if first else 1)",
            "1",
            "test_every_position_sees_all_earlier_codes_and_no_later_one",
        ),
        (
            "own code past the first layer",
            "residual if self.first else horizontal + residual",
            "horizontal + residual",
            "test_every_position_sees_all_earlier_codes_and_no_later_one",
        ),
        (
            "a layer too many",
            "missing = max(self.height, self.width) - 1 - first",
            "missing = max(self.height, self.width) - first",
            "test_layers_needed_is_the_smallest_number_without_a_blind_spot",
        ),
        (
            "no class is the first class",
            "masked_fill(nulls, self.num_classes)",
            "masked_fill(nulls, 0)",
            "test_null_labels_are_what_training_sees_at_their_rate",
        ),
    ),
    *mutations_of(
        "networks/sampling.py",
        "networks/test_pixelcnn.py",
        (
            "guidance from the class",
            "logits = unconditional + guidance",
            "logits = conditional + guidance",
            "test_sample_equals_full_reevaluation_with_every_option_together",
        ),
        (
            "temperature the wrong way",
            "(logits.double() / temperature)",
            "(logits.double() * temperature)",
            "test_temperature_is_a_power_of_the_probabilities",
        ),
        (
            "top_p leaves one code less",
            "before = best.cumsum(1) - best",
            "before = best.cumsum(1)",
            "test_options_leave_the_likeliest_codes_in_proportion",
        ),
        (
            "codes of probability zero",
            "wanted, right=True)",
            "wanted, right=False)",
            "test_choose_never_draws_a_code_of_probability_zero",
        ),
        (
            "mean for a sum",
            "-nats.sum(tuple(",
            "-nats.mean(tuple(",
            "test_score_is_the_sum_of_log_probabilities",
        ),
    ),
    *mutations_of(
        "report/comparison.py",
        "report/test_comparison.py",
        (
            "weights that differ are not named",
            "if len(hashes) > 1:",
            "if len(hashes) > 9:",
            "test_only_weights_that_differ_are_named",
        ),
    ),
    *mutations_of(
        "likelihoods/logistic.py",
        "likelihoods/test_logistic.py",
        (
            "derivative of inner bins at the ends",
            "masked_fill_(lowest | highest, 0)",
            "masked_fill_(lowest & highest, 0)",
            "test_gradients_equal_those_of_the_formula_in_float64",
        ),
        (
            "gradient of a scale that is not used",
            "masked_fill_(log_scale < MIN_LOG_SCALE, 0)",
            "masked_fill_(log_scale < -99, 0)",
            "test_a_scale_below_the_least_gets_no_gradient",
        ),
        (
            "lowest level without its tail",
            "torch.where(x < 0.5,",
            "torch.where(x < -0.5,",
            "test_mass_of_all_levels_is_one",
        ),
        (
            "worst scale",
            "return -discretised_logistic(x, centre",
            "return discretised_logistic(x, centre",
            "test_fitted_scale_is_the_best_of_a_fine_search",
        ),
    ),
    *mutations_of(
        "likelihoods/mixture.py",
        "likelihoods/test_distributions.py",
        (
            "components that do not sum to one",
            "torch.logsumexp(logits.log_softmax(1) + mass, 1)",
            "torch.logsumexp(logits + mass, 1)",
            "test_the_probabilities_of_the_levels_sum_to_one",
        ),
    ),
    *mutations_of(
        "likelihoods/scaled.py",
        "likelihoods/test_distributions.py",
        (
            "no noise of the dequantisation",
            ".square() + 1 / 12",
            ".square()",
            "test_the_gaussians_loss_is_the_expected_density_of_noisy_levels",
        ),
    ),
    *mutations_of(
        "evaluation/bounds.py",
        "evaluation/test_bounds.py",
        (
            "sum of the weights for their mean",
            "torch.logsumexp(pixels + ratio, 1) - math.log(samples)",
            "torch.logsumexp(pixels + ratio, 1)",
            "test_many_draws_find_the_likelihood_and_few_bound_it",
        ),
        (
            "weights without the density of the posterior",
            "(eps.square() + log_variance - z.square()) / 2",
            "-z.square() / 2",
            "test_many_draws_find_the_likelihood_and_few_bound_it",
        ),
        (
            "one stream for all images",
            'derive_seed(seed, "bound", row)',
            'derive_seed(seed, "bound", len(rows))',
            "test_the_batch_size_changes_nothing_and_the_seed_does",
        ),
    ),
    *mutations_of(
        "tasks/vqvae.py",
        "stages/test_kept_codes.py",
        (
            "kept codes that learn",
            "        if self.codes_kept:",
            "        if False:",
            "test_only_the_decoder_learns_and_the_prior_stays_valid",
        ),
        (
            "a decoder that starts from nothing",
            "{**own, **fits, **extra}",
            "{**own, **extra, **{k: v for k, v in fits.items() if 'decoder' not in k}}",
            "test_the_decoder_starts_from_the_finished_one",
        ),
    ),
    *mutations_of(
        "networks/classifier.py",
        EVALUATION,
        ("judge with dropout", "0.2, self.training)", "0.2, True)", JUDGE),
    ),
    *mutations_of(
        "metrics.py",
        "test_metrics.py",
        (
            "unigram without the added one",
            "smoothed = counts.float() + 1",
            "smoothed = counts.float()",
            BITS,
        ),
        (
            "use of at least two hits",
            "used = (self.counts > 0).sum()",
            "used = (self.counts > 1).sum()",
            "test_use_counts_codes_of_every_batch",
        ),
        (
            "mean of truncated numbers of images",
            "images = sum(number for number, _ in parts)",
            "images = len(parts) * (sum(number for number, _ in parts) // len(parts))",
            "quantizers/test_ranks.py::test_training_on_two_ranks_equals_training_in_one_process",
        ),
        (
            "variance about zero",
            " - (self.means / images).square()",
            "",
            "quantizers/test_continuous.py::test_collapsed_channels_are_distinguished_from_active_ones",
        ),
    ),
    *mutations_of(
        "tasks/vqvae.py",
        EVALUATION,
        (
            "nmse four times too large",
            "(4 * pixel_variance)",
            "pixel_variance",
            VQVAE_STEP,
        ),
        ("psnr of the root", "-10 * torch.log10(error)", "-20 * torch.log10(error)", VQVAE),
        ("weight forgotten", "= weight * share * terms", "= share * terms", VQVAE_STEP),
        (
            "errors of unrounded images",
            "to_uint8(output.reconstruction).float() / 255,",
            "(output.reconstruction.float() + 1) / 2,",
            VQVAE,
        ),
        (
            "ranks of unlike size count alike",
            "return images * self.trainer.world_size / total",
            "return 1.0",
            "quantizers/test_ranks.py::test_training_on_two_ranks_equals_training_in_one_process",
        ),
        (
            "terms of one rank",
            "self.log_dict(logged, sync_dist=True)",
            "self.log_dict(logged)",
            "jobs/test_devices.py::test_the_curves_of_two_ranks_are_those_of_one",
        ),
        (
            "revivals logged again",
            "self.since_logged = dict.fromkeys(self.since_logged, 0.0)",
            "self.since_logged = {}",
            "tasks/test_tasks.py::test_each_revived_code_is_logged_once",
        ),
        (
            "a validation empties the counts of training",
            'part = "fit" if split == "train" else "evaluation"',
            'part = "fit"',
            "tasks/test_tasks.py::test_a_validation_does_not_reset_what_training_counts",
        ),
        (
            "counts lost when a run resumes",
            'value.copy_(stored["counted"][name])',
            "value.zero_()",
            "tasks/test_tasks.py::test_a_resumed_run_logs_what_the_interrupted_one_counted",
        ),
    ),
    *mutations_of(
        "tasks/divergence.py",
        "tasks/test_tasks.py",
        (
            "the last step not logged",
            "or step >= self.trainer.estimated_stepping_batches",
            "",
            "tasks/test_tasks.py::test_the_last_step_is_logged_with_its_own_values",
        ),
    ),
    *mutations_of(
        "callbacks/checkpoints.py",
        "tasks/test_tasks.py",
        (
            "saved before a due validation",
            "self._waits = _validates_now(trainer)",
            "self._waits = False",
            "tasks/test_tasks.py::test_resume_equals_uninterrupted",
        ),
    ),
    *mutations_of(
        "tasks/prior.py",
        EVALUATION,
        ("validation nats as bits", "bits = nats / math.log(2)", "bits = nats", PRIOR),
        (
            "training nats as bits",
            'self.log("train/bits_per_code", nats / math.log(2), sync_dist=True)',
            'self.log("train/bits_per_code", nats, sync_dist=True)',
            PRIOR_STEP,
        ),
        (
            "constant accuracy",
            '"accuracy": (logits.argmax(1) == codes).float().mean()',
            '"accuracy": torch.tensor(0.5)',
            PRIOR,
        ),
        (
            "smoothed nats in training",
            "nats = compute_loss(logits, codes)\n                accuracy",
            "nats = loss\n                accuracy",
            PRIOR_STEP,
        ),
    ),
    *mutations_of(
        "tasks/optimization.py",
        "tasks/test_tasks.py",
        (
            "cosine upside down",
            "(1 + math.cos(math.pi * done)) / 2",
            "(1 - math.cos(math.pi * done)) / 2",
            "test_schedule_rises_and_falls_along_a_cosine",
        ),
    ),
    *mutations_of(
        "data/images.py",
        "data/test_data.py",
        (
            "variance of test images",
            "partial(_count_levels, splits.train.images, rows)",
            "partial(_count_levels, splits.test.images, torch.arange(len(splits.test.images)))",
            ERRORS,
        ),
        (
            "ranks train on the same part",
            "first = number * self.batch_size + self.rank * local",
            "first = number * self.batch_size",
            "test_ranks_share_one_global_batch",
        ),
        (
            "batches skipped after a limited epoch",
            "epoch in (None, self.epoch) and done",
            "done",
            "tasks/test_tasks.py::test_resume_equals_uninterrupted",
        ),
        (
            "one order for all epochs",
            '"order", self.epoch)',
            '"order")',
            "test_each_epoch_has_its_own_order_that_the_seed_repeats",
        ),
        (
            "validated images are trained on",
            "return order[taken:].sort()",
            "return order.sort()",
            "test_a_flat_folder_is_split_without_overlap",
        ),
        (
            "flips upside down",
            "images.flip(-1)",
            "images.flip(-2)",
            "test_flips_mirror_about_half_of_the_training_images",
        ),
        (
            "a batch of one is none",
            "self.array[places.numpy()]",
            "self.array[places]",
            "test_a_batch_of_one_row_is_a_batch",
        ),
    ),
    *mutations_of(
        "data/codes.py",
        "data/test_data.py",
        (
            "batches over each other",
            "codes.seek(row * encoded[0].nbytes)",
            "codes.seek(0)",
            "test_stored_codes_are_the_encoders_in_order",
        ),
        (
            "codes of another network",
            "if found.get(key) != value:",
            "if key not in found:",
            "test_damaged_or_foreign_codes_are_refused",
        ),
        (
            "histogram of test codes",
            'rows = self.datasets["train"].data',
            'rows = self.datasets["test"].data',
            USE,
        ),
    ),
    *mutations_of(
        "evaluation/reconstruction.py",
        EVALUATION,
        ("constant ssim", "cast(Tensor, self.ssim.compute()).item()", "0.9", ERRORS),
        (
            "psnr per image of the mean error",
            "psnr_sum / images",
            "-10 * math.log10(error)",
            ERRORS,
        ),
        (
            "nmse over the variance of another scale",
            "error / pixel_variance",
            "error / (4 * pixel_variance)",
            ERRORS,
        ),
        (
            "unrounded error of rounded images",
            "unrounded.update(((decoded + 1) / 2).contiguous(), truth)",
            "unrounded.update(rounded, truth)",
            ERRORS,
        ),
        (
            "samples without a seed",
            "codes.vqvae.decode(grid, noise)",
            "codes.vqvae.decode(grid)",
            f"{OF_A_DECODER}::test_an_evaluation_scores_the_images_and_measures_samples",
        ),
        (
            "perplexity of the last batch",
            "usage.update(grid)",
            "usage.reset() or usage.update(grid)",
            USE,
        ),
        (
            "constant perplexity of batches",
            '{"perplexity_batch32": sum(batch_perplexities) / len(batch_perplexities)}',
            '{"perplexity_batch32": 1.0}',
            USE,
        ),
        (
            "dead codes of the evaluated split",
            "float((codes.histogram() == 0).sum())",
            'float(used["dead_codes"])',
            USE,
        ),
        (
            "entropy in nats",
            'float(used["entropy_bits"])',
            "entropy_nats(usage.counts).item()",
            USE,
        ),
    ),
    *mutations_of(
        "evaluation/likelihood.py",
        EVALUATION,
        (
            "scale fitted on test images",
            'pair_images_with_codes(codes, "val", device, step, limit)',
            'pair_images_with_codes(codes, "test", device, step, limit)',
            BITS,
        ),
        (
            "constant unigram nats",
            '"unigram_nats_per_code": per_code["unigram"]',
            '"unigram_nats_per_code": 2.5',
            BITS,
        ),
        (
            "position nats of the unigram",
            "by_position.expand(len(grid), *by_position.shape[1:]).gather(1, grid[:, None])",
            "unigram[grid]",
            BITS,
        ),
        ("nats printed as bits", '"bits_per_code": nats / LN2', '"bits_per_code": nats', BITS),
        (
            "total without the codes",
            '"total_bits_per_dim"] = pixels + rate * nats',
            '"total_bits_per_dim"] = pixels',
            BITS,
        ),
    ),
    *mutations_of(
        "evaluation/classifier.py",
        EVALUATION,
        (
            "judge trained on test images",
            "    data = copy.copy(images)\n",
            '    data = copy.copy(images)\n    data.datasets = {"train": data.datasets["test"]}\n',
            "test_the_classifier_learns_from_training_images_only",
        ),
        (
            "constant real accuracy",
            '"real_accuracy": right["real"] / done,',
            '"real_accuracy": 0.5,',
            JUDGE,
        ),
        (
            "constant reconstruction accuracy",
            '"reconstruction_accuracy": right["reconstruction"] / done,',
            '"reconstruction_accuracy": 0.5,',
            JUDGE,
        ),
        ("constant sample accuracy", 'right["sample"] / len(samples)', "0.5", JUDGE),
        (
            "constant distance of reconstructions",
            '{"reconstruction_fid": float(distance.compute())}',
            '{"reconstruction_fid": 1.0}',
            JUDGE,
        ),
        (
            "constant distance of samples",
            '"sample_fid": float(distance.compute())',
            '"sample_fid": 1.0',
            JUDGE,
        ),
        ("samples judged with the reconstructions", "    distance.reset()\n", "", JUDGE),
    ),
    *mutations_of(
        "evaluation/drawing.py",
        EVALUATION,
        (
            "nearest image of the last batch",
            "closer = distance < best",
            "closer = distance < math.inf",
            "test_the_nearest_image_is_that_of_a_full_search",
        ),
    ),
    *mutations_of(
        "evaluation/inception.py",
        "evaluation/test_weights.py",
        (
            "kernel distance of the reconstructions",
            "measure_kernel_distance(truth, features)",
            "measure_kernel_distance(truth, others)",
            "test_distances_are_those_of_the_features",
        ),
        (
            "other subsets in each run",
            "        torch.manual_seed(0)\n",
            "",
            "test_the_kernel_distance_of_subsets_is_repeatable_and_unbiased",
        ),
    ),
    *mutations_of(
        "evaluation/lpips.py",
        "evaluation/test_weights.py",
        (
            "images read as [-1, 1]",
            "normalize=True)",
            "normalize=False)",
            "test_lpips_is_that_of_torchmetrics",
        ),
    ),
    *mutations_of(
        "stages/evaluating.py",
        "evaluation/test_classifier_cache.py",
        (
            "classifier depends on the loaders before it",
            '        torch.manual_seed(derive_seed(seed, "judge"))\n',
            "",
            "test_runs_share_the_classifier_of_their_data",
        ),
    ),
    *mutations_of(
        "stages/evaluating.py",
        EVALUATION,
        (
            "errors of another split",
            "measure_reconstruction(found.codes, cfg.split, device)",
            'measure_reconstruction(found.codes, "test", device)',
            "test_the_command_measures_the_split_it_names",
        ),
        (
            "likelihoods of another split",
            "measure_likelihood(found.codes, found.prior, cfg.split, device)",
            'measure_likelihood(found.codes, found.prior, "test", device)',
            "test_the_command_measures_the_split_it_names",
        ),
        (
            "samples drawn without their options",
            "            **drawing,",
            "            temperature=cfg.temperature,",
            "evaluation/test_drawing.py::test_the_evaluated_samples_are_those_of_vqvae_sample",
        ),
    ),
    *mutations_of(
        "callbacks/codebook.py",
        "callbacks/test_callbacks.py",
        (
            "always warned of collapse",
            "self._below + 1 if use < self.threshold else 0",
            "self._below + 1",
            "test_collapse_is_reported_once_after_patience_with_suggestions",
        ),
    ),
    *mutations_of(
        "callbacks/reproducibility.py",
        "callbacks/test_callbacks.py",
        (
            "configs never differ",
            "            if differing:",
            "            if not first:",
            "quantizers/test_ranks.py::test_a_rank_with_a_different_config_is_named",
        ),
    ),
    *mutations_of(
        "callbacks/codebook.py",
        "callbacks/test_callbacks.py",
        (
            "codebooks never differ",
            "if len(set(gather(digest))) > 1:",
            "if len(set(gather(digest))) > 2:",
            "quantizers/test_ranks.py::test_ranks_with_different_codebooks_stop_the_run",
        ),
    ),
    *mutations_of(
        "stages/training.py",
        "tasks/test_tasks.py",
        (
            "a resumed run starts over",
            "ckpt_path=find_checkpoint(last)",
            "ckpt_path=None",
            "test_the_same_command_resumes_an_unfinished_run",
        ),
    ),
    *mutations_of(
        "quantizers/sonnet.py",
        "quantizers/test_sonnet.py",
        (
            "averages not corrected for their start",
            "weight = 1 - self.decay**self.steps",
            "weight = 1.0",
            "test_the_codebook_is_that_of_sonnets_formulas",
        ),
        (
            "codes without hits stay",
            "self.codebook.copy_(self.sums / weight / smooth[:, None])",
            "self.codebook[counts > 0] = (self.sums / weight / smooth[:, None])[counts > 0]",
            "test_a_code_without_hits_becomes_the_zero_vector",
        ),
    ),
    *mutations_of(
        "networks/pixelcnn.py",
        "tasks/test_start.py",
        (
            "codes start from vectors that are not centred",
            "centred = tables.float().cpu() - tables.float().cpu().mean(1, keepdim=True)",
            "centred = tables.float().cpu()",
            "test_angles_between_codes_become_those_of_their_vectors",
        ),
        (
            "layers start with the usual weights",
            "convolution.weight.mul_(2)",
            "convolution.weight.mul_(1)",
            "test_a_layer_starts_with_twice_the_usual_weights_and_nothing_else",
        ),
    ),
    *mutations_of(
        "tasks/prior.py",
        "tasks/test_start.py",
        (
            "one codebook decoded for all",
            "codes[:, 0, 0, book] = torch.arange(num_codes)",
            "codes[:, 0, 0, 0] = torch.arange(num_codes)",
            "test_each_code_is_decoded_on_its_own",
        ),
        (
            "any start is random",
            'if self.start == "codebook":',
            'if self.start == "rows":',
            "test_a_training_starts_as_its_config_says",
        ),
    ),
    *mutations_of(
        "pictures.py",
        "stages/test_pipeline.py",
        (
            "black pictures",
            "images = (rows if isinstance(rows, Tensor) else torch.cat(list(rows))).cpu()",
            "images = (rows if isinstance(rows, Tensor) else torch.cat(list(rows))).cpu() * 0",
            "test_pictures_show_the_samples_and_images_above_their_reconstructions",
        ),
    ),
    *mutations_of(
        "jobs/launched_ranks.py",
        "jobs/test_launchers.py",
        (
            "any number of ranks",
            "if devices * nodes != self.world or per_node != [devices]:",
            "if devices < 1:",
            "test_ranks_that_the_trainer_does_not_count_are_refused",
        ),
        (
            "a job script waits for ranks",
            'int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:',
            '"SLURM_NTASKS" not in os.environ:',
            "test_a_job_script_without_srun_waits_for_nobody",
        ),
    ),
)


def copy_tree(target: Path) -> None:
    """Copy the files that git tracks, or would track, to `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: tuple[str, ...], seconds: int = SECONDS) -> tuple[bool, str]:
    """Run the named tests in `tree`, in a separate process.

    Returns:
        Whether they passed, and the last lines of pytest's output.

    Raises:
        RuntimeError: If pytest cannot find or run them.
    """
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        process = PROCESSES.Process(target=run_pytest, args=(str(tree), tests, log.name))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            return False, f"more than {seconds} s"
        output = "\n".join(log.read().strip().splitlines()[-15:])
    if process.exitcode not in (0, 1):
        raise RuntimeError(f"pytest cannot run {' '.join(tests)}:\n{output}")
    return process.exitcode == 0, output


def run_pytest(tree: str, tests: tuple[str, ...], log: str) -> None:
    """Run pytest in this process, with its output in `log`, and exit with its status."""
    import pytest

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    # Import the mutated copy and not the installed package, here and in subprocesses.
    sys.path.insert(0, tree)
    # COLD_PYTHON: preloading modules for the tests' processes costs more than it saves here.
    os.environ.update(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE="1", COLD_PYTHON="1")
    sys.dont_write_bytecode = True
    nodes = [f"tests/{test}" for test in tests]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *nodes]))


class Outcome(NamedTuple):
    """What became of a mutation."""

    mutation: Mutation
    caught: bool
    words: str
    seconds: float


def try_mutations(mutations: list[Mutation], tree: Path, console: Console) -> list[Outcome]:
    """Try each mutation in `tree` and print a table of the outcomes.

    Raises:
        RuntimeError: If the tests fail without any mutation.
    """
    tests = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    passed, output = run_tests(tree, tests, WHOLE)
    if not passed:
        raise RuntimeError(f"the tests fail before any mutation:\n{output}")
    table = Table("mutation", "outcome", "seconds", "tests")
    outcomes = []
    for mutation in mutations:
        start = time.perf_counter()
        text = mutation.apply(tree)
        try:
            passed, output = run_tests(tree, mutation.tests)
        finally:
            (tree / PACKAGE / mutation.file).write_text(text)
        seconds = time.perf_counter() - start
        words = "caught"
        if passed:
            words = f"survived: {mutation.survives or 'reason unknown'}"
        elif output.startswith("more than"):
            words = f"caught: {output}"
        console.print(f"{mutation.name}: {words} ({seconds:.0f} s)", highlight=False)
        outcomes.append(Outcome(mutation, not passed, words, seconds))
        table.add_row(mutation.name, words, f"{seconds:.0f}", "\n".join(mutation.tests))
    console.print(table)
    return outcomes


def count_survivors(outcomes: list[Outcome]) -> int:
    """Count the mutations that no test noticed."""
    return sum(not outcome.caught for outcome in outcomes)


def write_page(outcomes: list[Outcome], commit: str | None, path: Path) -> None:
    """Write the outcomes of all mutations of a commit as a page."""
    survived = count_survivors(outcomes)
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    lines = [
        "# Do the tests notice a wrong line?",
        "",
        "`uv run python experiments/mutations.py` breaks one line of the code at a time, runs the",
        f"tests that should fail, and writes this page. At commit {commit},",
        f"{len(outcomes) - survived} of {len(outcomes)} mutations were caught and {survived} "
        f"survived, in {minutes:.0f} minutes",
        f"with {os.cpu_count()} CPU threads and torch {version('torch')}.",
        "",
        "| mutation | outcome | tests |",
        "| --- | --- | --- |",
    ]
    for mutation, _, words, _ in outcomes:
        files = dict.fromkeys(test.partition("::")[0] for test in mutation.tests)
        tests = ", ".join(f"`{file}`" for file in files)
        lines.append(f"| {mutation.name} | {words} | {tests} |")
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run the mutations that the command line names, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="mutations whose name contains NAME"
    )
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.only or any(n in m.name for n in given.only)]
    console = Console()
    if given.list:
        for mutation in chosen:
            console.print(mutation.name, highlight=False)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        # Not at the top: the processes that run the tests import this file first, and would then
        # have the package itself instead of the mutated copy.
        from vqvae_lightning.runs.results import find_commit

        commit = find_commit()
        try:
            outcomes = try_mutations(chosen, tree, console)
        except (RuntimeError, ValueError) as error:
            console.print(f"error: {error}", highlight=False, markup=False)
            return 1
    survived = count_survivors(outcomes)
    console.print(f"{len(outcomes) - survived} of {len(outcomes)} caught")
    if chosen == list(MUTATIONS):
        write_page(outcomes, commit, PAGE)
    return int(survived > MOST_SURVIVORS)


if __name__ == "__main__":
    sys.exit(main())
