"""Checkpoints, run folders and data run no code that the user does not trust."""

import io
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_VQVAE, compose
from omegaconf import OmegaConf
from PIL import Image

from vqvae_lightning.callbacks import checkpoints as callbacks
from vqvae_lightning.checkpoints import load
from vqvae_lightning.configs import CONF_DIR, read_trusted
from vqvae_lightning.data.shards.index import scan_shard
from vqvae_lightning.data.shards.read import View, read_shard
from vqvae_lightning.data.sources.folder import ImageFolderSource
from vqvae_lightning.data.sources.npz import NpzSource
from vqvae_lightning.errors import InputError
from vqvae_lightning.stages.training import train
from vqvae_lightning.trust import RUNS, Trust, find_foreign


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return Path.touch, (self.ran,)


@pytest.fixture
def attack(tmp_path, monkeypatch):
    """Return a function from an attack's name to its config, and fail if an attack has run."""
    place = tmp_path / "attack"
    (place / "victim").mkdir(parents=True)
    ran = place / "ran"
    touch = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    for name in ("hubconf", "script", "evil_package"):
        (place / f"{name}.py").write_text(f"{touch}\ndef made(*a, **k): ...\n")
    (place / "payload.pkl").write_bytes(pickle.dumps(Payload(ran)))
    np.save(place / "payload.npy", np.array([Payload(ran)]), allow_pickle=True)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("EVIL", "vqvae_lightning.commands.app.os.system")
    run = {
        "_target_": "vqvae_lightning.jobs.local_ranks.subprocess.run",
        "args": ["touch", str(ran)],
    }
    configs = {
        "torch.load": {"f": str(place / "payload.pkl"), "weights_only": False},
        "torch.hub.load": {"repo_or_dir": str(place), "model": "made", "source": "local"},
        "vqvae_lightning.files.write_text": {
            "path": {"_target_": "vqvae_lightning.runs.results.Path", "_args_": [str(ran)]},
            "text": "",
        },
        "vqvae_lightning.jobs.local_ranks.subprocess.run": run,
        "vqvae_lightning.stages.sharding.shutil.rmtree": {"path": str(place / "victim")},
        "vqvae_lightning.commands.app.os.system": {"command": f"touch {ran}"},
        # Code that runs on import, a well-known library, positional arguments, a target that a
        # resolver spells out, and one that is nested in an argument of an allowed class.
        "evil_package.made": {},
        "numpy.load": {"file": str(place / "payload.npy"), "allow_pickle": True},
        "runpy.run_path": {"_args_": [str(place / "script.py")]},
        "${oc.env:EVIL}": {"command": f"touch {ran}"},
        "subprocess.run": {
            "_target_": "vqvae_lightning.data.ImageDataModule",
            "source": [[{"deep": {**run, "_partial_": False}}]],
        },
    }
    yield lambda name: {"_target_": name, **configs[name]}
    sys.modules.pop("evil_package", None)
    assert not ran.exists(), "it ran"
    assert (place / "victim").is_dir(), "it ran"


ATTACKS = (
    "torch.load",
    "torch.hub.load",
    "vqvae_lightning.files.write_text",
    "vqvae_lightning.jobs.local_ranks.subprocess.run",
    "vqvae_lightning.stages.sharding.shutil.rmtree",
    "vqvae_lightning.commands.app.os.system",
    "evil_package.made",
    "numpy.load",
    "runpy.run_path",
    "${oc.env:EVIL}",
    "subprocess.run",
)


@pytest.fixture(scope="module")
def trained(toy_npz, tmp_path_factory):
    """Train two tiny runs in the folders `vqvae` and `prior`."""
    folder = tmp_path_factory.mktemp("trained")
    toy = ("dataset=npz", f"dataset.source.path={toy_npz}")
    train(compose("vqvae", *toy, *TINY_VQVAE, folder=folder / "vqvae"))
    tiny = ("trainer=debug", "model.net.channels=8", "model.net.layers=2", "batch_size=8")
    given = f"vqvae_checkpoint={folder}/vqvae/checkpoints/best.ckpt"
    train(compose("prior", *toy, *tiny, given, folder=folder / "prior"))
    return folder


