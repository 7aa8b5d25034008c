"""A Gradio app that draws with one concept, beside the plain model, for a Space of Hugging Face.

    pip install gradio && CONCEPT=runs/mine/concepts/rex python docs/examples/space/app.py

A Space is this file, a requirements.txt (catversion-jax and gradio) and a README.md that says
``sdk: gradio``; CONCEPT (``hf://USER/NAME/rex``) and MODEL are its variables.
"""

import os
import tempfile
from pathlib import Path

import gradio as gr

import catversion_jax as cv
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME
from catversion_jax.models.weights.hub_concept import hub_concept

source = os.environ["CONCEPT"]
if source.startswith("hf://"):
    source = hub_concept(source, CONCEPT_FILE_NAME)
concept = cv.load_concept(source)
backbone = cv.load_backbone(os.environ.get("MODEL", concept.base_model))


def draw(prompt: str, scale: float, seed: float, steps: float) -> tuple[Path, Path]:
    """The files of a picture with the concept and of the plain model's; both say what drew them."""
    given = {"model": backbone, "seeds": int(seed), "num_inference_steps": int(steps)}
    files = []
    try:
        for concepts in ([(concept, scale)], []):
            drawn = cv.generate(prompt, concepts, output_dir=tempfile.mkdtemp(), **given)
            files += drawn.files
    except ValueError as error:  # what is wrong with the prompt or a number, in words
        raise gr.Error(str(error)) from error
    return files[0], files[1]


app = gr.Interface(
    draw,
    [
        gr.Textbox(f"a {concept.base_class} on the beach", label="Prompt", max_length=500),
        gr.Slider(0, 2, 1, label="Scale: 0 is the plain model"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1),
        gr.Slider(1, 50, 25, step=1, label="Steps"),
    ],
    [gr.Image(label=concept.name), gr.Image(label="The plain model")],
    title=concept.name,
    description=f'"{concept.base_class}" in a prompt calls {concept.name}. A machine draws this.',
    flagging_mode="never",
)

if __name__ == "__main__":
    app.queue(max_size=20).launch()
