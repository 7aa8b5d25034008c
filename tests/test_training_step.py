"""The compiled step: independence of concepts, devices and dispatches; quarantine; optimizer."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from training_cases import (
    LAYERS,
    NUM_CONCEPTS,
    concept_data,
    config,
    distance,
    optimizer,
    train_step,
)

from catversion_jax.config import TrainConfig
from catversion_jax.diffusion import NoiseSchedule, noise_schedule
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.runtime.sharding import make_mesh, place_by_concept, replicated
from catversion_jax.training.eval_step import make_eval_step
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses
from catversion_jax.training.state import (
    EVAL_STREAM,
    ConceptData,
    TrainState,
    create_train_state,
)
from catversion_jax.training.step import (
    StepMetrics,
    apply_update,
    sample_batch,
)


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder: Path) -> Backbone:
    return load_backbone(one_block_sd_folder)


def run(
    backbone: Backbone,
    options: TrainConfig,
    devices: int,
    rows: slice = slice(None),
    dispatches: tuple[int, ...] = (6,),
    edit: object = None,
) -> tuple[TrainState, StepMetrics]:
    """Train on ``devices`` devices: final state and the last dispatch's metrics, on the host."""
    residual, data = concept_data(backbone)
    if edit is not None:
        data = edit(data)
    residual, data = jax.tree.map(lambda leaf: leaf[rows], (residual, data))
    mesh = make_mesh(options.data_parallel, jax.devices()[:devices])
    tx = optimizer(options)
    step = train_step(backbone, tx, mesh, options)
    networks = jax.device_put((backbone.text_encoders, backbone.unet), replicated(mesh))
    state = place_by_concept(jax.tree.map(np.asarray, create_train_state(residual, tx)), mesh)
    data = place_by_concept(data, mesh)
    for count in dispatches:
        state, metrics = step(state, data, *networks, jnp.int32(count))
    return jax.tree.map(np.asarray, (state, metrics))


@pytest.fixture(scope="module")
def packed(backbone: Backbone) -> TrainState:
    return run(backbone, config(), devices=1)[0]


def test_training_moves_every_number(backbone: Backbone, packed: TrainState) -> None:
    start, _ = concept_data(backbone)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(packed.learned), strict=True):
        assert np.all(before != after)
    assert np.all(packed.step == 6)
    assert np.all(packed.failed_step == -1)


@pytest.mark.parametrize("concept", [0, 5])
def test_a_concept_alone_learns_what_it_learns_in_a_pack(
    backbone: Backbone, packed: TrainState, concept: int
) -> None:
    alone, _ = run(backbone, config(), devices=1, rows=slice(concept, concept + 1))
    expected = jax.tree.map(lambda leaf: leaf[concept : concept + 1], packed.learned)
    assert distance(alone.learned, expected) < 1e-3


@pytest.mark.parametrize(
    ("devices", "data_parallel"), [pytest.param(8, 1, marks=pytest.mark.slow), (8, 2)]
)
def test_the_mesh_does_not_change_the_result(
    backbone: Backbone, packed: TrainState, devices: int, data_parallel: int
) -> None:
    sharded, _ = run(backbone, config(data_parallel=data_parallel), devices=devices)
    assert distance(sharded.learned, packed.learned) < 1e-3


