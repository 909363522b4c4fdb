"""Trains a small transformer on the tokens of a clip, samples how it goes on, and decodes the sample.

    python3 example/train_generator.py --output_folder=outputs/generator    # some minutes on two CPU cores

It is an example to copy from, not a good generator: one clip teaches it nothing about the world, so it repeats what it saw.
What it shows is the way: clip -> shards -> batches -> ids -> blocks -> video.
"""

import argparse
import pathlib
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic import ElasticTokenizer, TokenizedClip, TokenShards
from elastic.media import write_video
from elastic.tokens import write_shard
from elastic.tokens.batches import Vocabulary, token_batches

ROOT = pathlib.Path(__file__).resolve().parents[1]
WIDTH, LAYERS, HEADS = 128, 4, 4


class Generator(nn.Module):
    """A causal transformer over ids. A code is one digit for each FSQ level, so that no table has 64,000 rows.

    Attributes:
      first_code: the id of code 0; ids below are signs and counts.
      levels: FSQ levels. The digits of a code are predicted one after the other from the same state.
    """

    first_code: int
    levels: tuple[int, ...]

    def setup(self):
        self.signs = nn.Embed(self.first_code + 1, WIDTH)  # the last one stands for "a code"
        self.digits = [nn.Embed(level, WIDTH) for level in self.levels]
        self.positions = nn.Embed(4096, WIDTH)
        self.blocks = [Layer() for _ in range(LAYERS)]
        self.norm = nn.RMSNorm()
        self.sign_logits = nn.Dense(self.first_code + 1)
        self.digit_logits = [nn.Dense(level) for level in self.levels]

    def split(self, ids):
        """int32 [b, s] -> the sign [b, s] and the digits of a code, int32 [b, s] each."""
        codes, digits = jnp.maximum(ids - self.first_code, 0), []
        for level in self.levels:
            digits.append(codes % level)
            codes = codes // level
        return jnp.minimum(ids, self.first_code), digits

    def __call__(self, ids, segments):
        """The state after every id, float32 [b, s, WIDTH]; an id sees the earlier ones of its segment."""
        signs, digits = self.split(ids)
        is_code = (signs == self.first_code)[..., None]
        embedded = sum(table(d) for table, d in zip(self.digits, digits, strict=True))
        x = self.signs(signs) + jnp.where(is_code, embedded, 0.0)
        x = x + self.positions(jnp.arange(ids.shape[1]) % 4096)
        mask = nn.make_causal_mask(ids) * nn.make_attention_mask(segments, segments, jnp.equal)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def loss(self, ids, segments, counts):
        """Mean negative log-likelihood of the ids, in nats."""
        state = self(ids[:, :-1], segments[:, :-1])
        signs, digits = self.split(ids[:, 1:])
        xent = optax.softmax_cross_entropy_with_integer_labels
        total = xent(self.sign_logits(state), signs)
        is_code = signs == self.first_code
        for logits, table, digit in zip(self.digit_logits, self.digits, digits, strict=True):
            total += jnp.where(is_code, xent(logits(state), digit), 0.0)
            state = state + table(digit)  # the next digit sees this one
        counts = counts[:, 1:] & (segments[:, 1:] == segments[:, :-1])
        return jnp.sum(total * counts) / jnp.maximum(jnp.sum(counts), 1)

    def sample(self, ids, segments, at, key, temperature):
        """The id that follows position `at`, int32 []."""
        state = self(ids, segments)[0, at]
        keys = jax.random.split(key, len(self.levels) + 1)
        sign = jax.random.categorical(keys[-1], self.sign_logits(state) / temperature)
        code, scale = jnp.int32(0), 1
        for k, (logits, table, level) in enumerate(zip(self.digit_logits, self.digits, self.levels, strict=True)):  # fmt: skip
            digit = jax.random.categorical(keys[k], logits(state) / temperature)
            code, scale, state = code + digit * scale, scale * level, state + table(digit)
        return jnp.where(sign == self.first_code, self.first_code + code, sign)


