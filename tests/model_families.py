"""Which families of models can do what, and which test shows it: the table of ``docs/models.md``.

``docs/generated.py`` writes the page from this table, and ``test_model_families.py`` checks that
every test that is named here is one that CI runs. So a cell that says yes is a test that passed.
"""

QUESTIONS = ("loads", "equals PyTorch", "draws", "trains", "exports", "is planned")

UNET = "test_unet.py::test_whole_network_and_text_gradient_equal_diffusers"
DEPTHS = "test_unet_config.py::test_distilled_models_have_the_tensors_that_diffusers_has"
OTHER_UNETS = "test_unet.py::test_other_configurations_equal_diffusers"
TRAINS = "test_train_cli.py::test_a_run_writes_what_the_readme_says"
TRAINS_XL = "test_training_xl.py::test_losses_and_gradients_equal_torch_autograd"
EXPORTS = "test_export_cli.py::test_pipeline_folder_needs_no_package_of_ours"
DRAWS = "test_sampling.py::test_images_equal_the_torch_pipelines"
DRAWS_XL = "test_sampling_xl.py::test_images_equal_the_torch_pipelines"
LCM = "test_distilled.py::test_a_consistency_model_draws_what_diffusers_draws"
INPAINTING = "test_inpainting.py::test_pictures_equal_diffusers"
EDM = "test_samplers.py::test_noise_levels_of_edm"
TURBO = "test_distilled.py::test_turbo_draws_what_diffusers_draws"

FAMILIES: dict[str, tuple[str, ...]] = {
    "Stable Diffusion 1.x and its fine-tunes": (
        "test_load_backbone.py::test_every_network_equals_the_pipeline",
        UNET,
        DRAWS,
        TRAINS,
        EXPORTS,
        "test_plan.py::test_a_plan_needs_no_weights",
    ),
    "Stable Diffusion 2.x": (
        "test_unet_config.py::test_published_configs_make_the_published_number_of_parameters",
        UNET,
        "test_samplers.py::test_trajectory_equals_diffusers",
        "as 1.x",
        "as 1.x",
        "as 1.x",
    ),
    "Stable Diffusion XL, Pony, Illustrious, NoobAI": (
        "test_load_xl.py::test_the_unet_equals_the_pipelines",
        "test_unet.py::test_added_conditions_equal_diffusers",
        DRAWS_XL,
        TRAINS_XL,
        "test_training_xl.py::test_the_command_trains_resumes_draws_and_exports",
        "test_training_xl.py::test_the_planned_step_is_that_of_training",
    ),
    "SD-Turbo, SDXL-Turbo": (
        "as 2.x and XL",
        "as 2.x and XL",
        TURBO,
        "as 2.x and XL",
        "as 2.x and XL",
        "as 2.x and XL",
    ),
    "BK-SDM Base, Small and Tiny": (DEPTHS, OTHER_UNETS, "as 1.x", "as 1.x", "as 1.x", "as 1.x"),
    "SSD-1B, Segmind-Vega": (DEPTHS, OTHER_UNETS, "as XL", "as XL", "as XL", "as XL"),
    "Latent consistency models": (
        LCM,
        LCM,
        LCM,
        "no: test_distilled.py::test_a_consistency_model_is_not_trained_on",
        "as 1.x",
        "no: test_distilled.py::test_a_consistency_model_is_not_trained_on",
    ),
    "Inpainting models (9 channels)": (
        INPAINTING,
        INPAINTING,
        INPAINTING,
        "test_inpainting_training.py::test_loss_and_gradient_equal_torch_autograd",
        "test_inpainting_training.py::test_an_exported_folder_paints_with_the_concept",
        "test_inpainting_training.py::test_the_planned_step_is_that_of_training",
    ),
    "Playground 2.5": (
        "as XL",
        "test_vae.py::test_whitened_latents_are_those_of_diffusers_pipelines",
        EDM,
        "no: test_samplers.py::test_edm_has_no_betas_to_train_on",
        "as XL",
        "no: test_samplers.py::test_edm_has_no_betas_to_train_on",
    ),
}
"""A test; ``no:`` and the test of the refusal; or ``as`` the family whose code it shares."""
