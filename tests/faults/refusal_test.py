# SPDX-License-Identifier: Apache-2.0
"""Faults 6, 15, 16 and 18: what cannot work is refused in one line, at once, and leaves no trace.

`WRONG` goes through the launcher's own code in one process that forks (see `forked.py`); a dozen of
them go through the launcher as users start it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from attnjax import recipe
from attnjax.errors import RecipeError

ENVIRONMENT = "environment.json"
LIMIT = 10.0
"""Seconds within which a mistake must be reported."""

CONFIG = "--config=tests/faults/tiny.py"
DIGITS = "--config=configs/crossvit/digits.py"
FOLDER = "--config=configs/crossvit/image_folder.py"

# Changes of the tiny recipe (or, if they bring their own --config, of that one) and what the line
# must say: the field, and what would be right.
WRONG = [
    # Misspelt.
    ("--config.stepz=5", "stepz: unknown; did you mean 'steps'?"),
    ("--config.optim.lrr=1", "optim.lrr: unknown; did you mean 'lr'?"),
    ("--config.model.num_head=4", "model.num_head: unknown; did you mean 'num_heads'?"),
    ("--config.model.dimms=(8,16)", "model.dimms: unknown; did you mean 'dims'?"),
    ("--config.task.label_smooth=0.1", "task.label_smooth: unknown; did you mean 'label_sm"),
    ("--config.data.sorce.name=x", "data.sorce.name: unknown; did you mean 'source'?"),
    ("--config.data.source.sed=3", "data.source.sed: unknown; did you mean 'seed'?"),
    ("--config.mesh.tensor=2", "mesh.tensor: unknown; (known: context, data, fsdp, model)"),
    (f"{DIGITS} --config.evals.tset.every=3", "evals.tset.every: unknown; did you mean 'test'?"),
    ("--workdri=x", "workdri'. Did you mean: workdir ?"),
    # No such choice.
    ("--config.optim.name=adamm", "optim.name='adamm': did you mean 'adamw'?"),
    ("--config.optim.decay=cosin", "optim.decay='cosin': did you mean 'cosine'?"),
    ("--config.model.name=crossvitt", "model 'crossvitt': did you mean 'crossvit'?"),
    ("--config.model.preset=tinyy", "model.preset: unknown preset 'tinyy' of crossvit: did"),
    ("--config.model.fusion=crosss", "fusion='crosss': did you mean 'cross'?"),
    ("--config.model.stem=patch", "stem='patch': did you mean 'patches'?"),
    ("--config.model.dtype=float99", "model crossvit: data type 'float99' not understood"),
    ("--config.task.name=clasification", "task 'clasification': did you mean 'classification'?"),
    ("--config.data.source.name=digitz", "source 'digitz': did you mean 'digits'?"),
    ("--config.data.pipeline.name=array", "pipeline 'array': did you mean 'arrays'?"),
    ("--config.data.source.split=trian", "data.source.split='trian': did you mean 'train'?"),
    ("--config.checkpoint.best=val/accuracy", "checkpoint.best='val/accuracy' is no evaluation"),
    (f"{DIGITS}:crosss", "unknown variant 'crosss': did you mean 'cross'?"),
    ("--config=configs/crossvit/digit.py", "no config file 'configs/crossvit/digit.py': did"),
    ("--config=README.md", "config file 'README.md' is no Python file"),
    ("--config=tests/faults/conftest.py", "conftest.py defines no get_config(variant)"),
    ("--resume=maybe", "--resume=maybe: value should be one of <auto|force|never>"),
    # Wrong type.
    ("--config.steps=ten", "--config.steps=ten: invalid literal for int"),
    ("--config.seed=1.5", "--config.seed=1.5: invalid literal for int"),
    ("--config.optim.lr=fast", "--config.optim.lr=fast: could not convert string to float"),
    ("--config.model.num_classes=many", "--config.model.num_classes=many: invalid literal for int"),
    ("--config.model.dims=16", "dims=(16,): needs one entry per branch"),
    ("--hang_timeout=soon", "--hang_timeout=soon: could not convert string to float"),
    # Out of range.
    ("--config.steps=0", "steps=0: must be at least 1"),
    ("--config.batch=0", "batch=0: must be at least 1"),
    ("--config.optim.lr=-1", "optim.lr=-1.0: must be above 0"),
    ("--config.optim.ema=1.5", "optim.ema=1.5: must be in [0, 1)"),
    ("--config.optim.beta1=2.0", "optim.beta1=2.0: must be in [0, 1)"),
    ("--config.optim.clip=-1", "optim.clip=-1.0: must be >= 0"),
    ("--config.optim.accumulate=0", "optim.accumulate=0: must be at least 1"),
    ("--config.optim.no_decay=('[',)", "optim.no_decay: '[' is no pattern"),
    ("--config.optim.warmup=10 --config.optim.cooldown=10", "cooldown=20: must be at most steps"),
    ("--config.model.drop_path=2.0", "drop_path=2.0: must be in [0, 1)"),
    ("--config.model.depth=((1,1),)", "depth=((1, 1),): each entry is (fine, coarse, fusion)"),
    ("--config.task.label_smoothing=1.5", "task.label_smoothing=1.5 is out of range"),
    ("--config.task.mixup=0.5", "task.mixup and task.cutmix need an input called 'image'"),
    ("--config.data.workers=-1", "data.workers=-1: must be at least 0"),
    ("--config.data.prefetch=0", "data.prefetch=0: must be at least 1"),
    ("--config.data.repeats=0", "data.repeats=0: must be at least 1"),
    ("--config.data.source.size=0", "data.source.size=0: must be at least 1"),
    ("--config.checkpoint.every=0", "checkpoint.every=0: must be at least 1"),
    ("--config.checkpoint.keep=0", "checkpoint.keep=0: must be at least 1"),
    ("--config.guard.patience=0", "guard.patience=0: must be at least 1"),
    ("--config.guard.spike_sigma=-1.0", "guard.spike_sigma=-1.0: must be at least 0"),
    ("--config.report.every=0", "report.every=0: must be at least 1"),
    (f"{DIGITS} --config.evals.test.every=-1", "evals.test.every=-1: must be at least 0"),
    # Not divisible.
    ("--config.batch=17", "batch=17: must be a multiple of optim.accumulate (2)"),
    ("--config.batch=24 --cpu_devices=8", "batch=24: must be a multiple of mesh.data * mesh.fsdp"),
    (f"{DIGITS} --config.evals.test.batch=63 --cpu_devices=2",
     "evals.test.batch=63: must be a multiple of mesh.data * mesh.fsdp = 2"),
    ("--config.mesh.data=3 --cpu_devices=4", "mesh={'data': 3, 'fsdp': 1, 'model': 1, "),
    ("--config.mesh.fsdp=-1", "at most one axis of -1"),
    ("--config.mesh.model=0", "mesh.model=0: must be at least 1, or -1 for the rest"),
    ("--config.model.num_heads=(3,4)", "num_heads=3 of the fine branch does not divide dims=16"),
    ("--config.model.image_size=(18,16)", "patch_size=4 of the fine branch does not divide 18"),
    ("--config.model.patch_size=(5,8)", "patch_size=5 of the fine branch does not divide 16"),
    # Data and model, or files, that do not fit.
    ("--config.model.image_size=(32,32)",
     "'fine' is float32[16, 16, 48], but the model expects float32[16, 64, 48]"),
    (f"{DIGITS} --config.data.pipeline.size=32",
     "'image' is float32[64, 32, 32, 3], but the model expects float32[64, 48, 48, 3]"),
    ("--config.model.num_classes=1", "model.num_classes=1 does not fit this data"),
    ("--config.model.weights=none.safetensors", "weights none.safetensors cannot be read"),
    (f"{FOLDER} --config.evals.val.data.source.root=none",
     "evals.val.data.source.root='none': no folder none/val, expected none/val/<class>/<image>"),
    ("--config=configs/crossvit/imagenet.py", "prepare it once with tfds.builder('imagenet2012'"),
    ("--workdir=/proc/none/run", "workdir /proc/none/run cannot be written"),
    ("--workdir=README.md", "workdir README.md is not a folder"),
    ("--workdir=README.md/run", "workdir README.md/run cannot be written"),
    ("--coordinator=localhost:1", "give all three, with 0 <= process_id < process_count"),
]  # fmt: skip

# Requests on a finished run of the tiny recipe, by how its directory was changed first.
TAKEN = [
    ("as it is", "--config.optim.lr=0.5", 2, "optim.lr: 0.001 != 0.5"),
    ("as it is", "--resume=never", 2, "already holds a run; choose another"),
    ("as it is", "--config.model.dims=(16,64) --resume=force", 2,
     "checkpoints/12 does not fit this recipe: "),
    ("bad recipe.json", "", 2, "recipe.json cannot be read: recipe is not valid JSON"),
    ("import path", "", 2, "model.name: 'os:system' != 'crossvit'"),
    ("all damaged", "", 4, "no usable checkpoint in "),
]  # fmt: skip


# These go through the launcher itself as well, with all its imports.
LAUNCHED = [
    "--config.stepz=5",
    "--config.steps=ten",
    "--config.model.preset=tinyy",
    "--config.model.num_heads=(3,4)",
    "--config.mesh.data=3 --cpu_devices=4",
    "--workdir=/proc/none/run",
    f"{DIGITS}:crosss",
    f"{DIGITS} --config.data.pipeline.size=32",
    f"{FOLDER} --config.evals.val.data.source.root=none",
    ("as it is", "--config.model.dims=(16,64) --resume=force"),
]


def command(workdir, flags):
    own = flags.split()
    given = {flag.partition("=")[0] for flag in own}
    defaults = {"--config": CONFIG, "--workdir": f"--workdir={workdir}"}
    return [*(flag for name, flag in defaults.items() if name not in given), *own]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory, taken):
    """Run all commands: flags -> (exit code, lines on stderr, seconds)."""
    workdir = tmp_path_factory.mktemp("refused") / "run"
    commands = {flags: command(workdir, flags) for flags, _ in WRONG}
    commands |= {(kind, flags): command(taken[kind][0], flags) for kind, flags, *_ in TAKEN}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.forked"],
        input=json.dumps(list(commands.values())),
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    results = map(json.loads, done.stdout.splitlines())
    found = {
        key: (r["code"], r["errors"].splitlines(), r["seconds"])
        for key, r in zip(commands, results, strict=True)
    }
    slowest = max(found, key=lambda key: found[key][2])
    total = sum(seconds for *_, seconds in found.values())
    print(f"{len(found)} refusals in {total:.1f} s, slowest {found[slowest][2]:.2f} s: {slowest}")
    yield found
    assert not workdir.parent.exists() or not list(workdir.parent.iterdir())


@pytest.fixture(scope="module")
def taken(tmp_path_factory, finished):
    """Copies of a finished run, some of them spoilt: kind -> (directory, its contents)."""
    folder = tmp_path_factory.mktemp("taken")
    kinds = {kind: folder / kind.replace(" ", "_") for kind, *_ in TAKEN}
    for workdir in kinds.values():
        shutil.copytree(finished, workdir)
    (kinds["bad recipe.json"] / "recipe.json").write_text('{"seed": 1,')
    record = kinds["import path"] / "recipe.json"
    record.write_text(record.read_text().replace('"crossvit"', '"os:system"'))
    for run in kinds["all damaged"].glob("checkpoints/*/run/metadata"):
        run.write_bytes(run.read_bytes()[:-20])
    return {kind: (workdir, contents(workdir)) for kind, workdir in kinds.items()}


def assert_one_line(answer, code, words):
    got, lines, seconds = answer
    assert got == code, lines
    (line,) = lines
    assert line.startswith("error: ") and words in line
    assert seconds < LIMIT


@pytest.mark.parametrize(("flags", "words"), WRONG)
def test_mistake_is_refused(answers, flags, words):
    assert_one_line(answers[flags], 2, words)


@pytest.mark.parametrize(("kind", "flags", "code", "words"), TAKEN)
def test_directory_is_refused(answers, kind, flags, code, words):
    assert_one_line(answers[kind, flags], code, words)


def test_refused_directories_are_as_they_were(answers, taken):
    for kind, (workdir, before) in taken.items():
        after = contents(workdir)
        if kind == "all damaged":  # Another start is on record; of the rest nothing is lost.
            del before[ENVIRONMENT], after[ENVIRONMENT]
        assert before == after, kind


@pytest.mark.parametrize("key", LAUNCHED, ids=str)
def test_launcher_says_the_same(start, answers, taken, tmp_path, key):
    kind, flags = key if isinstance(key, tuple) else (None, key)
    workdir = taken[kind][0] if kind else tmp_path / "run"
    begin = time.monotonic()
    run = start(None, *command(workdir, flags), config=None)
    code = run.finish(LIMIT)
    print(f"{time.monotonic() - begin:.1f} s")
    assert (code, run.errors.splitlines()) == answers[key][:2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nfrom attnjax.recipe import Recipes\n", ":2: ImportError: cannot import name"),
        ("def get_config(variant):\n    y = 1\n    return yy\n", ":3: NameError: name 'yy'"),
        ("def get_config(variant:\n", r":1: SyntaxError: '\(' was never closed"),
        (
            "def get_config(variant):\n    return {}\n",
            "get_config returned dict, expected a Recipe",
        ),
    ],
)
def test_an_error_in_a_config_file_names_its_line(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(RecipeError, match=rf"mine\.py{message}|mine\.py: {message}"):
        recipe.load(str(file))


@pytest.mark.parametrize("name", ["os:system", "attnjax.models.crossvit:CrossViT", "posixpath"])
@pytest.mark.parametrize("part", ["model", "task", "data.source", "data.pipeline"])
def test_a_recorded_recipe_names_no_import_path(part, name):
    values = recipe.load("tests/faults/tiny.py").to_dict()
    *parents, last = part.split(".")
    node = values[parents[0]] if parents else values
    node[last]["name"] = name
    with pytest.raises(RecipeError, match=f"unknown {last} '{name}': .*known: "):
        recipe.Recipe.from_json(json.dumps(values)).validate()


def test_enough_mistakes():
    assert len({flags for flags, _ in WRONG}) >= 40
