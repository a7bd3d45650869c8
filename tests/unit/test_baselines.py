"""Each method against a loop written here, through the training path, and back to the untouched base."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorasmith.baselines import (
    METHOD_FILES,
    MethodOptions,
    Tuned,
    applied,
    apply_method,
    make_method,
    read_method,
    write_method,
)
from lorasmith.baselines.projection import Fastfood, Sparse, hadamard
from lorasmith.data import encode, read_records
from lorasmith.engine import Engine, Request
from lorasmith.errors import AdapterFileError, ConfigError, TargetError
from lorasmith.formats import read_adapter
from lorasmith.train import Forward, TrainConfig, evaluate_loss
from lorasmith.train.batch import Layout
from lorasmith.train.policy import computing
from tests.support.models import bits, same_bits, tiny_causal_lm, tokens
from tests.support.tolerance import close
from tests.unit.test_train import HELD_OUT, RECORDS, Tokenizer, base, losses, run

CASES = {
    "full": {},
    "top-k": {"top_layers": 1},
    "bitfit": {"biases": "added"},
    "houlsby": {"bottleneck": 3},
    "lin": {"bottleneck": 3},
    "prefix": {"virtual_tokens": 3, "prefix_hidden": 8},
    "prefix from a text": {"init_text": "abcd"},
    "prompt": {"virtual_tokens": 3},
    "prompt from a text": {"init_text": "abcd", "virtual_tokens": 6},
    "intrinsic": {"dimension": 40},
    "intrinsic said": {"dimension": 40, "said": True},
    "intrinsic sparse": {"dimension": 40, "projection": "sparse", "said": True},
}


def method(case: str):
    name = case.split()[0]
    return make_method(name, MethodOptions(**CASES[case]).resolved(name), Tokenizer(chat=False))


def settings(case: str, **values) -> TrainConfig:
    defaults = {"lr": 0.01, "batch_size": 4, "epochs": 3, "save_every": 2, "eval_every": 3, "seed": 3}
    return TrainConfig(method=case.split()[0], options=MethodOptions(**CASES[case]), **defaults | values)


def stirred(model: nn.Module, made, seed: int = 5) -> dict[str, nn.Parameter]:
    """What trains, moved off its start, so that nothing is zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    found = made.parameters(model)
    with torch.no_grad():
        for p in found.values():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)
    return found


# ---------------------------------------------------------------- against a loop


def by_hand(model, ids, *, after_part=None, after_layer=None):
    """Logits of a Llama, its parts put together here; `after_…` change what a part gives."""
    body = model.model
    h = body.embed_tokens(ids)
    angles = body.rotary_emb(h, torch.arange(ids.shape[1])[None])
    for number, layer in enumerate(body.layers):
        for kind, (norm, part) in enumerate(
            [(layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)]
        ):
            x = norm(h)
            y = part(x, position_embeddings=angles, attention_mask=None)[0] if kind == 0 else part(x)
            h = h + (y if after_part is None else after_part(2 * number + kind, y))
        h = h if after_layer is None else after_layer(number, h)
    return model.lm_head(body.norm(h))


