# SPDX-License-Identifier: Apache-2.0
"""What the README says is true: its table, its commands, its code."""

import pathlib
import re

import pytest

from attnjax import catalog, recipe

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def test_table_of_systems_is_current():
    assert catalog.fill_readme(README) == README, "run: python -m launch.systems --readme"


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_block_runs(code, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    if "print(" in code:
        assert capsys.readouterr().out.strip()


def test_commands_name_things_that_exist():
    commands = [
        line.strip()
        for text in blocks("bash")
        for line in re.sub(r"\\\n\s*", "", text).splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    assert commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        for module in re.findall(r"python -m launch\.(\w+)", command):
            assert (ROOT / f"launch/{module}.py").is_file(), command
        for target in re.findall(r"^make ([a-z-]+)", command):
            assert target in targets, command
        for script in re.findall(r"launch/[\w.]+\.(?:sh|sbatch|yaml)", command):
            assert (ROOT / script).is_file(), command
        for config in re.findall(r"--config=(configs/[\w/]+\.py(?::[\w,-]+)?)", command):
            recipe.load(config).validate()


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#\s]+)\)", README):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / target).exists(), target


def test_picture_is_small():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 150_000


def test_exit_codes_are_those_of_the_library():
    from attnjax import errors

    listed = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    kinds = [errors.AttnjaxError, *errors.AttnjaxError.__subclasses__()]
    assert listed == {errors.DONE, errors.CLAIM_MISSED} | {kind.exit_code for kind in kinds}