def test_how_steps_are_dispatched_does_not_change_a_bit(
    backbone: Backbone, packed: TrainState
) -> None:
    in_parts, metrics = run(backbone, config(), devices=1, dispatches=(1, 3, 2))
    for one, other in zip(jax.tree.leaves(in_parts), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isfinite(metrics.losses[:2]).all()
    assert np.isnan(metrics.losses[2:]).all()


@pytest.mark.slow
def test_one_step_a_call_learns_what_the_loop_learns(
    backbone: Backbone, packed: TrainState
) -> None:
    options = config(steps_per_dispatch=1)
    single, metrics = run(backbone, options, devices=1, dispatches=(1,) * 6)
    assert distance(single.learned, packed.learned) < 1e-3
    assert metrics.losses.shape == (1, NUM_CONCEPTS)
    assert np.isfinite(metrics.losses).all()


@pytest.mark.slow
def test_what_is_computed_again_is_the_same(backbone: Backbone, packed: TrainState) -> None:
    again, _ = run(backbone, config(gradient_checkpointing="attention"), devices=1)
    assert distance(again.learned, packed.learned) < 1e-3


def test_a_concept_that_is_not_finite_stops_and_leaves_the_others_as_they_are(
    backbone: Backbone, packed: TrainState
) -> None:
    def spoil(data: ConceptData) -> ConceptData:
        data.latent_mean[3] = np.nan
        return data

    state, _ = run(backbone, config(), devices=1, edit=spoil)
    start, _ = concept_data(backbone)
    assert state.failed_step.tolist() == [-1, -1, -1, 0, -1, -1, -1, -1]
    np.testing.assert_array_equal(state.learned.key[3], start.key[3])
    healthy = [i for i in range(NUM_CONCEPTS) if i != 3]
    np.testing.assert_array_equal(state.learned.key[healthy], packed.learned.key[healthy])


def test_one_axis_needs_no_communication_and_two_axes_only_sums(backbone: Backbone) -> None:
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    found = {}
    for data_parallel in (1, 2):
        options = config(data_parallel=data_parallel)
        mesh = make_mesh(data_parallel, jax.devices()[:8])
        tx = optimizer(options)
        step = train_step(backbone, tx, mesh, options)
        residual, data = concept_data(backbone)
        state = place_by_concept(jax.tree.map(np.asarray, create_train_state(residual, tx)), mesh)
        networks = jax.device_put((backbone.text_encoders, backbone.unet), replicated(mesh))
        text = (
            step.lower(state, place_by_concept(data, mesh), *networks, jnp.int32(1))
            .compile()
            .as_text()
        )
        found[data_parallel] = {
            name for name in collectives if f" {name}(" in text or f" {name}-start(" in text
        }
    assert found == {1: set(), 2: {"all-reduce"}}


def test_every_image_is_used_equally_often(backbone: Backbone) -> None:
    _, data = concept_data(backbone)
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[2], data)  # 3 images, padded to 4
    marked = jnp.arange(4.0)[:, None, None, None, None] * jnp.ones_like(one.latent_mean)
    one = dataclasses.replace(one, latent_mean=marked, latent_std=jnp.zeros_like(marked))
    options = config()

    @jax.jit
    def images(step: jax.Array) -> jax.Array:
        return sample_batch(one, step, jnp.int32(0), 2, options.objective_options, 1000).latents[
            :, 0, 0, 0
        ]

    drawn = [int(image) for step in range(30) for image in images(jnp.int32(step))]
    epochs = [drawn[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_updates_are_torch_adamw(backbone: Backbone) -> None:
    options = config(learning_rate=1e-2, max_train_steps=20, adam_weight_decay=1e-2)
    rng = np.random.default_rng(1)
    start = [rng.normal(size=(3, 1, 4, 8)).astype(np.float32) for _ in range(2)]
    tx = optimizer(options)
    residual = KVResidual(jnp.asarray(start[0]), jnp.asarray(start[1]), LAYERS, 0.0)
    state = TrainState(jnp.int32(0), residual, tx.init(residual), jnp.int32(-1))
    parameters = [torch.tensor(leaf, requires_grad=True) for leaf in start]
    theirs = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for _ in range(20):
        grads = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in start]
        state = apply_update(
            state, jnp.float32(1.0), KVResidual(*map(jnp.asarray, grads), LAYERS, 0.0), tx
        )
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = torch.tensor(gradient)
        theirs.step()
    for ours, theirs in zip(jax.tree.leaves(state.learned), parameters, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "warmup"), [("constant", 0), ("linear", 5), ("cosine", 5), ("cosine", 0)]
)
def test_learning_rate_schedules_are_those_of_diffusers(scheduler: str, warmup: int) -> None:
    from diffusers.optimization import get_scheduler

    options = config(
        lr_scheduler=scheduler, lr_warmup_steps=warmup, max_train_steps=20, adam_weight_decay=0.0
    )
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, dummy, num_warmup_steps=warmup, num_training_steps=20)
    tx = optimizer(options)
    params, opt_state = jnp.zeros(()), tx.init(jnp.zeros(()))
    for step in range(20):
        updates, opt_state = tx.update(jnp.ones(()), opt_state, params)
        # AdamW's update for a constant gradient of one is exactly minus the learning rate.
        np.testing.assert_allclose(
            -updates, theirs.get_last_lr()[0], rtol=1e-4, atol=1e-9, err_msg=f"step {step}"
        )
        dummy.step()
        theirs.step()