def loop_adapter(h, values, *, activation, normed):
    """One position and one unit at a time, in Python's own doubles."""
    out = h.clone()
    down, b_down, up, b_up = (
        values[n].double().tolist() for n in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    for i, j in np.ndindex(*h.shape[:2]):
        z = h[i, j].tolist()
        if normed:
            mean = sum(z) / len(z)
            spread = math.sqrt(sum((x - mean) ** 2 for x in z) / len(z) + 1e-5)
            gain, shift = values["norm.weight"].tolist(), values["norm.bias"].tolist()
            z = [(x - mean) / spread * g + s for x, g, s in zip(z, gain, shift, strict=True)]
        u = [
            activation(sum(w * x for w, x in zip(row, z, strict=True)) + b)
            for row, b in zip(down, b_down, strict=True)
        ]
        for k, (row, b) in enumerate(zip(up, b_up, strict=True)):
            out[i, j, k] += sum(w * x for w, x in zip(row, u, strict=True)) + b
    return out


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("case", ["houlsby", "lin"])
@torch.no_grad()
def test_bottleneck_adapters_stand_where_the_paper_puts_them(case):
    model = tiny_causal_lm(dtype=torch.float64)
    plain, ids = copy.deepcopy(model), tokens()
    made = method(case)
    made.attach(model, seed=0)
    moved = {n: p.detach().clone() for n, p in stirred(model, made).items()}
    norms = {n: v for n, v in moved.items() if "bottleneck" not in n}
    plain.load_state_dict(norms, strict=False)
    adapters: dict[str, dict] = {}
    for name, value in moved.items():
        if "bottleneck" in name:
            place, _, part = name.partition(".bottleneck.")
            adapters.setdefault(place, {})[part] = value
    ordered = list(adapters.values())
    options = (
        {"activation": gelu, "normed": False}
        if case == "houlsby"
        else {"activation": lambda x: max(x, 0.0), "normed": True}
    )
    hook = {
        "after_part" if case == "houlsby" else "after_layer": lambda k, h: loop_adapter(
            h, ordered[k], **options
        )
    }
    assert len(ordered) == (4 if case == "houlsby" else 2)
    assert len(norms) == (5 if case == "houlsby" else 0)
    expected = by_hand(plain, ids, **hook)
    close(model(ids).logits, expected, torch.float32)  # transformers' norms round to float32
    assert (expected - plain(ids).logits).abs().max() > 1e-2


def test_parameter_counts_follow_the_papers_formulas():
    d, layers, r = 32, 2, 3
    counts = {}
    for case in ("houlsby", "lin"):
        model, made = tiny_causal_lm(), method(case)
        report = made.attach(model, seed=0)
        counts[case] = report.trainable
    each = 2 * d * r + r + d
    assert counts["houlsby"] == 2 * layers * each + (2 * layers + 1) * d
    assert counts["lin"] == layers * each + 2 * layers * d


def test_adapters_begin_near_the_identity():
    model, ids = tiny_causal_lm(), tokens()
    before = model(ids).logits
    made = method("houlsby")
    made.attach(model, seed=0)
    moved = (model(ids).logits - before).abs().max()
    assert 0 < moved < 1e-3


def test_hadamard_is_the_matrix_of_signs():
    H = np.array([[1]])
    for _ in range(5):
        H = np.block([[H, H], [H, -H]])
    x = torch.randn(32, dtype=torch.float64)
    close(hadamard(x), torch.from_numpy(H).double() @ x, torch.float64)


def dense(projection, name: str, size: int, d: int) -> torch.Tensor:
    """P entry by entry from its parts, by plain Python."""
    P = torch.zeros(size, d, dtype=torch.float64)
    if isinstance(projection, Sparse):
        columns = [i for index in projection.index.values() for i in index.tolist()]
        for row, column in enumerate(projection.index[name].tolist()):
            sharing = sum(c % d == column % d for c in columns)
            P[row, column % d] = (1 if column < d else -1) / math.sqrt(sharing)
        return P
    signs, order, gauss = (t.tolist() for t in projection.parts[name])
    n = len(signs)
    sign = lambda i, j: (-1) ** bin(i & j).count("1")  # noqa: E731
    divisor = math.sqrt(n * sum(g * g for g in gauss))
    for row in range(size):
        for column in range(d):
            P[row, column] = sum(
                sign(row, k) * gauss[k] * sign(order[k], column) * signs[column] for k in range(n)
            )
    return P / divisor


@pytest.mark.parametrize("kind", [Fastfood, Sparse])
def test_projections_are_the_matrices_they_say(kind):
    sizes, d = {"a": 21, "b": 3}, 7
    projection = kind(sizes, d, torch.Generator().manual_seed(1))
    theta = torch.randn(d, dtype=torch.float64)
    for name, size in sizes.items():
        P = dense(projection, name, size, d)
        close(projection.forward(name, theta), P @ theta, torch.float64)
        gradient = torch.randn(size, dtype=torch.float64)
        close(projection.transpose(name, gradient), P.T @ gradient, torch.float64)
    if kind is Sparse:
        whole = torch.cat([dense(projection, n, s, d) for n, s in sizes.items()])
        close(whole.square().sum(0), torch.ones(d), torch.float64)
        assert (whole != 0).sum(1).eq(1).all()


def test_fastfood_moves_each_weight_about_alike():
    """Rows of P have the same expected norm: entries of P are near normal with variance 1/n."""
    d, size = 64, 4096
    projection = Fastfood({"w": size}, d, torch.Generator().manual_seed(0))
    P = torch.stack([projection.forward("w", e) for e in torch.eye(d)], 1)
    assert abs(float(P.square().sum() / d) - 1) < 0.05  # columns of norm 1, nearly
    assert float((P.T @ P - torch.eye(d)).abs().max()) < 0.2


@pytest.mark.parametrize("said", [False, True])
def test_intrinsic_weights_are_the_base_plus_the_projection(said):
    model = tiny_causal_lm()
    before = bits(model)
    made = make_method("intrinsic", MethodOptions(dimension=20, said=said).resolved("intrinsic"))
    made.attach(model, seed=4)
    moved = stirred(model, made)
    model(tokens())
    for name, p in model.named_parameters():
        P = torch.stack([made._projection.forward(name, e) for e in torch.eye(len(moved["theta"]))], 1)
        layer = int(name.split(".")[2]) if ".layers." in name else 2
        factor = moved["multipliers"][layer] if said else 1.0
        expected = before[name] + factor * (P @ moved["theta"]).view(p.shape)
        close(p, expected, torch.float32)
        assert not torch.equal(p, before[name])
    assert len(moved["theta"]) + (3 if said else 0) == 20
    made.detach(model)
    assert same_bits(model, before)


# ---------------------------------------------------------------- through the training path


def naive_loss(model, examples) -> torch.Tensor:
    """One example at a time through the model's own forward."""
    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        ids = torch.from_numpy(e.tokens).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        wanted = torch.from_numpy(e.supervised)[1:]
        total = total + F.cross_entropy(logits[wanted].double(), ids[0, 1:][wanted], reduction="sum")
    return total


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["none", "tree"])
def test_the_loops_gradients_are_those_of_the_plain_model(case, layout):
    """Packed, in fast blocks or tiles, and chunked, against one example at a time through autograd."""
    model = tiny_causal_lm(vocab_size=264)
    examples = encode(read_records(RECORDS), Tokenizer(chat=False), max_length=64).examples
    made = method(case)
    made.attach(model, seed=0)
    parameters = stirred(model, made)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        loss.backward()
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        for p in parameters.values():
            p.grad = None
        return found

    expected = gradients(naive_loss(model, examples))
    forward = Forward(model)
    if layout == "tree":
        assert forward.can_mask(64)
    with computing(model, kernels="auto", recompute="none", flops=0, warm_up=lambda: None) as policy:
        (batch, *rest) = Layout(layout, "").batches(examples, range(len(examples)), batch_tokens=4096)
        actual = gradients(sum((forward.loss_sum(b) for b in rest), forward.loss_sum(batch)))
    in_place = case.split()[0] in ("full", "top-k", "bitfit", "intrinsic")
    assert (policy.kernels == "block") == in_place
    assert actual.keys() == expected.keys()
    assert len(actual) == len(parameters)
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        size = float(value.abs().max())
        close(actual[name] / size, value / size, torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("full")])
