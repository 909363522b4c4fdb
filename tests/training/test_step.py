"""Training steps against the released numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import released
from flax.traverse_util import flatten_dict

from elastic.checkpoints import load_train_state
from elastic.distributed.mesh import make_mesh
from elastic.distributed.sharding import param_shardings
from elastic.model import ElasticTok
from elastic.training.config import OptimizerConfig
from elastic.training.loss import training_loss
from elastic.training.optimizer import learning_rate, make_optimizer, where_good
from elastic.training.state import restore_state, state_tree
from elastic.training.step import new_state, train_step

OPTIMIZERS = ("run_train", "fast")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def noise_is_the_key(monkeypatch):
    """The released run wrote its noise down: a key that is the noise itself gives it back."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: key.reshape(shape))


def optimizer_config(case, name):
    options = released.meta(case)["train"][f"{name}_optimizer"]
    return OptimizerConfig(**options, decay_norms=True)  # as the released one: it decays all


def noise(case, step):
    if case == "fsq":
        return None
    return jnp.asarray(released.arrays(case, "train_eps")[f"vae_eps_step{step}"])


@functools.cache
def program(case, name):
    """A compiled step."""
    optimizer = make_optimizer(optimizer_config(case, name))
    return jax.jit(functools.partial(train_step, ElasticTok(released.config(case)), optimizer))


@functools.cache
def run(case, name):
    """The states before and after each of three steps, and the terms of the steps."""
    first = new_state(released.params(case), make_optimizer(optimizer_config(case, name)))
    states, terms = [jax.device_get(first)], []
    for step in range(3):
        state, one = program(case, name)(states[-1], released.batch(case), noise(case, step))
        states.append(jax.device_get(state))
        terms.append({key: float(value) for key, value in one.items()})
    return states, terms


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", released.CASES)
def test_three_steps_have_the_released_losses_and_norms(case, name):
    """FSQ trains: difference 4 in elastic/README.md."""
    _, terms = run(case, name)
    for step, ours in enumerate(terms):
        theirs = released.meta(case)["train"]["steps"][f"{name}/{step}"]
        for term in ("loss", "recon_loss", "gradient_norm", "param_norm"):
            assert ours[term] == pytest.approx(theirs[term], rel=TOLERANCE), (term, step)
        assert ours["aux_loss"] == pytest.approx(theirs.get("aux_loss", 0), rel=TOLERANCE)


@pytest.mark.parametrize("case", released.CASES)
def test_gradients_are_the_released_ones(case):
    model = ElasticTok(released.config(case))
    loss = lambda params: training_loss(model, params, released.batch(case), noise(case, 0))[0]  # noqa: E731
    ours = flatten_dict(jax.jit(jax.grad(loss))(released.params(case)), sep="/")
    golden = released.arrays(case, "grads_step0")
    assert ours.keys() == golden.keys()
    for name, expected in golden.items():
        assert released.relative_error(ours[name], expected) < TOLERANCE, name


