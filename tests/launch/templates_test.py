# SPDX-License-Identifier: Apache-2.0
"""The cluster templates parse, and say what the launchers understand."""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from attnjax import errors, recipe

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = [LAUNCH / "slurm.sbatch", LAUNCH / "tpu_pod.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_without_arguments_says_how_to_use_it(script):
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage:" in done.stderr


def test_slurm_asks_for_one_process_per_gpu_and_queues_again_after_preemption():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    # Without "B:" the signal goes to the training processes, not to the batch shell.
    assert options["signal"].startswith("TERM@")
    assert f'"$code" -eq {errors.Preempted.exit_code}' in text
    assert "scontrol requeue" in text


def test_tpu_pod_passes_its_arguments_through(tmp_path):
    log = tmp_path / "log"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\n')
    gcloud.chmod(0o755)
    command = [LAUNCH / "tpu_pod.sh", "pod", "zone-a", "c.py:v", "/mnt/run 1", "--config.steps=3"]
    path = f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"
    (tmp_path / "git").write_text("#!/bin/sh\n")
    (tmp_path / "git").chmod(0o755)
    subprocess.run(command, env={"PATH": path}, check=True, cwd=LAUNCH.parent)
    last = log.read_text().splitlines()[-1]
    inner = last.partition("--command=")[2]
    arguments = shlex.split(inner)
    assert "--workdir=/mnt/run 1" in arguments
    assert {"--config=c.py:v", "--config.steps=3"} <= set(arguments)


def test_gke_job_restarts_after_preemption_only():
    import yaml

    service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert spec["completions"] == spec["parallelism"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    (container,) = pod["containers"]
    assert spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    # Kubernetes accepts exit code rules only with this.
    assert pod["restartPolicy"] == "Never"
    actions = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ())
    }
    assert actions == {
        errors.RecipeError.exit_code: "FailJob",
        errors.NoUsableCheckpoint.exit_code: "FailJob",
        errors.Diverged.exit_code: "FailJob",
        errors.Preempted.exit_code: "Ignore",
    }
    config = container["args"][0].removeprefix("--config=")
    recipe.load(config).validate()