def test_a_run_learns_and_leaves_the_base_as_it_was(case, tmp_path):
    given = base()
    given.model.requires_grad_(False)
    before = bits(given.model)
    forward = Forward(given.model)
    result = run(tmp_path / "run", base=given, settings=settings(case, epochs=8))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert same_bits(given.model, before)
    assert not any(p.requires_grad for p in given.model.parameters())
    assert result.adapter is None
    tuned = read_method(result.adapter_dir)
    assert tuned.method == case.split()[0]
    examples = encode(read_records(HELD_OUT), Tokenizer(chat=False), max_length=64).examples

    with applied(given.model, tuned):
        assert evaluate_loss(forward, examples).loss == pytest.approx(result.eval_loss, rel=1e-5)
    assert same_bits(given.model, before)


@pytest.mark.parametrize("case", ["houlsby", "prefix", "prompt", "bitfit", "intrinsic said"])
def test_a_stopped_run_goes_on_to_the_same_bits(case, tmp_path):
    class StopError(Exception): ...

    def stop(step: int) -> None:
        if step == 3:
            raise StopError

    run(tmp_path / "whole", settings=settings(case))
    with pytest.raises(StopError):
        run(tmp_path / "run", settings=settings(case), on_step=stop)
    assert run(tmp_path / "run", settings=settings(case), resume=True).resumed_from_step == 3
    one, two = (read_method(tmp_path / name / "adapter") for name in ("whole", "run"))
    assert one.digest == two.digest


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("full")])
def test_generation_with_a_cache_gives_what_the_whole_text_gives(case, tmp_path):
    given = base()
    made = method(case)
    made.attach(given.model, seed=0)
    stirred(given.model, made)
    given.model(tokens())
    tensors = {n: t.clone() for n, t in made.tensors(given.model).items()}
    options = dict(made.options)
    made.detach(given.model)

    prompts = [[3, 4, 5], [7, 8, 9, 10, 11, 12], [1, 2]]
    with applied(given.model, Tuned(case.split()[0], options, tensors)), torch.no_grad():
        engine = Engine(given, runner="generic")
        results = engine.generate([Request(p, max_tokens=6, ignore_eos=True) for p in prompts])
        engine.close()
        for prompt, result in zip(prompts, results, strict=True):
            text = list(prompt)
            for _ in range(6):
                text.append(int(given.model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
            assert list(result.token_ids) == text[len(prompt) :]


@torch.no_grad()
def test_a_prefix_from_a_text_is_that_text_before_the_input():
    model, ids = tiny_causal_lm(vocab_size=264), tokens(rows=1)
    tokenizer = Tokenizer(chat=False)
    made = make_method("prefix", MethodOptions(init_text="hello").resolved("prefix"), tokenizer)
    before = torch.tensor([tokenizer.encode("hello", add_special_tokens=False)])
    expected = model(torch.cat([before, ids], 1)).logits[:, before.shape[1] :]
    made.attach(model, seed=0)
    close(model(ids).logits, expected, torch.float32)
    made.detach(model)
    prompt = make_method("prompt", MethodOptions(init_text="hello").resolved("prompt"), tokenizer)
    prompt.attach(model, seed=0)
    close(model(ids).logits, expected, torch.float32)


# ---------------------------------------------------------------- refusals


def test_bitfit_says_what_there_is_to_train():
    with pytest.raises(ConfigError, match=r"has none.*14 linear layers a zero bias \(448 parameters\)"):
        make_method("bitfit", MethodOptions().resolved("bitfit")).attach(tiny_causal_lm(), seed=0)
    model = tiny_causal_lm("gpt2")
    made = make_method("bitfit", MethodOptions().resolved("bitfit"))
    made.attach(model, seed=0)
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert set(made.parameters(model)) == biases
    assert any("ln_1" in n for n in biases)


def test_bitfit_and_top_layers_move_nothing_else(tmp_path):
    for case, moves in (
        ("bitfit", lambda n: False),
        ("top-k", lambda n: ".layers.1." in n or n == "model.norm.weight"),
    ):
        given = base()
        made = method(case)
        names = set()
        made.attach(given.model, seed=0)
        names |= set(made.parameters(given.model))
        assert {n for n in names if not n.endswith(".bias")} == {n for n in bits(given.model) if moves(n)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "houlsby", "options": {"virtual_tokens": 3}}, "belongs to prefix, prompt"),
        ({"method": "prefix", "options": {"virtual_tokens": 0}}, "at least 1"),
        ({"method": "bitfit", "options": {"biases": "all"}}, "own, added"),
        ({"method": "prefix", "options": {"init_text": " "}}, "is empty"),
        ({"method": "intrinsic", "options": {"dimensions": 3}}, 'Did you mean "dimension"'),
        ({"method": "houlsbi"}, "houlsby"),
    ],
)
def test_wrong_options_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


