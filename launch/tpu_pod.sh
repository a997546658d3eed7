#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on a Cloud TPU VM or pod slice, one process per host. Run from the root of the clone:
#
#   launch/tpu_pod.sh my-pod us-east5-a configs/crossvit/imagenet.py:18-dagger /mnt/shared/runs/a
#
# More arguments go to launch.train. Copies the last commit to every host, installs it there (hosts
# need Python >= 3.11) and starts the same command everywhere; the hosts find each other. The run
# folder and the data must be on a file system that all hosts mount at the same place (Filestore, or
# a bucket through gcsfuse).
# Exit code 3: the hosts were asked to stop and saved; run the same command again to continue.
set -euo pipefail

usage="usage: launch/tpu_pod.sh TPU ZONE CONFIG WORKDIR [--config.a.b=value ...]"
tpu=${1:?$usage}
zone=${2:?$usage}
config=${3:?$usage}
workdir=${4:?$usage}
shift 4

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$1"
}

folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
git archive --output="$folder/attnjax.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$folder/attnjax.tar.gz" "$tpu": --zone="$zone" --worker=all
on_all_hosts "mkdir -p attnjax && tar -xzf attnjax.tar.gz -C attnjax"
on_all_hosts "make -C attnjax setup EXTRAS=tpu"

arguments=$(printf ' %q' --config="$config" --workdir="$workdir" --hang_timeout=1800 "$@")
on_all_hosts "cd attnjax && exec .venv/bin/python -m launch.train$arguments"