def test_gradient_clip_never_couples_concepts() -> None:
    options = config(max_grad_norm=1.0)
    tx = optimizer(options)
    rng = np.random.default_rng(2)
    grads = KVResidual(
        *(rng.normal(size=(2, 3, 1, 4, 8)).astype(np.float32) for _ in range(2)), LAYERS, 0.0
    )
    grads = KVResidual(
        grads.key * np.array([1, 1e4])[:, None, None, None, None], grads.value, LAYERS, 0.0
    )
    clipped, _ = jax.vmap(lambda g: optax.clip_by_global_norm(1.0).update(g, optax.EmptyState()))(
        grads
    )
    together, _ = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(grads), grads)
    first = jax.tree.map(lambda leaf: leaf[0], grads)
    alone, _ = tx.update(first, tx.init(first), first)
    np.testing.assert_allclose(together.key[0], alone.key, rtol=1e-5)
    np.testing.assert_allclose(
        optax.tree.norm(jax.tree.map(lambda leaf: leaf[0], clipped)), 1.0, rtol=1e-5
    )


@pytest.mark.slow
def test_evaluation_loss_ignores_mesh_and_batch(backbone: Backbone) -> None:
    """Nor does it change from one time to the next, or with who else is due."""
    residual, data = concept_data(backbone)
    losses = []
    for devices, batch in ((1, 4), (8, 2)):
        mesh = make_mesh(1, jax.devices()[:devices])
        evaluate = make_eval_step(
            schedule_of(backbone), mesh, first_layers=LAYERS[:1], num_samples=6, batch_size=batch
        )
        networks = jax.device_put((backbone.text_encoders, backbone.unet), replicated(mesh))
        every = np.ones(len(data.flip), bool)
        placed = place_by_concept((residual, data, every), mesh)
        losses.append(np.asarray(evaluate(*placed, *networks)))
        np.testing.assert_array_equal(losses[-1], np.asarray(evaluate(*placed, *networks)))
        some = place_by_concept(np.arange(len(every)) % 3 == 1, mesh)
        of_some = np.asarray(evaluate(*placed[:2], some, *networks))
        np.testing.assert_array_equal(of_some[1::3], losses[-1][1::3])
        assert np.isnan(np.delete(of_some, np.s_[1::3])).all()
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [1, 3])  # fewer and more than the prompts, which are two
def test_the_evaluation_loss_is_the_mean_of_its_samples(
    backbone: Backbone, num_samples: int
) -> None:
    """Equation (2) of objective.py at the middle of each n-th of the schedule, one by one."""
    residual, data = concept_data(backbone)
    schedule, mesh = schedule_of(backbone), make_mesh(1, jax.devices()[:1])
    evaluate = make_eval_step(
        schedule, mesh, first_layers=LAYERS[:1], num_samples=num_samples, batch_size=2
    )
    every = np.ones(NUM_CONCEPTS, bool)
    found = evaluate(
        *place_by_concept((residual, data, every), mesh), backbone.text_encoders, backbone.unet
    )
    concept = 3  # of four images and two prompts
    learned = jax.tree.map(lambda leaf: leaf[concept : concept + 1], residual)
    losses = []
    for sample in range(num_samples):
        latents = data.latent_mean[concept, sample, 0]
        key = jax.random.fold_in(jax.random.fold_in(data.rng[concept], EVAL_STREAM), sample)
        timestep = int((sample + 0.5) / num_samples * schedule.num_train_timesteps)
        one = DiffusionBatch(
            latents,
            jax.random.normal(key, latents.shape),
            np.int32(timestep),
            jax.tree.map(lambda leaf, sample=sample: leaf[concept, sample % 2], data.text),
        )
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None, None], one)
        losses.append(
            diffusion_losses(
                learned,
                backbone.text_encoders,
                backbone.unet,
                batch,
                schedule,
                first_layers=LAYERS[:1],
            )[0]
        )
    np.testing.assert_allclose(found[concept], np.mean(losses), rtol=1e-5)


def schedule_of(backbone: Backbone) -> NoiseSchedule:
    return noise_schedule(backbone.noise_schedule)
