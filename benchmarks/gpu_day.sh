#!/bin/bash
# All figures of one GPU in six minutes, without a network: gpu_day.sh OUT
#
# Parts run one after the other, each a command of its own with a limit of its own: what is too slow
# or fails loses its own figures only. OUT/results.json has what every part has found, OUT/*.log what
# it printed. Needs jax with CUDA, torch, transformers and this repository's requirements; packages
# that are missing are installed from the wheels in WHEELS, beside the others:
#
#   pip download --no-deps --only-binary=:all: -d wheels diffusers datasets dill multiprocess tensorboardX
#   WHEELS=wheels benchmarks/gpu_day.sh OUT
#
# PARTS chooses some of them, LIMIT shortens all (seconds). Rehearsal without a GPU, minutes long:
#
#   DEVICE=cpu benchmarks/gpu_day.sh OUT
set -uo pipefail
mkdir -p "$1"
out=$(realpath "$1") here=$(realpath "$(dirname "$0")")
work=${WORK:-$out/work} total=${TOTAL:-360}
if [ "${DEVICE:-cuda}" = cuda ]; then
  small=(--model sd15 --dtype bfloat16) large=(--model sdxl --dtype bfloat16)
  few="1 4 8" pack=4 many=16 images="1 4" steps=10 rounds=5 fleet=16 updates=200
else
  export JAX_PLATFORMS=cpu
  small=(--model "${MODEL:-tiny-sd}") large=(--model "${LARGE_MODEL:-tiny-sd}")
  few="2 1" pack=2 many=3 images=1 steps=1 rounds=1 fleet=2 updates=2
fi
mkdir -p "$work"
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # PyTorch has the same card
export JAX_COMPILATION_CACHE_DIR=$work/xla  # a program of two parts is compiled once
python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$work/site
fi
cd "$here" || exit

wanted() { [[ " ${PARTS:-$1} " = *" $1 "* ]]; }
part() {  # NAME SECONDS COMMAND...
  local name=$1 limit=${LIMIT:-$2} left=$((total - SECONDS)) before=$SECONDS code
  shift 2
  wanted "$name" || return 0
  rm -f "$out/$name.json"
  if [ "$left" -lt 5 ]; then echo "$name: no time is left" | tee "$out/$name.log"; code=124
  else
    timeout -k 5 "$(awk "BEGIN { print $limit < $left ? $limit : $left }")" "$@" >"$out/$name.log" 2>&1
    code=$?
  fi
  echo "$name $code $((SECONDS - before))" | tee -a "$work/parts.txt"
}
rm -f "$work/parts.txt"
# without recomputation four concepts of Stable Diffusion 1.5 take 130 GiB
step=("$python" bench_step.py --work "$work" --steps "$steps" --rounds "$rounds" --recompute attention)

if wanted large && [ "${DEVICE:-cuda}" = cuda ]; then  # 7 GB of random weights, written beside what comes first
  timeout "$total" nice "$python" -c 'import sys, pathlib, random_models as m; m.write_random_sdxl(pathlib.Path(sys.argv[1]))' \
    "$work/sdxl" >"$out/weights.log" 2>&1 &
fi
part step 140 "${step[@]}" "${small[@]}" --concepts $few --out "$out/step.json"
part images 60 "$python" bench_generate.py --work "$work" "${small[@]}" --images $images \
  --steps $((steps * 5 / 2)) --rounds "$rounds" --out "$out/images.json"
part kernels 40 "${step[@]}" "${small[@]}" --concepts "$pack" --alone --profile --out "$out/kernels.json"
part many 50 "${step[@]}" "${small[@]}" --concepts "$many" --alone --out "$out/many.json"
part fleet 80 "$python" bench_fleet.py "$work/fleet" --counts "$fleet" --steps "$updates" --peers 1 \
  --results "$out/fleet.json"
part compiled 90 "${step[@]}" "${small[@]}" --concepts "$pack" --compile --out "$out/compiled.json"
wait
part large 100 "${step[@]}" "${large[@]}" --concepts 1 --alone --out "$out/large.json"

"$python" - "$out" "$work/parts.txt" <<'PYTHON'
import json, pathlib, sys

out, found = pathlib.Path(sys.argv[1]), {}
for line in pathlib.Path(sys.argv[2]).read_text().splitlines():
    name, code, seconds = line.split()
    file = out / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else None
    found[name] = {"exit_code": int(code), "seconds": int(seconds), "results": results}
(out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
print(f"{out}/results.json:", *(f"{name}: {part['exit_code']}" for name, part in found.items()))
PYTHON