class Layer(nn.Module):
    """Attention, then a feed-forward network; both on normed inputs."""

    @nn.compact
    def __call__(self, x, mask):
        h = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(h, h, mask=mask)
        h = nn.Dense(4 * WIDTH)(nn.RMSNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(h))


def train(generator, shards, *, length, steps):
    """The parameters after some steps of AdamW on packed sequences."""
    batches = iter(token_batches(shards, sequence_length=length, batch_size=2, seed=0))
    batch = next(batches)
    params = generator.init(
        jax.random.key(0), batch.tokens, batch.segment_ids, batch.loss_mask, method="loss"
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(20, steps), max(steps, 21))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            return generator.apply(params, batch.tokens, batch.segment_ids, batch.loss_mask, method="loss")  # fmt: skip

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    started = time.perf_counter()
    for number in range(1, steps + 1):
        params, state, loss = step(params, state, batch._replace(vectors=None))
        if number % 25 == 0 or number == steps:
            print(f"step {number}: {loss:.2f} nats a token, {time.perf_counter() - started:.0f} s")
        batch = next(batches)
    return params


def continue_clip(generator, params, vocabulary, prompt, *, num_tokens, temperature):
    """The ids of the prompt and of one more block. Its count is given, so that the block is whole."""
    known = [*prompt.tolist(), vocabulary.first_code - vocabulary.tokens_per_block + num_tokens - 1]
    ids = np.zeros((1, len(known) + num_tokens), np.int32)
    ids[0, : len(known)] = known
    next_id = jax.jit(lambda ids, at, key: generator.apply(
        params, ids, jnp.ones_like(ids), at, key, temperature, method="sample"
    ))  # fmt: skip
    for at in range(len(known) - 1, len(known) - 1 + num_tokens):
        found = int(next_id(ids, at, jax.random.key(at)))
        ids[0, at + 1] = max(found, vocabulary.first_code)  # a sign within a block would break it
    return ids[0]


def main() -> None:
    """Clip -> shard -> generator -> continuation -> video."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_path", default=str(ROOT / "example" / "video.mp4"))
    parser.add_argument("--output_folder", default="outputs/generator")
    parser.add_argument("--model", default="small-fsq")
    parser.add_argument("--num_tokens", type=int, default=256, help="tokens of every block")
    parser.add_argument(
        "--max_frames", type=int, default=None, help="the first frames of the clip only"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompt_blocks", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.8)
    flags = parser.parse_args()
    folder = pathlib.Path(flags.output_folder)
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = ElasticTokenizer.from_pretrained(flags.model)
    clip = tokenizer.encode(
        flags.input_path, num_tokens=flags.num_tokens, max_frames=flags.max_frames
    )
    write_shard(folder / "shard-00000.parquet", [("clip", clip)])
    shards = TokenShards(folder)
    vocabulary = Vocabulary.of(shards)
    longest = vocabulary.tokens_per_block + 3  # a sequence must hold a full block
    length = max(longest, (flags.prompt_blocks + 1) * (flags.num_tokens + 1) + 2)

    generator = Generator(vocabulary.first_code, tokenizer.config.fsq_quant_levels)
    params = train(generator, shards, length=length, steps=flags.steps)

    # A prompt of the whole clip does not end it either.
    prompt = vocabulary.ids(clip.blocks[: flags.prompt_blocks], begins=True, ends=False)
    ids = continue_clip(
        generator, params, vocabulary, prompt,
        num_tokens=flags.num_tokens, temperature=flags.temperature,
    )  # fmt: skip
    blocks = vocabulary.blocks(ids)
    frames = len(blocks) * clip.frames_per_block
    made = TokenizedClip(**{**vars(clip), "blocks": blocks, "num_frames": frames})
    made.save(folder / "continued.npz")
    write_video(folder / "continued.mp4", tokenizer.decode(made), clip.rate)
    print(
        f"{frames} frames, the last {clip.frames_per_block} of them sampled: {folder / 'continued.mp4'}"
    )


if __name__ == "__main__":
    main()
