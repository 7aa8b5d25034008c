"""What a run writes, how often, and where."""

from __future__ import annotations

import dataclasses
from typing import Literal

from catversion_jax.config.options import Options, option


@dataclasses.dataclass(frozen=True)
class RecordingOptions(Options):
    """What is recorded."""

    output_dir: str = option(
        "catversion-out",
        "Folder that receives everything a run writes; it may lie in a bucket (gs://...).",
        decides_result=False,
    )
    logging_steps: int = option(
        10,
        "Number of steps between the rows of metrics.csv.",
        decides_result=False,
        at_least=1,
    )
    eval_steps: int = option(
        100,
        "Number of steps between evaluations of a concept's loss at fixed noise and fixed "
        "timesteps.",
        decides_result="with early_stop",
        at_least=1,
    )
    num_eval_samples: int = option(
        8,
        "Number of pairs of noise and timestep in the evaluation loss.",
        decides_result="with early_stop",
        at_least=1,
    )
    validation_prompt: tuple[str, ...] = option(
        ("a {base_class}", "a photo of a {base_class} on the beach"),
        "Prompts of the sample grids, in which {base_class} stands for the base class.",
        decides_result=False,
    )
    validation_steps: int | None = option(
        500,
        "Number of steps between sample grids (official); null draws none.",
        decides_result=False,
        at_least=1,
    )
    num_validation_images: int = option(
        2,
        "Number of seeds drawn for each prompt of the sample grids (diffusers: 4).",
        decides_result=False,
        at_least=1,
    )
    validation_inference_steps: int | None = option(
        None,
        "Number of steps in which a sample grid's images are drawn; null is 25 of DPM-Solver++ "
        "(diffusers), and for distilled models their own number and sampler.",
        decides_result=False,
        at_least=1,
    )
    validation_guidance_scale: float | None = option(
        None,
        "Classifier-free guidance scale of the images in sample grids; null is 7.5 (diffusers), "
        "and for distilled models their own.",
        decides_result=False,
        at_least=0.0,
    )
    validation_vae: str | None = option(
        None,
        "Folder of a tiny autoencoder (AutoencoderTiny: taesd, or taesdxl for XL) that decodes the "
        "sample grids in a fraction of the time; null takes the model's own.",
        decides_result=False,
    )
    checkpointing_steps: int = option(
        250,
        "Number of steps between Orbax checkpoints, from which an interrupted run continues "
        "(official).",
        decides_result=False,
        at_least=1,
    )
    checkpoints_total_limit: int = option(
        2,
        "Number of checkpoints that are kept; older ones are deleted.",
        decides_result=False,
        at_least=1,
    )
    resume_from_checkpoint: Literal["latest", "none"] = option(
        "latest",
        "What happens to a run that output_dir already holds: latest continues it, none refuses "
        "to write there.",
        decides_result=False,
    )
    retrain: Literal["none", "changed", "failed"] = option(
        "none",
        "Which finished concepts of output_dir are trained again: changed takes those whose "
        "images, masks, words or model are not what they were trained on, which none and failed "
        "refuse by name; failed takes those that fail the quality gate (catversion evaluate "
        "--gate), with retrain_factor times the updates.",
        decides_result=False,
    )
    retrain_factor: float = option(
        2.0,
        "How many times the updates after which it failed a concept gets with retrain=failed, from "
        "its start on (2: the next step where budgets double).",
        decides_result=False,  # the concept files name their updates themselves
        at_least=1.1,
        at_most=100.0,
    )
    gate_file: str | None = option(
        None,
        "File of the quality gate that retrain=failed reads; null takes evaluation/gate.json in "
        "output_dir.",
        decides_result=False,
    )
    quarantine_exit_code: int = option(
        3,
        "Exit code of a run that is done but has given up some concepts; 0 where a job engine "
        "would take any other code for a failure.",
        decides_result=False,
        at_least=0,
        at_most=125,
    )
    report_to: Literal["tensorboard", "none"] = option(
        "tensorboard",
        "Where losses are written besides the CSV and JSONL files (diffusers).",
        decides_result=False,
    )
    evaluate_after: bool = option(
        False,
        "Whether the finished concepts are drawn and scored when training ends, which writes "
        "report.html into output_dir; images are drawn as those of the sample grids are.",
        decides_result=False,
    )
    evaluation_prompts: str = option(
        "tiny",
        "Prompt set of evaluate_after, with one image for each prompt: a name or a file, as "
        "catversion evaluate takes it.",
        decides_result=False,
    )
    evaluation_clip: str | None = option(
        None,
        "Folder of the transformers CLIPModel that evaluate_after scores with; null is the model's "
        "own clip/ folder, which Stable Diffusion's models have not.",
        decides_result=False,
    )
    push_to_hub: bool = option(
        False,
        "Whether the finished concepts and their model card are sent to the Hugging Face hub when "
        "training ends, as catversion push does (diffusers).",
        decides_result=False,
    )
    hub_model_id: str | None = option(
        None,
        "Repository of push_to_hub, USER/NAME; it is made if it is new (diffusers).",
        decides_result=False,
    )
    hub_private_repo: bool = option(
        False,
        "Whether a new repository of push_to_hub is private (transformers).",
        decides_result=False,
    )

    def contradictions(self) -> list[str]:
        """What a push lacks, and an exit code with two meanings."""
        problems = super().contradictions()
        if self.push_to_hub and not self.hub_model_id:
            problems.append(
                "push_to_hub=true: does not say where. Give hub_model_id=USER/NAME, or push later "
                "with catversion push."
            )
        if self.quarantine_exit_code in (1, 2, 75):
            problems.append(
                f"quarantine_exit_code={self.quarantine_exit_code}: means something else already "
                "(1 and 2 an error, 75 a run to be continued). Use 0 or 3."
            )
        return problems
