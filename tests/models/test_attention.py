"""Packed attention against one dense mask, in float64, values and gradients; varlen launchers on a model of kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mmrlhf.batch import Layout
from mmrlhf.models import attention, varlen
from mmrlhf.models.attention import Packing, sdpa_per_sequence

LAYOUTS = {
    "one response": Layout((5,), ((3,),)),
    "no response": Layout((4, 3), ((), (2,))),
    "one token each": Layout((1, 1), ((1, 1), (1,))),
    "mixed": Layout((7, 2, 11), ((1, 9, 3), (8,), (2, 2, 2, 2, 2))),
}


def dense_mask(layout: Layout, window: int | None) -> torch.Tensor:
    """[T, T] bool, written from the definition: same group, prefix or same response, not later, inside the window."""
    group, response, position = [], [], []
    count = 0
    for g, (prefix, responses) in enumerate(zip(layout.prefix_len, layout.response_len, strict=True)):
        for piece, length in enumerate((prefix, *responses)):
            count += 1
            start = 0 if piece == 0 else prefix
            group += [g] * length
            response += [0 if piece == 0 else count] * length
            position += range(start, start + length)
    total = len(group)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for q in range(total):
        for k in range(total):
            seen = group[q] == group[k] and response[k] in (0, response[q]) and position[k] <= position[q]
            mask[q, k] = seen and (window is None or position[q] - position[k] < window)
    return mask


def inputs(layout: Layout, *, heads=(4, 2), dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(layout.group_len)
    return [
        torch.randn(h, total, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    ]


def run_with_gradients(function, tensors):
    out = function(*tensors)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * direction.to(out.dtype)).sum(), tensors)]


def dense(layout, window, scale):
    def function(query, key, value):
        out = scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=dense_mask(layout, window), scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    return function


def varlen_model(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What varlen kernels compute, from their documentation: bottom-right aligned, a sequence at a time."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q is not cu_k
    assert q.is_contiguous()
    out = []
    for index in range(len(cu_q) - 1):
        a, b = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        queries, keys = q[a].shape[0], k[b].shape[0]
        assert queries <= max_q
        assert keys <= max_k
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        mask = torch.ones(queries, keys, dtype=torch.bool)
        if window_size[1] >= 0:
            mask &= distance >= -window_size[1]
        if window_size[0] >= 0:
            mask &= distance <= window_size[0]
        parts = [t.transpose(0, 1)[None] for t in (q[a], k[b], v[b])]
        one = scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        out.append(one[0].transpose(0, 1))
    return torch.cat(out)


def varlen_torch_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    """torch 2.10's signature: no grouped heads, no scale, no window."""
    assert q.shape[1] == k.shape[1]
    return varlen_model(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0) if is_causal else (-1, -1))


