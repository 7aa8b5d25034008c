#!/usr/bin/env bash
# A list of concepts as a job on Google Kubernetes Engine, one process on every host of the slice.
#   bash configs/launch/gke_xpk.sh
# Needs: pip install xpk; a cluster (xpk cluster create --cluster CLUSTER --tpu-type v5litepod-16 --num-slices 1 --spot); Docker; the photos in
#   gs://BUCKET/concepts (a folder for each concept, with its concept.json,
#   or folders and a list of them: CONCEPTS=concepts/products.csv), and pods that may read and write the bucket.
# Machine: TYPE; v5litepod-16 is 16 chips on 4 hosts. Cost: chips x hours x the price of a chip hour, spot less than on demand;
#   catversion plan --config configs/sd15.yaml --tpu v5e:4x4 --concepts N --price-per-chip-hour P    says how much before you pay.
# Edit: the variables below, or set them in the environment. Result: gs://BUCKET/runs/NAME, one file per concept.
# Evicted pods save within the grace period and end with code 75, on which the job starts again where it was. Concepts that were given up
# (their FAILED.txt says why) do not make it a failed job: quarantine_exit_code=0.
# Without a cluster: bash configs/launch/gke_xpk.sh --dry-run --skip-validation    shows what would be submitted.
set -euo pipefail

NAME=${NAME:-catversion}
CLUSTER=${CLUSTER:?set CLUSTER to the name of your cluster}
PROJECT=${PROJECT:?set PROJECT to your project}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
BUCKET=${BUCKET:?set BUCKET to the name of your bucket}
CONFIG=${CONFIG:-configs/sd15.yaml}
CONCEPTS=${CONCEPTS:-concepts}
IMAGE=${IMAGE:-python:3.12} # with the package installed in it, starts are minutes faster

fetch="import fsspec; fsspec.filesystem('gs').get('$BUCKET/concepts', 'concepts', recursive=True)"
xpk workload create "$@" \
  --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --tpu-type="$TYPE" --spot \
  --base-docker-image="$IMAGE" --script-dir=. \
  --max-restarts=1000 --restart-on-exit-codes=75 --termination-grace-period-seconds=60 \
  --command="set -e; pip install -q -e .[tpu,gcs]; python -c \"$fetch\"; \
exec python train_tpu.py --config $CONFIG concepts=$CONCEPTS output_dir=gs://$BUCKET/runs/$NAME quarantine_exit_code=0"
