#!/usr/bin/env bash
# `catversion serve` on one Cloud TPU host; concepts, pictures and jobs are on a disk that outlives it.
#   bash configs/launch/serve_tpu.sh      and, while it runs, http://127.0.0.1:8188 on this machine (through SSH, so without keys)
# Needs: gcloud, logged in, with a project chosen.
# Machine: TYPE; v5litepod-1 is one chip of 16 GB, -4 and -8 are more of them on one host. Cost: chips x hours x the price of a chip
#   hour, and the disk's; it runs until you stop it.
# Edit: the variables below, or set them in the environment.
# Result: the disk NAME-state. A host that is taken away is made again and the server goes on with what it had promised.
# Ctrl-C ends the server in order and leaves the host and the disk: delete both when you are done.
set -euo pipefail

NAME=${NAME:-catversion-serve}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-1}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
MODEL=${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}
OPTIONS=${OPTIONS:-}     # of catversion serve, for example "--rows 8 --batch_size 4"
DISK_GB=${DISK_GB:-100}
WAIT=${WAIT:-300}        # seconds before a host that is not to be had is asked for again

slice() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

make_disk() {
  gcloud compute disks describe "$NAME-state" --zone="$ZONE" >/dev/null 2>&1 ||
    gcloud compute disks create "$NAME-state" --zone="$ZONE" --size="${DISK_GB}GB"
}

make_host() {
  slice create --accelerator-type="$TYPE" --version="$RUNTIME" \
    --data-disk="source=projects/$(gcloud config get-value project)/zones/$ZONE/disks/$NAME-state,mode=read-write"
}

set_up() {
  git archive --format=tar.gz --output=/tmp/catversion.tar.gz HEAD
  gcloud compute tpus tpu-vm scp /tmp/catversion.tar.gz "$NAME": --zone="$ZONE"
  slice ssh --command="set -e
    disk=/dev/disk/by-id/google-persistent-disk-1
    sudo blkid \$disk || sudo mkfs.ext4 -q \$disk
    sudo mkdir -p /mnt/state && (mountpoint -q /mnt/state || sudo mount \$disk /mnt/state) && sudo chown \$USER /mnt/state
    mkdir -p catversion && tar -xzf catversion.tar.gz -C catversion && cd catversion
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --python 3.12
    ~/.local/bin/uv pip install -e '.[tpu,serve]'"
}

# Exit codes: 0 ended in order, 2 wrong options, anything else: go on. The terminal (-tt) takes the server along when it is lost.
serve() {
  slice ssh --command="cd catversion && . .venv/bin/activate
    catversion serve --model $MODEL --output_dir /mnt/state/server $OPTIONS
    code=\$?; echo \"ended with \$code\"; [ \$code = 0 ]" \
    -- -tt -L 8188:127.0.0.1:8188 2>&1 | tee /tmp/catversion-serve.log
}

make_disk
while true; do
  state=$(slice describe --format='value(state)' 2>/dev/null || true)
  if [[ $state != READY ]]; then
    [[ -z $state ]] || slice delete --quiet
    make_host || { sleep "$WAIT"; continue; }
    set_up || continue
  fi
  if serve; then break; fi
  if grep -q "ended with 2" /tmp/catversion-serve.log; then
    echo "the options are wrong, see above; the host is still there" >&2
    exit 2
  fi
  sleep $((WAIT < 10 ? WAIT : 10))
done
