# SPDX-License-Identifier: Apache-2.0
"""List every system, its presets, recipes, claim and status: python -m launch.systems [--json]"""

import dataclasses
import json
import pathlib

from absl import flags

from attnjax.errors import RecipeError
from launch import command

JSON = flags.DEFINE_bool("json", False, "Print a JSON list instead of text.")
README = flags.DEFINE_bool("readme", False, "Rewrite the table of systems in ./README.md.")


def main() -> None:
    from attnjax import catalog

    if README.value:
        path = pathlib.Path("README.md")
        if not path.is_file():
            raise RecipeError("README.md is not here; run this in the root of a clone")
        path.write_text(catalog.fill_readme(path.read_text()))
        return
    rows = catalog.rows()
    if JSON.value:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        print(f"{row.slug} ({row.kind}): {row.title}")
        for name, value in (
            ("paper", row.paper),
            ("presets", ", ".join(row.presets)),
            ("recipes", ", ".join(row.recipes)),
            ("claim", row.claim),
            ("status", ", ".join(row.status)),
            ("measured", row.result),
        ):
            if value:
                print(f"  {name:9}{value}")


if __name__ == "__main__":
    command.run(main)
