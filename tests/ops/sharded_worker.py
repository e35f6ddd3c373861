"""What each process of test_sharded runs: `torchrun --nproc_per_node 2 sharded_worker.py OUT` (gloo, CPU).

Every function called `case_...` runs on both ranks; its error, or none, goes to OUT/RANK.json. Truth and baseline are
those of one process with the whole vocabulary, which each rank computes for itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from mmrlhf.kernels.triton import configs  # noqa: E402
from mmrlhf.ops import LoraAdapter, VocabShard, fused_preference_loss, linear_logp, reference  # noqa: E402
from mmrlhf.train.distributed import leave  # noqa: E402
from numerics import HeadProblem, assert_no_worse  # noqa: E402

V, H, N = 1301, 24, 47
CU = torch.tensor([0, 9, 14, 21, 21, 33, 34, 47])
PAIRS = torch.tensor([[1, 0], [2, 4], [5, 2], [4, 5]])
OPTIONS = {"logit_scale": 0.8, "softcap": 40.0}
ROWWISE = ("weight", "bias", "b")  # cut by the vocabulary; hidden and a are not
NAMES = ("hidden", "a", *ROWWISE)
FROZEN = ("hidden", "a", "b")
CUTS = {"even": (0, 651, V), "uneven": (0, 100, V), "empty": (0, V, V)}
GEMM = configs.GemmConfig(4, 1, 64, 512, 32)
UPSTREAM = torch.randn(N, generator=torch.Generator().manual_seed(7))


def problem(*, far=False, seed=3, dtype=torch.float32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors by name, and targets. `far`: rows whose target is some 1000 nats below the largest logit."""
    made = HeadProblem.random(N, H, V, bias=True, seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(5, H, generator=g) / H**0.5, 0.3 * torch.randn(V, 5, generator=g)
    if far:
        made.hidden[[3, 17]] *= 3000
        logits = made.hidden @ made.weight.T
        made.targets[[3, 17]] = logits[[3, 17]].argmin(-1)
    tensors = {"hidden": made.hidden, "weight": made.weight, "bias": made.bias, "a": a.to(dtype), "b": b.to(dtype)}
    return tensors, made.targets


def leaves(tensors, train, dtype=None, cut=None):
    """Fresh copies, of this rank's rows of the vocabulary with a `cut`."""
    rank = dist.get_rank()
    part = {
        name: value[cut[rank] : cut[rank + 1]] if cut and name in ROWWISE else value for name, value in tensors.items()
    }
    return {k: v.detach().clone().to(dtype or v.dtype).requires_grad_(k in train) for k, v in part.items()}


def plain_logp(hidden, weight, targets, *, bias, logit_scale, softcap, adapter):
    """PyTorch's own path in the dtype of its inputs."""
    linear = torch.nn.functional.linear
    logits = linear(hidden, weight) + linear(linear(hidden, adapter.a), adapter.b) * adapter.scale
    logits = logits.float() * logit_scale + bias.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    keep = targets >= 0
    return torch.where(keep, logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0], 0)


def logp_of(function, given, targets, **more):
    adapter = LoraAdapter(given["a"], given["b"], 1.5)
    out = function(given["hidden"], given["weight"], targets, bias=given["bias"], adapter=adapter, **more)
    if out.requires_grad:
        out.backward(UPSTREAM.to(out.dtype))
    return out


def loss_of(function, given, targets, *, dtype=torch.float32, **more):
    g = torch.Generator().manual_seed(5)
    settings = {
        "token_weight": (1 + 4 * (torch.rand(N, generator=g) > 0.7).float()).to(dtype),
        "reference_scores": (torch.randn(7, generator=g) - 40).to(dtype),
        "beta": 0.3,
        "sft_weight": 0.25,
    }
    adapter, head = LoraAdapter(given["a"], given["b"], 1.5), {"bias": given["bias"]}
    if function is plain_logp:
        logp = plain_logp(given["hidden"], given["weight"], targets, **head, adapter=adapter, **more)
        out = reference.Objective(CU, PAIRS, **settings)(logp)
    else:
        arguments = (given["hidden"], given["weight"], targets, CU, PAIRS)
        out = function(*arguments, **head, adapter=adapter, **settings, **more)
    out.loss.backward()
    return out.logp