def evil_copy(path, change, where):
    """Copy a checkpoint and change its config."""
    raw = torch.load(path, weights_only=True)
    change(raw["hyper_parameters"])
    torch.save(raw, where)
    return where


def evil_run(folder, config_name, change, toy, *overrides):
    """Write the folder of a run that has only begun, with a changed config."""
    cfg = compose(config_name, *toy, *overrides, folder=folder)
    value = OmegaConf.to_container(cfg, resolve=True)
    value["command"] = {"vqvae": "vqvae-train"}.get(config_name, f"vqvae-{config_name}")
    change(value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(value))
    return folder


DOORS = ("sample", "evaluate", "reconstruct", "train", "prior", "pipeline", "stage of pipeline")


def through(number, door, name):
    """Try each attack on one command, so that every command is tried; `-m slow` tries all pairs."""
    quick = number % len(DOORS) == DOORS.index(door)
    return pytest.param(door, name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("door", "name"),
    [through(number, door, name) for door in DOORS for number, name in enumerate(ATTACKS)],
)
def test_no_command_runs_what_a_file_names(door, name, attack, trained, toy, tmp_path, command):
    def change(config):
        config["dataset"] = attack(name)

    begun = tmp_path / "begun"
    if door == "train":
        evil_run(begun, "vqvae", change, toy)
        outcome = command("vqvae-train", f"resume={begun}")
    elif door == "pipeline":
        evil_run(begun, "pipeline", change, toy)
        outcome = command("vqvae-pipeline", f"resume={begun}")
    elif door == "stage of pipeline":
        evil_run(begun, "pipeline", lambda config: None, toy)
        evil_run(begun / "vqvae", "vqvae", change, toy)
        outcome = command("vqvae-pipeline", f"resume={begun}")
    else:
        best = trained / "vqvae/checkpoints/best.ckpt"
        given = [f"vqvae_checkpoint={evil_copy(best, change, tmp_path / 'evil.ckpt')}"]
        if door == "sample":
            given += [f"prior_checkpoint={trained}/prior/checkpoints/best.ckpt", "complete=test"]
        words = ["vqvae-train", "--config-name=prior"] if door == "prior" else [f"vqvae-{door}"]
        outcome = command(*words, *given)
    assert outcome.status == 1
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert name in outcome.err
    assert "refused" in outcome.err


@pytest.mark.parametrize("name", ATTACKS)
def test_no_network_is_built_by_what_a_checkpoint_names(name, attack, trained, tmp_path):
    for inside in ("net", "quantizer", "levels"):

        def change(config, inside=inside):
            net = config["model"]["net"]
            if inside == "net":
                config["model"]["net"] = attack(name)
            elif inside == "quantizer":
                net["quantizer"] = attack(name)
            else:
                net["quantizer"]["options"] = {"levels": (8, [attack(name)])}

        best = trained / "vqvae/checkpoints/best.ckpt"
        with pytest.raises(InputError, match="refused"):
            load(evil_copy(best, change, tmp_path / "evil.ckpt"))


def test_every_part_of_a_stored_config_is_read(attack, toy, tmp_path):
    def configs(node, path=()):
        for key, child in node.items():
            if isinstance(child, dict):
                yield (*path, key)
                yield from configs(child, (*path, key))

    cfg = compose("pipeline", *toy, folder=tmp_path)
    whole = OmegaConf.to_container(cfg, resolve=True)
    Trust("it", table=RUNS).read(whole)
    places = list(configs(whole))
    assert len(places) > 30
    for *above, last in places:
        evil = OmegaConf.to_container(cfg, resolve=True)
        node = evil
        for key in above:
            node = node[key]
        node[last] = attack("vqvae_lightning.commands.app.os.system")
        with pytest.raises(InputError, match=r"app\.os\.system"):
            Trust("it").read(evil)


