"""Write ``integrations/comfyui/loader/``: the files of ``catversion_jax/integrations/`` that the
nodes for ComfyUI need, as they are but for their imports of each other.

    python tools/comfyui/copy_loader.py

The nodes run where the package is not installed, so they bring these files along.
``tests/test_comfyui_files.py`` fails where one differs.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "catversion_jax" / "integrations"
COPIES = ROOT / "integrations" / "comfyui" / "loader"
NAMES = ("loaded_concept.py", "shared_softmax.py", "word_places.py", "weights_sha256.py")


def copied(name: str) -> str:
    """What the copy of one file says."""
    text = (ROOM / name).read_text(encoding="utf-8")
    return text.replace("from catversion_jax.integrations.", "from .")


if __name__ == "__main__":
    for name in NAMES:
        (COPIES / name).write_text(copied(name), encoding="utf-8")