def compare(run, ours, tensors, targets, *, cut, train=NAMES, options=OPTIONS, **more):
    """`run` with the whole vocabulary in float64 and in PyTorch's own path, and sharded; every rank has the same."""
    double = {"dtype": torch.float64} if run is loss_of else {}
    whole = reference.fused_preference_loss if run is loss_of else reference.linear_logp
    true = leaves(tensors, train, torch.float64)
    truth = run(whole, true, targets, **options, **double)
    plain = leaves(tensors, train)
    base = run(plain_logp, plain, targets, **options)
    given = leaves(tensors, train, cut=cut)
    out = run(ours, given, targets, **options, shard=VocabShard(cut), **more)
    assert_no_worse(out, base, truth, name="logp")
    mine = slice(cut[dist.get_rank()], cut[dist.get_rank() + 1])
    for name, value in given.items():
        assert (value.grad is not None) == (name in train), name
        if name in train:
            where = mine if name in ROWWISE else slice(None)
            floor = float(torch.finfo(value.dtype).eps * true[name].grad.abs().max())  # of the whole, not of the part
            arguments = (value.grad, plain[name].grad[where], true[name].grad[where])
            if value.grad.numel():
                assert_no_worse(*arguments, floor=floor, name=f"grad of {name}")
    for tensor in (out.detach(), given["hidden"].grad, given["a"].grad):
        if tensor is not None:
            same_on_every_rank(tensor)
    return out