@pytest.mark.parametrize("door", ["vqvae-train", "vqvae-pipeline", "vqvae-report"])
def test_a_yaml_tag_is_refused_in_one_line(door, tmp_path, command, monkeypatch):
    from vqvae_lightning.commands.report import main as report

    ran = tmp_path / "ran"
    (tmp_path / "sweep/0").mkdir(parents=True)
    evil = tmp_path / "sweep/0/config.yaml"
    evil.write_text(f"folder: {evil.parent}\ncommand: !!python/object/apply:os.mkdir [{ran}]\n")
    if door == "vqvae-report":
        monkeypatch.setattr(sys, "argv", [door, str(tmp_path / "sweep")])
        with pytest.raises(SystemExit) as exit_:
            report()
        status, said = 1, str(exit_.value)  # Python prints it
        assert isinstance(exit_.value.code, str)
    else:
        status, _, said, _ = command(door, f"resume={evil.parent}")
    assert status == 1
    assert len(said.strip().splitlines()) == 1, said
    assert str(evil) in said
    assert "python/object/apply:os.mkdir" in said
    assert not ran.exists()


def test_every_option_of_conf_is_in_the_table(tmp_path):
    # Otherwise a run could not be resumed without `trust`.
    for path in CONF_DIR.rglob("*.yaml"):
        if "hydra" not in path.relative_to(CONF_DIR).parts and "conf/run.yaml" not in str(path):
            text = path.read_text().replace("${", "")
            assert find_foreign(OmegaConf.to_container(OmegaConf.create(text))) == [], path


def test_names_of_one_object_are_one_member():
    wanted = Trust("it").read({"_target_": "vqvae_lightning.EMAQuantizer"}).target
    for alias in ("quantizers.EMAQuantizer", "quantizers.ema.EMAQuantizer"):
        assert Trust("it").read({"_target_": f"vqvae_lightning.{alias}"}).target is wanted
    for entry in RUNS:
        assert callable(Trust("it").read({"_target_": entry}).target)


def test_a_config_that_holds_itself_is_refused(trained, tmp_path):
    def change(config):
        config["model"]["net"]["quantizer"]["self"] = config["model"]["net"]

    with pytest.raises(InputError, match="never ends"):
        load(evil_copy(trained / "vqvae/checkpoints/best.ckpt", change, tmp_path / "evil.ckpt"))


def test_a_pickle_in_a_checkpoint_is_not_run(trained, tmp_path, command):
    ran = tmp_path / "ran"
    begun = tmp_path / "begun"
    shutil.copytree(trained / "vqvae", begun)
    (begun / "result.json").unlink()
    raw = torch.load(begun / "checkpoints/last.ckpt", weights_only=True)
    for name in ("best", "last"):
        torch.save({**raw, "loops": Payload(ran)}, begun / f"checkpoints/{name}.ckpt")
    resumed = command("vqvae-train", f"resume={begun}")
    rebuilt = command("vqvae-reconstruct", f"vqvae_checkpoint={begun}/checkpoints/best.ckpt")
    for outcome in (resumed, rebuilt):
        assert outcome.status == 1
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err
        assert "checkpoint" in outcome.err
    assert not ran.exists()


def test_a_resumed_run_removes_and_overwrites_checkpoints_only(tmp_path):
    # Lightning removes the files that the state of its checkpoint callback names.
    best = callbacks.BestCheckpoint(dirpath=tmp_path, monitor="val/nmse")
    names = {str(tmp_path / name): torch.tensor(1.0) for name in ("papers", "..", "best.ckpt")}
    state = {**best.state_dict(), "best_k_models": names, "kth_best_model_path": "papers"}
    best.load_state_dict(state)
    assert list(best.best_k_models) == [str(tmp_path / "best.ckpt")]
    assert best.kth_best_model_path == ""
    with pytest.raises(InputError, match=r"must end in \.ckpt"):
        callbacks.LastCheckpoint(str(tmp_path / "authorized_keys"))


