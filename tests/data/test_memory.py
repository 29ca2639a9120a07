"""How much memory is available, and how much a run will need."""

from types import SimpleNamespace

import pytest
from conftest import TINY_VQVAE, compose

from vqvae_lightning.devices import measure_available_memory
from vqvae_lightning.errors import InputError
from vqvae_lightning.stages import preflight
from vqvae_lightning.stages.inputs import load_images
from vqvae_lightning.stages.pipeline import check_stages, compose_stages

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """Writes the files of a machine below a folder: 8 GiB available, and the given files."""

    def write(**files):
        given = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  8388608 kB\nHugePages_Total: 0\n"}
        for name, text in (given | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def group_v2(folder, limit, used, cache=0):
    place = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {
        f"{place}/memory.max": f"{limit}\n",
        f"{place}/memory.current": f"{used}\n",
        f"{place}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def group_v1(folder, limit, used, cache=0):
    place = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{place}/memory.limit_in_bytes": f"{limit}\n",
        f"{place}/memory.usage_in_bytes": f"{used}\n",
        f"{place}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cache}\n",
    }


V2 = {"proc/self/cgroup": "0::/slurm/job_7/step_0\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        (V2 | group_v2("slurm/job_7/step_0", 3 * GIB, GIB), 2 * GIB),
        (V2 | group_v2("slurm/job_7/step_0", "max", GIB), 8 * GIB),
        (
            V2 | group_v2("slurm/job_7/step_0", "max", GIB) | group_v2("slurm", 4 * GIB, GIB),
            3 * GIB,
        ),
        (V2 | group_v2("slurm/job_7", 2 * GIB, GIB) | group_v2("slurm", 4 * GIB, GIB), GIB),
        (V2 | group_v2("slurm/job_7", 9 * GIB, 0), 8 * GIB),
        (V2 | group_v2("slurm/job_7", 3 * GIB, 3 * GIB, cache=GIB), GIB),
        (V2 | group_v2("slurm/job_8", GIB, 0), 8 * GIB),
        ({"proc/self/cgroup": "0::/\n"} | group_v2("", 3 * GIB, GIB), 2 * GIB),
        (V2 | group_v2("", 2 * GIB, GIB), GIB),  # the path is that on the host
        ({"proc/self/cgroup": "0::/../other\n"} | group_v2("", 2 * GIB, GIB), GIB),
        (V2 | group_v2("slurm", GIB, 2 * GIB), 0),
        (V1 | group_v1("docker/abc", 3 * GIB, GIB), 2 * GIB),
        (V1 | group_v1("docker", 3 * GIB, 2 * GIB, cache=GIB), 2 * GIB),
        (V1 | group_v1("", 2**63 - 4096, GIB), 8 * GIB),
        (V1 | group_v1("other", GIB, 0), 8 * GIB),
        ({"proc/self/cgroup": "0::/a\n"} | group_v2("unified/a", 3 * GIB, GIB), 2 * GIB),
    ],
)
def test_available_memory_is_the_least_that_machine_and_control_groups_leave(
    files, expected, machine
):
    assert measure_available_memory(machine(**files)) == expected


def test_a_system_without_these_files_is_assumed_to_have_16_gib(tmp_path):
    assert measure_available_memory(tmp_path) == 16 * GIB


def surveys(folder, *overrides):
    """The surveys of both stages of a pipeline of tiny networks."""
    small = [option for option in TINY_VQVAE if not option.startswith("trainer=")]
    cfg = compose("pipeline", "experiment=smoke", *small, *overrides, folder=folder)
    configs = compose_stages(cfg)
    return check_stages(cfg, configs, load_images(configs["vqvae"].dataset))


def memory(survey):
    """Bytes that a stage needs on a device, as its survey reports them."""
    number, unit = survey.facts["memory"].split()[:2]
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_the_logits_of_a_priors_validation_are_counted(toy, tmp_path, monkeypatch):
    # Logits and log probabilities in float32, for the 30 images of 3x2 codes of the larger split.
    logits = 2 * 30 * 3 * 2 * 4096 * 4
    wide = ("model.net.quantizer.num_codes=4096", "prior.batch_size=1", *toy)
    one, all_ = (
        surveys(tmp_path, *wide, f"dataset.eval_batch_size={size}")["prior"] for size in (1, 1000)
    )
    assert 0.8 * logits < memory(all_) - memory(one) < logits
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: round(memory(all_) * 0.99))
    warnings = surveys(tmp_path, *wide, "dataset.eval_batch_size=1000")["prior"].warnings
    assert any("choose a smaller dataset.eval_batch_size" in warning for warning in warnings)


def test_mapped_images_that_memory_cannot_hold_are_a_warning(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_measure_room", lambda *_: (2**40, "anywhere"))
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: 43_000)
    (warning,) = surveys(tmp_path, *toy)["vqvae"].warnings
    assert "the images take 43.2 kB, but this machine has 43 kB left" in warning


def test_the_vectors_that_initialize_the_codebook_are_counted(toy, tmp_path, monkeypatch):
    wide = ("model.net.quantizer.code_dim=500", *toy)  # 16 codes with 16 vectors for each
    without, counted = (
        surveys(tmp_path, *wide, f"model.net.quantizer.init={init}")["vqvae"]
        for init in ("uniform", "kmeans")
    )
    gathered = 16 * 16 * (500 * 4 + 8)
    assert memory(counted) - memory(without) == pytest.approx(gathered, rel=0.02)
    # Enough for these vectors in four checkpoints, but not for the rest of the checkpoints.
    free = SimpleNamespace(free=4 * gathered)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="4 checkpoints of"):
        surveys(tmp_path, *wide, "model.net.quantizer.init=kmeans")


def test_the_images_are_counted_once_per_rank(toy, tmp_path, monkeypatch):
    pixels = (96 + 24 + 30) * 12 * 8 * 3
    mapped = surveys(tmp_path, *toy)["vqvae"]
    assert f"{pixels / 1e3:.3g} kB mapped from a file" in mapped.facts["data"]
    # No folder can be written to.
    monkeypatch.setattr("vqvae_lightning.data.mapped._list_folders", lambda *_: [])
    survey = surveys(tmp_path, *toy)["vqvae"]
    assert f"{pixels / 1e3:.3g} kB in memory" in survey.facts["data"]
    three = (*toy, "trainer.devices=3", "dataset.batch_size=33", "prior.batch_size=33")
    assert surveys(tmp_path, *three)["vqvae"].warnings == []
    # This process has loaded its images; the other two need 86 kB together.
    monkeypatch.setattr(preflight, "_measure_room", lambda *_: (2**40, "anywhere"))
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: 2 * pixels)
    assert surveys(tmp_path, *three)["vqvae"].warnings == []
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: 2 * pixels - 1)
    (warning,) = surveys(tmp_path, *three)["vqvae"].warnings
    assert "the images take 43.2 kB in each of 3 processes" in warning