@pytest.mark.parametrize("variant", ["packed", "keymask"])
@pytest.mark.parametrize("case", released.CASES)
def test_losses_of_packed_and_hidden_tokens_are_the_released_ones(case, variant):
    model = ElasticTok(released.config(case))
    loss = jax.jit(functools.partial(training_loss, model))
    _, terms = loss(released.params(case), released.batch(case, variant), noise(case, 0))
    theirs = released.meta(case)["train"][f"step0 {variant}"]
    assert float(terms["loss"]) == pytest.approx(theirs["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("case", released.CASES)
def test_parameters_after_three_fast_steps_are_the_released_ones(case):
    """Clipping, decay and schedule all matter here.

    Compared by norm, without the few weights whose gradient is all rounding: Adam divides a gradient by its own size, so
    that these take another step on another processor, up to the learning rate of 1e-2.
    """
    states, _ = run(case, "fast")
    ours = flatten_dict(states[-1].params, sep="/")
    golden = released.arrays(case, "params_after_fast_3steps")
    gradients = released.arrays(case, "grads_step0")
    assert ours.keys() == golden.keys()
    for name, expected in golden.items():
        size = np.abs(gradients[name])
        known = size >= 1e-5 * size.max()
        difference = np.abs(np.asarray(ours[name] - expected))
        assert known.mean() > 0.99 and difference.max() < 1e-3, name
        assert np.linalg.norm(difference[known]) < TOLERANCE * np.linalg.norm(expected), name
        assert np.quantile(difference, 0.99) < TOLERANCE, name


def released_state(golden, case):
    path = golden / case / "ckpt" / "trainstate_scan_fp32" / "streaming_train_state"
    return load_train_state(path, released.config(case))


@pytest.mark.parametrize("case", released.CASES)
def test_the_state_after_two_steps_is_the_released_one_by_name_and_number(golden, case):
    states, _ = run(case, "run_train")
    ours = flatten_dict(state_tree(states[2]), sep="/", keep_empty_nodes=False)
    theirs = flatten_dict(released_state(golden, case), sep="/")
    assert ours.keys() == theirs.keys()
    assert "opt_state/1/0/mu/params/encoder/in_proj/kernel" in ours
    for name, expected in theirs.items():
        assert released.relative_error(ours[name], expected) < TOLERANCE, name


def restored(tree, like):
    places = param_shardings(make_mesh("1,1,1,1", jax.devices()[:1]), like)
    return restore_state(tree, like, places)


def assert_identical(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), ours, expected)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("case", released.CASES)
def test_a_run_goes_on_from_the_released_state(golden, case):
    state = restored(released_state(golden, case), run(case, "run_train")[0][2])
    assert int(state.step) == 2
    step = program(case, "run_train")
    _, terms = step(jax.device_get(state), released.batch(case), noise(case, 2))
    theirs = released.meta(case)["train"]["steps"]["run_train/2"]
    for term in ("loss", "gradient_norm", "param_norm"):
        assert float(terms[term]) == pytest.approx(theirs[term], rel=TOLERANCE)


def test_a_stored_state_resumes_to_the_last_bit():
    before, after = run("vae", "fast")[0][1:3]
    state = restored(state_tree(before), before)
    assert_identical(state, before)
    again, _ = program("vae", "fast")(jax.device_get(state), released.batch("vae"), noise("vae", 1))
    assert_identical(again, after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_learning_rate_is_the_released_schedule(name):
    schedule = learning_rate(optimizer_config("fsq", name))
    for step, rate in released.meta("fsq")["train"][f"lr_schedule_{name}"].items():
        assert float(schedule(int(step))) == pytest.approx(rate, rel=1e-5, abs=0)


def test_the_released_metrics_log_the_rate_of_the_next_step():
    """Difference 17 in elastic/README.md: ours, `schedule(step)`, is the rate that the step used."""
    schedule = learning_rate(optimizer_config("fsq", "fast"))
    for step in range(3):
        logged = released.meta("fsq")["train"]["steps"][f"fast/{step}"]["learning_rate"]
        assert float(schedule(step + 1)) == pytest.approx(logged, rel=1e-5)
    states, _ = run("fsq", "fast")
    assert_identical(states[1].params, states[0].params)  # the rate of step 0 is 0


def small_params():
    return {
        "encoder": {
            "in_proj": {"kernel": jnp.ones((2, 3))},
            "is_kept_embed": jnp.ones((1, 3)),
            "ln_f": {"kernel": jnp.ones(3)},
            "encoder_blocks": {"scan_decoder": {"ffn_norm": {"kernel": jnp.ones((2, 3))}}},
        }
    }


@pytest.mark.parametrize("decay_norms", [False, True])
def test_norms_and_embeddings_decay_only_when_asked_to(decay_norms):
    """Difference 10 in elastic/README.md: the released optimizer decays them always."""
    config = OptimizerConfig(
        init_lr=0.1,
        lr=0.1,
        end_lr=0.1,
        lr_warmup_steps=0,
        weight_decay=0.5,
        decay_norms=decay_norms,
    )
    optimizer, params = make_optimizer(config), {"params": small_params()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for name, update in flatten_dict(updates, sep="/").items():
        decayed = decay_norms or "in_proj" in name
        assert np.allclose(update, -0.05 if decayed else 0.0), name


def test_two_accumulated_gradients_make_one_step_of_their_mean():
    options = dict(lr=0.1, end_lr=0.1, init_lr=0.1, lr_warmup_steps=0, clip_gradient=10.0)
    one = make_optimizer(OptimizerConfig(**options))
    two = make_optimizer(OptimizerConfig(**options, accumulate_gradient_steps=2))
    params = small_params()
    gradients = [jax.tree.map(lambda x, s=s: s * jnp.ones_like(x), params) for s in (1.0, 3.0)]
    state, now = two.init(params), params
    for gradient in gradients:
        before = now
        updates, state = two.update(gradient, state, now)
        now = optax.apply_updates(now, updates)
        if gradient is gradients[0]:
            assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), before, now)))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    updates, _ = one.update(mean, one.init(params), params)
    expected = optax.apply_updates(params, updates)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b), now, expected)))


