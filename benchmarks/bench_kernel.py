"""The compiler's schedule of our attention kernel and of splash attention: ``bench_kernel.py OUT``.

Compiles forward and backward of self-attention for TPUs that are not here, lets libtpu write the
final schedules of the kernels, and counts the instruction bundles one head executes: those of a
loop's body as often as it runs. A bundle takes a cycle unless something is waited for, so this is a
lower bound of the time; both kernels are counted in the same way. Splash attention comes with JAX;
its settings here are the fastest of those that were tried (fused backward
pass, blocks of 1024, positions in the lanes of its inputs).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from machine import write_results

RESULTS = Path(__file__).parent / "results" / "kernel.json"
SHAPES = ((4096, 40), (1024, 80), (9216, 64))
CHIPS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")
HEADS, BLOCK, FORWARD_QUERIES, SPLASH_BLOCK = 8, 512, 1024, 1024
_BUNDLE = re.compile(r"\s*0x[0-9a-f]+[^:{]*: (>*) *\{")


def compile_kernel(kernel: str, chip: str, positions: int, head_dim: int) -> None:
    """In a process of its own: libtpu reads where to write when it is loaded."""
    import jax
    import jax.numpy as jnp

    from catversion_jax.models.layers.attention_pallas import transposed_attention
    from catversion_jax.runtime.sharding import replicated
    from catversion_jax.training.planning.chips import parse_slice
    from catversion_jax.training.planning.compiled import tpu_mesh

    if kernel == "ours":
        shape = (HEADS, head_dim, positions)

        def attend(*arrays: jax.Array) -> jax.Array:
            return transposed_attention(*arrays, head_dim**-0.5)
    else:
        shape = (HEADS, positions, head_dim)
        attend = splash(positions)
    sharding = replicated(tpu_mesh(parse_slice(chip)))

    def both(*arrays: jax.Array) -> tuple:
        out, pull = jax.vjp(attend, *arrays[:3])
        return out, pull(arrays[3])

    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)] * 4
    jax.jit(both).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def splash(positions: int):  # noqa: ANN201
    """JAX's kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    lanes = kernel.QKVLayout.SEQ_MINOR
    block = SPLASH_BLOCK
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=splash_backward_block(positions),
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
        q_layout=lanes,
        k_layout=lanes,
        v_layout=lanes,
    )
    mask = masks.MultiHeadMask([masks.FullMask((positions, positions))] * HEADS)
    return kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def splash_backward_block(positions: int) -> int:
    """Keys of one program of its backward pass."""
    return 2 * SPLASH_BLOCK if positions % (2 * SPLASH_BLOCK) == 0 else SPLASH_BLOCK


def bundles(path: Path) -> tuple[int, int]:
    """Bundles of a final schedule: in the loop over the grid, and in the first loop within it."""
    depths = [len(m[1]) for m in map(_BUNDLE.match, path.read_text().splitlines()) if m]
    if 2 not in depths:
        return depths.count(1), 0
    first = depths.index(2)
    ends = [i for i in range(first, len(depths)) if depths[i] == 0]
    return depths.count(1), depths[first : ends[0] if ends else None].count(2)


def executed(kernel: str, is_backward: bool, positions: int, outer: int, inner: int) -> int:
    """Bundles of one head. Further loops of ours are the way round a bound that is too high; their
    bundles outside of loops are counted.
    """
    if kernel == "ours":
        programs = positions // (BLOCK if is_backward else FORWARD_QUERIES)
        return programs * (outer + positions // BLOCK * inner)
    keys = splash_backward_block(positions) if is_backward else SPLASH_BLOCK
    return (positions // SPLASH_BLOCK) * (positions // keys) * outer


def main() -> None:
    """Compile everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="receives the schedules, 20 MB each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kernel, chip, *shape = args.one
        compile_kernel(kernel, chip, *map(int, shape))
        return
    rows: dict[str, dict[str, int]] = {}
    if args.results.is_file():
        rows = json.loads(args.results.read_text())["bundles_of_a_head"]
    for chip in CHIPS:
        for positions, head_dim in SHAPES:
            for kernel in ("ours", "splash"):
                words = [kernel, chip, str(positions), str(head_dim)]
                if " ".join(words) in rows:
                    continue
                dump = args.out / "-".join(words).replace(":", "_")
                shutil.rmtree(dump, ignore_errors=True)  # of another run
                env = {
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
                }
                command = [sys.executable, __file__, str(args.out), "--one", *words]
                if subprocess.run(command, env=env, capture_output=True).returncode:
                    rows[" ".join(words)] = {}
                    continue
                row = rows.setdefault(" ".join(words), {})
                for path in dump.glob("*final_bundles.txt"):
                    part = re.search(r"attention_(forward|backward)|mha_(fwd|dkv)", path.name)
                    if part is None or "schedule-analysis" in path.name:
                        continue
                    is_backward = (part[1] or part[2]) in ("backward", "dkv")
                    name = "backward" if is_backward else "forward"
                    row[name] = executed(kernel, is_backward, positions, *bundles(path))
                print(" ".join(words), row, flush=True)
                write_results(args.results, {"bundles_of_a_head": rows})
    print("| chip, positions, head dim | ours, forward + backward | splash | splash / ours |")
    print("| --- | ---: | ---: | ---: |")
    for name, row in rows.items():
        other = rows.get(name.replace("ours", "splash"), {})
        if name.startswith("ours") and len(row) == 2:
            total, peer = sum(row.values()), sum(other.values())
            shown = f"{peer:,}" if len(other) == 2 else "does not compile"
            ratio = f"{peer / total:.2f}" if len(other) == 2 else ""
            parts = f"{row['forward']:,} + {row['backward']:,}"
            print(f"| {name[5:]} | {parts} | {shown} | {ratio} |")


if __name__ == "__main__":
    main()
