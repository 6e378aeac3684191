from __future__ import annotations

import pytest
import torch

from refilled.config import OptimizerConfig, ScheduleConfig
from refilled.training.optim import build_optimizer, learning_rate, set_learning_rate


def test_step_decays_at_its_milestones() -> None:
    config = ScheduleConfig(kind="step", learning_rate=0.1, decay=0.2, milestones=(0.25, 0.5, 0.75))
    rates = [learning_rate(config, epoch / 200) for epoch in (0, 49, 50, 99, 100, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008])


def test_cosine_by_hand() -> None:
    config = ScheduleConfig(kind="cosine", learning_rate=0.1, final_fraction=0.1)
    # Half-way: the mean of 0.1 and 0.01. At a quarter: 0.01 + 0.09 (1 + cos 45°) / 2 = 0.01 + 0.09 x 0.853553.
    assert [learning_rate(config, x) for x in (0, 0.25, 0.5, 1)] == pytest.approx([0.1, 0.0868198, 0.055, 0.01])


def test_one_cycle_starts_low_peaks_and_ends() -> None:
    config = ScheduleConfig(kind="one_cycle", learning_rate=0.5, peak_at=0.4, final_fraction=0.01)
    assert [learning_rate(config, x) for x in (0, 0.2, 0.4, 1)] == pytest.approx([0.02, 0.26, 0.5, 0.005])
    rates = [learning_rate(config, x / 100) for x in range(101)]
    assert max(rates) == rates[40]


def test_schedules_agree_with_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    torch_cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.03)
    config = ScheduleConfig(kind="cosine", learning_rate=0.3, final_fraction=0.1)
    for step in range(50):
        assert learning_rate(config, step / 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        torch_cosine.step()


def test_optimizer_takes_one_nesterov_step_as_worked_out_by_hand() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_optimizer([parameter], OptimizerConfig(momentum=0.9, nesterov=True, weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    parameter.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    # gradient 1 + 0.5 x 2 = 2; velocity 2; Nesterov 2 + 0.9 x 2 = 3.8; 2 - 0.1 x 3.8 = 1.62
    assert parameter.item() == pytest.approx(1.62, abs=1e-12)
