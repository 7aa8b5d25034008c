#!/usr/bin/env bash
# A list of concepts on a Cloud TPU slice, one process on every host.
#   bash configs/launch/tpu_vm.sh
# Needs: gcloud, logged in; the photos in gs://BUCKET/concepts (a folder for each concept, with its concept.json,
#   or folders and a list of them: CONCEPTS=concepts/products.csv).
# Machine: TYPE; v5litepod-16 is 16 chips on 4 hosts. Cost: chips x hours x the price of a chip hour, spot less than on demand;
#   catversion plan --config configs/sd15.yaml --tpu v5e:4x4 --concepts N --price-per-chip-hour P    says how much before you pay.
# Edit: the variables below, or set them in the environment. Result: gs://BUCKET/runs/NAME, one file per concept.
# A preempted slice is made again and the run goes on; the slice is deleted when all is done. Ctrl-C leaves it running: delete it then.
set -euo pipefail

NAME=${NAME:-catversion}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
BUCKET=${BUCKET:?set BUCKET to the name of your bucket}
CONFIG=${CONFIG:-configs/sd15.yaml}
CONCEPTS=${CONCEPTS:-concepts}
WAIT=${WAIT:-300} # seconds before a slice that is not to be had is asked for again

slice() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on_all_hosts() { slice ssh --worker=all --command="$1"; }

set_up() {
  git archive --format=tar.gz --output=/tmp/catversion.tar.gz HEAD
  gcloud compute tpus tpu-vm scp /tmp/catversion.tar.gz "$NAME": --zone="$ZONE" --worker=all
  on_all_hosts "set -e
    mkdir -p catversion && tar -xzf catversion.tar.gz -C catversion && cd catversion
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --python 3.12
    ~/.local/bin/uv pip install -e '.[tpu,gcs]'
    gcloud storage cp --recursive gs://$BUCKET/concepts ."
}

# Exit codes: 0 done (concepts that were given up included), 2 wrong options, anything else: go on.
train() {
  on_all_hosts "cd catversion && . .venv/bin/activate
    python train_tpu.py --config $CONFIG concepts=$CONCEPTS output_dir=gs://$BUCKET/runs/$NAME quarantine_exit_code=0
    code=\$?; echo \"ended with \$code\"; [ \$code = 0 ]" 2>&1 | tee /tmp/catversion.log
}

while true; do
  state=$(slice describe --format='value(state)' 2>/dev/null || true)
  if [[ $state != READY ]]; then
    [[ -z $state ]] || slice delete --quiet
    slice create --accelerator-type="$TYPE" --version="$RUNTIME" --spot || { sleep "$WAIT"; continue; }
    set_up || continue
  fi
  if train; then break; fi
  if grep -q "ended with 2" /tmp/catversion.log; then
    echo "the options are wrong, see above; the slice is still there" >&2
    exit 2
  fi
done
slice delete --quiet