@pytest.mark.parametrize("name", ["train_images", "train_labels", "class_names"])
def test_objects_in_an_npz_are_refused(name, toy_npz, tmp_path):
    ran = tmp_path / "ran"
    with np.load(toy_npz) as archive:
        arrays = dict(archive)
    arrays[name] = np.array([Payload(ran)], dtype=object)
    np.savez(tmp_path / "evil.npz", **arrays)
    with pytest.raises(InputError, match=r"evil\.npz.*allow_pickle"):
        NpzSource(str(tmp_path / "evil.npz")).load()
    assert not ran.exists()


def picture(format_, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(file, format_)
    return file.getvalue()


def shard(path, members):
    """Write a tar file of (name, contents) or (name, kind of link, target)."""
    with tarfile.open(path, "w") as tar:
        for name, *what in members:
            info = tarfile.TarInfo(name)
            if len(what) == 2:
                info.type, info.linkname = what
            else:
                info.size = len(what[0])
            tar.addfile(info, None if len(what) == 2 else io.BytesIO(what[0]))
    return str(path)


def test_names_in_a_shard_write_nowhere_and_links_are_not_followed(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(picture("PNG", (4, 4)))
    before = sorted(tmp_path.rglob("*"))
    names = (f"{tmp_path}/absolute", "../above", "a/../../above")
    url = shard(inside / "train-000000.tar", [(f"{name}.png", picture("PNG")) for name in names])
    found = scan_shard(url, View(None, grey=False))
    assert (found.images, found.shape) == (3, (3, 8, 8))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        link = ("key.png", kind, str(tmp_path / "secret.png"))
        url = shard(inside / "train-000000.tar", [link, ("key.cls", b"0")])
        assert [sample.get("png") for sample in read_shard(url)] == [None]
        with pytest.raises(InputError, match="sample key of shard"):
            scan_shard(url, View(None, grey=False))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, Path(url)])