def test_what_a_method_cannot_do_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="recompute"):
        run(tmp_path / "run", settings=settings("prompt", recompute="layers"))
    with pytest.raises(ConfigError, match="2 decoder layers"):
        run(tmp_path / "run", settings=TrainConfig(method="top-k", options=MethodOptions(top_layers=3)))
    with pytest.raises(ConfigError, match="at most"):
        run(
            tmp_path / "run", settings=TrainConfig(method="intrinsic", options=MethodOptions(dimension=10**9))
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises((ConfigError, TargetError)):
        method("prefix").attach(tiny_causal_lm("mamba"), seed=0)


def test_prefix_recomputes_exactly(tmp_path):
    run(tmp_path / "kept", settings=settings("prefix"))
    run(tmp_path / "again", settings=settings("prefix", recompute="layers"))
    one, two = (read_method(tmp_path / name / "adapter") for name in ("kept", "again"))
    for name, value in one.tensors.items():
        close(two.tensors[name], value, torch.float32)


# ---------------------------------------------------------------- on disk


def tuned_of(case: str) -> Tuned:
    model, made = tiny_causal_lm(), method(case)
    made.attach(model, seed=0)
    stirred(model, made)
    return Tuned(
        case.split()[0], made.options, {n: t.clone() for n, t in made.tensors(model).items()}, {"by": "us"}
    )


@pytest.mark.parametrize("case", ["houlsby", "prefix", "prompt", "bitfit", "top-k", "intrinsic said"])
def test_written_read_and_written_again_gives_the_same_bytes(case, tmp_path):
    write_method(tuned_of(case), tmp_path / "a")
    again = read_method(tmp_path / "a")
    write_method(again, tmp_path / "b")
    for name in METHOD_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.provenance == {"by": "us"}


def test_a_lora_reader_says_what_it_was_given(tmp_path):
    write_method(tuned_of("houlsby"), tmp_path / "a")
    with pytest.raises(AdapterFileError, match="what method 'houlsby' trained, which is no LoRA adapter"):
        read_adapter(tmp_path / "a")
    run(tmp_path / "full", settings=settings("full"))
    for read in (read_adapter, read_method):
        with pytest.raises(AdapterFileError, match="fully fine-tuned model"):
            read(tmp_path / "full" / "model")


@pytest.mark.parametrize("file", METHOD_FILES)
def test_a_changed_file_is_refused(file, tmp_path):
    write_method(tuned_of("houlsby"), tmp_path / "a")
    path = tmp_path / "a" / file
    data = bytearray(path.read_bytes())
    if file == METHOD_FILES[0]:
        data = data.replace(b'"bottleneck": 3', b'"bottleneck": 4')
    else:
        data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match="changed after they were written"):
        read_method(tmp_path / "a")


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: (d / "method.safetensors").unlink(),
        lambda d: (d / "method.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 40),
        lambda d: (d / "method.json").write_text("[1]"),
        lambda d: (d / "method.json").write_text('{"format_version": 1, "method": "os.system"}'),
        lambda d: (d / "method.json").write_text('{"format_version": 9}'),
    ],
)
def test_a_broken_directory_is_refused(harm, tmp_path):
    write_method(tuned_of("lin"), tmp_path / "a")
    harm(tmp_path / "a")
    with pytest.raises(AdapterFileError):
        read_method(tmp_path / "a")


