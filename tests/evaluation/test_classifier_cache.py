"""The trained classifier of a data set is read from a file, and gives what training would give."""

import subprocess
import sys
from functools import partial

import evaluated
import pytest
import torch
from evaluated import CPU

from vqvae_lightning.checkpoints import hash_weights
from vqvae_lightning.data import ShardDataModule
from vqvae_lightning.evaluation import classifier_cache
from vqvae_lightning.evaluation.classifier import measure_with_classifier, train_classifier
from vqvae_lightning.evaluation.classifier_cache import fetch_classifier
from vqvae_lightning.networks.classifier import Classifier
from vqvae_lightning.runs.results import read_result
from vqvae_lightning.tasks import ClassifierTask

OPTIONS = {"accelerator": "cpu", "max_steps": 3, "precision": "32-true"}
CONFIG = {"lr": 0.02}


def make_task(seed=7):
    torch.manual_seed(seed)
    return ClassifierTask(Classifier(3, 3, hidden=4), lambda p: torch.optim.Adam(p, 0.02))


def fetch(folder, data=None, task=None, config=CONFIG, batch_size=20, **options):
    data = data or evaluated.make_image_data()
    return fetch_classifier(
        task or make_task(), data, config, {**OPTIONS, **options}, batch_size, str(folder), CPU
    )


@pytest.fixture
def trained(monkeypatch):
    """Count the trainings."""
    calls = []

    def count(*args):
        calls.append(args)
        return train_classifier(*args)

    monkeypatch.setattr(classifier_cache, "train_classifier", count)
    return calls


def test_a_stored_classifier_measures_what_a_trained_one_does(tmp_path, trained):
    codes = evaluated.make_codes_data(tmp_path / "codes")
    samples = torch.randint(0, 256, (40, 3, 16, 20), dtype=torch.uint8)
    measure = partial(measure_with_classifier, codes=codes, split="test", samples=samples)
    found = [
        measure(judge, labels=torch.arange(40) % 3, device=CPU)
        for judge in (
            train_classifier(make_task(), evaluated.make_image_data(), OPTIONS, 20),
            fetch(tmp_path),
            fetch(tmp_path),
        )
    ]
    assert len(trained) == 1
    assert found[0] == found[1] == found[2]


def test_another_recipe_or_other_data_are_trained(tmp_path, trained):
    flipped, ordered, changed = (evaluated.make_image_data() for _ in range(3))
    flipped.flip, ordered.seed, changed.fingerprint = True, 5, "0" * 16
    for number, change in enumerate(
        (
            {},
            {"task": make_task(8)},
            {"config": {"lr": 0.01}},
            {"batch_size": 19},
            {"max_steps": 4},
            {"precision": "bf16-mixed"},
            {"data": flipped},
            {"data": ordered},
            {"data": changed},
        ),
        1,
    ):
        fetch(tmp_path, **change)
        assert len(trained) == number, change
        assert len(list(tmp_path.iterdir())) == number


def test_the_recipe_has_all_code_that_decides_the_training():
    # The code of the order, dropout and scaling was once left out.
    data, task = evaluated.make_image_data(), make_task()
    data.flip = True
    used = set()

    def note(frame, event, argument):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("vqvae_lightning."):
            used.add(name)

    sys.setprofile(note)
    try:
        train_classifier(task, data, OPTIONS, 20)
    finally:
        sys.setprofile(None)
    harmless = {
        "callbacks.progress",
        "console",
        "devices",  # copies batches
        "distributed",  # one rank
        "errors",
    }
    covered = {module.__name__ for module in classifier_cache.MODULES}
    assert used == covered | {f"vqvae_lightning.{name}" for name in harmless}


def test_data_and_code_without_a_fingerprint_are_not_stored(tmp_path, trained):
    data = evaluated.make_image_data()
    fetch(tmp_path, data, config={"net": {"_target_": "my_package.Net"}})
    data.__class__ = type("Mine", (type(data),), {})  # its batches may be in any order
    fetch(tmp_path, data)
    assert not issubclass(ShardDataModule, classifier_cache.ImageDataModule)
    assert list(tmp_path.iterdir()) == []


def damage_start(path):
    path.write_bytes(b"no" + path.read_bytes()[2:])


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-300])


def damage_weights(path):
    stored = torch.load(path)
    stored["weights"]["head.bias"][0] += 1
    torch.save(stored, path)


def damage_recipe(path):
    torch.save({**torch.load(path), "recipe": "another"}, path)


def damage_shapes(path):
    stored = torch.load(path)
    stored["weights"]["head.weight"] = torch.zeros(9, 9)
    torch.save(stored, path)


def damage_pickle(path):
    torch.save({"weights": print}, path)


@pytest.mark.parametrize(
    "damage",
    [damage_start, damage_end, damage_weights, damage_recipe, damage_shapes, damage_pickle],
)
def test_a_damaged_file_is_replaced(damage, tmp_path, trained, capsys):
    wanted = hash_weights(fetch(tmp_path))
    (path,) = tmp_path.iterdir()
    damage(path)
    capsys.readouterr()
    assert hash_weights(fetch(tmp_path)) == wanted
    (line,) = capsys.readouterr().out.splitlines()
    assert f"classifier {path} is damaged, so it is trained again: " in line
    assert len(trained) == 2
    assert hash_weights(fetch(tmp_path)) == wanted
    assert len(trained) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_costs_only_the_training(tmp_path, trained, capsys):
    (tmp_path / "file").touch()
    assert hash_weights(fetch(tmp_path / "file")) == hash_weights(fetch(tmp_path))
    assert f"classifier_cache={tmp_path / 'file'} cannot be written to" in capsys.readouterr().out


@pytest.mark.slow  # both import torch anew
def test_two_processes_at_once_store_one_classifier(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/evaluation']; import torch\n"
        "torch.set_num_threads(int(sys.argv[2])); from test_classifier_cache import *\n"
        "print(hash_weights(fetch(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hashes = {process.communicate()[0].splitlines()[-1] for process in both}
    assert all(process.returncode == 0 for process in both)
    assert len(list(tmp_path.iterdir())) == 1
    assert hashes == {hash_weights(fetch(tmp_path))}


def test_runs_share_the_classifier_of_their_data(checkpoints, command, tmp_path):
    small = ("num_samples=12", "classifier_steps=2", "trainer.precision=32-true")
    prior = f"prior_checkpoint={checkpoints / 'prior/checkpoints/best.ckpt'}"
    given, results = "classifier_seed=3", []
    for number, extra in enumerate(
        (
            [],
            # Images that are encoded first draw random numbers before the classifier is built.
            [f"codes_dir={tmp_path / 'codes'}"],
            ["classifier_cache=null"],
            ["seed=1", given],
            ["seed=2", given],
        )
    ):
        folder = tmp_path / str(number)
        assert command("vqvae-evaluate", prior, *small, *extra, folder=folder).status == 0
        results.append(read_result(folder))
    assert results[0]["metrics"] == results[1]["metrics"] == results[2]["metrics"]
    hashes = [result["classifier"] for result in results]
    assert hashes[0] == hashes[1] == hashes[2]
    assert hashes[3] == hashes[4] != hashes[0]
    assert len(list((tmp_path / "data/classifiers").iterdir())) == 2
