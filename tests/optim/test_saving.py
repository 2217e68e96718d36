"""Runs that are saved, loaded into new optimizers and go on: to the same bits, with what is ours and nothing else."""

from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pairwise import pairwise
from signstep import HybridSignSGD, Lion, SignSGD
from signstep.kernels.momentum import is_freed

SWITCH = 3
Options = dict[str, Any]


def make(cls: type[SignSGD], **options: Any) -> tuple[nn.Module, SignSGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 3))
    return model, cls(model.parameters(), lr=0.01, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def assert_equal(state: Any, expected: Any) -> None:
    """The same containers, with tensors of the same bits and dtypes."""
    if isinstance(state, tuple):  # of which torch makes a list in a full state
        state, expected = list(state), list(expected)
    assert type(state) is type(expected)
    if isinstance(state, dict):
        assert state.keys() == expected.keys()
        for key in state:
            assert_equal(state[key], expected[key])
    elif isinstance(state, list):
        for x, y in zip(state, expected, strict=True):
            assert_equal(x, y)
    elif isinstance(state, Tensor):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    else:
        assert state == expected


def by_torch_save(
    save: tuple[nn.Module, SignSGD], load: tuple[nn.Module, SignSGD], folder: Path, _: StateDictOptions | None
) -> None:
    torch.save([x.state_dict() for x in save], folder / "state.pt")
    for x, state in zip(load, torch.load(folder / "state.pt", weights_only=True), strict=True):
        x.load_state_dict(state)


def by_distributed_checkpoint(
    save: tuple[nn.Module, SignSGD], load: tuple[nn.Module, SignSGD], folder: Path, options: StateDictOptions | None
) -> None:
    dcp.save({"optimizer": get_optimizer_state_dict(*save, options=options)}, checkpoint_id=folder, no_dist=True)
    state = {"optimizer": get_optimizer_state_dict(*load, options=options)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(*load, state["optimizer"], options=options)
    load[0].load_state_dict(save[0].state_dict())


WAYS: dict[str, tuple[Callable[..., None], StateDictOptions | None]] = {
    "torch.save": (by_torch_save, None),
    "plain": (by_distributed_checkpoint, None),
    "full": (by_distributed_checkpoint, StateDictOptions(full_state_dict=True)),
    "cpu offload": (by_distributed_checkpoint, StateDictOptions(cpu_offload=True)),
    "flattened": (by_distributed_checkpoint, StateDictOptions(flatten_optimizer_state_dict=True)),
}
WHEN = {"SignSGD": 2, "Lion": 2, "before": SWITCH - 1, "at": SWITCH, "after": SWITCH + 2}
DITHER: dict[str, Options] = {
    "clean": {},
    "absolute": {"dither": 1e-3},
    "relative": {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"},
}
MATRIX = pairwise(WAYS, WHEN, (0.0, 0.9), (0.0, 0.9), DITHER, (None, "float32", "bfloat16", "int8"))


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize(("way", "when", "momentum", "sgd_momentum", "dither", "state_dtype"), MATRIX)
def test_a_run_resumes_to_the_same_bits(
    way: str, when: str, momentum: float, sgd_momentum: float, dither: str, state_dtype: str | None, tmp_path: Path
) -> None:
    options: Options = {"momentum": momentum, "state_dtype": state_dtype, **DITHER[dither]}
    cls: type[SignSGD] = SignSGD
    if when == "Lion":
        cls = Lion
        del options["momentum"]
        options["betas"] = (0.9, momentum)
    elif when != "SignSGD":
        cls = HybridSignSGD
        options |= {"switch_step": SWITCH, "sgd_momentum": sgd_momentum, "calibration": "ratio"}
    old, new = make(cls, **options), make(cls, **options)
    train(*old, range(WHEN[when]))
    transfer, dcp_options = WAYS[way]
    if way == "full" and momentum == 0 and when != "Lion" and (sgd_momentum == 0 or when == "SignSGD"):
        # torch cannot load what has no tensor with a dimension, as the state of torch.optim.SGD without momentum.
        with pytest.raises(AssertionError, match="Expected device to be set"):
            transfer(old, new, tmp_path, dcp_options)
        return
    transfer(old, new, tmp_path, dcp_options)
    states = [optimizer.state_dict() for _, optimizer in (old, new)]
    for state in states:  # torch makes empty entries of flattened ones
        state["state"] = {index: kept for index, kept in state["state"].items() if kept}
    assert_equal(*states)
    for run in (old, new):
        train(*run, range(WHEN[when], WHEN[when] + 3))
    for p, q in zip(old[0].parameters(), new[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert new[1].param_groups[0]["state_dtype"] == state_dtype


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("there", [SWITCH - 1, SWITCH + 1], ids=["before", "after"])
@pytest.mark.parametrize("here", [SWITCH - 1, SWITCH + 1], ids=["into before", "into after"])
@pytest.mark.parametrize("momenta", [(0.9, 0.0), (0.0, 0.9)], ids=str)
def test_a_checkpoint_is_loaded_into_an_optimizer_that_has_taken_steps(
    way: str, there: int, here: int, momenta: tuple[float, float], tmp_path: Path
) -> None:
    """As when a run goes back to its last checkpoint."""
    options = {"momentum": momenta[0], "sgd_momentum": momenta[1], "switch_step": SWITCH}
    old, new = make(HybridSignSGD, **options), make(HybridSignSGD, **options)
    train(*old, range(there))
    train(*new, range(5, 5 + here))
    transfer, dcp_options = WAYS[way]
    transfer(old, new, tmp_path, dcp_options)
    for run in (old, new):
        train(*run, range(there, there + 3))
    for p, q in zip(old[0].parameters(), new[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("sgd_momentum", [0.0, 0.9])
def test_what_others_keep_in_the_state_stays(sgd_momentum: float) -> None:
    """As timm's Lookahead keeps its slow weights there."""
    model, optimizer = make(HybridSignSGD, switch_step=2, sgd_momentum=sgd_momentum)
    train(model, optimizer, range(1))
    for p in model.parameters():
        optimizer.state[p]["slow"] = p.detach().clone()
    train(model, optimizer, range(1, 4))
    assert optimizer.phase == "sgd"
    assert all("slow" in optimizer.state[p] for p in model.parameters())
    again, other = make(HybridSignSGD, switch_step=2, sgd_momentum=sgd_momentum)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(other.state[p]["slow"], optimizer.state[q]["slow"])


def test_a_switch_gives_the_memory_of_momenta_back() -> None:
    model, optimizer = make(HybridSignSGD, switch_step=2, state_dtype="int8")
    train(model, optimizer, range(3))
    for p in model.parameters():
        for name in ("exp_avg", "exp_avg_scale"):
            x = optimizer.state[p][name]
            assert is_freed(x)
            assert x.untyped_storage().nbytes() <= 4
    for state in optimizer.state_dict()["state"].values():
        assert state["exp_avg"].is_contiguous()
        assert not state["exp_avg"].any()


def test_a_momentum_that_no_sign_step_uses_takes_no_memory_before_the_switch() -> None:
    model, optimizer = make(HybridSignSGD, switch_step=2, momentum=0.0, sgd_momentum=0.9)
    train(model, optimizer, range(1))
    assert all(is_freed(optimizer.state[p]["exp_avg"]) for p in model.parameters())
    train(model, optimizer, range(1, 3))
    assert not any(is_freed(optimizer.state[p]["exp_avg"]) for p in model.parameters())


def test_a_state_of_signsgd_keeps_what_the_hybrid_was_made_with() -> None:
    model, optimizer = make(SignSGD, momentum=0.8)
    train(model, optimizer, range(4))
    state = deepcopy(optimizer.state_dict())
    for switch_step in (3, 6):  # one that the state is past, and one that it is not
        again, hybrid = make(
            HybridSignSGD, switch_step=switch_step, calibration="ratio", sgd_momentum=0.9, ema_decay=0.5
        )
        assert isinstance(hybrid, HybridSignSGD)
        hybrid.load_state_dict(deepcopy(state))
        again.load_state_dict(model.state_dict())
        group = hybrid.param_groups[0]
        expected = {"switch_step": switch_step, "calibration": "ratio", "sgd_momentum": 0.9, "ema_decay": 0.5}
        assert {name: group[name] for name in expected} == expected
        assert group["momentum"] == 0.8
        assert hybrid.phase == "sign"
        assert int(group["step"]) == 4
        with pytest.raises(RuntimeError, match="before the first sign step"):
            hybrid.switch()
        while hybrid.phase == "sign":
            assert hybrid.is_sign_step(group, int(group["step"]))
            train(again, hybrid, range(int(group["step"]), int(group["step"]) + 1))
        assert int(group["step"]) == max(switch_step, 5)
        assert group["lr_ratio"] > 0
        before = [p.detach().clone() for p in again.parameters()]
        train(again, hybrid, range(9, 10))
        assert any(not torch.equal(p, q) for p, q in zip(again.parameters(), before, strict=True))


def test_a_state_of_the_hybrid_in_signsgd() -> None:
    model, optimizer = make(HybridSignSGD, switch_step=SWITCH)
    train(model, optimizer, range(2))
    again, plain = make(SignSGD)
    plain.load_state_dict(deepcopy(optimizer.state_dict()))
    again.load_state_dict(model.state_dict())
    assert plain.param_groups[0].keys() == make(SignSGD)[1].param_groups[0].keys()
    twin, same = make(SignSGD)
    train(twin, same, range(2))
    for run in ((again, plain), (twin, same)):
        train(*run, range(2, 4))
    for p, q in zip(again.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    train(model, optimizer, range(2, SWITCH))
    with pytest.raises(ValueError, match="after its switch to SGD, and SignSGD takes sign steps only"):
        plain.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("cls", "foreign"),
    [
        *product((SignSGD, HybridSignSGD, Lion), (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop)),
        *((SignSGD, Lion), (HybridSignSGD, Lion), (Lion, SignSGD), (Lion, HybridSignSGD)),
    ],
)
def test_the_state_of_another_optimizer_is_refused(cls: type[SignSGD], foreign: type[torch.optim.Optimizer]) -> None:
    model, optimizer = make(cls)
    other = foreign(model.parameters())
    train(model, other, range(1))
    before = deepcopy(optimizer.state_dict())
    own = "Lion" if cls is Lion else "SignSGD or HybridSignSGD"
    with pytest.raises(ValueError, match=f"this state is not one of {own}: its param_group has"):
        optimizer.load_state_dict(other.state_dict())
    assert_equal(optimizer.state_dict(), before)


def test_keys_of_others_in_a_param_group() -> None:
    """A scheduler's, timm's: from the state, or where that has none, the optimizer's own."""
    _, optimizer = make(SignSGD)
    optimizer.param_groups[0]["lr_scale"] = 0.5
    state = deepcopy(optimizer.state_dict())
    _, other = make(SignSGD)
    other.param_groups[0] |= {"initial_lr": 7.0, "lr_scale": 1.0}
    other.load_state_dict(state)
    assert (other.param_groups[0]["initial_lr"], other.param_groups[0]["lr_scale"]) == (7.0, 0.5)


def test_a_state_of_version_0_1_in_its_sign_phase() -> None:
    """It did not average lr: the rate goes on as if lr had always been what it is."""
    model, optimizer = make(HybridSignSGD, ema_decay=0.5, calibration="paper")
    twin, same = make(HybridSignSGD, ema_decay=0.5, calibration="paper")
    for run in ((model, optimizer), (twin, same)):
        train(*run, range(3))
    state = deepcopy(optimizer.state_dict())
    for name in ("lr_avg", "avg_weight", "param_rounding"):
        del state["param_groups"][0][name]
    optimizer.load_state_dict(state)
    for run in ((model, optimizer), (twin, same)):
        train(*run, range(3, 5))
    assert float(optimizer.param_groups[0]["lr_ratio"]) == pytest.approx(float(same.param_groups[0]["lr_ratio"]))


@pytest.mark.parametrize("value", [torch.int8, "int8", torch.bfloat16, "bfloat16", torch.float32, "float32", None])
def test_state_dtype_is_kept_as_a_name(value: torch.dtype | str | None) -> None:
    model, optimizer = make(SignSGD, state_dtype=value)
    name = None if value is None else str(value).removeprefix("torch.")
    assert optimizer.defaults["state_dtype"] == optimizer.param_groups[0]["state_dtype"] == name
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "state_dtype": torch.int8})
    assert optimizer.param_groups[1]["state_dtype"] == "int8"
    old = deepcopy(optimizer.state_dict())
    old["param_groups"][0]["state_dtype"] = value  # as version 0.1 saved it
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["state_dtype"] == name
    optimizer.param_groups[0]["state_dtype"] = value  # by hand
    train(model, optimizer, range(1))
    for p in model.parameters():
        assert str(optimizer.state[p]["exp_avg"].dtype) == f"torch.{name or 'float32'}"


def test_state_dtype_errors() -> None:
    for bad, error in (("float16", ValueError), (torch.float16, ValueError), (8, TypeError)):
        with pytest.raises(error, match=r"Invalid state_dtype: .*or its name as a string"):
            make(SignSGD, state_dtype=bad)


def test_the_phase_is_shown() -> None:
    _, optimizer = make(HybridSignSGD)
    assert "param_group 0: sign phase (no switch_step: only switch() ends it), 0 steps taken" in repr(optimizer)
    model, optimizer = make(HybridSignSGD, switch_step=2)
    train(model, optimizer, range(3))
    rates = sorted((optimizer.param_groups[0]["lr_ratio"] * optimizer.param_groups[0]["lr"]).tolist())
    assert f"param_group 0: SGD phase at rate {rates[0]:.3g} to {rates[-1]:.3g}, 3 steps taken" in repr(optimizer)
    _, optimizer = make(HybridSignSGD, switch_step="auto")
    assert "param_group 0: sign phase (switches when its rate is steady), 0 steps taken" in repr(optimizer)
    model, optimizer = make(HybridSignSGD, switch_step=2, calibration="paper")
    train(model, optimizer, range(1))
    assert "param_group 0: sign phase (switches at step 2), 1 steps taken" in repr(optimizer)
    train(model, optimizer, range(1, 3))
    group = optimizer.param_groups[0]
    rate = float(group["lr_ratio"]) * group["lr"]
    assert f"param_group 0: SGD phase at rate {rate:.3g}, 3 steps taken" in repr(optimizer)
    assert "calibration: paper" in repr(optimizer)


def test_a_momentum_of_one_element_without_strides_is_not_taken_for_freed() -> None:
    p = nn.Parameter(torch.full((), 0.5).expand(1, 1))
    for cls in (SignSGD, HybridSignSGD):
        optimizer = cls([p])
        for _ in range(3):
            p.grad = torch.ones(1, 1)
            optimizer.step()
        assert float(optimizer.state_dict()["state"][0]["exp_avg"]) == pytest.approx(1 - 0.9**3)


def test_momentum_may_be_switched_off_saved_and_switched_on_again() -> None:
    model, optimizer = make(SignSGD)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["momentum"] = 0.0
    again, other = make(SignSGD)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    other.param_groups[0]["momentum"] = 0.9
    train(again, other, range(1, 3))


def test_a_capturable_hybrid_on_meta_is_printed() -> None:
    optimizer = HybridSignSGD(nn.Linear(2, 2, device="meta").parameters(), capturable=True)
    assert "? steps taken" in repr(optimizer)