@pytest.mark.parametrize("place", ["folder", "shard"])
def test_no_program_is_called_to_read_an_image(place, tmp_path, monkeypatch):
    # Pillow detects the format by content, so Ghostscript would run an EPS named .png.
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was called"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    if place == "folder":
        (tmp_path / "a.png").write_bytes(picture("EPS"))
        with pytest.raises(InputError, match=r"a\.png"):
            ImageFolderSource(str(tmp_path)).load()
    else:
        url = shard(tmp_path / "train-000000.tar", [("a.png", picture("EPS"))])
        with pytest.raises(InputError, match="sample a of shard"):
            scan_shard(url, View(None, grey=False))


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """Create a user's package with a quantizer and what it imports."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "my_package.py").write_text(
        "import os\nfrom vqvae_lightning.quantizers import EMAQuantizer\n"
        "class MyQuantizer(EMAQuantizer):\n    pass\n"
    )
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", str(place))  # for ranks
    yield "my_package"
    sys.modules.pop("my_package", None)


MINE = "model.net.quantizer._target_=my_package.MyQuantizer"


def test_a_quantizer_of_the_users_trains_and_loads_where_it_is_trusted(
    my_package, toy, tmp_path, command
):
    trained = command("vqvae-train", *toy, *TINY_VQVAE, MINE)
    assert trained.status == 0, trained.err
    best = trained.folder / "checkpoints/best.ckpt"
    stored = OmegaConf.load(trained.folder / "config.yaml")
    assert stored.foreign == [my_package]
    raw = torch.load(best, weights_only=True)
    assert raw["hyper_parameters"]["foreign"] == [my_package]

    sys.modules.pop("my_package")
    with pytest.raises(InputError) as refused:
        load(best)
    assert "trust=[my_package]" in str(refused.value)
    assert 'load(path, trust=["my_package"])' in str(refused.value)
    assert "my_package" not in sys.modules, "an import runs code"
    assert type(load(best, trust=["my_package"]).net.quantizer).__name__ == "MyQuantizer"

    (trained.folder / "result.json").unlink()
    given = f"vqvae_checkpoint={best}"
    for number, (name, option) in enumerate(
        [
            ("vqvae-reconstruct", given),
            ("vqvae-evaluate", given),
            ("vqvae-train", f"resume={trained.folder}"),
        ]
    ):
        without = command(name, option, folder=tmp_path / f"without{number}")
        assert without.status == 1
        assert len(without.err.strip().splitlines()) == 1, without.err
        assert "my_package.MyQuantizer" in without.err
        assert "trust=[my_package]" in without.err
        trusting = command(name, option, "trust=[my_package]", folder=tmp_path / f"with{number}")
        assert trusting.status == 0, trusting.err
    # A command that names the package trusts it.
    (trained.folder / "result.json").unlink()
    again = command("vqvae-train", *toy, *TINY_VQVAE, MINE, "resume=auto")
    assert again.status == 0, again.err


def test_a_trusted_package_stands_for_itself_only(my_package):
    with pytest.raises(InputError, match=r"trust=\[my_package,my_package\.os\.getcwd\]"):
        Trust("it", [my_package]).read({"_target_": "my_package.os.getcwd"})
    with pytest.raises(InputError, match="my_package"):
        Trust("it", ["my"]).read({"_target_": "my_package.MyQuantizer"})
    # torch loads pickles, so trusting the whole package is neither suggested nor enough.
    with pytest.raises(InputError, match=r"trust=\[torch\.load\]"):
        Trust("it").read({"_target_": "torch.load"})
    with pytest.raises(InputError, match=r"torch\.load"):
        Trust("it", ["torch"]).read({"_target_": "torch.load"})
    with pytest.raises(InputError, match=r"trust=os/system"):
        Trust("it", ["os/system"])


def test_a_file_cannot_trust_itself(my_package, toy, tmp_path):
    def change(config):
        config["trust"] = config["foreign"] = [my_package]
        config["model"]["net"]["quantizer"]["_target_"] = "my_package.MyQuantizer"

    folder = evil_run(tmp_path / "begun", "vqvae", change, toy)
    with pytest.raises(InputError, match="my_package"):
        read_trusted(folder / "config.yaml", [])
    assert read_trusted(folder / "config.yaml", [my_package])["trust"] == [my_package]


def test_the_ranks_of_a_command_trust_what_it_trusts(my_package, toy, tmp_path, monkeypatch):
    from vqvae_lightning.commands import worker

    cfg = compose("vqvae", *toy, *TINY_VQVAE, MINE, folder=tmp_path)
    path = evil_run(tmp_path, "vqvae", lambda config: None, toy, *TINY_VQVAE, MINE) / "config.yaml"
    ran = []
    monkeypatch.setattr(worker, "run", ran.append)
    monkeypatch.setattr(sys, "argv", ["worker", str(path)])
    with pytest.raises(InputError, match="my_package"):
        worker.main()
    monkeypatch.setattr(sys, "argv", ["worker", str(path), my_package])
    worker.main()
    assert ran[0].model == cfg.model


@pytest.mark.slow
def test_a_quantizer_of_the_users_trains_on_two_ranks(my_package, toy, command):
    two = ("trainer=ddp_cpu", "trainer.max_steps=2", "trainer.val_check_interval=2")
    tiny = [option for option in TINY_VQVAE if option != "trainer=debug"]
    outcome = command("vqvae-train", *toy, *tiny, *two, MINE)
    assert outcome.status == 0, outcome.err


def test_load_needs_neither_hydra_nor_lightning(trained):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {{"hydra", "omegaconf", "pytorch_lightning", "lightning_fabric"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from vqvae_lightning import load
net, config = load({str(trained / "vqvae/checkpoints/best.ckpt")!r})
images = torch.rand(2, 3, 12, 8) * 2 - 1
codes = net.encode(images)
assert codes.shape == (2, 3, 2), codes.shape
assert net.decode(codes).shape == images.shape
assert load({str(trained / "prior/checkpoints/best.ckpt")!r}, "prior").net.num_codes == 16
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
