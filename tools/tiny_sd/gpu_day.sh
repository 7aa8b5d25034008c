#!/bin/bash
# The whole training on one GPU, eight minutes: gpu_day.sh WORK OUT [START]
#
# WORK holds sprites.npz and sprites.json (sprites.py; 1.2 MB). START is the tiny-sd folder whose
# averages training begins with, the shipped one by default. OUT gets the new folder as parts of at
# most 15 MB (cat OUT/tiny-sd.tgz.* | tar xz) and a log. Needs torch, transformers, diffusers and
# this repository's requirements, no network; wheels in WHEELS are installed beside. PARTS=pool only
# composes the pictures, which needs no GPU and is done once.
#
# Rehearsal without a GPU, a hundredth of the length:
#   DEVICE=cpu COUNT=4500 EARLY_MINUTES=0.015 UNET_MINUTES=0.05 BATCH=16 gpu_day.sh WORK OUT
set -euo pipefail
work=$(realpath "$1") out=$(realpath -m "$2")
here=$(realpath "$(dirname "$0")")
start=$(realpath "${3:-$here/../../catversion_jax/assets/tiny-sd}")
device=${DEVICE:-cuda} count=${COUNT:-240000} loaders=${LOADERS:-$(($(nproc) / 2))}
early=${EARLY_MINUTES:-1.5} late=${UNET_MINUTES:-4.5} batch=${BATCH:-1024}
export OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
exec > >(tee -a "$out/log.txt") 2>&1
say() { echo "$(date +%T) $*"; }

if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install -q --no-index --no-deps --upgrade --target "$work/site" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$work/site
fi
cd "$here"
if [ ! -e "$work/pool.done" ]; then
  say "$count pictures"
  python3 pool.py "$work" --count "$count"
  python3 stages_of.py "$work" "$start"
  touch "$work/pool.done"
fi
[ "${PARTS:-}" != pool ] || exit 0

# The denoiser is compiled while the other stages train, on pictures of its own; where that fails it
# trains uncompiled.
denoiser=(--device "$device" --batch "$batch")
mkdir -p "$work/compiling/pool"
cp -r "$work"/sprites.* "$work"/*.start.pt "$work/clip" "$work/tokenizer" "$work/compiling"
python3 -c 'import sys, numpy
for name in ("images", "labels"):
    numpy.save(f"{sys.argv[2]}/{name}.npy", numpy.load(f"{sys.argv[1]}/{name}.npy", mmap_mode="r")[-4500:])' \
  "$work/pool" "$work/compiling/pool"
timeout 150 python3 train_unet.py "$work/compiling" "${denoiser[@]}" --compile 1 --steps 3 \
  >"$out/compiling.txt" 2>&1 & compiling=$!

say "VAE and CLIP side by side, $early minutes"
python3 train_vae.py "$work" --device "$device" --minutes "$early" --batch $((batch / 4)) --lr 1e-3 & vae=$!
python3 train_clip.py "$work" --device "$device" --minutes "$early" --batch $((batch / 2)) --lr 5e-4 \
  --loaders $((loaders / 2)) & clip=$!
wait $vae || say "the VAE stays as far as it came"
wait $clip || say "CLIP stays as it was"
compiled=1
wait $compiling || { compiled=0; say "not compiled: $(tail -n 1 "$out/compiling.txt")"; }
say "denoiser, $late minutes, compiled: $compiled"
python3 train_unet.py "$work" "${denoiser[@]}" --loaders "$loaders" --minutes "$late" --lr 1e-3 \
  --compile "$compiled" \
  || { stopped=1; say "the denoiser stopped early"; }
say "packaging"
python3 package.py "$work" "$work/tiny-sd"
tar cz -C "$work" tiny-sd | split -b 15M - "$out/tiny-sd.tgz."
say "done"; ls -l "$out"
exit "${stopped:-0}"