def varlen_torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """2.11's: grouped heads have no argument, and the kernel under it takes them."""
    options = {"scale": scale, "window_size": window_size, "enable_gqa": True}
    return varlen_model(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def varlen_equal_heads(q, k, v, *arguments, return_aux=None, scale=None, window_size=(-1, -1)):
    """The same if its kernel did not."""
    assert q.shape[1] == k.shape[1]
    return varlen_model(q, k, v, *arguments, scale=scale, window_size=window_size)


def repeated(function, *tensors, **options):
    return varlen._run_torch(function, *tensors, repeated=True, **options)


def flash_model(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    assert options["causal"]
    assert options["dropout_p"] == 0.0
    left, _ = options["window_size"]
    return varlen_model(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=options["softmax_scale"],
        window_size=(left, 0),
        enable_gqa=True,
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sdpa_per_sequence_equals_one_dense_mask(name, window, heads):
    layout, scale = LAYOUTS[name], 0.3
    tensors = inputs(layout, heads=heads)
    got = run_with_gradients(
        lambda q, k, v: sdpa_per_sequence(q, k, v, Packing(layout), scale=scale, window=window, dropout=0.0), tensors
    )
    want = run_with_gradients(dense(layout, window, scale), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("launch", "function", "windows"),
    [
        (varlen._run_torch, varlen_model, (None, 1, 4)),
        (repeated, varlen_torch_2_10, (None,)),
        (varlen._run_torch, varlen_torch_2_11, (None, 1, 4)),
        (repeated, varlen_equal_heads, (None, 1, 4)),
        (varlen._run_flash, flash_model, (None, 1, 4)),
    ],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_varlen_launchers_equal_one_dense_mask(name, launch, function, windows):
    """Lengths, gathered keys, windows, scale and heads as handed to the kernels, by signature."""
    layout, scale = LAYOUTS[name], 0.3
    for window in windows:
        tensors = inputs(layout)
        packing = Packing(layout)

        def run(q, k, v, packing=packing, window=window):
            return launch(function, q, k, v, packing, scale=scale, window=window, dropout=0.0)

        got = run_with_gradients(run, tensors)
        want = run_with_gradients(dense(layout, window, scale), tensors)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attention_evaluates_the_dense_mask(name, window):
    layout = LAYOUTS[name]
    packing = Packing(layout)
    mask = varlen.block_mask(packing, window, torch.device("cpu"))
    rows = torch.arange(sum(layout.group_len))
    assert torch.equal(mask.mask_mod(None, None, rows[:, None], rows[None]), dense_mask(layout, window))


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_gives_the_values_of_the_dense_mask(window):
    """Uncompiled, on the CPU, forward only: its backward is for CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    layout, scale = LAYOUTS["mixed"], 0.3
    packing = Packing(layout)
    tensors = [tensor.detach() for tensor in inputs(layout, dim=16, dtype=torch.float32)]
    want = dense(layout, window, scale)(*(tensor.double() for tensor in tensors))
    for _ in range(2):
        got = varlen._run_flex(flex_attention, *tensors, packing, scale=scale, window=window, dropout=0.0)
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= 1e-6 * want.norm()
    assert len(packing._kept) == 1  # one mask for all layers
    with pytest.raises(ValueError, match=r"no dropout, the model asks for 0\.1"):
        varlen._run_flex(flex_attention, *tensors, packing, scale=scale, window=window, dropout=0.1)


def test_kernels_are_tried_in_order_and_each_is_tested(monkeypatch):
    """The first that is there and passes its self-test is taken; the others' reasons are told."""
    names = [name for name, _, _ in varlen.candidates(windowed=True)]
    assert [name for name in names if "repeated" not in name] == ["varlen_attn", "flash_attn", "flex_attention"]
    monkeypatch.setattr(varlen, "_find", lambda module, name: (varlen_torch_2_11, ""))
    assert [name for name, _, _ in varlen.candidates(windowed=True)][1] == "varlen_attn with repeated heads"

    def listed(*, windowed):
        yield "absent", None, "not available (no module)"
        yield "wrong", top_left, ""
        yield "right", sdpa_per_sequence, ""
        yield "never", None, ""

    monkeypatch.setattr(varlen, "candidates", listed)
    # The choice itself is pure: only the tensors of a self-test lie on the device, here the CPU in CUDA's place.
    real = attention.self_test
    monkeypatch.setattr(attention, "self_test", lambda run, device, *args, **how: real(run, CPU, *args, **how))
    choose = attention._choose.__wrapped__
    run, name, _ = choose("cuda", None, torch.bfloat16, 64, 64, True)
    assert (run, name) == (sdpa_per_sequence, "right")
    monkeypatch.setattr(varlen, "candidates", lambda *, windowed: list(listed(windowed=windowed))[:2])
    run, name, reason = choose("cuda", None, torch.bfloat16, 64, 64, False)
    assert name == "sdpa"
    assert "absent: not available (no module); wrong: self-test error" in reason
    assert "causal alignment" in reason


CPU = torch.device("cpu")


def top_left(q, k, v, packing, *, scale, window, dropout):
    """A kernel whose causal mask is aligned top-left, as cuDNN's packed one is."""
    out = []
    k, v = (varlen.gathered(t.transpose(0, 1), packing).transpose(0, 1) for t in (k, v))
    lengths = packing.key_lengths
    for a, b, c in zip(q.split(packing.lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True):
        out.append(scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True))
    return torch.cat(out, 1).transpose(0, 1)


def test_self_test_finds_a_top_left_kernel():
    """cuDNN's packed causal mask is aligned top-left: such a kernel must never be used."""

    cpu = torch.device("cpu")
    for windowed in (False, True):
        assert attention.self_test(sdpa_per_sequence, cpu, torch.bfloat16, 64, windowed=windowed) == ""
    problem = attention.self_test(top_left, cpu, torch.bfloat16, 64, windowed=False)
    assert "causal alignment" in problem


def test_self_test_reports_a_kernel_that_raises():
    def broken(*tensors, **options):
        raise RuntimeError("no kernel image is available")

    problem = attention.self_test(broken, torch.device("cpu"), torch.bfloat16, 64, windowed=False)
    assert problem == "self-test failed with RuntimeError: no kernel image is available"


def test_backend_on_cpu_says_why():
    name, reason = attention.attention_backend(torch.device("cpu"), torch.float32)
    assert name == "sdpa"
    assert reason == "varlen kernels are for CUDA, this is cpu"


def test_unknown_score_modifications_are_refused():
    layout = LAYOUTS["mixed"]
    query, key, value = (t[None].detach() for t in inputs(layout))
    module = torch.nn.Module()
    call = {attention.KEYWORD: Packing(layout)}
    with pytest.raises(ValueError, match="softcap"):
        attention.attention(module, query, key, value, None, softcap=30.0, **call)
    with pytest.raises(ValueError, match=r"one row of 51 tokens, attention got query \(1, 4, 50, 8\)"):
        attention.attention(module, query[:, :, 1:], key, value, None, **call)


def test_packing_lengths():
    packing = Packing(Layout((3, 2), ((1, 4), (5,))))
    assert packing.lengths == [3, 1, 4, 2, 5]
    assert packing.key_lengths == [3, 4, 7, 2, 7]
    cu_q, cu_k = packing.cumulative(torch.device("cpu"))
    assert cu_q.tolist() == [0, 3, 4, 8, 10, 15]
    assert cu_k.tolist() == [0, 3, 7, 14, 16, 23]


@pytest.mark.gpu
@pytest.mark.parametrize("windowed", [False, True])
def test_every_kernel_that_is_installed_passes_its_self_test(windowed):
    """torch's own two always are; flash-attn may be."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = {name: (run, missing) for name, run, missing in varlen.candidates(windowed=windowed)}
    assert not found["varlen_attn"][1]
    assert not found["flex_attention"][1]
    for name, (run, missing) in found.items():
        if not missing:
            problem = attention.self_test(run, torch.device("cuda"), torch.bfloat16, 64, windowed=windowed)
            assert problem == "", name


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_on_cuda(dtype, window):
    """The real kernel: value and gradients at most twice SDPA's own error against float64."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    layout = Layout((300, 65), ((40, 1, 200), (77,)))
    run = attention.packed_attention(device, dtype, 64, 64, windowed=window is not None)
    assert attention.attention_backend(device, dtype)[0] != "sdpa"
    scale = 1 / math.sqrt(64)
    low = [t.detach().to(device, dtype).requires_grad_() for t in inputs(layout, dim=64)]
    exact = [t.detach().double().cpu().requires_grad_() for t in low]
    want = run_with_gradients(dense(layout, window, scale), exact)

    def pack(q, k, v, function=run):
        return function(q, k, v, Packing(layout), scale=scale, window=window, dropout=0.0).cpu()

    got = run_with_gradients(pack, low)
    own = run_with_gradients(lambda q, k, v: pack(q, k, v, sdpa_per_sequence), low)
    for a, b, truth in zip(got, own, want, strict=True):
        truth = truth.detach()
        floor = torch.finfo(dtype).eps * truth.norm()
        assert (a.cpu().double() - truth).norm() <= 2 * (b.cpu().double() - truth).norm() + floor
