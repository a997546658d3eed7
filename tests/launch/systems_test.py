# SPDX-License-Identifier: Apache-2.0
"""launch.systems lists what the registry holds."""

import json

from attnjax import catalog, registry


def test_json_lists_every_system(launch):
    done = launch("systems", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["slug"] for row in rows] == list(registry.SYSTEMS)
    fields = {"slug", "kind", "title", "presets", "recipes", "claim", "status"}
    assert all(fields <= set(row) for row in rows)


def test_text_names_presets_and_recipes(launch):
    text = launch("systems").stdout
    assert "18-dagger-384" in text
    assert "configs/crossvit/digits.py" in text


def test_readme_is_rewritten_here_and_only_here(launch, tmp_path):
    done = launch("systems", "--readme", cwd=tmp_path)
    assert done.returncode == 2
    assert "root of a clone" in done.stderr
    readme = tmp_path / "README.md"
    readme.write_text(f"{catalog.README_START}\nold\n{catalog.README_END}\n")
    assert launch("systems", "--readme", cwd=tmp_path).returncode == 0
    assert "`crossvit`" in readme.read_text()
