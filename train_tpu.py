"""Train many concepts at once: ``python train_tpu.py --config configs/quickstart.yaml [key=value
...]``.

The same as ``catversion train``; ``python train_tpu.py --help`` lists every option.
"""

import sys

from catversion_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