def test_momentum_is_kept_in_bfloat16_when_asked_to():
    optimizer = make_optimizer(OptimizerConfig(bf16_momentum=True))
    types = {x.dtype.name for x in jax.tree.leaves(optimizer.init(small_params())) if x.ndim}
    assert types == {"bfloat16", "float32"}


def test_muon_updates_the_matrices_of_layers_and_adamw_the_rest():
    """The first projection at ten times its root mean square."""
    draw = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    layer = {"attention": {"wq": {"kernel": random(2, 4, 6)}}, "ffn_norm": {"kernel": random(2, 4)}}
    params = {"encoder_blocks": {"scan_decoder": layer}, "in_proj": {"kernel": random(5, 4)}}
    rates = dict(init_lr=0.1, lr=0.1, end_lr=0.1, lr_warmup_steps=0, weight_decay=0.5, clip_gradient=np.inf)  # fmt: skip
    mixed = make_optimizer(OptimizerConfig(type="muon", matrix_lr=0.02, **rates))
    adamw = make_optimizer(OptimizerConfig(**rates))
    muon = optax.contrib.muon(0.02, weight_decay=0.5)  # of one matrix
    states = [optimizer.init(params) for optimizer in (mixed, adamw)]
    one = muon.init(params["encoder_blocks"]["scan_decoder"]["attention"]["wq"]["kernel"][1])
    for _ in range(3):
        gradients = jax.tree.map(lambda x: random(*x.shape), params)
        updates, states[0] = mixed.update(gradients, states[0], params)
        expected, states[1] = adamw.update(gradients, states[1], params)
        found, expected, flat, before = (flatten_dict(tree, sep="/") for tree in (updates, expected, gradients, params))  # fmt: skip
        for name in found:
            if "wq" in name:
                alone, one = muon.update(flat[name][1], one, before[name][1])
                np.testing.assert_allclose(found[name][1], alone, atol=1e-6)
            elif "in_proj" in name:
                rate = 10 * jnp.sqrt(jnp.mean(jnp.square(before[name])))
                decay = 0.1 * 0.5 * before[name]
                scaled = rate * (expected[name] + decay) - decay
                np.testing.assert_allclose(found[name], scaled, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(found[name], expected[name])
    # A step without a finite gradient leaves the state as it was.
    _, bad = mixed.update(jax.tree.map(lambda x: x * jnp.nan, gradients), states[0], params, good=jnp.asarray(False))  # fmt: skip
    kept = where_good(jnp.asarray(False), bad, states[0])
    jax.tree.map(np.testing.assert_array_equal, kept, states[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(lr_warmup_steps=10, lr_decay_steps=10),
            "must be 0 or more and below lr_decay_steps=10",
        ),
        (dict(lr_warmup_steps=-1), "lr_warmup_steps=-1 must be 0 or more"),
        (dict(accumulate_gradient_steps=0), "must be 1 or more"),
        (dict(type="sgd"), "type='sgd' must be one of"),
        (dict(matrix_lr=0.0), "matrix_lr=0.0 must be"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)
