"""The README's first command, in a process of its own: the real configuration, fewer steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from running import COMPILATION_CACHE, ROOT, final_files, run_to_end, steps_of

from catversion_jax import load_concept
from catversion_jax.concepts import read_concepts


@pytest.mark.slow
def test_the_first_command_trains_evaluates_and_names_its_report(tmp_path: Path) -> None:
    output, prompts = tmp_path / "catversion-out", tmp_path / "prompts.txt"
    prompts.write_text("a {} on the beach")
    shorter = {
        "max_train_steps": 2,
        "eval_steps": 2,
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "validation_inference_steps": 1,
        "num_eval_samples": 1,
        "evaluation_prompts": prompts,
        "output_dir": output,
        "compilation_cache_dir": COMPILATION_CACHE,
    }
    given = [f"{key}={value}" for key, value in shorter.items()]
    text = run_to_end(["--config", str(ROOT / "configs" / "quickstart.yaml"), *given])
    examples = {spec.name: spec for spec in read_concepts("tiny-sd-examples").concepts}
    assert f"{len(examples)} concepts in {output / 'concepts'}" in text
    assert steps_of(output) == dict.fromkeys(sorted(examples), 2)
    for name, spec in examples.items():
        concept = load_concept(output / "concepts" / name)
        assert concept.base_class == spec.base_class
        assert concept.base_model == "tiny-sd"
        assert concept.learned.scope == "from_class_word"
        assert concept.learned.key.shape[1] == 4
        assert np.isfinite(concept.learned.value).all()
        assert len(list((output / "concepts" / name / "samples").glob("*.png"))) == 1
    assert text.splitlines()[-1] == str(output / "report.html")
    page = (output / "report.html").read_text()
    assert all(name in page for name in examples)
    assert "on the beach" in page
    assert len({*final_files(output).values()}) == len(examples)
    assert json.loads((output / "run.json").read_text())["base_model"] == "tiny-sd"
