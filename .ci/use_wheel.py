"""Uses an installed mmrlhf and checks that it is the installed one: `use_wheel.py FOLDER compiled|pure`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main(folder: str, kind: str) -> None:
    import mmrlhf

    where = Path(mmrlhf.__file__).resolve()
    assert where.is_relative_to(Path(folder).resolve()), f"imported {where}, which is not the wheel"
    assert all(Path(path).is_relative_to(Path(folder).resolve()) for path in mmrlhf.__path__), mmrlhf.__path__
    assert (where.parent / "kernels" / "cuda" / "formulas.cuh").is_file(), "the wheel lacks kernels/"

    import torch

    has_extension = importlib.util.find_spec("mmrlhf._C") is not None
    assert has_extension == (kind == "compiled"), f"a {kind} wheel, extension found: {has_extension}"
    if has_extension:
        from mmrlhf import _C

        tile, sums = torch.zeros(2, 5), torch.empty(2)
        _C.exp2_rowsum_(tile, torch.zeros(2), sums, threads=2)
        assert sums.tolist() == [5.0, 5.0]
        print(_C.build_info())

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator, requires_grad=True)
    weight = torch.randn(33, 16, generator=generator)
    targets = torch.arange(7)
    logp = mmrlhf.linear_logp(hidden, weight, targets)
    logp.sum().backward()
    truth = torch.log_softmax(hidden.detach().double() @ weight.double().T, -1)[torch.arange(7), targets]
    assert torch.allclose(logp.double(), truth, atol=1e-5), "linear_logp is off"
    print(f"{kind} wheel: mmrlhf {mmrlhf.__version__} from {where.parent}, linear_logp agrees with float64")


if __name__ == "__main__":
    main(*sys.argv[1:])
