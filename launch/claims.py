# SPDX-License-Identifier: Apache-2.0
"""Measure a paper's claim against its baseline: python -m launch.claims --system=<slug>

Progress goes to stderr; the last line on stdout is the JSON record, which is also appended to the
results file. Exit codes: 0 the claim holds, 6 it was measured and does not hold, 2 bad arguments.
"""

import json
import pathlib
import sys

from absl import flags

from attnjax.errors import CLAIM_MISSED, RecipeError
from launch import command

SYSTEM = flags.DEFINE_string("system", None, "Slug of the system; see launch.systems.")
SEEDS = flags.DEFINE_integer("seeds", 0, "Number of seeds; 0: what the claim asks for (3).")
OUT = flags.DEFINE_string("out", "", "JSON-lines file to append to; empty: configs/results.jsonl.")


def results_file() -> pathlib.Path:
    """Return the file to append to, after checking that it can be written.

    Raises:
      RecipeError: it cannot, or there is no clone that has a results file of its own.
    """
    from attnjax import catalog

    if not OUT.value and catalog.installed():
        raise RecipeError("--out is missing: the results file of an installed package stays as is")
    path = pathlib.Path(OUT.value) if OUT.value else catalog.results_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise RecipeError(f"--out={path} cannot be written: {error}") from error
    return path


def main() -> int:
    from attnjax import catalog, claim

    if not SYSTEM.value:
        raise RecipeError("--system is missing; claims: " + ", ".join(catalog.with_claims()))
    if SEEDS.value < 0:
        raise RecipeError(f"--seeds={SEEDS.value}: must be at least 1")
    claim.load(SYSTEM.value).validate()
    out = results_file()
    command.start_devices("", 0, -1, 0)
    from attnjax.train.claim import measure

    record = measure(
        SYSTEM.value,
        SEEDS.value,
        command="python -m launch.claims " + " ".join(sys.argv[1:]),
        say=command.say,
    )
    command.append(out, record)
    print(json.dumps(record))
    return 0 if record["holds"] else CLAIM_MISSED


if __name__ == "__main__":
    command.run(main)
