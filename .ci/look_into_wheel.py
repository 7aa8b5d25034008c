"""What a wheel must hold, and nothing else: ``python .ci/look_into_wheel.py WHEEL``."""

import subprocess
import sys
import zipfile
from pathlib import Path

MOST_BYTES = 30_000_000
"""Of the wheel; tiny-sd and its examples are nearly all of it."""


def expected_files() -> set[str]:
    """The package's files as git knows them; ``assets/configs`` is a link in the repository."""

    def tracked(folder: str) -> set[str]:
        listed = subprocess.run(["git", "ls-files", "-z", folder], check=True, capture_output=True)
        return {name for name in listed.stdout.decode().split("\0") if name}

    link = "catversion_jax/assets/configs"
    configs = {f"catversion_jax/assets/{name}" for name in tracked("configs")}
    return (tracked("catversion_jax") - {link}) | configs


def main(wheel: Path) -> int:
    """Print the size; 1 if the files are not the expected ones or too large."""
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info.file_size for info in archive.infolist()}
    of_package = {name for name in files if ".dist-info/" not in name}
    problems = [f"missing: {name}" for name in sorted(expected_files() - of_package)]
    problems += [
        f"not from the repository: {name}" for name in sorted(of_package - expected_files())
    ]
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        problems.append(f"{size} bytes: more than {MOST_BYTES}")
    print(f"{wheel.name}: {len(of_package)} files, {size / 1e6:.1f} MB")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