@pytest.mark.parametrize("case", ["houlsby", "prefix", "prompt", "bitfit", "top-k", "intrinsic"])
def test_tensors_that_do_not_fit_leave_the_base_alone(case):
    tuned = tuned_of(case)
    model = tiny_causal_lm()
    before = bits(model)
    name = next(iter(tuned.tensors))
    wrong = [
        {n: t for n, t in tuned.tensors.items() if n != name},
        tuned.tensors | {"stranger": torch.ones(2)},
        tuned.tensors | {name: torch.ones(*tuned.tensors[name].shape, 2)},
    ]
    for tensors in wrong:
        with pytest.raises(AdapterFileError, match="does not fit this base"):
            apply_method(model, Tuned(tuned.method, tuned.options, tensors))
        assert same_bits(model, before)
    with applied(model, tuned):
        assert not torch.equal(model(tokens()).logits, tiny_causal_lm()(tokens()).logits)
    assert torch.equal(model(tokens()).logits, tiny_causal_lm()(tokens()).logits)
    assert same_bits(model, before)


def test_another_random_projection_is_refused():
    tuned = tuned_of("intrinsic")
    with pytest.raises(AdapterFileError, match="random projection"):
        apply_method(tiny_causal_lm(), Tuned("intrinsic", tuned.options | {"seed": 1}, tuned.tensors))


def test_weights_that_train_coarsely_are_announced():
    for dtype, is_said in ((torch.bfloat16, True), (torch.float32, False)):
        report = method("top-k").attach(tiny_causal_lm(dtype=dtype), seed=0)
        assert ("rounds small updates away" in str(report)) == is_said
    assert "rounds" not in str(method("lin").attach(tiny_causal_lm(dtype=torch.bfloat16), seed=0))
