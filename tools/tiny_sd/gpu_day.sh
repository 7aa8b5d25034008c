#!/bin/bash
# The whole training on one GPU, eight minutes: gpu_day.sh WORK OUT [START]
#
# WORK holds sprites.npz and sprites.json (sprites.py; 1.2 MB). START is the tiny-sd folder whose
# averages training begins with, the shipped one by default. OUT gets the new folder as parts of at
# most 15 MB (cat OUT/tiny-sd.tgz.* | tar xz), the judge and a log. Needs torch, transformers,
# diffusers and this repository's requirements, no network; wheels in WHEELS are installed beside.
#
# Rehearsal without a GPU, a hundredth of the length:
#   DEVICE=cpu COUNT=4500 EARLY_MINUTES=0.015 UNET_MINUTES=0.05 BATCH=16 gpu_day.sh WORK OUT
set -euo pipefail
work=$(realpath "$1") out=$(realpath -m "$2")
here=$(realpath "$(dirname "$0")")
start=$(realpath "${3:-$here/../../catversion_jax/assets/tiny-sd}")
device=${DEVICE:-cuda} count=${COUNT:-150000} loaders=${LOADERS:-$(($(nproc) / 2))}
early=${EARLY_MINUTES:-1.5} late=${UNET_MINUTES:-4.5} batch=${BATCH:-1024}
export OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
say() { echo "$(date +%T) $*"; }

if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install -q --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$work/site
fi
cd "$here"
[ -e "$work/pool/labels.npy" ] || { say "$count pictures"; python3 pool.py "$work" --count "$count"; }
python3 stages_of.py "$work" "$start"
say "VAE, CLIP and judge side by side, $early minutes"
on_device=(--device "$device" --minutes "$early")
python3 train_vae.py "$work" "${on_device[@]}" --batch $((batch / 4)) --lr 1e-3 & vae=$!
python3 train_clip.py "$work" "${on_device[@]}" --batch $((batch / 2)) --lr 5e-4 \
  --loaders $((loaders / 2)) & clip=$!
python3 train_judge.py "$work" "${on_device[@]}" --batch $((batch / 4)) & judge=$!
wait $vae; wait $clip; wait $judge
say "denoiser, $late minutes"
python3 train_unet.py "$work" --device "$device" --minutes "$late" --batch "$batch" --loaders "$loaders"
python3 package.py "$work" "$work/tiny-sd"
tar cz -C "$work" tiny-sd | split -b 15M - "$out/tiny-sd.tgz."
cp "$work/judge.ema.pt" "$out/"
say "done"; ls -l "$out"
