"""The pixels recipe on a game of nine steps: what stays frozen, what is the same bits, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("stable_baselines3", reason='the recipe needs pip install "lorasmith[rl]"')

import numpy as np
from safetensors.torch import load_file

from lorasmith.errors import ConfigError, TrainingError
from lorasmith.formats import read_adapter
from lorasmith.inject import eject, extract, merge
from lorasmith.recipes.pixels import stages
from lorasmith.recipes.pixels.autoencoder import Decoder, Encoder, train_autoencoder
from lorasmith.recipes.pixels.film import picture, watch
from lorasmith.recipes.pixels.games import PALETTE, make_game
from lorasmith.recipes.pixels.policy import ADAPTER, encoder_of, load_policy, save_policy, scores
from lorasmith.recipes.pixels.proof import prove_adapter
from lorasmith.recipes.pixels.settings import Arm, Settings, arm_key, encoder_key
from lorasmith.recipes.pixels.stages import learn_to_play, learn_to_see, new_ppo, play_at_random, read_result
from lorasmith.recipes.pixels.summary import curve, margin
from tests.support.tolerance import close

GAME = "tests.support.catch:Catch-v0"
TINY = Settings(
    game=GAME,
    seeds=(0,),
    ranks=(2,),
    frames=256,
    updates=20,
    latent=8,
    steps=512,
    games=4,
    rollout=64,
    batch=64,
    learning_rate=1e-2,
)
LORA = Arm("lora", 2)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("pixels")


@pytest.fixture(scope="module")
def base(out):
    return load_file(learn_to_see(TINY, 0, out) / stages.BASE)


@pytest.fixture(scope="module")
def frames():
    return play_at_random(TINY, 7, 200)[0]


# games


def test_minatar_is_painted_with_the_last_channel_on_top():
    game = make_game("MinAtar/Breakout-v1")
    frame, _ = game.reset(seed=3)
    for action in (1, 2, 0, 1):
        frame, *_ = game.step(action)
    state = game.unwrapped.game.state()
    expected = np.zeros((10, 10, 3), np.uint8)
    for (row, column), _ in np.ndenumerate(expected[..., 0]):
        there = np.flatnonzero(state[row, column])
        expected[row, column] = PALETTE[there.max() + 1 if there.size else 0]
    assert frame.dtype == np.uint8
    assert np.array_equal(frame, expected.transpose(2, 0, 1))
    assert len({tuple(pixel) for pixel in expected.reshape(-1, 3)}) == 5  # background and four objects


def test_atari_comes_with_its_rom_as_a_stack_of_four_small_screens():
    game = make_game("ALE/Pong-v5")
    first, _ = game.reset(seed=0)
    assert (first.shape, first.dtype) == ((4, 84, 84), np.uint8)
    assert game.observation_space.contains(first)
    for _ in range(20):
        frame, *_ = game.step(0)
    assert not np.array_equal(frame[-1], frame[0])  # the ball moves within the stack


@pytest.mark.parametrize(
    ("name", "said"),
    [("MinAtar/Breakuot-v1", "Breakout"), ("ALE/Png-v5", "no game"), ("CartPole-v1", "pixels")],
)
def test_a_game_that_is_not_there_or_shows_no_pixels_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        make_game(name)


def test_games_side_by_side_start_from_different_seeds_and_repeat():
    first, returns = play_at_random(TINY, 5, 40)
    again, _ = play_at_random(TINY, 5, 40)
    other, _ = play_at_random(TINY, 6, 40)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(frame.flatten().tolist()) for frame in first[:4]}) > 1
    assert set(returns) <= {0.0, 1.0}


# phase one


@pytest.mark.parametrize(("channels", "side"), [(3, 10), (4, 84)])
def test_the_decoder_gives_frames_of_the_encoders_size(channels, side):
    encoder = Encoder(channels, side, 8)
    x = torch.rand(2, channels, side, side)
    assert encoder(x).shape == (2, 8)
    assert Decoder(encoder)(encoder(x)).shape == x.shape


def test_frames_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="33 pixels wide"):
        Encoder(3, 33, 8)


def test_the_autoencoder_explains_frames_and_repeats(frames):
    def fit(seed, updates=10):
        return train_autoencoder(frames, latent=16, updates=updates, batch=64, learning_rate=1e-2, seed=seed)

    encoder, decoder, _ = fit(0, updates=250)
    x = frames.float() / 255
    with torch.no_grad():
        error = (decoder(encoder(x)) - x).square().mean()
    assert error < 0.75 * x.var(0, correction=0).mean()  # what drawing the mean frame always would leave
    assert fit(0)[2] == fit(0)[2] != fit(1)[2]


# phase two


def ppo_at_start(arm, base):
    return new_ppo(TINY, arm, base, 0)


def test_lora_at_the_start_acts_exactly_as_the_frozen_encoder(base, frames):
    frozen = scores(ppo_at_start(Arm("frozen"), base).policy, frames)
    assert torch.equal(scores(ppo_at_start(LORA, base).policy, frames), frozen)
    assert torch.equal(scores(ppo_at_start(Arm("full"), base).policy, frames), frozen)
    assert (scores(ppo_at_start(Arm("scratch"), base).policy, frames) - frozen).abs().max() > 1e-4


@pytest.mark.parametrize("arm", [*TINY.arms()], ids=lambda arm: arm.name)
def test_the_optimizer_has_what_trains_and_nothing_else(arm, base):
    policy = ppo_at_start(arm, base).policy
    held = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    named = {name: id(p) in held for name, p in policy.named_parameters()}
    of_encoder = {
        name.rpartition(".")[2] for name, is_held in named.items() if ".encoder." in name and is_held
    }
    expected = {"frozen": set(), "lora": {"lora_A", "lora_B"}}.get(arm.way, {"weight", "bias"})
    assert of_encoder == expected
    assert all(is_held for name, is_held in named.items() if ".encoder." not in name)


@pytest.mark.parametrize("arm", [Arm("frozen"), LORA, Arm("full")], ids=lambda arm: arm.name)
def test_ppo_leaves_a_frozen_base_bitwise_and_moves_what_trains(arm, base):
    ppo = ppo_at_start(arm, base)
    heads = {name: p.clone() for name, p in ppo.policy.action_net.named_parameters()}
    ppo.learn(TINY.steps)
    encoder = encoder_of(ppo.policy)
    now = encoder.state_dict()
    assert all(torch.equal(now[name], base[name]) for name in base) == (arm.way != "full")
    assert all(not torch.equal(p, heads[name]) for name, p in ppo.policy.action_net.named_parameters())
    if arm.way == "lora":
        assert sorted(extract(encoder).factors) == ["conv1", "conv2", "to_latent"]
        assert all(f.B.any() for f in extract(encoder).factors.values())


@pytest.mark.parametrize("arm", TINY.arms(), ids=lambda arm: arm.name)
def test_a_policy_that_is_saved_and_loaded_gives_the_same_bits(arm, base, frames, tmp_path):
    ppo = ppo_at_start(arm, base)
    ppo.learn(TINY.steps)
    save_policy(ppo.policy, arm, tmp_path, {"base": {"name": "eyes"}})
    loaded = load_policy(tmp_path, base, make_game(GAME), TINY.latent)
    assert torch.equal(scores(loaded, frames), scores(ppo.policy, frames))
    assert (tmp_path / ADAPTER).exists() == (arm.way == "lora")


def test_the_merged_policy_acts_as_the_adapted_one(base, frames, out):
    run = learn_to_play(TINY, LORA, 0, out)
    policy = load_policy(run, base, make_game(GAME), TINY.latent)
    adapted = scores(policy, frames)
    eject(encoder_of(policy))
    plain = scores(policy, frames)
    merge(encoder_of(policy), read_adapter(run / ADAPTER))
    close(scores(policy, frames), adapted, torch.float32)
    assert torch.equal(scores(policy, frames).argmax(1), adapted.argmax(1))
    assert (plain - adapted).abs().max() > 1e-3  # a merge that did nothing would be seen

    proof = prove_adapter(run, base, make_game(GAME), frames, TINY.latent)
    assert proof["same_best_action"] == proof["frames"] == len(frames)
    assert proof["max_abs_difference"] < 1e-4
    assert proof["unmerge_bit_identical"]
    assert proof["params"] == sum(2 * sum(f) for f in ((3 * 9, 16), (16 * 16, 32), (32 * 25, 8)))


def test_the_same_run_gives_the_same_bits_and_is_not_run_twice(out, tmp_path, monkeypatch):
    first, again = (learn_to_play(TINY, LORA, 0, place) for place in (out, tmp_path))
    assert read_result(first)["returns"] == read_result(again)["returns"]
    assert read_adapter(first / ADAPTER).digest == read_adapter(again / ADAPTER).digest
    monkeypatch.setattr(stages, "new_ppo", None)
    assert learn_to_play(TINY, LORA, 0, out) == first


def test_a_base_that_moves_is_an_error_and_leaves_nothing(out, monkeypatch):
    learn_to_see(TINY, 0, out)
    tuned = stages.prepare_encoder

    def forgetful(encoder, arm, base, **options):
        tuned(encoder, Arm("full"), base, **options)

    monkeypatch.setattr(stages, "prepare_encoder", forgetful)
    with pytest.raises(TrainingError, match="base changed"):
        learn_to_play(TINY, Arm("frozen"), 0, out)
    assert not list((out / "arms").glob("frozen*"))


def test_a_run_without_a_whole_episode_is_an_error(tmp_path):
    short = replace(TINY, frames=8)
    with pytest.raises(TrainingError, match="frames=8"):
        learn_to_see(short, 0, tmp_path)
    assert not list((tmp_path / "encoders").iterdir())


def test_watching_gives_each_frame_and_the_return_so_far(base, out):
    policy = load_policy(learn_to_play(TINY, LORA, 0, out), base, make_game(GAME), TINY.latent)
    episode = watch(policy, GAME, seed=1, most_frames=50)
    assert len(episode.frames) == len(episode.scores) == 10  # the ball falls nine rows
    assert picture(episode.frames[0]).shape == (10, 10, 3)
    assert torch.equal(episode.frames, watch(policy, GAME, seed=1, most_frames=50).frames)


# settings and numbers


def test_a_folder_is_named_by_what_decides_its_content_and_by_nothing_else():
    same = replace(TINY, seeds=(0, 1), ranks=(2, 8))
    assert arm_key(same, LORA, 0) == arm_key(TINY, LORA, 0)
    louder, longer = replace(TINY, alpha=8.0), replace(TINY, steps=1024)
    assert arm_key(louder, LORA, 0) != arm_key(TINY, LORA, 0)
    assert arm_key(louder, Arm("full"), 0) == arm_key(TINY, Arm("full"), 0)
    assert arm_key(longer, Arm("full"), 0) != arm_key(TINY, Arm("full"), 0)
    assert encoder_key(longer, 0) == encoder_key(TINY, 0) != encoder_key(replace(TINY, updates=21), 0)
    assert len({arm_key(TINY, arm, seed) for arm in TINY.arms() for seed in (0, 1)}) == 8


def test_every_fault_of_the_settings_is_named():
    with pytest.raises(ConfigError, match=r"latent=0(.|\n)*ranks=\[0\](.|\n)*steps=5"):
        Settings(latent=0, ranks=(0,), steps=5)


def test_margin():
    apart = margin([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    assert apart.difference == 3.0
    assert apart.standard_error is not None
    assert math.isclose(apart.standard_error, math.sqrt(1 / 3 + 1 / 3))
    assert apart.holds
    assert not margin([0.5, 4.0, 5.0], [0.0, 1.0, 2.0]).holds  # one seed is below
    assert not margin([1.1, 9.0, 1.2], [0.9, 1.0, 0.8]).holds  # within twice the standard error
    assert not margin([0.0, 1.0, 2.0], [3.0, 4.0, 5.0]).holds
    assert not margin([9.0], [0.0]).holds  # one seed shows nothing about seeds


def test_curve_is_the_mean_return_of_each_span():
    chance = np.random.default_rng(0)
    steps = 1000
    results = [
        {
            "at_step": sorted(chance.integers(1, steps, 400).tolist()),
            "returns": chance.normal(size=400).tolist(),
        }
        for _ in range(2)
    ]
    line = curve(results, steps)
    for k, middle in enumerate(line["step"]):
        low, high = middle - 10, middle + 10
        means = [
            np.mean(
                [g for s, g in zip(r["at_step"], r["returns"], strict=True) if low <= s < high] or [np.nan]
            )
            for r in results
        ]
        if np.isnan(means).any():
            assert line["mean"][k] is None
        else:
            assert np.allclose([line["low"][k], line["mean"][k], line["high"][k]],
                               [min(means), np.mean(means), max(means)])  # fmt: skip