def same_on_every_rank(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    assert torch.equal(everyone[0], everyone[1])


def case_linear_logp():
    tensors, targets = problem()
    for cut, budget, backend in itertools.product(CUTS.values(), (None, 0), ("torch", "cpu")):
        for train in (NAMES, FROZEN, ()):
            compare(logp_of, linear_logp, tensors, targets, cut=cut, train=train, memory_budget=budget, backend=backend)


def case_fused():
    """Budgets of everything, of chunks (some kept, some made again) and of nothing: with an uneven cut each rank could
    keep another number of rows, but all have to cut the same chunks."""
    tensors, targets = problem()
    for cut, rows in itertools.product(CUTS.values(), (N, 20, 15, 0)):
        for train in (NAMES, FROZEN):
            compare(loss_of, fused_preference_loss, tensors, targets, cut=cut, train=train, memory_budget=rows * 4 * V)


def case_rows_done_again():
    """The target lies on one rank, the largest logit on the other or on the same."""
    tensors, targets = problem(far=True)
    for cut, budget in itertools.product(CUTS.values(), (None, 0)):
        for options in ({"logit_scale": 1.0, "softcap": None}, {"logit_scale": 1.0, "softcap": 500.0}):
            for train in (NAMES, FROZEN):
                out = compare(
                    logp_of,
                    linear_logp,
                    tensors,
                    targets,
                    cut=cut,
                    train=train,
                    options=options,
                    memory_budget=budget,
                )
                assert (out[[3, 17]] < -100).all()
        compare(loss_of, fused_preference_loss, tensors, targets, cut=cut, memory_budget=budget)


@contextlib.contextmanager
def large_tiles(**more):
    """The triton kernels' configurations for the interpreter, which pays a program, not an element."""
    rows = configs.RowConfig(4, 1, 64, 512)
    epilogue = configs.EpilogueConfig(4, 1, 64, 512)
    wanted = {"EPILOGUE": epilogue, "EPILOGUE_NARROW": epilogue, "REDO_FLOAT": GEMM, **more}
    wanted |= dict.fromkeys(("TARGET_LOGIT", "UNIT_GRADIENT"), rows)
    before = {name: getattr(configs, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(configs, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(configs, name, value)


def case_triton():
    """The kernels in the interpreter; some targets lie far below a largest logit of this rank or the other."""
    tensors, targets = problem(far=True)
    with large_tiles():
        common = {"options": {"logit_scale": 1.0, "softcap": 500.0}, "backend": "triton"}
        out = compare(logp_of, linear_logp, tensors, targets, cut=CUTS["uneven"], **common, memory_budget=0)
        assert (out[[3, 17]] < -100).all()
        compare(loss_of, fused_preference_loss, tensors, targets, cut=CUTS["empty"], **common)


def case_triton_without_an_adapter():
    """Only then does the fused GEMM make E, and the target's logit come from a kernel."""
    cap = {"softcap": 500.0, "logit_scale": 0.8}
    with large_tiles():
        without_an_adapter(CUTS["uneven"], keep=True, **cap)
    with large_tiles(pick=lambda problem: GEMM):
        without_an_adapter(CUTS["uneven"], keep=False)
        without_an_adapter(CUTS["empty"], keep=True, **cap)


def without_an_adapter(cut, *, keep, **options):
    """linear_logp of hidden, weight and bias alone, sharded, against the whole in float64 and in float32."""
    tensors, targets = problem(far=True)
    names, mine = ("hidden", "weight", "bias"), slice(cut[dist.get_rank()], cut[dist.get_rank() + 1])
    found = []
    for dtype in (torch.float64, torch.float32, None):
        given = leaves(tensors, names, dtype, None if dtype else cut)
        arguments = {"bias": given["bias"], **options}
        if dtype is not None:
            logits = given["hidden"] @ given["weight"].T * options.get("logit_scale", 1.0) + given["bias"]
            cap = options.get("softcap")
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        else:
            arguments |= {"shard": VocabShard(cut), "memory_budget": None if keep else 0, "backend": "triton"}
            logp = linear_logp(given["hidden"], given["weight"], targets, **arguments)
        logp.backward(UPSTREAM.to(logp.dtype))
        found.append((logp, *(given[name].grad for name in names)))
    for name, truth, base, ours in zip(("logp", *names), *found, strict=True):
        part = mine if name in ROWWISE else slice(None)
        if ours.numel():
            floor = float(torch.finfo(torch.float32).eps * truth.abs().max())
            assert_no_worse(ours, base[part], truth[part], floor=floor, name=f"{name} {cut} {options}")
    same_on_every_rank(found[2][0].detach())
    same_on_every_rank(found[2][1])


def case_ignored_rows():
    tensors, targets = problem()
    targets[[0, 20, 46]] = -100
    compare(logp_of, linear_logp, tensors, targets, cut=CUTS["uneven"])
    everything = torch.full_like(targets, -100)
    given = leaves(tensors, NAMES, cut=CUTS["even"])
    out = logp_of(linear_logp, given, everything, shard=VocabShard(CUTS["even"]))
    assert (out == 0).all()
    assert all((value.grad == 0).all() for value in given.values())


def case_half_precision():
    tensors, targets = problem(dtype=torch.bfloat16)
    for run, ours in ((logp_of, linear_logp), (loss_of, fused_preference_loss)):
        for budget in (None, 0):
            compare(run, ours, tensors, targets, cut=CUTS["uneven"], memory_budget=budget)


def case_reference_backend():
    """The definition, in float64, sharded: it gathers the whole and is exact."""
    tensors, targets = problem()
    cut = CUTS["uneven"]
    true, given = leaves(tensors, NAMES, torch.float64), leaves(tensors, NAMES, torch.float64, cut)
    truth = logp_of(reference.linear_logp, true, targets, **OPTIONS)
    out = logp_of(linear_logp, given, targets, **OPTIONS, shard=VocabShard(cut), backend="reference")
    torch.testing.assert_close(out, truth)
    mine = slice(cut[dist.get_rank()], cut[dist.get_rank() + 1])
    for name, value in given.items():
        torch.testing.assert_close(value.grad, true[name].grad[mine] if name in ROWWISE else true[name].grad)


def raises(error, words, function, *arguments, **options):
    with pytest.raises(error, match=re.escape(words)):
        function(*arguments, **options)


def case_what_is_refused():
    tensors, targets = problem()
    cut, rank = CUTS["even"], dist.get_rank()
    given = leaves(tensors, (), cut=cut)
    hidden, weight = given["hidden"], given["weight"]
    raises(ValueError, "bounds must be 3 whole numbers", VocabShard, (0, V))
    raises(ValueError, "bounds must be 3 whole numbers", VocabShard, (0, 5, 4))
    raises(TypeError, "shard must be a VocabShard", linear_logp, hidden, weight, targets, shard=cut)
    shard = VocabShard(cut)
    assert (shard.total, shard.largest) == (V, 651)
    assert VocabShard.even(V).bounds == cut
    assert VocabShard.even(1).bounds == (0, 1, 1)
    raises(ValueError, f"weight must have the {cut[rank + 1] - cut[rank]} rows", linear_logp, hidden, weight[1:],
           targets, shard=shard)  # fmt: skip
    raises(ValueError, "bias must have shape", linear_logp, hidden, weight, targets, bias=tensors["bias"], shard=shard)
    raises(ValueError, "token ids in [0, 1301)", linear_logp, hidden, weight, targets + V, shard=shard)
    other = targets.roll(rank)
    raises(ValueError, "they differ in targets", linear_logp, hidden, weight, other, shard=shard)
    fewer = slice(0, N - rank)
    raises(ValueError, "the number of rows", linear_logp, hidden[fewer], weight, targets[fewer], shard=shard)
    compiled = torch.compile(linear_logp, backend="aot_eager")
    raises(Exception, "not for traced code", compiled, hidden, weight, targets, shard=shard)


def own_rows(rank):
    """As under data parallelism: the vocabulary is everybody's, the rows each rank's own."""
    tensors, _ = problem()
    mine, targets = problem(seed=10 + rank)
    return tensors | {"hidden": mine["hidden"]}, targets


def case_dtensor_gathered():
    """FSDP2's weight: each rank scores its own rows; a gradient is the mean of the ranks', in the weight's shards."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for run, whole, ours in (
        (logp_of, reference.linear_logp, linear_logp),
        (loss_of, reference.fused_preference_loss, fused_preference_loss),
    ):
        double = {"dtype": torch.float64} if run is loss_of else {}
        true, base = [], []
        for each in (0, 1):
            tensors, targets = own_rows(each)
            true.append(leaves(tensors, NAMES, torch.float64))
            run(whole, true[-1], targets, **OPTIONS, **double)
            base.append(leaves(tensors, NAMES))
            run(plain_logp, base[-1], targets, **OPTIONS)
        tensors, targets = own_rows(rank)
        given = leaves(tensors, NAMES)
        for name in ("weight", "bias", "a", "b"):
            given[name] = distribute_tensor(given[name].detach(), mesh, [Shard(0)]).requires_grad_()
        run(ours, given, targets, **OPTIONS)
        assert_no_worse(given["hidden"].grad, base[rank]["hidden"].grad, true[rank]["hidden"].grad)
        for name in ("weight", "bias", "a", "b"):
            grad = given[name].grad
            assert isinstance(grad, DTensor)
            assert grad.placements == (Shard(0),)
            means = [(each[0][name].grad + each[1][name].grad) / 2 for each in (base, true)]
            assert_no_worse(grad.full_tensor(), *means, name=name)


def case_dtensor_frozen():
    mesh = init_device_mesh("cpu", (2,))
    tensors, targets = own_rows(dist.get_rank())
    given = leaves(tensors, ("hidden",))
    want = logp_of(linear_logp, given, targets, **OPTIONS)
    again = leaves(tensors, ("hidden",))
    again["weight"] = distribute_tensor(again["weight"], mesh, [Shard(0)])
    assert torch.equal(logp_of(linear_logp, again, targets, **OPTIONS), want)
    assert torch.equal(given["hidden"].grad, again["hidden"].grad)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        gathered = linear_logp(again["hidden"], again["weight"], targets)
        assert torch.equal(gathered, linear_logp(given["hidden"], given["weight"], targets))


def case_dtensor_tensor_parallel():
    """A mesh dimension called tp, or a `VocabShard` beside a DTensor: the vocabulary stays where it is."""
    tensors, targets = problem()
    cut = CUTS["even"]
    meshes = [
        (init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), [Shard(0)], {}),
        (init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), [Replicate(), Shard(0)], {}),
        (init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), [Shard(0), Shard(0)], {}),
        (init_device_mesh("cpu", (2,)), [Shard(0)], {"shard": VocabShard(cut)}),
    ]
    mine = slice(cut[dist.get_rank()], cut[dist.get_rank() + 1])
    for run, ours in ((logp_of, linear_logp), (loss_of, fused_preference_loss)):
        want = leaves(tensors, NAMES, cut=cut)
        logp = run(ours, want, targets, **OPTIONS, shard=VocabShard(cut))
        for mesh, placements, more in meshes:
            given = leaves(tensors, NAMES)
            for name in ROWWISE:
                given[name] = distribute_tensor(given[name].detach(), mesh, placements).requires_grad_()
            out = run(ours, given, targets, **OPTIONS, **more)
            assert torch.equal(out, logp)
            for name, value in given.items():
                grad = value.grad
                if name in ROWWISE:
                    assert grad.placements == tuple(placements)
                    grad = grad.full_tensor()[mine]
                assert torch.equal(grad, want[name].grad), name
    mesh = meshes[-1][0]
    weight = distribute_tensor(tensors["weight"], mesh, [Shard(0)])
    arguments = (tensors["hidden"], weight, targets)
    raises(ValueError, "cut at (0, 651, 1301)", linear_logp, *arguments, shard=VocabShard(CUTS["uneven"]))
    wrong = distribute_tensor(tensors["weight"], mesh, [Shard(1)])
    raises(ValueError, "it must be Shard(0)", linear_logp, tensors["hidden"], wrong, targets, shard=VocabShard(cut))
    hidden = distribute_tensor(tensors["hidden"], mesh, [Replicate()])
    raises(TypeError, "pass hidden.to_local()", linear_logp, hidden, weight, targets)
    assert torch.equal(linear_logp(tensors["hidden"], wrong, targets), linear_logp(*arguments))  # both gathered


def case_a_head_that_is_an_fsdp_unit():
    """`fully_shard` on the lm_head itself: its weight is read outside its module, as a DTensor, and trains."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    head = torch.nn.Linear(H, V, bias=False)
    alone = torch.nn.Linear(H, V, bias=False)
    alone.load_state_dict(head.state_dict())
    fully_shard(head)
    losses = []
    for tensors, targets in map(own_rows, (0, 1)):
        losses.append(linear_logp(tensors["hidden"], alone.weight, targets).mean())
    (sum(losses) / 2).backward()
    tensors, targets = own_rows(dist.get_rank())
    loss = linear_logp(tensors["hidden"], head.weight, targets).mean()
    assert torch.equal(loss, losses[dist.get_rank()])
    loss.backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), alone.weight.grad)
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    torch.testing.assert_close(head.weight.full_tensor(), alone.weight)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            try:
                case()
                found[name] = None
            except Exception:
                found[name] = traceback.format_exc()
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
